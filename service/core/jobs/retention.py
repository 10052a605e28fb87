"""Deleting checkpoints that nobody needs any more: of a completed job after some days, and of any ended job when a caller asks for it.

What is kept of a completed job is its published checkpoint, without the files that only a continued training reads, so that it can be
exported again. What is kept of a failed or cancelled job is the checkpoint from which a retry continues, as it is.

A checkpoint's manifest is deleted before its files, and a smaller manifest replaces the old one before the files that it leaves out are
deleted: at every moment each checkpoint is whole, or does not count. A deletion that was interrupted is finished by the next one.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from schema.checkpoint import MANIFEST, checkpoints_prefix
from schema.job import CheckpointDeletion, CheckpointRef, Job, Status
from service.core.errors import Conflict, TunesmithError
from service.core.jobs.checkpoints import StoredCheckpoint, list_checkpoints
from service.core.jobs.orphans import JOB_KEY_PATTERN
from service.core.jobs.repository import JobRepository
from service.core.principals import Principal, Scope
from storage import ObjectStore, StorageError, StoredObject, map_concurrently
from storage.deadline import remaining_s

log = logging.getLogger(__name__)

Keep = Literal["published", "none"]
MIN_STEP_BUDGET_S = 5.0  # to delete the files of one job
CHECKPOINTS = "checkpoints/"


@dataclass(frozen=True)
class Pruned:
    """What a deletion of checkpoints did."""

    freed_bytes: int
    deleted_steps: tuple[int, ...]  # of whole checkpoints
    kept_step: int | None


@dataclass(frozen=True)
class ExpiredPruned:
    """What a pass over all completed jobs did."""

    jobs: int
    freed_bytes: int
    complete: bool  # it finished within its time


@dataclass(frozen=True)
class _Plan:
    """What to delete of one job."""

    kept: StoredCheckpoint | None
    folders: Mapping[str, Sequence[StoredObject]] = field(default_factory=dict[str, Sequence[StoredObject]])  # whole, by key
    files: Sequence[StoredObject] = ()  # of the checkpoint that is kept

    @property
    def kept_step(self) -> int | None:
        return self.kept.checkpoint.step if self.kept else None

    def describe(self) -> Pruned:
        freed_bytes = sum(stored.size_bytes for stored in (*self.files, *(each for folder in self.folders.values() for each in folder)))
        return Pruned(freed_bytes, tuple(sorted({_parse_step(key) for key in self.folders})), self.kept_step)


class CheckpointRetention:
    """Deletes checkpoints of jobs that have ended."""

    def __init__(self, repository: JobRepository, models: ObjectStore, retention: timedelta | None) -> None:
        """`retention`: how long a completed job keeps its checkpoints; None: forever."""
        self._repository = repository
        self._models = models
        self._retention = retention

    def prune(self, principal: Principal, job_id: str, keep: Keep = "published", *, dry_run: bool = False) -> Pruned:
        """Delete the checkpoints of a job that has ended, but the one that `keep` names. Can be repeated; `dry_run` deletes nothing.

        Raises Conflict while the job is not ended, or an unfinished job exports one of them; NotFound, StorageError.
        """
        principal.require(Scope.JOBS_WRITE)
        job = self._repository.find(principal, job_id)
        self._check_unused(job)
        listed = list(self._models.iter_objects(checkpoints_prefix(job.job_id, job.project_id)))
        plan = self._plan(job, listed, keep)
        return plan.describe() if dry_run else self._delete(job, plan)

    def prune_expired(self, principal: Principal) -> ExpiredPruned:
        """Prune every completed job whose checkpoints have been kept for long enough. An error of one job never stops the others.

        Raises StorageError when the store cannot be listed.
        """
        principal.require(Scope.UPKEEP)
        if self._retention is None:
            return ExpiredPruned(0, 0, complete=True)
        jobs = freed_bytes = 0
        for job_id, listed in self._list_by_job().items():
            if remaining_s(MIN_STEP_BUDGET_S) < MIN_STEP_BUDGET_S:
                return ExpiredPruned(jobs, freed_bytes, complete=False)
            try:
                freed = self._prune_if_expired(job_id, listed, self._repository.clock() - self._retention)
            except (TunesmithError, StorageError) as error:
                log.warning("checkpoints could not be pruned", extra={"job_id": job_id, "error": str(error)})
                continue
            jobs, freed_bytes = jobs + bool(freed), freed_bytes + freed
        return ExpiredPruned(jobs, freed_bytes, complete=True)

    def _list_by_job(self) -> dict[str, list[StoredObject]]:
        """The files of all checkpoints, by the id of their job. Another deployment's jobs may be among them."""
        by_job: dict[str, list[StoredObject]] = {}
        for stored in self._models.iter_objects(CHECKPOINTS):
            match = JOB_KEY_PATTERN.match(stored.key)
            if match is not None and match["checkpoint"]:
                by_job.setdefault(match["checkpoint"], []).append(stored)
        return by_job

    def _prune_if_expired(self, job_id: str, listed: Sequence[StoredObject], finished_before: datetime) -> int:
        """The bytes that were freed."""
        job = self._repository.store.find_job(job_id)
        if job is None or job.status is not Status.COMPLETED or job.deletion_started_at or not job.finished_at:
            return 0
        if job.finished_at > finished_before or _is_pruned(job, listed) or self._find_export(job):
            return 0
        freed_bytes = self._delete(job, self._plan(job, listed, "published")).freed_bytes
        if freed_bytes:
            log.info("checkpoints pruned", extra={"job_id": job_id, "freed_bytes": freed_bytes})
        return freed_bytes

    def _check_unused(self, job: Job) -> None:
        """Raise Conflict for a job that needs its checkpoints, or whose checkpoints another job needs."""
        if not job.status.is_final:
            hint = "cancel it first, or wait until it has ended"
            raise Conflict(f"{job.job_id} is {job.status}; its checkpoints can be deleted once it has ended", hint=hint)
        if job.deletion_started_at is not None:
            raise Conflict(f"{job.job_id} is being deleted", hint="repeat DELETE /jobs/{id} until it is gone")
        if export_job_id := self._find_export(job):
            hint = f"wait until it has ended, or cancel it: POST /jobs/{export_job_id}/cancel"
            raise Conflict(f"{export_job_id} is not finished and exports a checkpoint of {job.job_id}", hint=hint)

    def _find_export(self, job: Job) -> str | None:
        """An unfinished job that exports a checkpoint of this one."""
        for job_id in self._repository.store.list_jobs_using_dataset(job.processed_dataset_id):
            other = self._repository.store.find_job(job_id)
            if other is not None and other.export_of is not None and other.export_of.job_id == job.job_id:
                return job_id
        return None

    def _plan(self, job: Job, listed: Sequence[StoredObject], keep: Keep) -> _Plan:
        folders = _group_by_checkpoint(job, listed)
        if keep == "none":
            return _Plan(None, folders)
        readable = list_checkpoints(self._models, job, min_attempt=1)
        kept = choose_kept(job, [stored for stored in readable if stored.checkpoint.attempt >= job.resume_from_attempt])
        known = {stored.key for stored in readable}
        # A manifest that cannot be read may be of a newer version of Tunesmith, which can.
        whole = {key: objects for key, objects in folders.items() if key in known or not _has_manifest(key, objects)}
        surplus = _surplus_files(job)
        files = [stored for stored in whole.pop(kept.key, []) if stored.key.removeprefix(kept.key) in surplus] if kept else []
        return _Plan(kept, whole, files)

    def _delete(self, job: Job, plan: _Plan) -> Pruned:
        if plan.folders:  # noted first, so that a record never promises what is gone
            self._repository.change(job.job_id, lambda job, now: _note_deletion(job, now, plan.kept))
        for key, objects in plan.folders.items():
            self._models.delete(key + MANIFEST)
            map_concurrently(self._models.delete, [stored.key for stored in objects])
        if plan.kept and plan.files:
            self._reduce(plan.kept, plan.files)
        return plan.describe()

    def _reduce(self, kept: StoredCheckpoint, files: Sequence[StoredObject]) -> None:
        """Write a manifest without some files, then delete them."""
        surplus = {stored.key.removeprefix(kept.key) for stored in files}
        reduced = kept.checkpoint.without_files(surplus)
        if reduced != kept.checkpoint:
            self._models.write(kept.key + MANIFEST, reduced.with_checksum())
        for stored in files:
            self._models.delete(stored.key)


def choose_kept(job: Job, in_resume_order: Sequence[StoredCheckpoint]) -> StoredCheckpoint | None:
    """The checkpoint of an ended job that is of use: of a completed one the published, else the one that a retry continues from."""
    published = [stored for stored in in_resume_order if job.status is Status.COMPLETED and stored.checkpoint.step == job.published_step]
    return next(iter([*published, *in_resume_order]), None)


def _surplus_files(job: Job) -> frozenset[str]:
    """Files of a completed job's checkpoint that nothing reads any more: a completed job is never continued."""
    return frozenset(job.training_config.resume_only_files) if job.status is Status.COMPLETED else frozenset()


def _is_pruned(job: Job, listed: Sequence[StoredObject]) -> bool:
    """Whether nothing is left to delete; decided without reading a manifest, because every pass asks it of every completed job."""
    folders, surplus = _group_by_checkpoint(job, listed), _surplus_files(job)
    return len(folders) < 2 and all(
        stored.key.removeprefix(folder) not in surplus for folder, objects in folders.items() for stored in objects
    )


def _group_by_checkpoint(job: Job, listed: Sequence[StoredObject]) -> dict[str, list[StoredObject]]:
    """The files of each checkpoint of the attempts that the record knows, by the key of its folder.

    A retry that begins now writes below a later attempt's number.
    """
    prefix = checkpoints_prefix(job.job_id, job.project_id)
    folders: dict[str, list[StoredObject]] = {}
    for stored in listed:
        attempt, step, *rest = stored.key.removeprefix(prefix).split("/")
        number = attempt.removeprefix("attempt-")
        if rest and number.isdecimal() and int(number) <= len(job.attempts):
            folders.setdefault(f"{prefix}{attempt}/{step}/", []).append(stored)
    return folders


def _has_manifest(folder: str, objects: Sequence[StoredObject]) -> bool:
    return any(stored.key == folder + MANIFEST for stored in objects)


def _parse_step(folder: str) -> int:
    digits = folder.rstrip("/").rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _note_deletion(job: Job, now: datetime, kept: StoredCheckpoint | None) -> Job:
    """Raises Conflict for a job that was retried meanwhile."""
    if not job.status.is_final:
        raise Conflict(f"{job.job_id} is {job.status} again; nothing was deleted")
    checkpoint = kept.checkpoint if kept else None
    newest = CheckpointRef(step=checkpoint.step, attempt=checkpoint.attempt, at=checkpoint.created_at) if checkpoint else None
    deletion = CheckpointDeletion(at=now, kept_step=checkpoint.step if checkpoint else None)
    return job.model_copy(update={"checkpoints_deleted": deletion, "checkpoint": newest, "updated_at": now})
