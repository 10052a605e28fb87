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
from schema.events import Directive, Event, EventBatch, EventBatchResponse
from schema.job import Artifact, ArtifactFile, ArtifactKind, ExportSource, Failure, Gate, Job, Status
from schema.requests import CloneRequest, ContinuationOptions, ExportRequest, ReexportRequest, ResumeRequest, RetryRequest, TrainRequest
from schema.result import PublishManifest, Result
from schema.spec import ClaimResponse, JobSpec, StoreUrls, attempt_name, manifest_key, result_key, spec_key
from schema.training import TrainingConfig
from service.core import lifecycle
from service.core.capabilities import check_dataset_compatible, check_supported
from service.core.errors import Conflict, InvalidRequest, LaunchFailed, NotFound, StaleRevision, TunesmithError, Unavailable
from service.core.hub import NoHub, check_hub, check_only_our_commits, check_token
from service.core.job_secrets import HF_SECRET, WANDB_SECRET, extract_request_secrets, redact, resent_secrets
from service.core.jobs.checkpoints import StoredCheckpoint, list_checkpoints
from service.core.jobs.clone import clone_request
from service.core.jobs.orphans import JOB_FOLDERS, OrphanScan, delete_orphan, find_orphans
from service.core.ports import (
    ExitReason,
    ExitReasonReader,
    Heartbeat,
    Hub,
    IdempotencyKey,
    JobQuery,
    JobStore,
    JobSummary,
    Launcher,
    LaunchRequest,
    LogLocator,
    LogPage,
    LogReader,
    Page,
    SecretStore,
    StoredEvent,
    UrlSigner,
)
from service.core.tokens import TokenSigner
from service.core.trackers import DeploymentTrackers, add_deployment_trackers, deployment_tracker_secrets, deployment_trackers_of
from service.core.validation.models import check_embedding_models
from storage import NoSuchObject, ObjectStore, StorageError, delete_prefix
from storage.deadline import remaining_s

log = logging.getLogger(__name__)

MAX_JOBS_PER_RECONCILE = 1000  # jobs looked after in one turn; the oldest come first
CAS_TRIES = 10  # writers of one job are few: its attempt, one caller, one reconciler
DOWNLOAD_PREFERENCE: tuple[ArtifactKind, ...] = (
    "gguf",
    "merged",
    "adapter",
    "onnx",
    "lora_gguf",
)  # what a download means that names nothing
RECONCILE_CONCURRENCY = 8  # a thousand jobs of a tenth of a second each are looked after within a scheduler's minute
ORPHAN_SCAN_TIMEOUT_S = 600.0  # looking through every file of a bucket, where nobody waits
MIN_STEP_BUDGET_S = 2.0  # a launch is a handful of calls; begun with less, it would only be cut off half-way


@dataclass(frozen=True)
class Limits:
    """How long the service waits, and for what."""

    heartbeat_timeout: timedelta = timedelta(seconds=60)  # no sign of life: ask the compute
    cancel_grace: timedelta = timedelta(seconds=1)  # an attempt that knows of its cancel may tidy up; then a signal
    kill_grace: timedelta = timedelta(seconds=8)  # and then no more
    launch_lookup_delay: timedelta = timedelta(seconds=5)  # an attempt without a handle is looked up by name this long after it was sent
    start_timeout: timedelta = timedelta(minutes=10)  # until then nobody minds that a launched attempt has not claimed itself
    lease: timedelta = timedelta(minutes=5)  # silent for so long after it was first doubted: the compute is told to end it
    lease_grace: timedelta = timedelta(minutes=1)  # and then it counts as lost, whatever the compute says
    link_ttl_s: int = 900


@dataclass(frozen=True)
class DeletionResult:
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
        url_signer: UrlSigner,
        tokens: TokenSigner,
        clock: Callable[[], datetime],
        random_suffix: Callable[[], str],
        wake: Callable[[str], None] = lambda _: None,
        limits: Limits = Limits(),  # frozen
        hub: Hub | None = None,
        trackers: DeploymentTrackers | None = None,
        attempt_environment: Mapping[str, str] | None = None,
    ) -> None:
        self._store = store
        self._secrets = secrets
        self._configs = configs
        self._models = models
        self._datasets = datasets
        self._launcher = launcher
        self._url_signer = url_signer
        self._tokens = tokens
        self._clock = clock
        self._random_suffix = random_suffix
        self._wake = wake
        self._limits = limits
        self._hub = hub or NoHub()
        self._trackers = trackers or DeploymentTrackers()
        self._attempt_environment = dict(attempt_environment or {})

    @property
    def link_ttl_s(self) -> int:
        """How long a download link works, in seconds."""
        return self._limits.link_ttl_s

    # --- callers -----------------------------------------------------------------------------------------------------

    def submit(self, request: TrainRequest, tenant_id: str, idempotency_key: str | None = None) -> Job:
        """Make a job of a request: durable when this returns, launched soon after.

        Raises NotFound, InvalidRequest, Unsupported, IdempotencyConflict before anything is kept.
        """
        return self._submit(request, tenant_id, idempotency_key, request_digest(request))

    def clone(self, job_id: str, tenant_id: str, patch: CloneRequest, idempotency_key: str | None = None) -> Job:
        """Make a job of another's request with changes. Raises ValidationError when the whole is no request, and what `submit` raises."""
        source = self.find(job_id, tenant_id)
        if source.export_of:
            hint = f"export again: POST /jobs/{source.export_of.job_id}/export"
            raise InvalidRequest(f"{job_id} trained nothing; it exported a checkpoint of {source.export_of.job_id}", hint=hint)
        config = source.training_config
        own, secrets = deployment_trackers_of(config, self._trackers), deployment_tracker_secrets(config, self._trackers)
        request = clone_request(source, patch, deployment_trackers=frozenset(own), deployment_secrets=frozenset(secrets))
        digest = _digest({"clone_of": job_id, "request": request_digest(request)})
        return self._submit(request, tenant_id, idempotency_key, digest, cloned_from=job_id)

    def find(self, job_id: str, tenant_id: str) -> Job:
        """A tenant's job. Raises NotFound, also for somebody else's."""
        job = self.find_or_none(job_id, tenant_id)
        if job is None:
            raise NotFound(f"no job {job_id!r}", hint="GET /jobs lists them", param="job_id")
        return job

    def find_or_none(self, job_id: str, tenant_id: str) -> Job | None:
        """A tenant's job, or None."""
        job = self._store.find_job(job_id)
        return job if job and job.tenant_id == tenant_id else None

    def find_heartbeat(self, job: Job) -> Heartbeat | None:
        """The sign of life of the job's current attempt, if it gave one."""
        alive = self._store.find_heartbeat(job.job_id)
        return alive if alive and job.attempt and alive.attempt == job.attempt.number else None

    def get_refreshed(self, job_id: str, tenant_id: str) -> tuple[Job, Heartbeat | None]:
        """A tenant's job and its sign of life. One that has gone silent is looked after on the way. Raises NotFound."""
        job = self.find(job_id, tenant_id)
        alive = self.find_heartbeat(job)
        job = self._write_manifest(job)
        if not job.status.is_active or self._launcher.polling_is_free or not self._is_heartbeat_expired(job, alive):
            return job, alive
        self._wake(job_id)
        return self.find(job_id, tenant_id), alive

    def list_jobs(self, query: JobQuery) -> Page[JobSummary]:
        """A page of a tenant's jobs."""
        return self._store.list_jobs(query)

    def list_events(self, job_id: str, tenant_id: str, after: int, limit: int) -> list[StoredEvent]:
        """A page of a job's events."""
        self.find(job_id, tenant_id)
        return self.list_events_unchecked(job_id, after, limit)

    def list_events_unchecked(self, job_id: str, after: int, limit: int) -> list[StoredEvent]:
        """A page of events of a job that the caller has found before."""
        return self._store.list_events(job_id, after, limit)

    def read_log(self, job_id: str, tenant_id: str, attempt: int | None, offset: int, limit: int) -> tuple[int, LogPage]:
        """A part of an attempt's output, the latest attempt's by default, and that attempt's number. Raises NotFound."""
        job = self.find(job_id, tenant_id)
        number = attempt or len(job.attempts)
        if number == 0:
            return 0, LogPage(text="", next_offset=0)
        if number > len(job.attempts):
            raise NotFound(f"{job_id} has no attempt {number}; it has {len(job.attempts)}", param="attempt")
        if not isinstance(self._launcher, LogReader):
            raise NotFound(f"the launcher {self._launcher.name!r} keeps the logs elsewhere", hint=self._log_location(job, number))
        page = self._launcher.read_log(attempt_name(job_id, number), offset, limit)
        return number, page or LogPage(text="", next_offset=offset)

    def cancel(self, job_id: str, tenant_id: str) -> Job:
        """Stop a job: by telling its attempt first, by force if it does not listen. Can be repeated. Raises Conflict."""
        self.find(job_id, tenant_id)
        job = self._change(job_id, lambda job: lifecycle.request_cancel(job, self._clock()))
        if job.status.is_final:
            self._delete_secrets(job)
        self._wake(job_id)
        return job

    def pause(self, job_id: str, tenant_id: str) -> Job:
        """Free the compute and keep the place: the attempt saves a checkpoint and ends. Can be repeated. Raises Conflict."""
        self.find(job_id, tenant_id)
        job = self._change(job_id, lambda job: lifecycle.request_pause(job, self._clock()))
        self._wake(job_id)
        return job

    def resume(self, job_id: str, tenant_id: str, request: ResumeRequest) -> Job:
        """Go on where the pause was, perhaps on other hardware or for longer. Can be repeated. Raises Conflict, InvalidRequest."""
        before = self.find(job_id, tenant_id)
        if before.status is Status.PAUSED:
            self._refresh_secrets(before, request)

        def resumed(job: Job) -> Job:
            config = self._extend_config(job, request)
            return lifecycle.request_resume(job, self._clock(), training_config=config, hardware=request.hardware)

        job = self._change(job_id, resumed)
        self._wake(job_id)
        return job

    def retry(self, job_id: str, tenant_id: str, request: RetryRequest) -> Job:
        """Continue a failed or cancelled job from its last good checkpoint. Can be repeated. Raises Conflict, InvalidRequest."""
        before = self.find(job_id, tenant_id)
        if before.status in (Status.FAILED, Status.CANCELLED):
            self._require_dataset(before.processed_dataset_id, tenant_id)
            self._refresh_secrets(before, request)

        def retried(job: Job) -> Job:
            config = self._extend_config(job, request)
            return lifecycle.request_retry(
                job, self._clock(), from_start=request.from_start, training_config=config, hardware=request.hardware
            )

        job = self._change(job_id, retried)
        self._wake(job_id)
        return job

    def list_checkpoints(self, job_id: str, tenant_id: str) -> list[StoredCheckpoint]:
        """What a job can go on from, or be exported at; the one that counts first. Raises NotFound."""
        job = self.find(job_id, tenant_id)
        return list_checkpoints(self._models, checkpoints_prefix(job.job_id, job.project_id), job.resume_from_attempt)

    def export(self, job_id: str, step: int, tenant_id: str, request: ExportRequest, idempotency_key: str | None = None) -> Job:
        """Make a job that exports a checkpoint of another without training. Raises NotFound, Unsupported, InvalidRequest."""
        source = self.find(job_id, tenant_id)
        found = _pick_checkpoint(self.list_checkpoints(job_id, tenant_id), job_id, step, request.attempt)
        config = export_config_for(source.training_config, request)
        hardware = request.hardware or source.hardware
        check_supported(config, self._launcher.get_capabilities(hardware))
        self._require_dataset(source.processed_dataset_id, tenant_id)
        secrets = {HF_SECRET: request.hf_token.get_secret_value()} if request.hf_token else {}
        check_token(config, secrets.get(HF_SECRET))
        check_hub(config, secrets.get(HF_SECRET), self._hub, self._models)
        now = self._clock()
        job = Job(
            job_id=make_job_id(source.processed_dataset_id, config.base_model_id, self._random_suffix()),
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
        return self._create_and_wake(job, secrets, idempotency_key, digest)

    def reexport(self, job_id: str, tenant_id: str, request: ReexportRequest, idempotency_key: str | None = None) -> Job:
        """Export what a job has trained once more; without a step, what was published, else the newest. Raises as `export` does."""
        source = self.find(job_id, tenant_id)
        stored = self.list_checkpoints(job_id, tenant_id)
        if not stored:
            raise _no_checkpoint_error(source)
        steps = [found.checkpoint.step for found in stored if request.attempt in (None, found.checkpoint.attempt)]
        step = request.step
        if step is None:
            step = source.published_step if source.published_step in steps else next(iter(steps), stored[0].checkpoint.step)
        return self.export(job_id, step, tenant_id, request, idempotency_key)

    def create_download_links(
        self, job_id: str, tenant_id: str, artifact_name: str | None
    ) -> tuple[Artifact, list[tuple[ArtifactFile, str]]]:
        """Links to the files of an artifact, the most useful one by default: GGUF, merged, adapter. Raises NotFound, Conflict."""
        job = self.find(job_id, tenant_id)
        if job.status is not Status.COMPLETED:
            raise Conflict(f"{job_id} is {job.status}; there is something to download once it is completed")
        if job.gate and not job.gate.passed and not job.artifacts:
            message = f"{job_id} published nothing, for the promotion gate was not passed: {describe_failed_checks(job.gate)}"
            raise Conflict(message, hint=f"POST /jobs/{job_id}/export publishes it all the same")
        job = self._write_manifest(job)
        artifact = _pick_artifact(job, artifact_name)
        return artifact, [(file, self._sign_url(artifact, file)) for file in artifact.files]

    def delete(self, job_id: str, tenant_id: str, *, delete_hub: bool = False, hub_token: str | None = None) -> DeletionResult | None:
        """Stop the job, remove its files and then its record. None: it is still stopping, repeat. Raises NotFound.

        `with_hub` removes the repositories that it pushed to as well; InvalidRequest for one that holds anything else.
        """
        job = self.find(job_id, tenant_id)
        if not job.status.is_final:
            job = self.cancel(job_id, tenant_id)
        if not job.status.is_final:
            return None
        on_hub = self._delete_hub_repositories(job, hub_token) if delete_hub else []
        job = self._change(job_id, lambda job: lifecycle.start_deletion(job, self._clock()))
        deleted = self._delete_files(job)
        if not deleted.failures:
            self._store.delete_job(job_id)
        return DeletionResult(resources=[*on_hub, *deleted.resources], failures=deleted.failures)

    # --- attempts ----------------------------------------------------------------------------------------------------

    def claim(self, job_id: str, number: int, claimant: str) -> ClaimResponse:
        """Give the attempt to a process, with the job's secrets. Raises Fenced for a second process, NotFound."""
        job = self._change(job_id, lambda job: lifecycle.claim_attempt(job, number, claimant, self._clock()))
        secrets = self._secrets.read(job_id) if job.secret_names else {}
        return ClaimResponse(secrets=secrets, directive=directive_for(job))

    def report(self, job_id: str, number: int, batch: EventBatch) -> EventBatchResponse:
        """Take what an attempt tells; says what it should do. Raises Fenced for an attempt that is over, NotFound."""
        now = self._clock()
        job = self._store.find_job(job_id) or _job_not_found(job_id)
        lifecycle.check_current(job, number)
        next_seq = self._store.append_events(job_id, number, batch, now)
        told = [reported.event for reported in batch.events]
        if _apply_events(job, number, told, now) is not job:
            job = self._change(job_id, lambda job: _apply_events(job, number, told, now))
        return EventBatchResponse(directive=directive_for(job), next_seq=next_seq)

    def finish(self, job_id: str, result: Result) -> Job:
        """Take an attempt's last word. Repeats are harmless. Raises Fenced, NotFound."""
        job = self._change(job_id, lambda job: lifecycle.apply_result(job, result, self._clock()))
        if job.status.is_final:
            self._delete_secrets(job)
        self._wake(job_id)
        return self._write_manifest(job)

    # --- the reconciler ----------------------------------------------------------------------------------------------

    def reconcile(self) -> int:
        """Bring every open job a step nearer to where it should be; returns how many were changed.

        Can be run by anybody, at any time, as often as one likes. One job's trouble never stops the others.
        """
        active = self._store.list_active_jobs(MAX_JOBS_PER_RECONCILE)
        return self._for_each(self._reconcile_active, active) + self._launch_queued(active=len(active))

    def reconcile_job(self, job_id: str) -> None:
        """What `reconcile` would do for one job, now, for a service without a background task. Fails quietly: it comes by again.

        A job that has ended has made room for one that waits.
        """
        if remaining_s(MIN_STEP_BUDGET_S) < MIN_STEP_BUDGET_S:
            return
        try:
            job = self._store.find_job(job_id)
            if job is not None and job.status.is_active:
                self._try_step(self._reconcile_active, job)
            else:
                self._launch_queued(active=len(self._store.list_active_jobs(MAX_JOBS_PER_RECONCILE)), limit=1)
        except TunesmithError as error:
            log.warning("job could not be reconciled", extra={"job_id": job_id, "error": error.message})

    def delete_stale_secrets(self, *, orphans: bool = False) -> int:
        """Destroy secrets that outlived their job; returns how many. `orphans`: also those of no known job.

        A job's secrets are written before its record: only a process that knows itself alone may look for orphans.
        """
        swept = 0
        for job_id in list(self._secrets.iter_job_ids()):
            job = self._store.find_job(job_id)
            if (job is None and orphans) or (job is not None and job.status.is_final):
                swept += self._secrets.destroy(job_id)
        return swept

    def list_orphans(self) -> OrphanScan:
        """Files of jobs that there are not. Raises StorageError, Unavailable."""
        return find_orphans(self._store, configs=self._configs, models=self._models, timeout_s=remaining_s(ORPHAN_SCAN_TIMEOUT_S) * 0.8)

    def delete_orphans(self) -> OrphanScan:
        """Remove the files of jobs that there are not; returns what was removed. Can be repeated until it is complete."""
        swept = self.list_orphans()
        for orphan in swept.orphans:
            delete_orphan(orphan, configs=self._configs, models=self._models)
        return swept

    def _launch_queued(self, active: int, limit: int = MAX_JOBS_PER_RECONCILE) -> int:
        free_slots = min(limit, self._launcher.count_free_slots(active))
        queued = self._store.list_queued_jobs(free_slots) if free_slots > 0 else []
        return self._for_each(self._launch, queued)

    def _for_each(self, step: Callable[[Job], Job], jobs: Sequence[Job]) -> int:
        """Take a step with every job; returns how many were changed. Where each takes a network's time, several at a time."""
        if self._launcher.polling_is_free or len(jobs) < 2:
            return sum(self._try_step(step, job) for job in jobs)
        with ThreadPoolExecutor(RECONCILE_CONCURRENCY, "reconcile") as pool:
            taken = [pool.submit(copy_context().run, self._try_step, step, job) for job in jobs]
        return sum(step_taken.result() for step_taken in taken)

    def _try_step(self, step: Callable[[Job], Job], job: Job) -> bool:
        """Whether the step changed the job."""
        try:
            return step(job).revision != job.revision
        except (TunesmithError, StorageError) as error:
            log.warning("job could not be reconciled", extra={"job_id": job.job_id, "error": str(error)})
            return False

    def _reconcile_active(self, job: Job) -> Job:
        assert job.attempt is not None
        if job.attempt.handle is None:
            return self._recover_launch(job)
        if (result := self._read_result(job)) is not None:
            return self.finish(job.job_id, result)
        if job.status is Status.CANCELLING:
            self._escalate_cancel(job, job.attempt.handle)
        if not self._should_poll(job):
            return job
        state = self._launcher.check(job.attempt.handle)
        if state == "ended":
            return self._handle_ended(job)
        return self._start_or_check_lease(job, job.attempt.handle) if state == "running" else job  # unknown is not lost

    def _start_or_check_lease(self, job: Job, handle: str) -> Job:
        """The compute is there. If its attempt is not heard of for a whole lease after it was first doubted, it is ended.

        The doubt is written down: a service that slept, or was started just now, hears the attempt before it judges it.
        """
        attempt, alive = job.attempt, self.find_heartbeat(job)
        assert attempt is not None
        now, since = self._clock(), attempt.suspected_at
        may_be_starting = attempt.claimed_by is None and now - (attempt.launched_at or attempt.created_at) < self._limits.start_timeout
        if may_be_starting or not self._is_heartbeat_expired(job, alive):
            return job
        if since is None or (alive is not None and alive.received_at > since):
            log.warning("attempt is silent", extra={"job_id": job.job_id, "attempt": attempt.number})
            return self._change(job.job_id, lambda job: lifecycle.suspect(job, attempt.number, now))
        if now - since >= self._limits.lease:
            self._launcher.cancel(handle, force=True)
        return self._mark_lost(job) if now - since >= self._limits.lease + self._limits.lease_grace else job

    def _launch(self, job: Job) -> Job:
        try:
            job = self._replace(job, lifecycle.begin_attempt(job, self._launcher.name, self._clock()))
        except StaleRevision:
            return job  # somebody else was faster: it is theirs
        return self._launch_attempt(job)

    def _recover_launch(self, job: Job) -> Job:
        """The service died between writing the attempt down and hearing its handle: look before launching twice."""
        attempt = job.attempt
        assert attempt is not None
        if self._clock() - (attempt.launch_started_at or attempt.created_at) < self._limits.launch_lookup_delay:
            return job  # its launcher may be at work this very moment
        handle = self._launcher.find_handle(attempt_name(job.job_id, attempt))
        if handle is not None:
            return self._change(job.job_id, lambda job: lifecycle.mark_launched(job, attempt.number, handle, self._clock()))
        if attempt.claimed_by is not None:
            return self._recover_claimed(job)
        if job.status in (Status.CANCELLING, Status.PAUSING):
            return self._mark_lost(job)
        try:
            job = self._replace(job, lifecycle.relaunch(job, attempt.number, self._clock()))
        except StaleRevision:
            return job  # somebody else sends it
        return self._launch_attempt(job)

    def _recover_claimed(self, job: Job) -> Job:
        """A process claimed the attempt and cannot be found: it lives as long as it is heard of, and is gone after that."""
        if (result := self._read_result(job)) is not None:
            return self.finish(job.job_id, result)
        return self._mark_lost(job) if self._is_unresponsive(job) else job

    def _launch_attempt(self, job: Job) -> Job:
        """Hand the current attempt to the compute and note its handle."""
        attempt = job.attempt
        assert attempt is not None
        try:
            spec = self._render_spec(job)
            self._configs.write(spec_key(job.job_id), spec.model_dump_json(indent=1).encode())
            handle = self._launcher.launch(self._build_launch_request(job, attempt.number))
        except (Unavailable, StorageError) as error:
            why = f"{error.message} {error.hint}".strip() if isinstance(error, Unavailable) else str(error)
            log.warning("launch delayed", extra={"job_id": job.job_id, "attempt": attempt.number, "error": why})
            return self._change(job.job_id, lambda job: lifecycle.delay_launch(job, attempt.number, why, self._clock()))
        except (LaunchFailed, NotFound) as error:
            failure = Failure(code="launch_failed", message=error.message, hint=error.hint)
            job = self._change(job.job_id, lambda job: lifecycle.mark_launch_failed(job, attempt.number, failure, self._clock()))
            self._delete_secrets(job)
            return job
        return self._change(job.job_id, lambda job: lifecycle.mark_launched(job, attempt.number, handle, self._clock()))

    def _render_spec(self, job: Job) -> JobSpec:
        return JobSpec(
            job_id=job.job_id,
            job_name=job.job_name,
            tenant_id=job.tenant_id,
            project_id=job.project_id,
            training_config=job.training_config,
            dataset=self._require_dataset(job.processed_dataset_id, job.tenant_id),
            stores=StoreUrls(datasets=self._datasets.url, models=self._models.url, configs=self._configs.url),
            checkpoints_prefix=checkpoints_prefix(job.job_id, job.project_id),
            resume_from_attempt=job.resume_from_attempt,
            export_of=job.export_of,
        )

    def _build_launch_request(self, job: Job, number: int) -> LaunchRequest:
        environment = self._attempt_environment | {
            "JOB_ID": job.job_id,
            "JOB_ATTEMPT": str(number),
            "JOB_TOKEN": self._tokens.sign_attempt_token(job.job_id, number),
            "JOB_SPEC_STORE_URL": self._configs.url,
        }
        name = attempt_name(job.job_id, number)
        return LaunchRequest(name=name, job_id=job.job_id, attempt=number, environment=environment, profile=job.hardware)

    def _should_poll(self, job: Job) -> bool:
        """Whether it is worth asking the compute: always for a local one, where asking is free."""
        return self._launcher.polling_is_free or job.status is Status.CANCELLING or self._is_unresponsive(job)

    def _is_unresponsive(self, job: Job) -> bool:
        return self._is_heartbeat_expired(job, self.find_heartbeat(job))

    def _is_heartbeat_expired(self, job: Job, heartbeat: Heartbeat | None) -> bool:
        attempt = job.attempt
        last_sign = heartbeat.received_at if heartbeat else (attempt.launched_at if attempt else None) or job.updated_at
        return self._clock() - last_sign > self._limits.heartbeat_timeout

    def _handle_ended(self, job: Job) -> Job:
        """The compute is gone. Its last word may have been written just before."""
        assert job.attempt is not None
        result = self._read_result(job)
        return self.finish(job.job_id, result) if result else self._mark_lost(job)

    def _mark_lost(self, job: Job) -> Job:
        number, told, saved_step = len(job.attempts), self._read_exit_reason(job), self._find_last_checkpoint_step(job)
        reason, preempted = (told.failure, told.preempted) if told else (None, False)

        def vanished(job: Job) -> Job:
            return lifecycle.mark_lost(job, number, self._clock(), reason, preempted=preempted, last_checkpoint_step=saved_step)

        job = self._change(job.job_id, vanished)
        if job.status.is_final:
            self._delete_secrets(job)
        self._wake(job.job_id)
        return job

    def _read_exit_reason(self, job: Job) -> ExitReason | None:
        """What the compute tells about the end of the current attempt. Raises Unavailable: then the judgement waits."""
        handle = job.attempt.handle if job.attempt else None
        return self._launcher.get_exit_reason(handle) if handle and isinstance(self._launcher, ExitReasonReader) else None

    def _find_last_checkpoint_step(self, job: Job) -> int | None:
        """The newest checkpoint of the current attempt: it may have been killed before it told."""
        prefix, number = checkpoints_prefix(job.job_id, job.project_id), len(job.attempts)
        found = list_checkpoints(self._models, prefix, number)
        return max((stored.checkpoint.step for stored in found if stored.checkpoint.attempt == number), default=None)

    def _log_location(self, job: Job, number: int) -> str:
        handle = job.attempts[number - 1].handle
        return self._launcher.log_location(handle) if handle and isinstance(self._launcher, LogLocator) else ""

    def _read_result(self, job: Job) -> Result | None:
        assert job.attempt is not None
        try:
            return Result.load(self._configs.read(result_key(job.job_id, job.attempt.number)))
        except NoSuchObject:
            return None
        except ValidationError:
            log.error("result is not readable", extra={"job_id": job.job_id, "attempt": job.attempt.number})
            return None

    def _escalate_cancel(self, job: Job, handle: str) -> None:
        """The directive was given; an attempt that is too busy to hear it gets signals."""
        waited = self._clock() - job.status_changed_at
        if waited >= self._limits.cancel_grace:
            self._launcher.cancel(handle, force=waited >= self._limits.kill_grace)

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _submit(
        self, request: TrainRequest, tenant_id: str, idempotency_key: str | None, digest: str, cloned_from: str | None = None
    ) -> Job:
        check_supported(request.training_config, self._launcher.get_capabilities(request.hardware))
        dataset = self._require_dataset(request.processed_dataset_id, tenant_id)
        check_dataset_compatible(request.training_config, dataset)
        check_embedding_models(request.training_config, self._models)
        check_token(request.training_config, extract_request_secrets(request).get(HF_SECRET))
        request = request.model_copy(update={"training_config": add_deployment_trackers(request.training_config, self._trackers)})
        secrets = extract_request_secrets(request)
        check_hub(request.training_config, secrets.get(HF_SECRET), self._hub, self._models)
        now = self._clock()
        job = Job(
            job_id=make_job_id(request.processed_dataset_id, request.training_config.base_model_id, self._random_suffix()),
            tenant_id=tenant_id,
            project_id=request.project_id,
            job_name=request.job_name,
            processed_dataset_id=request.processed_dataset_id,
            training_config=redact(request.training_config),
            secret_names=tuple(sorted(secrets)),
            hardware=request.hardware or self._launcher.profiles[0],
            cloned_from=cloned_from,
            status=Status.QUEUED,
            created_at=now,
            updated_at=now,
            status_changed_at=now,
        )
        return self._create_and_wake(job, secrets, idempotency_key, digest)

    def _create_and_wake(self, job: Job, secrets: dict[str, str], idempotency_key: str | None, digest: str) -> Job:
        """Keep a new job; its secrets go first, so that no attempt can start without them."""
        if secrets:
            self._secrets.put(job.job_id, secrets)
        kept = self._create(job, IdempotencyKey(idempotency_key, digest) if idempotency_key else None)
        self._wake(kept.job_id)
        return kept

    def _refresh_secrets(self, job: Job, request: ContinuationOptions) -> None:
        """Keep what is sent again beside what is still there. Raises InvalidRequest when the job then lacks one that it had."""
        renewed = resent_secrets(request)
        for name in renewed.keys() - set(job.secret_names):
            raise InvalidRequest(
                f"{job.job_id} was made without {name}, and goes on without it", hint="leave it out", param=_secret_param(name)
            )
        if not job.secret_names:
            return
        stored = self._secrets.read(job.job_id)
        known = deployment_tracker_secrets(job.training_config, self._trackers) | stored | renewed
        for name in job.secret_names:
            if name not in known:
                hint = "secrets are destroyed when a job ends, and expire after 30 days"
                message = f"{name} is needed again to go on with {job.job_id}; send it in the body"
                raise InvalidRequest(message, hint=hint, param=_secret_param(name))
        if known != stored:
            self._secrets.put(job.job_id, known)

    def _extend_config(self, job: Job, request: ContinuationOptions) -> TrainingConfig:
        """The job's configuration with what the request changes. Raises InvalidRequest for what would not be safe, Unsupported."""
        config = extend_training(job.training_config, request)
        if request.hardware:
            check_supported(config, self._launcher.get_capabilities(request.hardware))
        return config

    def _write_manifest(self, job: Job) -> Job:
        """Write the manifest of a completed job, for who reads the bucket alone; whoever sees the job next does it if this fails.

        Only now, for now nothing can take the job's place any more: an attempt that was given up cannot get here.
        """
        if job.status is not Status.COMPLETED or job.manifest_written or not job.artifacts:
            return job
        number, now = len(job.attempts), self._clock()
        manifest = PublishManifest(job_id=job.job_id, attempt=number, artifacts=job.artifacts, created_at=job.finished_at or now)
        try:
            self._models.write(manifest_key(job.job_id), manifest.model_dump_json(indent=1).encode())
            return self._change(job.job_id, lambda job: lifecycle.mark_manifest_written(job, now))
        except (StorageError, Unavailable, NotFound) as error:
            log.warning("manifest not written yet", extra={"job_id": job.job_id, "error": str(error)})
            return job

    def _create(self, job: Job, idempotency: IdempotencyKey | None) -> Job:
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
            job = self._store.find_job(job_id) or _job_not_found(job_id)
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

    def _require_dataset(self, dataset_id: str, tenant_id: str) -> Dataset:
        dataset = self._store.find_dataset(dataset_id)
        if dataset is None or dataset.tenant_id != tenant_id:
            raise NotFound(f"no dataset {dataset_id!r}", hint="POST /datasets uploads one", param="processed_dataset_id")
        return dataset

    def _delete_secrets(self, job: Job) -> None:
        if job.secret_names:
            self._secrets.destroy(job.job_id)

    def _sign_url(self, artifact: Artifact, file: ArtifactFile) -> str:
        key = artifact.key + file.path if artifact.key.endswith("/") else artifact.key
        return self._url_signer.sign_url(key, key.rpartition("/")[2], self._limits.link_ttl_s)

    def _delete_hub_repositories(self, job: Job, token: str | None) -> list[str]:
        """Remove the repositories that hold nothing but what this job pushed. Raises InvalidRequest before anything is removed."""
        pushed: dict[str, set[str]] = {}
        for push in (artifact.hub for artifact in job.artifacts if artifact.hub):
            pushed.setdefault(push.repo_id, set()).add(push.revision)
        if pushed and not token:
            hint = "send one that may delete the repository"
            raise InvalidRequest("delete_hub needs a token, in the header X-HF-Token", hint=hint, param="X-HF-Token")
        found = {repo_id: self._hub.list_commits(repo_id, token or "") for repo_id in pushed}
        for repo_id, commits in found.items():
            if commits is not None:
                check_only_our_commits(repo_id, commits, pushed[repo_id])
        there = [repo_id for repo_id, commits in found.items() if commits is not None]
        for repo_id in there:
            self._hub.delete_repository(repo_id, token or "")
        return [f"hf://{repo_id}" for repo_id in there]

    def _delete_files(self, job: Job) -> DeletionResult:
        resources: list[str] = []
        failures: list[str] = []
        for store, prefix in job_storage_prefixes(job, configs=self._configs, models=self._models):
            try:
                keys = delete_prefix(store, prefix) if prefix.endswith("/") else [prefix] * store.delete(prefix)
                resources += [f"{store.url}/{prefix}"] if keys else []
            except StorageError as error:
                failures.append(f"{store.url}/{prefix}: {error}")
        self._delete_secrets(job)
        if isinstance(self._launcher, LogReader):
            names = [attempt_name(job.job_id, attempt) for attempt in job.attempts]
            resources += [f"log of {name}" for name in names if self._launcher.delete_log(name)]
        return DeletionResult(resources=resources, failures=failures)


def request_digest(request: TrainRequest) -> str:
    """What makes two requests the same one: everything but the secrets, which may be renewed between two tries."""
    return _digest(request.model_dump(mode="json", exclude={"hf_token"}))


def extend_training(config: TrainingConfig, request: ContinuationOptions) -> TrainingConfig:
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


def export_config_for(config: TrainingConfig, request: ExportRequest) -> TrainingConfig:
    """The configuration of a job that exports a checkpoint: another export, no tracker, no gate. Raises InvalidRequest for a misfit."""
    export = request.export_config
    if config.method == "Full" and "adapter" in export.formats and "format" in export.model_fields_set:
        message = "format 'adapter' needs method LoRA or QLoRA; with method Full use 'merged'"
        raise InvalidRequest(message, param="export_config.format")
    if config.method == "Full" and export.include_lora_gguf:
        raise InvalidRequest("include_lora_gguf needs method LoRA or QLoRA, not Full", param="export_config.include_lora_gguf")
    judged = config.eval_config.model_copy(update={"promotion_gate": [], "lm_eval_tasks": [], "lm_eval_limit": None})
    changed = config.model_copy(update={"export_config": export, "eval_config": judged, **dict.fromkeys(DeploymentTrackers.model_fields)})
    try:
        return type(config).model_validate(changed.model_dump())
    except ValidationError as error:
        why = error.errors()[0]
        raise InvalidRequest(why["msg"], param=why.get("ctx", {}).get("field")) from error


def describe_failed_checks(gate: Gate) -> str:
    """The checks of a gate that failed, for a person."""
    return "; ".join(f"{check.metric}: {check.reason or 'not passed'}" for check in gate.checks if not check.passed)


def make_job_id(dataset_id: str, base_model_id: str, suffix: str) -> str:
    """The seed's readable form, training_<dataset>_<model>_<tail>, with a random tail: two jobs never share an id."""
    dataset = dataset_id.removeprefix("dataset_")
    model = base_model_id.rpartition("/")[2]
    readable = [re.sub(r"[^A-Za-z0-9-]+", "-", part)[:40].strip("-") for part in (dataset, model)]
    return "_".join(["training", *readable, suffix])


def directive_for(job: Job) -> Directive:
    """What the current attempt should do."""
    match job.status:
        case Status.CANCELLING:
            return "cancel"
        case Status.PAUSING:
            return "pause"
        case _:
            return "continue"


def job_storage_prefixes(job: Job, *, configs: ObjectStore, models: ObjectStore) -> Sequence[tuple[ObjectStore, str]]:
    """Every place where a job's files can lie. The manifest goes first: readers stop believing in the rest."""
    return (
        (models, manifest_key(job.job_id)),
        *((models, f"{folder}/{job.job_id}/") for folder in JOB_FOLDERS),
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


def _apply_events(job: Job, number: int, events: Sequence[Event], now: datetime) -> Job:
    job = lifecycle.clear_suspicion(job, number, now)
    for event in events:
        job = lifecycle.apply_event(job, number, event, now)
    return job


def _no_checkpoint_error(job: Job) -> NotFound:
    """Why there is no checkpoint, and what would help."""
    if job.export_of:
        hint = f"POST /jobs/{job.export_of.job_id}/export exports it again"
        return NotFound(f"{job.job_id} trained nothing; it exported a checkpoint of {job.export_of.job_id}", hint=hint)
    if job.status.is_final:
        return NotFound(f"no checkpoint of {job.job_id} is kept", hint=f"POST /jobs/{job.job_id}/clone trains it once more")
    return NotFound(f"{job.job_id} is {job.status} and has no checkpoint yet", hint="POST /jobs/{id}/pause makes one")


def _secret_param(secret_name: str) -> str:
    """Where a body says a secret again."""
    return secret_name if secret_name in (HF_SECRET, WANDB_SECRET) else f"secrets.{secret_name}"


def _pick_artifact(job: Job, name: str | None) -> Artifact:
    known = ", ".join(artifact.name for artifact in job.artifacts)
    if name is None:
        by_use = sorted(job.artifacts, key=lambda artifact: DOWNLOAD_PREFERENCE.index(artifact.kind))
        if by_use:
            return by_use[0]
        raise NotFound(f"{job.job_id} has no artifacts")
    for artifact in job.artifacts:
        if artifact.name == name:
            return artifact
    raise NotFound(f"{job.job_id} has no artifact {name!r}; it has: {known}", param="artifact")


def _job_not_found(job_id: str) -> NoReturn:
    raise NotFound(f"no job {job_id!r}", param="job_id")
