"""What callers read of a job: its current state, its log, links to its artifacts."""

from dataclasses import dataclass, replace
from datetime import datetime

from schema.job import Artifact, ArtifactFile, ComputeRate, Gate, Job, Status
from schema.spec import attempt_name
from service.core.accrual import Spending, sum_spending
from service.core.errors import Conflict, NotFound
from service.core.event_store import Heartbeat, StoredEvent
from service.core.job_lists import JobQuery, ListedJob
from service.core.jobs.budget import Budget
from service.core.jobs.checkpoints import StoredCheckpoint, list_checkpoints
from service.core.jobs.manifest import write_manifest
from service.core.jobs.repository import JobRepository
from service.core.launchers import LauncherPool
from service.core.links import UrlSigner
from service.core.ports import LogLocator, LogPage, LogReader, Page, Wake
from service.core.principals import Principal, Scope
from service.core.suggestions import did_you_mean
from storage import ObjectStore

LINK_TTL_S = 900  # how long a download link works
MAX_TAIL_BYTES = 4 << 20  # of an attempt's output, in which its last lines are looked for
MAX_PAGE_BYTES = 1 << 20  # of stored events in one answer; the event that reaches it is still part of it


@dataclass(frozen=True)
class JobView:
    """A job as a caller sees it."""

    job: Job
    heartbeat: Heartbeat | None  # of its current attempt
    pending_reason: str | None  # why it does not run yet, where that is known
    spending: Spending  # of all attempts until now
    rate: ComputeRate  # of the current attempt, else of the placement that the job prefers
    now: datetime


class JobQueries:
    """Reads jobs for callers. Reading a silent job also reconciles it, where no background task does."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        launchers: LauncherPool,
        budget: Budget,
        models: ObjectStore,
        url_signer: UrlSigner,
        wake: Wake,
    ) -> None:
        self._repository = repository
        self._launchers = launchers
        self._budget = budget
        self._models = models
        self._url_signer = url_signer
        self._wake = wake

    def list_jobs(self, principal: Principal, query: JobQuery) -> Page[ListedJob]:
        """A page of the tenant's jobs, newest first. Raises InvalidRequest for a malformed cursor."""
        principal.require(Scope.JOBS_READ)
        return self._repository.store.list_jobs(replace(query, tenant_id=principal.tenant_id))

    def count_jobs_by_status(self, principal: Principal, query: JobQuery) -> dict[Status, int] | None:
        """How many of the tenant's jobs that match the query, whatever its statuses, have each status; None: too many to count."""
        principal.require(Scope.JOBS_READ)
        return self._repository.store.count_jobs_by_status(replace(query, tenant_id=principal.tenant_id))

    def get_refreshed(self, principal: Principal, job_id: str) -> JobView:
        """A job with what is known of it outside its record. A silent job is reconciled first. Raises NotFound."""
        principal.require(Scope.JOBS_READ)
        job = write_manifest(self._repository, self._models, self._repository.find(principal, job_id))
        heartbeat = self._repository.find_heartbeat(job)
        if self._is_silent(job, heartbeat):
            self._wake(job_id)
            job = self._repository.find(principal, job_id)
        return self._make_view(job, heartbeat)

    def describe(self, job: Job) -> JobView:
        """A job with its heartbeat, and why it waits."""
        return self._make_view(job, self._repository.find_heartbeat(job))

    def _make_view(self, job: Job, heartbeat: Heartbeat | None) -> JobView:
        attempt = job.attempt
        pending_reason = attempt.pending_reason if attempt and job.status.is_active else None
        if job.status is Status.QUEUED:
            pending_reason = self._launchers.describe_missing(job) or self._budget.describe_wait(job)
        rate = attempt.rate if attempt and attempt.rate and job.status is not Status.QUEUED else self._budget.find_rate(job)
        now = self._repository.clock()
        return JobView(job, heartbeat, pending_reason, sum_spending(job, now), rate, now)

    def list_events(self, principal: Principal, job_id: str, after: int, limit: int) -> list[StoredEvent]:
        """A page of a job's events, oldest first: at most `limit`, and about MAX_PAGE_BYTES. Raises NotFound."""
        principal.require(Scope.JOBS_READ)
        self._repository.find(principal, job_id)
        return self._repository.store.list_events(job_id, after, limit, MAX_PAGE_BYTES)

    def find_last_cursor(self, principal: Principal, job_id: str) -> int:
        """The cursor of a job's newest event; 0 before the first. Raises NotFound."""
        principal.require(Scope.JOBS_READ)
        self._repository.find(principal, job_id)
        return self._repository.store.find_last_cursor(job_id)

    def list_checkpoints(self, principal: Principal, job_id: str) -> list[StoredCheckpoint]:
        """The stored checkpoints of a job, the one first that its next attempt tries first. Raises NotFound, StorageError."""
        principal.require(Scope.JOBS_READ)
        return list_checkpoints(self._models, self._repository.find(principal, job_id))

    def read_log(
        self, principal: Principal, job_id: str, attempt: int | None, offset: int, limit: int, *, whole_lines: bool = False
    ) -> tuple[int, LogPage]:
        """The number of an attempt, by default the latest, and a part of its output. Raises NotFound. `offset` and `limit` are in bytes.

        With `whole_lines` the part ends with a line end, if it has any.
        """
        number, reader = self._find_log(principal, job_id, attempt)
        name = attempt_name(job_id, number)
        page = reader.read_log(name, offset, limit, whole_lines=whole_lines) if reader else None
        return number, page or LogPage(text="", next_offset=offset if reader else 0)

    def find_log_tail(self, principal: Principal, job_id: str, attempt: int | None, lines: int) -> tuple[int, int]:
        """The number of an attempt, by default the latest, and where the last lines of its output begin (bytes). Raises NotFound."""
        number, reader = self._find_log(principal, job_id, attempt)
        return number, (reader.find_log_tail(attempt_name(job_id, number), lines, MAX_TAIL_BYTES) if reader else None) or 0

    def _find_log(self, principal: Principal, job_id: str, attempt: int | None) -> tuple[int, LogReader | None]:
        """The number of an attempt, by default the latest, and what reads its output; 0 and None before the first. Raises NotFound."""
        principal.require(Scope.JOBS_READ)
        job = self._repository.find(principal, job_id)
        number = attempt or len(job.attempts)
        if number == 0:
            return 0, None
        if number > len(job.attempts):
            raise NotFound(f"{job_id} has no attempt {number}; it has {len(job.attempts)}", param="attempt")
        launcher, name = self._launchers.find_for_attempt(job, number), job.attempts[number - 1].placement.launcher
        if launcher is None:
            raise NotFound(
                f"attempt {number} of {job_id} ran on the launcher {name!r}, which this deployment no longer has", param="attempt"
            )
        if not isinstance(launcher, LogReader):
            handle = job.attempts[number - 1].handle
            location = launcher.log_location(handle) if handle and isinstance(launcher, LogLocator) else ""
            raise NotFound(f"the launcher {name!r} keeps its logs elsewhere", hint=location)
        return number, launcher

    def create_download_links(
        self, principal: Principal, job_id: str, artifact_name: str | None
    ) -> tuple[Artifact, list[tuple[ArtifactFile, str]]]:
        """Links to the files of an artifact, by default the one that its family prefers. Raises NotFound, Conflict, Unavailable."""
        principal.require(Scope.JOBS_READ)
        job = self._repository.find(principal, job_id)
        if job.status is not Status.COMPLETED:
            raise Conflict(f"{job_id} is {job.status}; its artifacts can be downloaded when it is completed")
        if job.gate and not job.gate.passed and not job.artifacts:
            message = f"{job_id} published nothing because it did not pass the promotion gate: {_describe_failed_checks(job.gate)}"
            raise Conflict(message, hint=f"POST /jobs/{job_id}/export exports it anyway")
        job = write_manifest(self._repository, self._models, job)
        artifact = _pick_artifact(job, artifact_name)
        return artifact, [(file, self._sign_url(artifact, file)) for file in artifact.files]

    def _is_silent(self, job: Job, heartbeat: Heartbeat | None) -> bool:
        """Whether an active job should be reconciled now because asking its launcher costs a call, so that it is rarely asked."""
        launcher = self._launchers.find_for_attempt(job, len(job.attempts)) if job.status.is_active else None
        if launcher is None or launcher.polling_is_free:
            return False
        return launcher.limits.is_heartbeat_expired(job, heartbeat.received_at if heartbeat else None, self._repository.clock())

    def _sign_url(self, artifact: Artifact, file: ArtifactFile) -> str:
        key = artifact.file_key(file)
        return self._url_signer.sign_url(key, key.rpartition("/")[2], LINK_TTL_S)


def _describe_failed_checks(gate: Gate) -> str:
    return "; ".join(f"{check.metric}: {check.reason or 'not passed'}" for check in gate.checks if not check.passed)


def _pick_artifact(job: Job, name: str | None) -> Artifact:
    """The artifact of that name, or of those that the family recommends the one of its first kind. Raises NotFound."""
    if name is None:
        if not job.artifacts:
            raise NotFound(f"{job.job_id} has no artifacts")
        config = job.training_config
        recommended = [artifact for artifact in job.artifacts if config.recommends_artifact(artifact.name, artifact.fidelity)]
        preferred = [info.name for info in config.artifact_kinds]
        return min(
            recommended or job.artifacts,
            key=lambda artifact: preferred.index(artifact.kind) if artifact.kind in preferred else len(preferred),
        )
    for artifact in job.artifacts:
        if artifact.name == name:
            return artifact
    known = ", ".join(artifact.name for artifact in job.artifacts)
    raise NotFound(f"{job.job_id} has no artifact {name!r}; it has: {known}", hint=did_you_mean(name, known.split(", ")), param="artifact")
