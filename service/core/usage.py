"""What a tenant has and uses, as job stores count it for quotas.

A store writes usage in the transaction that changes the record which it comes from: the attempts that have ended, by month, and the bytes
of datasets and published artifacts. Each entry has a key of its own, so writing it again changes nothing, and the usage of a month stays
when its jobs are deleted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from schema.dataset import Dataset
from schema.job import Job, Status
from schema.spec import attempt_name
from service.core.accrual import iter_months

STORED = "stored"  # the period of bytes, which are not of a month

JobState = Literal["queued", "active"]


@dataclass(frozen=True)
class Usage:
    """A sum of usage."""

    gpu_seconds: float = 0.0
    usd: float = 0.0  # as far as prices are known
    stored_bytes: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.gpu_seconds + other.gpu_seconds, self.usd + other.usd, self.stored_bytes + other.stored_bytes)


@dataclass(frozen=True)
class UsageEntry:
    """What one attempt, job or dataset adds to its tenant's usage of a period."""

    tenant_id: str
    period: str  # a month such as "2026-11", or STORED
    key: str  # unique within the period
    usage: Usage


class UsageStore(Protocol):
    """The part of a job store that quotas read. Raises Unavailable when the database does not answer."""

    def count_jobs(self, tenant_id: str, state: JobState) -> int:
        """How many jobs of the tenant are queued, or hold compute or may hold it."""
        ...

    def sum_usage(self, tenant_id: str, period: str) -> Usage:
        """The tenant's usage of a month by attempts that have ended, or with STORED the bytes that it stores now."""
        ...

    def find_job_by_key(self, tenant_id: str, idempotency_key: str, body_digest: str) -> Job | None:
        """The job that was created under the key by a request with the digest; None without one, or if the key was used for another."""
        ...


def statuses_of(state: JobState) -> tuple[Status, ...]:
    """The statuses that a count covers."""
    return (Status.QUEUED,) if state == "queued" else tuple(status for status in Status if status.is_active)


def job_bytes_key(job_id: str) -> str:
    """The key of a job's entry of stored bytes."""
    return f"job:{job_id}"


def dataset_bytes_key(dataset_id: str) -> str:
    """The key of a dataset's entry of stored bytes."""
    return f"dataset:{dataset_id}"


def iter_job_entries(job: Job) -> Iterator[UsageEntry]:
    """What a job's record adds: its latest attempt, once that has ended, and its artifacts."""
    attempt = job.attempt
    if attempt is not None and attempt.ended_at is not None:
        for month, spent in iter_months(attempt, attempt.ended_at):
            usage = Usage(gpu_seconds=spent.gpu_seconds, usd=spent.usd or 0.0)
            yield UsageEntry(job.tenant_id, month, attempt_name(job.job_id, attempt.number), usage)
    if job.artifacts:
        stored = Usage(stored_bytes=sum(artifact.size_bytes for artifact in job.artifacts))
        yield UsageEntry(job.tenant_id, STORED, job_bytes_key(job.job_id), stored)


def dataset_entry(dataset: Dataset) -> UsageEntry:
    """What a dataset adds."""
    size_bytes = sum(split.size_bytes for split in dataset.splits.values())
    return UsageEntry(dataset.tenant_id, STORED, dataset_bytes_key(dataset.processed_dataset_id), Usage(stored_bytes=size_bytes))
