"""The verbs of a job: submit, find, report, cancel, delete, reconcile. The order of the lines is the promise.

The record goes first: a job exists once it is written, and everything that follows can be done again by
`reconcile` from the record alone. The spec is rendered from the record when an attempt is launched.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NoReturn

from pydantic import SecretStr, ValidationError

from schema.dataset import Dataset
from schema.events import BatchAnswer, Directive, Event, EventBatch
from schema.job import Artifact, ArtifactFile, Failure, Job, Status
from schema.requests import TrainRequest
from schema.result import Result
from schema.spec import ClaimAnswer, JobSpec, StoreUrls, attempt_name, manifest_key, result_key, spec_key
from schema.training import TrainingConfig
from service.core import lifecycle
from service.core.capabilities import check_fits, check_supported
from service.core.errors import Conflict, LaunchFailed, NotFound, StaleRevision, TunesmithError, Unavailable
from service.core.ports import (
    Ended,
    EndSource,
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
from service.core.tokens import TokenSigner
from storage import NoSuchObject, ObjectStore, StorageError, delete_below
from storage.patience import time_left

log = logging.getLogger(__name__)

ACTIVE_LIMIT = 1000  # jobs looked after in one turn; the oldest come first
CAS_TRIES = 10  # writers of one job are few: its attempt, one caller, one reconciler
REDACTED = SecretStr("**********")
WANDB_SECRET = "wandb_api_key"
HF_SECRET = "hf_token"
STEPS_AT_ONCE = 8  # a thousand jobs of a tenth of a second each are looked after within a scheduler's minute
STEP_NEEDS_S = 2.0  # a launch is a handful of calls; begun with less, it would only be cut off half-way


@dataclass(frozen=True)
class Limits:
    """How long the service waits, and for what."""

    silent_after: timedelta = timedelta(seconds=60)  # no sign of life: ask the compute
    cancel_grace: timedelta = timedelta(seconds=1)  # an attempt that knows of its cancel may tidy up; then a signal
    kill_grace: timedelta = timedelta(seconds=8)  # and then no more
    launch_lookup: timedelta = timedelta(seconds=5)  # an attempt without a handle is looked up by name this long after it was sent
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

    @property
    def link_life_s(self) -> int:
        """How long a download link works, in seconds."""
        return self._limits.link_life_s

    # --- callers -----------------------------------------------------------------------------------------------------

    def submit(self, request: TrainRequest, tenant_id: str, idempotency_key: str | None = None) -> Job:
        """Make a job of a request: durable when this returns, launched soon after.

        Raises NotFound, InvalidRequest, Unsupported, IdempotencyConflict before anything is kept.
        """
        check_supported(request.training_config, self._launcher.hardware(request.hardware))
        dataset = self._own_dataset(request.processed_dataset_id, tenant_id)
        check_fits(request.training_config, dataset)
        secrets = secrets_of(request)
        now = self._clock()
        job = Job(
            job_id=job_id_for(request, self._random_tail()),
            tenant_id=tenant_id,
            project_id=request.project_id,
            job_name=request.job_name,
            processed_dataset_id=request.processed_dataset_id,
            training_config=without_secrets(request.training_config),
            secret_names=tuple(sorted(secrets)),
            hardware=request.hardware or self._launcher.profiles[0],
            status=Status.QUEUED,
            created_at=now,
            updated_at=now,
            status_changed_at=now,
        )
        if secrets:  # first, so that no attempt can start without them
            self._secrets.put(job.job_id, secrets)
        kept = self._keep(job, IdempotencyKey(idempotency_key, digest_of(request)) if idempotency_key else None)
        self._wake(kept.job_id)
        return kept

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

    def download(self, job_id: str, tenant_id: str, artifact_name: str | None) -> tuple[Artifact, list[tuple[ArtifactFile, str]]]:
        """Links to the files of an artifact, the most useful one by default: GGUF, merged, adapter. Raises NotFound, Conflict."""
        job = self.find(job_id, tenant_id)
        if job.status is not Status.COMPLETED:
            raise Conflict(f"{job_id} is {job.status}; there is something to download once it is completed")
        artifact = _pick_artifact(job, artifact_name)
        return artifact, [(file, self._link(artifact, file)) for file in artifact.files]

    def delete(self, job_id: str, tenant_id: str) -> Deleted | None:
        """Stop the job, remove its files and then its record. None: it is still stopping, repeat. Raises NotFound."""
        job = self.find(job_id, tenant_id)
        if not job.status.is_final:
            job = self.cancel(job_id, tenant_id)
        if not job.status.is_final:
            return None
        deleted = self._delete_files(job)
        if not deleted.failures:
            self._store.delete_job(job_id)
        return deleted

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
        if any(lifecycle.absorbed(job, number, event, now) is not job for event in told):
            job = self._change(job_id, lambda job: _absorb_all(job, number, told, now))
        return BatchAnswer(directive=directive_for(job), next_seq=next_seq)

    def finish(self, job_id: str, result: Result) -> Job:
        """Take an attempt's last word. Repeats are harmless. Raises Fenced, NotFound."""
        job = self._change(job_id, lambda job: lifecycle.finished(job, result, self._clock()))
        if job.status.is_final:
            self._forget_secrets(job)
        self._wake(job_id)
        return job

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
        if not self._launcher.check_is_cheap and job.attempt.claimed_by is not None:  # before that its machine may still be starting
            log.warning("attempt is silent", extra={"job_id": job.job_id, "attempt": job.attempt.number, "compute_says": state})
        return job

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
        if job.status is Status.CANCELLING:
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
        )

    def _launch_order(self, job: Job, number: int) -> LaunchOrder:
        environment = {
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
        number, told = len(job.attempts), self._why_ended(job)
        reason, preempted = (told.failure, told.preempted) if told else (None, False)
        job = self._change(job.job_id, lambda job: lifecycle.vanished(job, number, self._clock(), reason, preempted=preempted))
        if job.status.is_final:
            self._forget_secrets(job)
        self._wake(job.job_id)
        return job

    def _why_ended(self, job: Job) -> Ended | None:
        """What the compute tells about the end of the current attempt. Raises Unavailable: then the judgement waits."""
        handle = job.attempt.handle if job.attempt else None
        return self._launcher.why_ended(handle) if handle and isinstance(self._launcher, EndSource) else None

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


def secrets_of(request: TrainRequest) -> dict[str, str]:
    """The secrets in a request, by name."""
    found = {
        HF_SECRET: request.hf_token,
        WANDB_SECRET: request.training_config.wandb_config and request.training_config.wandb_config.api_key,
    }
    return {name: secret.get_secret_value() for name, secret in found.items() if secret}


def without_secrets(config: TrainingConfig) -> TrainingConfig:
    """The configuration as it may be kept and shown."""
    wandb = config.wandb_config
    if wandb is None or wandb.api_key is None:
        return config
    return config.model_copy(update={"wandb_config": wandb.model_copy(update={"api_key": REDACTED})})


def digest_of(request: TrainRequest) -> str:
    """What makes two requests the same one: everything but the secrets, which may be renewed between two tries."""
    body = request.model_dump(mode="json", exclude={"hf_token"})
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def job_id_for(request: TrainRequest, tail: str) -> str:
    """The seed's readable form, training_<dataset>_<model>_<tail>, with a random tail: two jobs never share an id."""
    dataset = request.processed_dataset_id.removeprefix("dataset_")
    model = request.training_config.base_model_id.rpartition("/")[2]
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


def checkpoints_prefix(job: Job) -> str:
    """Where a job's resumable state lies, in the model bucket."""
    if job.project_id:
        return f"checkpoints/projects/{job.project_id}/jobs/{job.job_id}/"
    return f"checkpoints/test-jobs/job_{job.job_id}/"


def owned_prefixes(job: Job, *, configs: ObjectStore, models: ObjectStore) -> Sequence[tuple[ObjectStore, str]]:
    """Every place where a job's files can lie. The manifest goes first: readers stop believing in the rest."""
    return (
        (models, manifest_key(job.job_id)),
        (models, f"trained_adapters/{job.job_id}/"),
        (models, f"merged_models/{job.job_id}/"),
        (models, f"gguf_models/{job.job_id}/"),
        (models, checkpoints_prefix(job)),
        (configs, spec_key(job.job_id)),
        (configs, f"results/{job.job_id}/"),
    )


def _absorb_all(job: Job, number: int, events: Sequence[Event], now: datetime) -> Job:
    for event in events:
        job = lifecycle.absorbed(job, number, event, now)
    return job


def _pick_artifact(job: Job, name: str | None) -> Artifact:
    known = ", ".join(artifact.name for artifact in job.artifacts)
    if name is None:
        by_use = sorted(job.artifacts, key=lambda artifact: ("gguf", "merged", "adapter").index(artifact.kind))
        if by_use:
            return by_use[0]
        raise NotFound(f"{job.job_id} has no artifacts")
    for artifact in job.artifacts:
        if artifact.name == name:
            return artifact
    raise NotFound(f"{job.job_id} has no artifact {name!r}; it has: {known}", param="artifact")


def _raise_gone(job_id: str) -> NoReturn:
    raise NotFound(f"no job {job_id!r}", param="job_id")
