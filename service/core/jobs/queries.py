"""What callers read of a job: its current state, its log, links to its artifacts."""

from schema.job import Artifact, ArtifactFile, Gate, Job, Status
from schema.spec import attempt_name
from service.core.errors import Conflict, NotFound
from service.core.jobs.limits import Limits
from service.core.jobs.manifest import write_manifest
from service.core.jobs.repository import JobRepository
from service.core.ports import Heartbeat, Launcher, LogLocator, LogPage, LogReader, StoredEvent, UrlSigner, Wake
from storage import ObjectStore

LINK_TTL_S = 900  # how long a download link works


class JobQueries:
    """Reads jobs for callers. Reading a silent job also reconciles it, where no background task does."""

    def __init__(
        self, repository: JobRepository, *, launcher: Launcher, models: ObjectStore, url_signer: UrlSigner, limits: Limits, wake: Wake
    ) -> None:
        self._repository = repository
        self._launcher = launcher
        self._models = models
        self._url_signer = url_signer
        self._limits = limits
        self._wake = wake

    def get_refreshed(self, job_id: str, tenant_id: str) -> tuple[Job, Heartbeat | None]:
        """A tenant's job and its heartbeat. An active job whose heartbeat has expired is reconciled first. Raises NotFound."""
        job = self._repository.find(job_id, tenant_id)
        heartbeat = self._repository.find_heartbeat(job)
        job = write_manifest(self._repository, self._models, job)
        if not job.status.is_active or self._launcher.polling_is_free:
            return job, heartbeat
        if not self._limits.is_heartbeat_expired(job, heartbeat, self._repository.clock()):
            return job, heartbeat
        self._wake(job_id)
        return self._repository.find(job_id, tenant_id), heartbeat

    def list_events(self, job_id: str, tenant_id: str, after: int, limit: int) -> list[StoredEvent]:
        """A page of a job's events, oldest first. Raises NotFound."""
        self._repository.find(job_id, tenant_id)
        return self._repository.store.list_events(job_id, after, limit)

    def read_log(self, job_id: str, tenant_id: str, attempt: int | None, offset: int, limit: int) -> tuple[int, LogPage]:
        """The number of an attempt, by default the latest, and a part of its output. Raises NotFound. `offset` and `limit` are in bytes."""
        job = self._repository.find(job_id, tenant_id)
        number = attempt or len(job.attempts)
        if number == 0:
            return 0, LogPage(text="", next_offset=0)
        if number > len(job.attempts):
            raise NotFound(f"{job_id} has no attempt {number}; it has {len(job.attempts)}", param="attempt")
        if not isinstance(self._launcher, LogReader):
            handle = job.attempts[number - 1].handle
            location = self._launcher.log_location(handle) if handle and isinstance(self._launcher, LogLocator) else ""
            raise NotFound(f"the launcher {self._launcher.name!r} keeps its logs elsewhere", hint=location)
        page = self._launcher.read_log(attempt_name(job_id, number), offset, limit)
        return number, page or LogPage(text="", next_offset=offset)

    def create_download_links(
        self, job_id: str, tenant_id: str, artifact_name: str | None
    ) -> tuple[Artifact, list[tuple[ArtifactFile, str]]]:
        """Links to the files of an artifact, by default the one that its family prefers. Raises NotFound, Conflict, Unavailable."""
        job = self._repository.find(job_id, tenant_id)
        if job.status is not Status.COMPLETED:
            raise Conflict(f"{job_id} is {job.status}; its artifacts can be downloaded when it is completed")
        if job.gate and not job.gate.passed and not job.artifacts:
            message = f"{job_id} published nothing because it did not pass the promotion gate: {_describe_failed_checks(job.gate)}"
            raise Conflict(message, hint=f"POST /jobs/{job_id}/export exports it anyway")
        job = write_manifest(self._repository, self._models, job)
        artifact = _pick_artifact(job, artifact_name)
        return artifact, [(file, self._sign_url(artifact, file)) for file in artifact.files]

    def _sign_url(self, artifact: Artifact, file: ArtifactFile) -> str:
        key = artifact.key + file.path if artifact.key.endswith("/") else artifact.key
        return self._url_signer.sign_url(key, key.rpartition("/")[2], LINK_TTL_S)


def _describe_failed_checks(gate: Gate) -> str:
    return "; ".join(f"{check.metric}: {check.reason or 'not passed'}" for check in gate.checks if not check.passed)


def _pick_artifact(job: Job, name: str | None) -> Artifact:
    """The artifact of that name, or the most useful one. Raises NotFound."""
    if name is None:
        if not job.artifacts:
            raise NotFound(f"{job.job_id} has no artifacts")
        preferred = [info.name for info in job.training_config.artifact_kinds]
        return min(job.artifacts, key=lambda artifact: preferred.index(artifact.kind) if artifact.kind in preferred else len(preferred))
    for artifact in job.artifacts:
        if artifact.name == name:
            return artifact
    known = ", ".join(artifact.name for artifact in job.artifacts)
    raise NotFound(f"{job.job_id} has no artifact {name!r}; it has: {known}", param="artifact")
