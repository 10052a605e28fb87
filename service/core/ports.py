"""The ports: what the core needs from databases, compute, secret stores and the Hub. Each port has one contract suite."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

from schema.capabilities import EnvironmentManifest
from schema.dataset import Dataset
from schema.events import Event
from schema.job import Failure, Job, Status
from service.core.event_store import EventStore
from service.core.job_lists import JobEntry, JobQuery, ListedJob
from service.core.limits import Limits
from service.core.usage import UsageStore
from storage import ObjectStore

Row = TypeVar("Row")
Wake = Callable[[str], None]  # called with a job's id when its next step can be taken

# --- records ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Some rows, and the cursor of the next page; None on the last page."""

    rows: list[Row]
    next_cursor: str | None


@dataclass(frozen=True)
class IdempotencyKey:
    """Marks two requests of a tenant as the same one, for 24 hours."""

    key: str
    body_digest: str


class JobStore(EventStore, UsageStore, Protocol):
    """Durable records. Every write is atomic, and durable when the call returns.

    A job's record is changed by compare-and-set on `revision`; there is no other lock. A record that could not be read back is refused
    with InvalidRequest or TooLarge. Lists skip records that cannot be read, which an earlier or later version wrote.
    Raises Unavailable when the database does not answer.
    """

    def create_job(self, job: Job, idempotency: IdempotencyKey | None = None) -> Job:
        """Store a new job, or return the job created earlier under the same key. Raises IdempotencyConflict, Conflict."""
        ...

    def find_job(self, job_id: str) -> Job | None:
        """The record, or None. Raises UnreadableRecord, RecordTooNew."""
        ...

    def find_job_entry(self, job_id: str) -> JobEntry | None:
        """What is known of a job without reading its record, or None."""
        ...

    def replace_job(self, job: Job, events: Sequence[Event] = ()) -> Job:
        """Store `job` over the revision it was read at, together with `events`; returns it at its new revision.

        Raises StaleRevision when another writer was faster, and NotFound when the job is gone.
        """
        ...

    def list_jobs(self, query: JobQuery) -> Page[ListedJob]:
        """A page of a tenant's jobs, newest first. Raises InvalidRequest for a malformed cursor.

        A store that looks for jobs in a bounded number of records may return fewer than the limit, even none, with a cursor that goes on.
        """
        ...

    def count_jobs_by_status(self, query: JobQuery) -> dict[Status, int] | None:
        """How many jobs each status has among those that match the query, whatever its statuses, limit and cursor.

        None when a search matches more records than the store reads to count them.
        """
        ...

    def list_queued_jobs(self, launcher: str | None, limit: int) -> list[Job]:
        """Queued jobs of all tenants that the launcher may take, oldest first; None: of every launcher."""
        ...

    def list_active_jobs(self, launcher: str | None, limit: int) -> list[Job]:
        """Jobs of all tenants whose attempt may hold the launcher's compute, oldest first; None: of every launcher."""
        ...

    def list_jobs_using_dataset(self, dataset_id: str) -> list[str]:
        """Ids of jobs that are not final and train on the dataset."""
        ...

    def delete_job(self, job_id: str) -> bool:
        """Delete the record, its events and its heartbeat. False when there was none."""
        ...

    def create_dataset(self, dataset: Dataset) -> None:
        """Store a new dataset."""
        ...

    def replace_dataset(self, dataset: Dataset) -> None:
        """Store the record over the one of the same id and tenant, whatever that says. Raises NotFound when there is none."""
        ...

    def find_dataset(self, dataset_id: str) -> Dataset | None:
        """The record, or None. Raises UnreadableRecord, RecordTooNew."""
        ...

    def find_dataset_tenant(self, dataset_id: str) -> str | None:
        """The tenant of a dataset, without reading its record; None when there is no such dataset."""
        ...

    def list_datasets(self, tenant_id: str, limit: int = 50, after: str | None = None) -> Page[Dataset]:
        """A page of a tenant's datasets, newest first. Raises InvalidRequest for a malformed cursor."""
        ...

    def delete_dataset(self, dataset_id: str) -> bool:
        """Delete the record. False when there was none."""
        ...

    def ping(self) -> None:
        """Raise Unavailable unless a read would succeed now."""
        ...

    def close(self) -> None:
        """Close the connections."""
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
class Profile:
    """One kind of hardware that a launcher offers. None: the launcher does not know it."""

    name: str
    device: str  # "cpu", "cuda"
    device_name: str
    gpus: int = 0
    gpu_memory_bytes: int | None = None  # of one GPU
    compute_capability: float | None = None  # CUDA's: 8.9 for an L4
    cpus: int | None = None
    memory_bytes: int | None = None
    has_bf16: bool | None = None  # whether a processor computes it in hardware; GPUs do
    time_limit_s: int | None = None  # of an attempt; the next attempt continues. None: no limit


@dataclass(frozen=True)
class LaunchRequest:
    """One attempt to start. `name` is unique to it and can be looked up; `variables` holds its token."""

    name: str
    job_id: str
    attempt: int
    profile: str
    environment: str  # the name of the environment with the trainer's packages
    variables: Mapping[str, str] = field(repr=False)  # environment variables of the process


# waiting: launched, and not yet claimed by a machine that asks for work; it holds no compute and may wait for any time.
ExecutionState = Literal["waiting", "running", "ended", "unknown"]


class Launcher(Protocol):
    """Starts, checks and ends attempts somewhere, or offers them to machines that ask for work.

    It is asked only about handles that it returned itself: each attempt's record names its launcher. Not promised: that a launched
    attempt also starts, and that a canceled one ends at once.
    """

    name: str
    polling_is_free: bool  # `check` makes no call over a network, so it can be called at every reconcile
    limits: Limits

    @property
    def profiles(self) -> Mapping[str, Profile]:
        """The kinds of hardware that a job may ask for, by name; the first is the default."""
        ...

    def list_environments(self) -> Mapping[str, EnvironmentManifest]:
        """The environments that attempts can use here, by name, each with what it can run. Raises Unavailable."""
        ...

    def launch(self, launch_request: LaunchRequest) -> str:
        """Start or offer the attempt and return its handle.

        Raises LaunchFailed when no later try could succeed, NoCapacity when nothing was started and a later try may succeed, and
        Unavailable when it is not known whether the attempt was started.
        """
        ...

    def find_handle(self, name: str) -> str | None:
        """The handle of an attempt launched under that name, by this process or an earlier one. Raises Unavailable."""
        ...

    def check(self, handle: str) -> ExecutionState:
        """Whether the attempt still holds compute. `unknown` is not `ended`."""
        ...

    def cancel(self, handle: str, *, force: bool) -> None:
        """Ask the attempt to stop; with `force`, kill it. Withdraws one that waits, and does nothing for one that has ended.

        Raises Unavailable.
        """
        ...

    def count_free_slots(self, active_jobs: int) -> int:
        """How many attempts may be launched now, while `active_jobs` jobs hold its compute or may hold it."""
        ...

    def ping(self) -> None:
        """Raise Unavailable, with the reason, unless an attempt could be launched now."""
        ...

    def close(self) -> None:
        """Called when the service stops: end whatever nothing else would end."""
        ...


@runtime_checkable
class SlotReserver(Protocol):
    """A launcher that keeps slots for the attempts of some environments, so that they need not wait behind all others."""

    @property
    def reserved_environments(self) -> Collection[str]:
        """The environments with slots of their own. `count_free_slots` counts neither these slots nor their attempts."""
        ...

    def count_free_reserved_slots(self, environment: str) -> int:
        """How many attempts of that environment may be launched now."""
        ...


@runtime_checkable
class AttemptOwner(Protocol):
    """A launcher whose attempts end when the service stops: they save their state and continue at the next start."""

    def count_attempts(self) -> int:
        """How many run now."""
        ...


@dataclass(frozen=True)
class ExitReason:
    """Why an attempt ended that wrote no result."""

    failure: Failure
    preempted: bool = False  # the platform took the compute away; the job can continue elsewhere


@runtime_checkable
class ExitReasonReader(Protocol):
    """A launcher that can also report why an attempt ended."""

    def get_exit_reason(self, handle: str) -> ExitReason | None:
        """The reason as a failure; None when the launcher has none. Raises Unavailable."""
        ...


@runtime_checkable
class LogLocator(Protocol):
    """A launcher that names the place where the output of an attempt can be read."""

    def log_location(self, handle: str) -> str:
        """An address or a command, in one sentence."""
        ...


@dataclass(frozen=True)
class LogPage:
    """A part of an attempt's output, and where the next part begins (bytes)."""

    text: str
    next_offset: int


@runtime_checkable
class LogReader(Protocol):
    """A launcher whose attempts' output can be read while they run."""

    def read_log(self, name: str, offset: int, max_bytes: int, *, whole_lines: bool = False) -> LogPage | None:
        """At most `max_bytes` bytes from `offset`; None when the attempt has no output here.

        A page never ends inside a character. With `whole_lines` it ends with the last line end, if it has any.
        """
        ...

    def find_log_tail(self, name: str, lines: int, max_bytes: int) -> int | None:
        """Where the last lines begin (bytes), at most `max_bytes` before the end; None when the attempt has no output here."""
        ...

    def delete_log(self, name: str) -> bool:
        """Delete the output. False when there was none."""
        ...


@runtime_checkable
class LogMeter(Protocol):
    """A launcher that keeps the output of attempts, and knows how much it has."""

    def measure_logs(self, job_id: str) -> int:
        """Bytes of the output, and of the working folders, of all attempts of a job."""
        ...


# --- secrets ---------------------------------------------------------------------------------------------------------


class SecretStore(Protocol):
    """Stores the secrets of a job until the job ends, and no longer. Raises Unavailable when the store does not answer."""

    def put(self, job_id: str, secrets: Mapping[str, str]) -> None:
        """Store the secrets of a job, replacing earlier ones. Raises TooLarge when the store cannot hold them."""
        ...

    def read(self, job_id: str) -> dict[str, str]:
        """The secrets of a job; empty when there are none."""
        ...

    def destroy(self, job_id: str) -> bool:
        """Make the secrets permanently unreadable. False when there were none."""
        ...

    def iter_job_ids(self) -> Iterator[str]:
        """Ids of the jobs that have secrets here, for finding orphans."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


# --- the Hugging Face Hub ----------------------------------------------------------------------------------------------

# gated: the account must accept a license first. absent: the repository does not exist, or is private and hidden from this token.
HubAccess = Literal["yes", "gated", "absent", "refused", "bad_token", "unknown"]


@dataclass(frozen=True)
class HubAccount:
    """The account of a token and what the token may do, in the Hub's terms."""

    user: str
    role: str  # "read", "write", "fineGrained", or a role that the Hub added later
    orgs: Mapping[str, str]  # organization → the user's role in it
    writable: frozenset[str] = frozenset()  # the namespaces and repositories that a fine-grained token may write


class HostResolver(Protocol):
    """Finds the addresses of a host within the caller's deadline."""

    def resolve(self, host: str, port: int) -> tuple[str, ...]:
        """All addresses; none if the host is not found, or not in time. Never raises."""
        ...


class Hub(Protocol):
    """The Hub's facts about tokens and repositories. The access checks never raise: while the Hub is unreachable they return `unknown`."""

    def check_read_access(self, repo_id: str, token: str | None) -> HubAccess:
        """Whether the token, or an anonymous caller, can read the files of a model."""
        ...

    def check_write_access(self, repo_id: str, token: str) -> HubAccess:
        """Whether the token can write to an existing model repository."""
        ...

    def get_account(self, token: str) -> HubAccount | None:
        """The account of the token; None when the Hub does not return it."""
        ...

    def list_commits(self, repo_id: str, token: str) -> list[str] | None:
        """The hashes of a repository's commits, oldest first; None when the repository does not exist. Raises Unavailable."""
        ...

    def delete_repository(self, repo_id: str, token: str) -> None:
        """Permanently delete a model repository. Raises Unavailable, and InvalidRequest when the token may not."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...
