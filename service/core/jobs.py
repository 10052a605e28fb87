"""The verbs of a job: submit, find, pause, resume, cancel, retry, report, delete, reconcile. The order of the lines is the promise.

The record goes first: a job exists once it is written, and everything that follows can be done again by
`reconcile` from the record alone. The spec is rendered from the record when an attempt is launched.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NoReturn

from pydantic import ValidationError

from schema.checkpoint import checkpoints_prefix
from schema.dataset import Dataset
from schema.events import BatchAnswer, Directive, Event, EventBatch
from schema.job import Artifact, ArtifactFile, ArtifactKind, ExportSource, Failure, Gate, Job, Status
from schema.requests import CloneRequest, ExportAgainRequest, ExportRequest, ResumeRequest, RetryRequest, SafeChanges, TrainRequest
from schema.result import PublishManifest, Result
from schema.spec import ClaimAnswer, JobSpec, StoreUrls, attempt_name, manifest_key, result_key, spec_key
from schema.training import TrainingConfig
from service.core import lifecycle
from service.core.bases import check_graders_models
from service.core.capabilities import check_fits, check_supported
from service.core.checkpoints import StoredCheckpoint, stored_checkpoints
from service.core.clone import cloned_request
from service.core.errors import Conflict, InvalidRequest, LaunchFailed, NotFound, StaleRevision, TunesmithError, Unavailable
from service.core.hub import NoHub, check_all_ours, check_hub, check_token
from service.core.orphans import BY_JOB, Orphans, delete_orphan, find_orphans
from service.core.ports import (
    Ended,
    EndSource,
    Hub,
    IdempotencyKey,
    JobQuery,
    JobStore,
    JobSummary,
    Launcher,
    LaunchOrder,
    LinkSigner,
    Liveness,
    LogPage,
    LogsElsewhere,
    LogSource,
    Page,
    SecretStore,
    StoredEvent,
)
from service.core.secrets import HF_SECRET, WANDB_SECRET, redacted, secrets_of, sent_again
from service.core.tokens import TokenSigner
from service.core.trackers import Trackers, deployments_own, deployments_secrets, with_trackers
from storage import NoSuchObject, ObjectStore, StorageError, delete_below
from storage.patience import time_left

log = logging.getLogger(__name__)

ACTIVE_LIMIT = 1000  # jobs looked after in one turn; the oldest come first
CAS_TRIES = 10  # writers of one job are few: its attempt, one caller, one reconciler
BY_USE: tuple[ArtifactKind, ...] = ("gguf", "merged", "adapter", "onnx", "lora_gguf")  # what a download means that names nothing
STEPS_AT_ONCE = 8  # a thousand jobs of a tenth of a second each are looked after within a scheduler's minute
ORPHANS_S = 600.0  # looking through every file of a bucket, where nobody waits
STEP_NEEDS_S = 2.0  # a launch is a handful of calls; begun with less, it would only be cut off half-way


@dataclass(frozen=True)
class Limits:
    """How long the service waits, and for what."""

    silent_after: timedelta = timedelta(seconds=60)  # no sign of life: ask the compute
    cancel_grace: timedelta = timedelta(seconds=1)  # an attempt that knows of its cancel may tidy up; then a signal
    kill_grace: timedelta = timedelta(seconds=8)  # and then no more
    launch_lookup: timedelta = timedelta(seconds=5)  # an attempt without a handle is looked up by name this long after it was sent
    start_within: timedelta = timedelta(minutes=10)  # until then nobody minds that a launched attempt has not claimed itself
    lease: timedelta = timedelta(minutes=5)  # silent for so long after it was first doubted: the compute is told to end it
    lease_grace: timedelta = timedelta(minutes=1)  # and then it counts as lost, whatever the compute says
    link_life_s: int = 900


@dataclass(frozen=True)
class Deleted:
    """What a deletion removed, and what it could not."""

    resources: list[str]
    failures: list[str]


class Jobs:
    """Everything that can be done with jobs. Holds no state of its own."""

    def __init__(
        self,
        *,
        store: JobStore,
        secrets: SecretStore,
        configs: ObjectStore,
        models: ObjectStore,
        datasets: ObjectStore,
        launcher: Launcher,
        links: LinkSigner,
        tokens: TokenSigner,
        clock: Callable[[], datetime],
        random_tail: Callable[[], str],
        wake: Callable[[str], None] = lambda _: None,
        limits: Limits = Limits(),  # frozen
        hub: Hub | None = None,
        trackers: Trackers | None = None,
        attempt_environment: Mapping[str, str] | None = None,
    ) -> None:
        self._store = store
        self._secrets = secrets
        self._configs = configs
        self._models = models
        self._datasets = datasets
        self._launcher = launcher
        self._links = links
        self._tokens = tokens
        self._clock = clock
        self._random_tail = random_tail
        self._wake = wake
        self._limits = limits
        self._hub = hub or NoHub()
        self._trackers = trackers or Trackers()
        self._attempt_environment = dict(attempt_environment or {})

    @property
    def link_life_s(self) -> int:
        """How long a download link works, in seconds."""
        return self._limits.link_life_s

    # --- callers -----------------------------------------------------------------------------------------------------

    def submit(self, request: TrainRequest, tenant_id: str, idempotency_key: str | None = None) -> Job:
        """Make a job of a request: durable when this returns, launched soon after.

        Raises NotFound, InvalidRequest, Unsupported, IdempotencyConflict before anything is kept.
        """
        return self._submit(request, tenant_id, idempotency_key, digest_of(request))

    def clone(self, job_id: str, tenant_id: str, patch: CloneRequest, idempotency_key: str | None = None) -> Job:
        """Make a job of another's request with changes. Raises ValidationError when the whole is no request, and what `submit` raises."""
        source = self.find(job_id, tenant_id)
        if source.export_of:
            hint = f"export again: POST /jobs/{source.export_of.job_id}/export"
            raise InvalidRequest(f"{job_id} trained nothing; it exported a checkpoint of {source.export_of.job_id}", hint=hint)
        config = source.training_config
        own, secrets = deployments_own(config, self._trackers), deployments_secrets(config, self._trackers)
        request = cloned_request(source, patch, leave_out=frozenset(own), not_asked_for=frozenset(secrets))
        digest = _digest({"clone_of": job_id, "request": digest_of(request)})
        return self._submit(request, tenant_id, idempotency_key, digest, cloned_from=job_id)

    def find(self, job_id: str, tenant_id: str) -> Job:
        """A tenant's job. Raises NotFound, also for somebody else's."""
        job = self.find_if_there(job_id, tenant_id)
        if job is None:
            raise NotFound(f"no job {job_id!r}", hint="GET /jobs lists them", param="job_id")
        return job

    def find_if_there(self, job_id: str, tenant_id: str) -> Job | None:
        """A tenant's job, or None."""
        job = self._store.find_job(job_id)
        return job if job and job.tenant_id == tenant_id else None

    def liveness(self, job: Job) -> Liveness | None:
        """The sign of life of the job's current attempt, if it gave one."""
        alive = self._store.liveness(job.job_id)
        return alive if alive and job.attempt and alive.attempt == job.attempt.number else None

    def look_at(self, job_id: str, tenant_id: str) -> tuple[Job, Liveness | None]:
        """A tenant's job and its sign of life. One that has gone silent is looked after on the way. Raises NotFound."""
        job = self.find(job_id, tenant_id)
        alive = self.liveness(job)
        job = self._list_in_bucket(job)
        if not job.status.is_active or self._launcher.check_is_cheap or not self._has_gone_silent(job, alive):
            return job, alive
        self._wake(job_id)
        return self.find(job_id, tenant_id), alive

    def page(self, query: JobQuery) -> Page[JobSummary]:
        """A page of a tenant's jobs."""
        return self._store.page_jobs(query)

    def events(self, job_id: str, tenant_id: str, after: int, limit: int) -> list[StoredEvent]:
        """A page of a job's events."""
        self.find(job_id, tenant_id)
        return self.events_of(job_id, after, limit)

    def events_of(self, job_id: str, after: int, limit: int) -> list[StoredEvent]:
        """A page of events of a job that the caller has found before."""
        return self._store.page_events(job_id, after, limit)

    def log_page(self, job_id: str, tenant_id: str, attempt: int | None, offset: int, limit: int) -> tuple[int, LogPage]:
        """A part of an attempt's output, the latest attempt's by default, and that attempt's number. Raises NotFound."""
        job = self.find(job_id, tenant_id)
        number = attempt or len(job.attempts)
        if number == 0:
            return 0, LogPage(text="", next_offset=0)
        if number > len(job.attempts):
            raise NotFound(f"{job_id} has no attempt {number}; it has {len(job.attempts)}", param="attempt")
        if not isinstance(self._launcher, LogSource):
            raise NotFound(f"the launcher {self._launcher.name!r} keeps the logs elsewhere", hint=self._where_logs(job, number))
        page = self._launcher.read_log(attempt_name(job_id, number), offset, limit)
        return number, page or LogPage(text="", next_offset=offset)

    def cancel(self, job_id: str, tenant_id: str) -> Job:
        """Stop a job: by telling its attempt first, by force if it does not listen. Can be repeated. Raises Conflict."""
        self.find(job_id, tenant_id)
        job = self._change(job_id, lambda job: lifecycle.cancel_requested(job, self._clock()))
        if job.status.is_final:
            self._forget_secrets(job)
        self._wake(job_id)
        return job

    def pause(self, job_id: str, tenant_id: str) -> Job:
        """Free the compute and keep the place: the attempt saves a checkpoint and ends. Can be repeated. Raises Conflict."""
        self.find(job_id, tenant_id)
        job = self._change(job_id, lambda job: lifecycle.pause_requested(job, self._clock()))
        self._wake(job_id)
        return job

    def resume(self, job_id: str, tenant_id: str, request: ResumeRequest) -> Job:
        """Go on where the pause was, perhaps on other hardware or for longer. Can be repeated. Raises Conflict, InvalidRequest."""
        before = self.find(job_id, tenant_id)
        if before.status is Status.PAUSED:
            self._renew_secrets(before, request)

        def resumed(job: Job) -> Job:
            config = self._longer(job, request)
            return lifecycle.resume_requested(job, self._clock(), training_config=config, hardware=request.hardware)

        job = self._change(job_id, resumed)
        self._wake(job_id)
        return job

    def retry(self, job_id: str, tenant_id: str, request: RetryRequest) -> Job:
        """Continue a failed or cancelled job from its last good checkpoint. Can be repeated. Raises Conflict, InvalidRequest."""
        before = self.find(job_id, tenant_id)
        if before.status in (Status.FAILED, Status.CANCELLED):
            self._own_dataset(before.processed_dataset_id, tenant_id)
            self._renew_secrets(before, request)

        def retried(job: Job) -> Job:
            config = self._longer(job, request)
            return lifecycle.retry_requested(
                job, self._clock(), from_start=request.from_start, training_config=config, hardware=request.hardware
            )

        job = self._change(job_id, retried)
        self._wake(job_id)
        return job

    def checkpoints(self, job_id: str, tenant_id: str) -> list[StoredCheckpoint]:
        """What a job can go on from, or be exported at; the one that counts first. Raises NotFound."""
        job = self.find(job_id, tenant_id)
        return stored_checkpoints(self._models, checkpoints_prefix(job.job_id, job.project_id), job.first_attempt)

    def export(self, job_id: str, step: int, tenant_id: str, request: ExportRequest, idempotency_key: str | None = None) -> Job:
        """Make a job that exports a checkpoint of another without training. Raises NotFound, Unsupported, InvalidRequest."""
        source = self.find(job_id, tenant_id)
        found = _pick_checkpoint(self.checkpoints(job_id, tenant_id), job_id, step, request.attempt)
        config = exporting(source.training_config, request)
        hardware = request.hardware or source.hardware
        check_supported(config, self._launcher.hardware(hardware))
        self._own_dataset(source.processed_dataset_id, tenant_id)
        secrets = {HF_SECRET: request.hf_token.get_secret_value()} if request.hf_token else {}
        check_token(config, secrets.get(HF_SECRET))
        check_hub(config, secrets.get(HF_SECRET), self._hub, self._models)
        now = self._clock()
        job = Job(
            job_id=job_id_for(source.processed_dataset_id, config.base_model_id, self._random_tail()),
            tenant_id=tenant_id,
            project_id=source.project_id,
            job_name=request.job_name or f"{source.job_name[:100]} at step {step}",
            processed_dataset_id=source.processed_dataset_id,
            training_config=config,
            secret_names=tuple(sorted(secrets)),
            hardware=hardware,
            export_of=ExportSource(job_id=job_id, attempt=found.checkpoint.attempt, step=step, key=found.key),
            status=Status.QUEUED,
            created_at=now,
            updated_at=now,
            status_changed_at=now,
        )
        # Of an ExportAgainRequest it is the step that was asked for, which may be none: the newest one moves.
        digest = _digest({"export_of": job_id, "step": step, **request.model_dump(mode="json", exclude={"hf_token"})})
        return self._begin(job, secrets, idempotency_key, digest)

    def export_again(self, job_id: str, tenant_id: str, request: ExportAgainRequest, idempotency_key: str | None = None) -> Job:
        """Export what a job has trained once more; without a step, what was published, else the newest. Raises as `export` does."""
        source = self.find(job_id, tenant_id)
        stored = self.checkpoints(job_id, tenant_id)
        if not stored:
            raise _nothing_to_export(source)
        steps = [found.checkpoint.step for found in stored if request.attempt in (None, found.checkpoint.attempt)]
        step = request.step
        if step is None:
            step = source.published_step if source.published_step in steps else next(iter(steps), stored[0].checkpoint.step)
        return self.export(job_id, step, tenant_id, request, idempotency_key)

    def download(self, job_id: str, tenant_id: str, artifact_name: str | None) -> tuple[Artifact, list[tuple[ArtifactFile, str]]]:
        """Links to the files of an artifact, the most useful one by default: GGUF, merged, adapter. Raises NotFound, Conflict."""
        job = self.find(job_id, tenant_id)
        if job.status is not Status.COMPLETED:
            raise Conflict(f"{job_id} is {job.status}; there is something to download once it is completed")
        if job.gate and not job.gate.passed and not job.artifacts:
            message = f"{job_id} published nothing, for the promotion gate was not passed: {why_not_passed(job.gate)}"
            raise Conflict(message, hint=f"POST /jobs/{job_id}/export publishes it all the same")
        job = self._list_in_bucket(job)
        artifact = _pick_artifact(job, artifact_name)
        return artifact, [(file, self._link(artifact, file)) for file in artifact.files]

    def delete(self, job_id: str, tenant_id: str, *, with_hub: bool = False, hub_token: str | None = None) -> Deleted | None:
        """Stop the job, remove its files and then its record. None: it is still stopping, repeat. Raises NotFound.

        `with_hub` removes the repositories that it pushed to as well; InvalidRequest for one that holds anything else.
        """
        job = self.find(job_id, tenant_id)
        if not job.status.is_final:
            job = self.cancel(job_id, tenant_id)
        if not job.status.is_final:
            return None
        on_hub = self._delete_on_hub(job, hub_token) if with_hub else []
        job = self._change(job_id, lambda job: lifecycle.deletion_begun(job, self._clock()))
        deleted = self._delete_files(job)
        if not deleted.failures:
            self._store.delete_job(job_id)
        return Deleted(resources=[*on_hub, *deleted.resources], failures=deleted.failures)

    # --- attempts ----------------------------------------------------------------------------------------------------

    def claim(self, job_id: str, number: int, claimant: str) -> ClaimAnswer:
        """Give the attempt to a process, with the job's secrets. Raises Fenced for a second process, NotFound."""
        job = self._change(job_id, lambda job: lifecycle.claimed(job, number, claimant, self._clock()))
        secrets = self._secrets.read(job_id) if job.secret_names else {}
        return ClaimAnswer(secrets=secrets, directive=directive_for(job))

    def report(self, job_id: str, number: int, batch: EventBatch) -> BatchAnswer:
        """Take what an attempt tells; says what it should do. Raises Fenced for an attempt that is over, NotFound."""
        now = self._clock()
        job = self._store.find_job(job_id) or _raise_gone(job_id)
        lifecycle.check_current(job, number)
        next_seq = self._store.append_events(job_id, number, batch, now)
        told = [reported.event for reported in batch.events]
        if _absorb_all(job, number, told, now) is not job:
            job = self._change(job_id, lambda job: _absorb_all(job, number, told, now))
        return BatchAnswer(directive=directive_for(job), next_seq=next_seq)

    def finish(self, job_id: str, result: Result) -> Job:
        """Take an attempt's last word. Repeats are harmless. Raises Fenced, NotFound."""
        job = self._change(job_id, lambda job: lifecycle.finished(job, result, self._clock()))
        if job.status.is_final:
            self._forget_secrets(job)
        self._wake(job_id)
        return self._list_in_bucket(job)

    # --- the reconciler ----------------------------------------------------------------------------------------------

    def reconcile(self) -> int:
        """Bring every open job a step nearer to where it should be; returns how many were changed.

        Can be run by anybody, at any time, as often as one likes. One job's trouble never stops the others.
        """
        active = self._store.active_jobs(ACTIVE_LIMIT)
        return self._each(self._look_after, active) + self._launch_waiting(active=len(active))

    def step(self, job_id: str) -> None:
        """What `reconcile` would do for one job, now, for a service without a background task. Fails quietly: it comes by again.

        A job that has ended has made room for one that waits.
        """
        if time_left(STEP_NEEDS_S) < STEP_NEEDS_S:
            return
        try:
            job = self._store.find_job(job_id)
            if job is not None and job.status.is_active:
                self._safely(self._look_after, job)
            else:
                self._launch_waiting(active=len(self._store.active_jobs(ACTIVE_LIMIT)), most=1)
        except TunesmithError as error:
            log.warning("job could not be reconciled", extra={"job_id": job_id, "error": error.message})

    def sweep_secrets(self, *, orphans: bool = False) -> int:
        """Destroy secrets that outlived their job; returns how many. `orphans`: also those of no known job.

        A job's secrets are written before its record: only a process that knows itself alone may look for orphans.
        """
        swept = 0
        for job_id in list(self._secrets.walk()):
            job = self._store.find_job(job_id)
            if (job is None and orphans) or (job is not None and job.status.is_final):
                swept += self._secrets.destroy(job_id)
        return swept

    def orphans(self) -> Orphans:
        """Files of jobs that there are not. Raises StorageError, Unavailable."""
        return find_orphans(self._store, configs=self._configs, models=self._models, within_s=time_left(ORPHANS_S) * 0.8)

    def sweep_orphans(self) -> Orphans:
        """Remove the files of jobs that there are not; returns what was removed. Can be repeated until it is complete."""
        swept = self.orphans()
        for orphan in swept.found:
            delete_orphan(orphan, configs=self._configs, models=self._models)
        return swept

    def _launch_waiting(self, active: int, most: int = ACTIVE_LIMIT) -> int:
        free_slots = min(most, self._launcher.free_slots(active))
        queued = self._store.queued_jobs(free_slots) if free_slots > 0 else []
        return self._each(self._launch, queued)

    def _each(self, step: Callable[[Job], Job], jobs: Sequence[Job]) -> int:
        """Take a step with every job; returns how many were changed. Where each takes a network's time, several at a time."""
        if self._launcher.check_is_cheap or len(jobs) < 2:
            return sum(self._safely(step, job) for job in jobs)
        with ThreadPoolExecutor(STEPS_AT_ONCE, "reconcile") as pool:
            taken = [pool.submit(copy_context().run, self._safely, step, job) for job in jobs]
        return sum(step_taken.result() for step_taken in taken)

    def _safely(self, step: Callable[[Job], Job], job: Job) -> bool:
        """Whether the step changed the job."""
        try:
            return step(job).revision != job.revision
        except (TunesmithError, StorageError) as error:
            log.warning("job could not be reconciled", extra={"job_id": job.job_id, "error": str(error)})
            return False

    def _look_after(self, job: Job) -> Job:
        assert job.attempt is not None
        if job.attempt.handle is None:
            return self._launch_again(job)
        if (result := self._result_of(job)) is not None:
            return self.finish(job.job_id, result)
        if job.status is Status.CANCELLING:
            self._insist_on_cancel(job, job.attempt.handle)
        if not self._is_quiet(job):
            return job
        state = self._launcher.check(job.attempt.handle)
        if state == "ended":
            return self._judge_ended(job)
        return self._doubt(job, job.attempt.handle) if state == "running" else job  # unknown is not lost

    def _doubt(self, job: Job, handle: str) -> Job:
        """The compute is there. If its attempt is not heard of for a whole lease after it was first doubted, it is ended.

        The doubt is written down: a service that slept, or was started just now, hears the attempt before it judges it.
        """
        attempt, alive = job.attempt, self.liveness(job)
        assert attempt is not None
        now, since = self._clock(), attempt.doubted_at
        may_be_starting = attempt.claimed_by is None and now - (attempt.launched_at or attempt.created_at) < self._limits.start_within
        if may_be_starting or not self._has_gone_silent(job, alive):
            return job
        if since is None or (alive is not None and alive.seen_at > since):
            log.warning("attempt is silent", extra={"job_id": job.job_id, "attempt": attempt.number})
            return self._change(job.job_id, lambda job: lifecycle.doubted(job, attempt.number, now))
        if now - since >= self._limits.lease:
            self._launcher.cancel(handle, force=True)
        return self._end_vanished(job) if now - since >= self._limits.lease + self._limits.lease_grace else job

    def _launch(self, job: Job) -> Job:
        try:
            job = self._replace(job, lifecycle.begin_attempt(job, self._launcher.name, self._clock()))
        except StaleRevision:
            return job  # somebody else was faster: it is theirs
        return self._send(job)

    def _launch_again(self, job: Job) -> Job:
        """The service died between writing the attempt down and hearing its handle: look before launching twice."""
        attempt = job.attempt
        assert attempt is not None
        if self._clock() - (attempt.launch_began_at or attempt.created_at) < self._limits.launch_lookup:
            return job  # its launcher may be at work this very moment
        handle = self._launcher.find(attempt_name(job.job_id, attempt))
        if handle is not None:
            return self._change(job.job_id, lambda job: lifecycle.launched(job, attempt.number, handle, self._clock()))
        if attempt.claimed_by is not None:
            return self._launched_unseen(job)
        if job.status in (Status.CANCELLING, Status.PAUSING):
            return self._end_vanished(job)
        try:
            job = self._replace(job, lifecycle.launching_again(job, attempt.number, self._clock()))
        except StaleRevision:
            return job  # somebody else sends it
        return self._send(job)

    def _launched_unseen(self, job: Job) -> Job:
        """A process claimed the attempt and cannot be found: it lives as long as it is heard of, and is gone after that."""
        if (result := self._result_of(job)) is not None:
            return self.finish(job.job_id, result)
        return self._end_vanished(job) if self._is_silent(job) else job

    def _send(self, job: Job) -> Job:
        """Hand the current attempt to the compute and note its handle."""
        attempt = job.attempt
        assert attempt is not None
        try:
            spec = self._render_spec(job)
            self._configs.write(spec_key(job.job_id), spec.model_dump_json(indent=1).encode())
            handle = self._launcher.launch(self._launch_order(job, attempt.number))
        except (Unavailable, StorageError) as error:
            why = f"{error.message} {error.hint}".strip() if isinstance(error, Unavailable) else str(error)
            log.warning("launch delayed", extra={"job_id": job.job_id, "attempt": attempt.number, "error": why})
            return self._change(job.job_id, lambda job: lifecycle.launch_delayed(job, attempt.number, why, self._clock()))
        except (LaunchFailed, NotFound) as error:
            failure = Failure(code="launch_failed", message=error.message, hint=error.hint)
            job = self._change(job.job_id, lambda job: lifecycle.launch_refused(job, attempt.number, failure, self._clock()))
            self._forget_secrets(job)
            return job
        return self._change(job.job_id, lambda job: lifecycle.launched(job, attempt.number, handle, self._clock()))

    def _render_spec(self, job: Job) -> JobSpec:
        return JobSpec(
            job_id=job.job_id,
            job_name=job.job_name,
            tenant_id=job.tenant_id,
            project_id=job.project_id,
            training_config=job.training_config,
            dataset=self._own_dataset(job.processed_dataset_id, job.tenant_id),
            stores=StoreUrls(datasets=self._datasets.url, models=self._models.url, configs=self._configs.url),
            checkpoints=checkpoints_prefix(job.job_id, job.project_id),
            first_attempt=job.first_attempt,
            export_of=job.export_of,
        )

    def _launch_order(self, job: Job, number: int) -> LaunchOrder:
        environment = self._attempt_environment | {
            "JOB_ID": job.job_id,
            "JOB_ATTEMPT": str(number),
            "JOB_TOKEN": self._tokens.attempt_token(job.job_id, number),
            "JOB_SPEC_STORE_URL": self._configs.url,
        }
        name = attempt_name(job.job_id, number)
        return LaunchOrder(name=name, job_id=job.job_id, attempt=number, environment=environment, hardware=job.hardware)

    def _is_quiet(self, job: Job) -> bool:
        """Whether it is worth asking the compute: always for a local one, where asking is free."""
        return self._launcher.check_is_cheap or job.status is Status.CANCELLING or self._is_silent(job)

    def _is_silent(self, job: Job) -> bool:
        return self._has_gone_silent(job, self.liveness(job))

    def _has_gone_silent(self, job: Job, alive: Liveness | None) -> bool:
        attempt = job.attempt
        last_sign = alive.seen_at if alive else (attempt.launched_at if attempt else None) or job.updated_at
        return self._clock() - last_sign > self._limits.silent_after

    def _judge_ended(self, job: Job) -> Job:
        """The compute is gone. Its last word may have been written just before."""
        assert job.attempt is not None
        result = self._result_of(job)
        return self.finish(job.job_id, result) if result else self._end_vanished(job)

    def _end_vanished(self, job: Job) -> Job:
        number, told, saved_step = len(job.attempts), self._why_ended(job), self._saved_step(job)
        reason, preempted = (told.failure, told.preempted) if told else (None, False)

        def vanished(job: Job) -> Job:
            return lifecycle.vanished(job, number, self._clock(), reason, preempted=preempted, saved_step=saved_step)

        job = self._change(job.job_id, vanished)
        if job.status.is_final:
            self._forget_secrets(job)
        self._wake(job.job_id)
        return job

    def _why_ended(self, job: Job) -> Ended | None:
        """What the compute tells about the end of the current attempt. Raises Unavailable: then the judgement waits."""
        handle = job.attempt.handle if job.attempt else None
        return self._launcher.why_ended(handle) if handle and isinstance(self._launcher, EndSource) else None

    def _saved_step(self, job: Job) -> int | None:
        """The newest checkpoint of the current attempt: it may have been killed before it told."""
        prefix, number = checkpoints_prefix(job.job_id, job.project_id), len(job.attempts)
        found = stored_checkpoints(self._models, prefix, number)
        return max((stored.checkpoint.step for stored in found if stored.checkpoint.attempt == number), default=None)

    def _where_logs(self, job: Job, number: int) -> str:
        handle = job.attempts[number - 1].handle
        return self._launcher.where_logs(handle) if handle and isinstance(self._launcher, LogsElsewhere) else ""

    def _result_of(self, job: Job) -> Result | None:
        assert job.attempt is not None
        try:
            return Result.load(self._configs.read(result_key(job.job_id, job.attempt.number)))
        except NoSuchObject:
            return None
        except ValidationError:
            log.error("result is not readable", extra={"job_id": job.job_id, "attempt": job.attempt.number})
            return None

    def _insist_on_cancel(self, job: Job, handle: str) -> None:
        """The directive was given; an attempt that is too busy to hear it gets signals."""
        waited = self._clock() - job.status_changed_at
        if waited >= self._limits.cancel_grace:
            self._launcher.cancel(handle, force=waited >= self._limits.kill_grace)

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _submit(
        self, request: TrainRequest, tenant_id: str, idempotency_key: str | None, digest: str, cloned_from: str | None = None
    ) -> Job:
        check_supported(request.training_config, self._launcher.hardware(request.hardware))
        dataset = self._own_dataset(request.processed_dataset_id, tenant_id)
        check_fits(request.training_config, dataset)
        check_graders_models(request.training_config, self._models)
        check_token(request.training_config, secrets_of(request).get(HF_SECRET))
        request = request.model_copy(update={"training_config": with_trackers(request.training_config, self._trackers)})
        secrets = secrets_of(request)
        check_hub(request.training_config, secrets.get(HF_SECRET), self._hub, self._models)
        now = self._clock()
        job = Job(
            job_id=job_id_for(request.processed_dataset_id, request.training_config.base_model_id, self._random_tail()),
            tenant_id=tenant_id,
            project_id=request.project_id,
            job_name=request.job_name,
            processed_dataset_id=request.processed_dataset_id,
            training_config=redacted(request.training_config),
            secret_names=tuple(sorted(secrets)),
            hardware=request.hardware or self._launcher.profiles[0],
            cloned_from=cloned_from,
            status=Status.QUEUED,
            created_at=now,
            updated_at=now,
            status_changed_at=now,
        )
        return self._begin(job, secrets, idempotency_key, digest)

    def _begin(self, job: Job, secrets: dict[str, str], idempotency_key: str | None, digest: str) -> Job:
        """Keep a new job; its secrets go first, so that no attempt can start without them."""
        if secrets:
            self._secrets.put(job.job_id, secrets)
        kept = self._keep(job, IdempotencyKey(idempotency_key, digest) if idempotency_key else None)
        self._wake(kept.job_id)
        return kept

    def _renew_secrets(self, job: Job, request: SafeChanges) -> None:
        """Keep what is sent again beside what is still there. Raises InvalidRequest when the job then lacks one that it had."""
        renewed = sent_again(request)
        for name in renewed.keys() - set(job.secret_names):
            raise InvalidRequest(
                f"{job.job_id} was made without {name}, and goes on without it", hint="leave it out", param=_field_of(name)
            )
        if not job.secret_names:
            return
        stored = self._secrets.read(job.job_id)
        known = deployments_secrets(job.training_config, self._trackers) | stored | renewed
        for name in job.secret_names:
            if name not in known:
                hint = "secrets are destroyed when a job ends, and expire after 30 days"
                message = f"{name} is needed again to go on with {job.job_id}; send it in the body"
                raise InvalidRequest(message, hint=hint, param=_field_of(name))
        if known != stored:
            self._secrets.put(job.job_id, known)

    def _longer(self, job: Job, request: SafeChanges) -> TrainingConfig:
        """The job's configuration with what the request changes. Raises InvalidRequest for what would not be safe, Unsupported."""
        config = longer(job.training_config, request)
        if request.hardware:
            check_supported(config, self._launcher.hardware(request.hardware))
        return config

    def _list_in_bucket(self, job: Job) -> Job:
        """Write the manifest of a completed job, for who reads the bucket alone; whoever sees the job next does it if this fails.

        Only now, for now nothing can take the job's place any more: an attempt that was given up cannot get here.
        """
        if job.status is not Status.COMPLETED or job.manifest_written or not job.artifacts:
            return job
        number, now = len(job.attempts), self._clock()
        manifest = PublishManifest(job_id=job.job_id, attempt=number, artifacts=job.artifacts, created_at=job.finished_at or now)
        try:
            self._models.write(manifest_key(job.job_id), manifest.model_dump_json(indent=1).encode())
            return self._change(job.job_id, lambda job: lifecycle.manifest_written(job, now))
        except (StorageError, Unavailable, NotFound) as error:
            log.warning("manifest not written yet", extra={"job_id": job.job_id, "error": str(error)})
            return job

    def _keep(self, job: Job, idempotency: IdempotencyKey | None) -> Job:
        try:
            kept = self._store.create_job(job, idempotency)
        except Unavailable:
            raise  # it may have been kept all the same, and would then need its secrets
        except TunesmithError:
            self._secrets.destroy(job.job_id)
            raise
        if kept.job_id != job.job_id and job.secret_names:
            self._secrets.destroy(job.job_id)
        return kept

    def _change(self, job_id: str, decide: Callable[[Job], Job]) -> Job:
        """Apply a pure decision to the record, again if somebody else was faster."""
        for _ in range(CAS_TRIES):
            job = self._store.find_job(job_id) or _raise_gone(job_id)
            after = decide(job)
            if after is job:
                return job
            try:
                return self._replace(job, after)
            except StaleRevision:
                continue
        raise Unavailable(f"{job_id} is being changed by too many at once; try again")

    def _replace(self, before: Job, after: Job) -> Job:
        told = lifecycle.status_event(before, after)
        kept = self._store.replace_job(after, [told] if told else [])
        if told:
            log.info("status changed", extra={"job_id": after.job_id, "status": after.status, "attempt": told.attempt})
        return kept

    def _own_dataset(self, dataset_id: str, tenant_id: str) -> Dataset:
        dataset = self._store.find_dataset(dataset_id)
        if dataset is None or dataset.tenant_id != tenant_id:
            raise NotFound(f"no dataset {dataset_id!r}", hint="POST /datasets uploads one", param="processed_dataset_id")
        return dataset

    def _forget_secrets(self, job: Job) -> None:
        if job.secret_names:
            self._secrets.destroy(job.job_id)

    def _link(self, artifact: Artifact, file: ArtifactFile) -> str:
        key = artifact.key + file.path if artifact.key.endswith("/") else artifact.key
        return self._links.link(key, key.rpartition("/")[2], self._limits.link_life_s)

    def _delete_on_hub(self, job: Job, token: str | None) -> list[str]:
        """Remove the repositories that hold nothing but what this job pushed. Raises InvalidRequest before anything is removed."""
        pushed: dict[str, set[str]] = {}
        for push in (artifact.hub for artifact in job.artifacts if artifact.hub):
            pushed.setdefault(push.repo_id, set()).add(push.revision)
        if pushed and not token:
            hint = "send one that may delete the repository"
            raise InvalidRequest("delete_hub needs a token, in the header X-HF-Token", hint=hint, param="X-HF-Token")
        found = {repo_id: self._hub.commits(repo_id, token or "") for repo_id in pushed}
        for repo_id, commits in found.items():
            if commits is not None:
                check_all_ours(repo_id, commits, pushed[repo_id])
        there = [repo_id for repo_id, commits in found.items() if commits is not None]
        for repo_id in there:
            self._hub.delete_repository(repo_id, token or "")
        return [f"hf://{repo_id}" for repo_id in there]

    def _delete_files(self, job: Job) -> Deleted:
        resources: list[str] = []
        failures: list[str] = []
        for store, prefix in owned_prefixes(job, configs=self._configs, models=self._models):
            try:
                keys = delete_below(store, prefix) if prefix.endswith("/") else [prefix] * store.delete(prefix)
                resources += [f"{store.url}/{prefix}"] if keys else []
            except StorageError as error:
                failures.append(f"{store.url}/{prefix}: {error}")
        self._forget_secrets(job)
        if isinstance(self._launcher, LogSource):
            names = [attempt_name(job.job_id, attempt) for attempt in job.attempts]
            resources += [f"log of {name}" for name in names if self._launcher.forget_log(name)]
        return Deleted(resources=resources, failures=failures)


def digest_of(request: TrainRequest) -> str:
    """What makes two requests the same one: everything but the secrets, which may be renewed between two tries."""
    return _digest(request.model_dump(mode="json", exclude={"hf_token"}))


def longer(config: TrainingConfig, request: SafeChanges) -> TrainingConfig:
    """The configuration with more epochs or steps. Raises InvalidRequest for fewer, and for the one that the job is not counted in."""
    knobs = config.hyperparameters
    changes: dict[str, int] = {}
    for name, wanted in (("epochs", request.epochs), ("max_steps", request.max_steps)):
        if wanted is None or wanted == getattr(knobs, name):
            continue
        counted_in = "max_steps" if knobs.max_steps > 0 else "epochs"
        if name != counted_in:
            raise InvalidRequest(f"this job is counted in {counted_in}; {name} would not be used", hint=f"raise {counted_in}", param=name)
        if wanted < getattr(knobs, name):
            message = f"{name} can only grow: the job was planned with {getattr(knobs, name)}, and {wanted} may have been passed already"
            raise InvalidRequest(message, hint="an earlier checkpoint can be exported instead", param=name)
        changes[name] = wanted
    return config.model_copy(update={"hyperparameters": knobs.model_copy(update=changes)}) if changes else config


def exporting(config: TrainingConfig, request: ExportRequest) -> TrainingConfig:
    """The configuration of a job that exports a checkpoint: another export, no tracker, no gate. Raises InvalidRequest for a misfit."""
    export = request.export_config
    if config.method == "Full" and "adapter" in export.formats and "format" in export.model_fields_set:
        message = "format 'adapter' needs method LoRA or QLoRA; with method Full use 'merged'"
        raise InvalidRequest(message, param="export_config.format")
    if config.method == "Full" and export.include_lora_gguf:
        raise InvalidRequest("include_lora_gguf needs method LoRA or QLoRA, not Full", param="export_config.include_lora_gguf")
    judged = config.eval_config.model_copy(update={"promotion_gate": [], "lm_eval_tasks": [], "lm_eval_limit": None})
    changed = config.model_copy(update={"export_config": export, "eval_config": judged, **dict.fromkeys(Trackers.model_fields)})
    try:
        return type(config).model_validate(changed.model_dump())
    except ValidationError as error:
        why = error.errors()[0]
        raise InvalidRequest(why["msg"], param=why.get("ctx", {}).get("field")) from error


def why_not_passed(gate: Gate) -> str:
    """The checks of a gate that failed, for a person."""
    return "; ".join(f"{check.metric}: {check.why or 'not passed'}" for check in gate.checks if not check.passed)


def job_id_for(dataset_id: str, base_model_id: str, tail: str) -> str:
    """The seed's readable form, training_<dataset>_<model>_<tail>, with a random tail: two jobs never share an id."""
    dataset = dataset_id.removeprefix("dataset_")
    model = base_model_id.rpartition("/")[2]
    readable = [re.sub(r"[^A-Za-z0-9-]+", "-", part)[:40].strip("-") for part in (dataset, model)]
    return "_".join(["training", *readable, tail])


def directive_for(job: Job) -> Directive:
    """What the current attempt should do."""
    match job.status:
        case Status.CANCELLING:
            return "cancel"
        case Status.PAUSING:
            return "pause"
        case _:
            return "continue"


def owned_prefixes(job: Job, *, configs: ObjectStore, models: ObjectStore) -> Sequence[tuple[ObjectStore, str]]:
    """Every place where a job's files can lie. The manifest goes first: readers stop believing in the rest."""
    return (
        (models, manifest_key(job.job_id)),
        *((models, f"{folder}/{job.job_id}/") for folder in BY_JOB),
        (models, checkpoints_prefix(job.job_id, job.project_id)),
        (configs, spec_key(job.job_id)),
        (configs, f"results/{job.job_id}/"),
    )


def _digest(body: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _pick_checkpoint(stored: Sequence[StoredCheckpoint], job_id: str, step: int, attempt: int | None) -> StoredCheckpoint:
    """The checkpoint of a step, the newest attempt's unless one is named. Raises NotFound that lists what there is."""
    for found in stored:
        if found.checkpoint.step == step and attempt in (None, found.checkpoint.attempt):
            return found
    known = ", ".join(str(found.checkpoint.step) for found in stored) or "none"
    whose = f" of attempt {attempt}" if attempt else ""
    raise NotFound(f"{job_id} has no checkpoint{whose} at step {step}; it has: {known}", param="attempt" if attempt else "step")


def _absorb_all(job: Job, number: int, events: Sequence[Event], now: datetime) -> Job:
    job = lifecycle.heard(job, number, now)
    for event in events:
        job = lifecycle.absorbed(job, number, event, now)
    return job


def _nothing_to_export(job: Job) -> NotFound:
    """Why there is no checkpoint, and what would help."""
    if job.export_of:
        hint = f"POST /jobs/{job.export_of.job_id}/export exports it again"
        return NotFound(f"{job.job_id} trained nothing; it exported a checkpoint of {job.export_of.job_id}", hint=hint)
    if job.status.is_final:
        return NotFound(f"no checkpoint of {job.job_id} is kept", hint=f"POST /jobs/{job.job_id}/clone trains it once more")
    return NotFound(f"{job.job_id} is {job.status} and has no checkpoint yet", hint="POST /jobs/{id}/pause makes one")


def _field_of(secret: str) -> str:
    """Where a body says a secret again."""
    return secret if secret in (HF_SECRET, WANDB_SECRET) else f"secrets.{secret}"


def _pick_artifact(job: Job, name: str | None) -> Artifact:
    known = ", ".join(artifact.name for artifact in job.artifacts)
    if name is None:
        by_use = sorted(job.artifacts, key=lambda artifact: BY_USE.index(artifact.kind))
        if by_use:
            return by_use[0]
        raise NotFound(f"{job.job_id} has no artifacts")
    for artifact in job.artifacts:
        if artifact.name == name:
            return artifact
    raise NotFound(f"{job.job_id} has no artifact {name!r}; it has: {known}", param="artifact")


def _raise_gone(job_id: str) -> NoReturn:
    raise NotFound(f"no job {job_id!r}", param="job_id")
