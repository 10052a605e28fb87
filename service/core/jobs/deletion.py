"""Deleting: a job with all its files, secrets that outlived their job, and files whose job is gone."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from schema.checkpoint import checkpoints_prefix
from schema.job import Job
from schema.spec import attempt_name, manifest_key, spec_key
from service.core import lifecycle
from service.core.errors import InvalidRequest, RecordTooNew, Unavailable, UnreadableRecord
from service.core.job_lists import JobEntry
from service.core.jobs.control import JobControl
from service.core.jobs.orphans import JOB_FOLDERS, OrphanScan, delete_orphan, find_orphans, is_forgotten
from service.core.jobs.ownership import JobMarks
from service.core.jobs.repository import JobRepository
from service.core.launchers import LauncherPool
from service.core.ports import Buckets, Hub, LogReader
from service.core.principals import Principal, Scope
from service.core.validation.hub import check_only_our_commits
from storage import ObjectStore, StorageError, delete_prefix
from storage.deadline import remaining_s

ORPHAN_MIN_AGE = timedelta(hours=24)  # since the last launch: a record that is restored from a backup may be that far behind
ORPHAN_SCAN_TIMEOUT_S = 600.0  # for listing every file of a bucket outside a request

UNREADABLE_ATTEMPTS_ENDED = 3  # the newest ones; earlier attempts have ended before a later one began


@dataclass(frozen=True)
class DeletionResult:
    """What a deletion removed, and what it could not remove."""

    resources: list[str]
    failures: list[str]


class Deletion:
    """Removes jobs and what they left behind. Every method can be repeated until nothing is left."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        control: JobControl,
        launchers: LauncherPool,
        buckets: Buckets,
        marks: JobMarks,
        hub: Hub,
    ) -> None:
        self._repository = repository
        self._control = control
        self._launchers = launchers
        self._buckets = buckets
        self._marks = marks
        self._hub = hub

    def delete(self, principal: Principal, job_id: str, *, delete_hub: bool = False, hub_token: str | None = None) -> DeletionResult | None:
        """Cancel the job, remove its files and then its record. None: the job is still being canceled; repeat the call.

        `delete_hub` also removes the Hub repositories that the job pushed to. Raises InvalidRequest when one of them holds anything else,
        NotFound. A job whose record cannot be read is deleted as well, by what is indexed of it.
        """
        principal.require(Scope.JOBS_WRITE)
        try:
            job = self._repository.find(principal, job_id)
        except (UnreadableRecord, RecordTooNew):
            return self._delete_unreadable(self._repository.find_entry(principal, job_id), delete_hub=delete_hub)
        if not job.status.is_final:
            job = self._control.cancel(principal, job_id)
        if not job.status.is_final:
            return None
        repositories = self._delete_hub_repositories(job, hub_token) if delete_hub else []
        job = self._repository.change(job_id, lifecycle.start_deletion)
        self._repository.destroy_secrets(job)
        files = self._delete_files(job_id, job.project_id, [attempt_name(job_id, attempt) for attempt in job.attempts])
        if not files.failures:
            self._repository.store.delete_job(job_id)
        return DeletionResult(resources=[*repositories, *files.resources], failures=files.failures)

    def delete_stale_secrets(self, principal: Principal, *, orphans: bool = False) -> int:
        """Destroy secrets that outlived their job; returns how many. `orphans`: also secrets of unknown jobs.

        A job's secrets are written before its record, so only the sole process of a deployment may look for orphans. Raises Unavailable.
        """
        principal.require(Scope.UPKEEP)
        destroyed = 0
        for job_id in list(self._repository.secrets.iter_job_ids()):
            entry = self._repository.store.find_job_entry(job_id)  # the record itself may be unreadable
            if (entry is None and orphans) or (entry is not None and entry.summary.status.is_final):
                destroyed += self._repository.secrets.destroy(job_id)
        return destroyed

    def list_orphans(self, principal: Principal, *, min_age: timedelta = ORPHAN_MIN_AGE) -> OrphanScan:
        """Files of this deployment's jobs that have no record and were last launched `min_age` ago. Raises StorageError, Unavailable."""
        principal.require(Scope.UPKEEP)
        return find_orphans(
            self._repository.store,
            self._marks,
            configs=self._buckets.configs,
            models=self._buckets.models,
            launched_before=self._repository.clock() - min_age,
            timeout_s=remaining_s(ORPHAN_SCAN_TIMEOUT_S) * 0.8,
        )

    def delete_orphans(self, principal: Principal, *, min_age: timedelta = ORPHAN_MIN_AGE) -> OrphanScan:
        """Remove what `list_orphans` finds; returns what was removed. Repeat until the scan is complete. Raises as `list_orphans`."""
        scan = self.list_orphans(principal, min_age=min_age)
        for orphan in scan.orphans:
            delete_orphan(orphan, configs=self._buckets.configs, models=self._buckets.models)
        if scan.complete:
            self._delete_marks(self._repository.clock() - min_age)
        return scan

    def _delete_marks(self, launched_before: datetime) -> None:
        """Delete the marks of jobs without a record, of which no file is left."""
        for job_id in list(self._marks.iter_job_ids()):
            if is_forgotten(self._repository.store, self._marks, job_id, launched_before):
                self._marks.delete(job_id)

    def _delete_hub_repositories(self, job: Job, token: str | None) -> list[str]:
        """Remove the repositories that hold nothing but what this job pushed. Raises InvalidRequest before anything is removed."""
        pushed: dict[str, set[str]] = {}
        for push in (artifact.hub for artifact in job.artifacts if artifact.hub):
            pushed.setdefault(push.repo_id, set()).add(push.revision)
        if pushed and not token:
            hint = "send one that may delete the repository"
            raise InvalidRequest("delete_hub needs a token, in the header X-HF-Token", hint=hint, param="X-HF-Token")
        commits_by_repository = {repo_id: self._hub.list_commits(repo_id, token or "") for repo_id in pushed}
        existing = {repo_id: commits for repo_id, commits in commits_by_repository.items() if commits is not None}
        for repo_id, commits in existing.items():
            check_only_our_commits(repo_id, commits, pushed[repo_id])
        for repo_id in existing:
            self._hub.delete_repository(repo_id, token or "")
        return [f"hf://{repo_id}" for repo_id in existing]

    def _delete_unreadable(self, entry: JobEntry, *, delete_hub: bool) -> DeletionResult:
        """Delete a job whose record cannot be read. Its attempts are looked up by the names that they were launched under."""
        job_id = entry.summary.job_id
        if delete_hub:
            message = f"the record of {job_id} cannot be read, so it is not known what it pushed to the Hub"
            raise UnreadableRecord(message, hint="leave out delete_hub, and delete the repository on the Hub")
        heartbeat = self._repository.store.find_heartbeat(job_id)
        # An attempt may have been launched that has not reported yet.
        names = [attempt_name(job_id, number) for number in range(1, (heartbeat.attempt if heartbeat else 0) + 2)]
        ended: list[str] = []
        failures: list[str] = []
        if entry.summary.status.is_active:
            ended, failures = self._end_attempts(names[-UNREADABLE_ATTEMPTS_ENDED:])
        self._repository.secrets.destroy(job_id)
        files = self._delete_files(job_id, entry.summary.project_id, names)
        failures += files.failures
        if not failures:
            self._repository.store.delete_job(job_id)
        return DeletionResult(resources=[*(f"attempt {name}" for name in ended), *files.resources], failures=failures)

    def _end_attempts(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Kill the attempts that a launcher knows under these names; returns their names, and what failed."""
        ended: list[str] = []
        failures: list[str] = []
        for launcher in self._launchers:
            for name in names:
                try:
                    if (handle := launcher.find_handle(name)) is not None and launcher.check(handle) != "ended":
                        launcher.cancel(handle, force=True)
                        ended.append(name)
                except Unavailable as error:
                    failures.append(f"attempt {name} on {launcher.name}: {error.message}")
        return ended, failures

    def _delete_files(self, job_id: str, project_id: str | None, attempt_names: Sequence[str]) -> DeletionResult:
        resources: list[str] = []
        failures: list[str] = []
        for store, prefix in self._storage_prefixes(job_id, project_id):
            try:
                keys = delete_prefix(store, prefix) if prefix.endswith("/") else [prefix] * store.delete(prefix)
                resources += [f"{store.url}/{prefix}"] if keys else []
            except StorageError as error:
                failures.append(f"{store.url}/{prefix}: {error}")
        for launcher in self._launchers:
            for name in attempt_names:
                if isinstance(launcher, LogReader) and launcher.delete_log(name):
                    resources.append(f"log of {name}")
        return DeletionResult(resources=resources, failures=failures)

    def _storage_prefixes(self, job_id: str, project_id: str | None) -> Sequence[tuple[ObjectStore, str]]:
        """Every place where a job may have files. The manifest goes first: without it, readers ignore the rest."""
        configs, models = self._buckets.configs, self._buckets.models
        return (
            (models, manifest_key(job_id)),
            *((models, f"{folder}/{job_id}/") for folder in JOB_FOLDERS),
            (models, checkpoints_prefix(job_id, project_id)),
            (configs, spec_key(job_id)),
            (configs, f"results/{job_id}/"),
        )
