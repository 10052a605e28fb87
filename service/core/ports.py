"""What the core needs from the world, in the core's own words. Adapters obey; each port has one contract suite."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

from schema.dataset import Dataset
from schema.events import Event, EventBatch
from schema.job import Failure, Job, Phase, Progress, Status
from storage import ObjectStore

Row = TypeVar("Row")
Wake = Callable[[str], None]  # called with a job's id when its next step can be taken

# --- records ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobSummary:
    """A job in a list: what can be shown without reading its whole record."""

    job_id: str
    job_name: str
    base_model_id: str
    status: Status
    modality: str
    trainer_type: str
    project_id: str | None
    created_at: datetime


@dataclass(frozen=True)
class JobQuery:
    """Which jobs, newest first. A None filter lets everything through."""

    tenant_id: str
    limit: int = 50
    after: str | None = None  # a cursor from an earlier page
    status: Status | None = None
    project_id: str | None = None
    modality: str | None = None
    trainer_type: str | None = None


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Some rows, and the cursor that continues behind them; None when there are no more."""

    rows: list[Row]
    next_cursor: str | None


@dataclass(frozen=True)
class IdempotencyKey:
    """A caller's promise that two requests are the same one. Scoped to the tenant, kept 24 hours."""

    key: str
    body_digest: str


@dataclass(frozen=True)
class StoredEvent:
    """An event with its place in the job's history. `cursor` grows within the job, as a number."""

    cursor: int
    attempt: int  # 0: written by the service
    seq: int
    at: datetime
    event: Event


@dataclass(frozen=True)
class Heartbeat:
    """The attempt's last sign of life: a record of its own, because it is written so often."""

    attempt: int
    received_at: datetime  # the service's clock
    next_seq: int
    phase: Phase | None = None
    progress: Progress | None = None


class JobStore(Protocol):
    """Durable records. Every write is all or nothing, and done when the call returns.

    A job's record is changed by compare-and-set on `revision`; nothing else guards it.
    Raises Unavailable when the database does not answer.
    """

    def create_job(self, job: Job, idempotency: IdempotencyKey | None = None) -> Job:
        """Keep a new job; or return the job made earlier under the same key. Raises IdempotencyConflict, Conflict."""
        ...

    def find_job(self, job_id: str) -> Job | None:
        """The record, or None."""
        ...

    def replace_job(self, job: Job, events: Sequence[Event] = ()) -> Job:
        """Store `job` over the revision it was read at, with what there is to tell; returns it at its new revision.

        Raises StaleRevision when the stored revision is another one, and NotFound when the job is gone.
        """
        ...

    def list_jobs(self, query: JobQuery) -> Page[JobSummary]:
        """A page of a tenant's jobs, newest first. Raises InvalidRequest for a cursor that is not ours."""
        ...

    def list_queued_jobs(self, limit: int) -> list[Job]:
        """Jobs that wait to be launched, over all tenants, oldest first."""
        ...

    def list_active_jobs(self, limit: int) -> list[Job]:
        """Jobs whose attempt may hold compute, over all tenants, oldest first."""
        ...

    def list_jobs_using_dataset(self, dataset_id: str) -> list[str]:
        """Ids of jobs that are not final and train on the dataset."""
        ...

    def delete_job(self, job_id: str) -> bool:
        """Forget the job, its events and its liveness. False when it was not there."""
        ...

    def append_events(self, job_id: str, attempt: int, batch: EventBatch, now: datetime) -> int:
        """Keep what is new in the batch and the sign of life; returns the next seq not seen. Repeats are harmless."""
        ...

    def list_events(self, job_id: str, after: int = 0, limit: int = 500) -> list[StoredEvent]:
        """Events behind a cursor, oldest first."""
        ...

    def find_heartbeat(self, job_id: str) -> Heartbeat | None:
        """The last sign of life of the job's attempts."""
        ...

    def create_dataset(self, dataset: Dataset) -> None:
        """Keep a new dataset."""
        ...

    def find_dataset(self, dataset_id: str) -> Dataset | None:
        """The record, or None."""
        ...

    def list_datasets(self, tenant_id: str, limit: int = 50, after: str | None = None) -> Page[Dataset]:
        """A page of a tenant's datasets, newest first."""
        ...

    def delete_dataset(self, dataset_id: str) -> bool:
        """Forget the record. False when it was not there."""
        ...

    def ping(self) -> None:
        """Raise Unavailable unless a read would succeed now."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


# --- objects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Buckets:
    """The object stores, by what is stored there. On a laptop all three are one folder."""

    configs: ObjectStore  # specs and results
    datasets: ObjectStore
    models: ObjectStore  # base models, checkpoints, artifacts


# --- compute ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaunchRequest:
    """One attempt to start. `name` is unique to it and can be looked up; `environment` holds its token."""

    name: str
    job_id: str
    attempt: int
    environment: Mapping[str, str] = field(repr=False)
    profile: str | None = None  # a profile of the launcher; None is its default


ExecutionState = Literal["running", "ended", "unknown"]


@dataclass(frozen=True)
class RuntimeCapabilities:
    """What the compute behind a launcher can do, as far as it is known."""

    device: str  # "cpu", "cuda"
    device_name: str
    methods: tuple[str, ...]
    providers: tuple[str, ...]
    modalities: tuple[str, ...]
    trainer_types: tuple[str, ...]
    flash_attention_2: bool
    gguf: bool
    onnx: bool = False
    lm_eval: bool = False  # lm-evaluation-harness is installed
    notes: Mapping[str, str] = field(default_factory=dict[str, str])  # why something is missing, by name


class Launcher(Protocol):
    """Starts, checks and ends attempts somewhere.

    Not promised: that an attempt which was launched also starts, and that one which was cancelled is gone at once.
    """

    name: str
    polling_is_free: bool  # asking costs no call over a network, so it can be done at every turn
    profiles: tuple[str, ...]  # kinds of hardware that a job may ask for; the first is the default

    def launch(self, launch_request: LaunchRequest) -> str:
        """Start the attempt and return its handle. Raises LaunchFailed when it can never start, Unavailable when it may later."""
        ...

    def find_handle(self, name: str) -> str | None:
        """The handle of an attempt launched under that name, by this process or an earlier one. Raises Unavailable."""
        ...

    def check(self, handle: str) -> ExecutionState:
        """Whether the attempt still holds compute. `unknown` is not `ended`."""
        ...

    def cancel(self, handle: str, *, force: bool) -> None:
        """Ask the attempt to stop; with `force`, end it. Harmless for one that has ended."""
        ...

    def count_free_slots(self, active_jobs: int) -> int:
        """How many attempts may be launched now, when the records say that `active` jobs hold compute or may hold some."""
        ...

    def get_capabilities(self, profile: str | None = None) -> RuntimeCapabilities:
        """What an attempt can do there. Raises Unsupported for a profile that there is not."""
        ...

    def close(self) -> None:
        """The service stops: leave nothing behind that nobody would look after."""
        ...


@dataclass(frozen=True)
class ExitReason:
    """What the compute tells about an attempt that has ended without a last word."""

    failure: Failure
    preempted: bool = False  # its compute was taken away through no fault of the job, which may go on elsewhere


@runtime_checkable
class ExitReasonReader(Protocol):
    """Extra power of a launcher: it knows why an attempt ended."""

    def get_exit_reason(self, handle: str) -> ExitReason | None:
        """The reason, in our words; None when the compute knows of none. Raises Unavailable."""
        ...


@runtime_checkable
class LogLocator(Protocol):
    """Extra power of a launcher: it says where the output of an attempt can be read, if not here."""

    def log_location(self, handle: str) -> str:
        """A sentence for a person: an address or a command."""
        ...


@dataclass(frozen=True)
class LogPage:
    """A part of an attempt's output, and where the next part begins (bytes)."""

    text: str
    next_offset: int


@runtime_checkable
class LogReader(Protocol):
    """Extra power of a launcher: the output of its attempts can be read while they run."""

    def read_log(self, name: str, offset: int, max_bytes: int) -> LogPage | None:
        """At most `limit` bytes from `offset`; None when the attempt left no output here."""
        ...

    def delete_log(self, name: str) -> bool:
        """Remove the output. False when there was none."""
        ...


# --- secrets and links -----------------------------------------------------------------------------------------------


class SecretStore(Protocol):
    """Keeps the secrets of a job until the job ends, and no longer."""

    def put(self, job_id: str, secrets: Mapping[str, str]) -> None:
        """Keep the secrets of a job, in place of any before."""
        ...

    def read(self, job_id: str) -> dict[str, str]:
        """The secrets of a job; empty when there are none."""
        ...

    def destroy(self, job_id: str) -> bool:
        """Make the secrets unreadable for good. False when there were none."""
        ...

    def iter_job_ids(self) -> Iterator[str]:
        """Ids of jobs that have secrets here: for finding orphans."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class UrlSigner(Protocol):
    """Turns an object of the model bucket into a link that works for a while without any other credential."""

    def sign_url(self, key: str, filename: str, expires_s: int) -> str:
        """An absolute URL, or a path that starts with `/` when this service itself serves it."""
        ...


# --- the Hugging Face Hub ----------------------------------------------------------------------------------------------

# gated: somebody must accept a licence first. absent: there is no such repository, or it is private and not for this token.
HubAccess = Literal["yes", "gated", "absent", "refused", "bad_token", "unknown"]


@dataclass(frozen=True)
class HubAccount:
    """Whose token it is, and what it may do, in the Hub's words."""

    user: str
    role: str  # "read", "write", "fineGrained", or a kind that came later
    orgs: Mapping[str, str]  # organisation → the user's role in it
    writable: frozenset[str] = frozenset()  # of a fine-grained token: the namespaces and repositories that it may write


class Hub(Protocol):
    """What the Hub says about a token and a repository. It never raises for a Hub that is not there: then nothing is known."""

    def check_read_access(self, repo_id: str, token: str | None) -> HubAccess:
        """Whether the files of a model can be read with the token, or by anybody."""
        ...

    def check_write_access(self, repo_id: str, token: str) -> HubAccess:
        """Whether a model repository that is there can be written to with the token."""
        ...

    def get_account(self, token: str) -> HubAccount | None:
        """Whose token it is; None when that cannot be known."""
        ...

    def list_commits(self, repo_id: str, token: str) -> list[str] | None:
        """The hashes of a repository's commits, oldest first; None when there is no such repository. Raises Unavailable."""
        ...

    def delete_repository(self, repo_id: str, token: str) -> None:
        """Remove a model repository for good. Raises Unavailable, InvalidRequest when the token may not."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...
