"""What a tenant stores, counted from the stores themselves: datasets, and of each job its checkpoints, artifacts and logs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from schema.checkpoint import checkpoints_prefix
from schema.job import Status
from schema.models import MODELS_PREFIX
from service.core.job_lists import JobQuery, JobSummary
from service.core.jobs.deletion import Deletion
from service.core.jobs.orphans import JOB_FOLDERS
from service.core.jobs.repository import JobRepository
from service.core.launchers import LauncherPool
from service.core.ports import Buckets, LogMeter
from service.core.principals import Principal, Scope
from storage import ObjectStore, map_concurrently
from storage.deadline import remaining_s

PAGE_ROWS = 200
JOBS_AT_ONCE = 32  # between two looks at the clock
MIN_BATCH_BUDGET_S = 10.0  # for those, where each listing is a call over a network


@dataclass(frozen=True)
class UsageBytes:
    """Bytes by kind."""

    checkpoints: int = 0
    artifacts: int = 0  # with run records and the files of trackers
    logs: int = 0  # with the working folders of attempts, where the launcher has them

    @property
    def total(self) -> int:
        """All of them."""
        return self.checkpoints + self.artifacts + self.logs


@dataclass(frozen=True)
class JobUsage:
    """What one job stores."""

    job_id: str
    job_name: str
    status: Status
    finished_at: datetime | None
    stored: UsageBytes


@dataclass(frozen=True)
class StorageUsage:
    """What a tenant stores; of the operator's, also what belongs to none."""

    dataset_bytes: int
    jobs: list[JobUsage] = field(default_factory=list[JobUsage])  # the largest first
    complete: bool = True  # every job was counted within the time
    base_model_bytes: int | None = None  # shared by all tenants; None: the caller is no operator
    orphan_bytes: int | None = None  # likewise, files of jobs that do not exist

    @property
    def by_kind(self) -> UsageBytes:
        """The bytes of all jobs."""
        return UsageBytes(
            checkpoints=sum(job.stored.checkpoints for job in self.jobs),
            artifacts=sum(job.stored.artifacts for job in self.jobs),
            logs=sum(job.stored.logs for job in self.jobs),
        )


class StorageQueries:
    """Counts what is stored. Each job's own folders are listed, so that another tenant's files are never looked at."""

    def __init__(self, repository: JobRepository, *, buckets: Buckets, launchers: LauncherPool, deletion: Deletion) -> None:
        self._repository = repository
        self._buckets = buckets
        self._launchers = launchers
        self._deletion = deletion

    def measure(self, principal: Principal) -> StorageUsage:
        """Count the tenant's files, until about the caller's deadline. Raises StorageError, Unavailable."""
        principal.require(Scope.JOBS_READ)
        dataset_bytes = self._measure_datasets(principal.tenant_id)
        jobs, complete = self._measure_jobs(principal.tenant_id)
        jobs.sort(key=lambda job: job.stored.total, reverse=True)
        base_model_bytes = orphan_bytes = None
        if Scope.OPERATE in principal.scopes and complete:
            base_model_bytes = _sum_bytes(self._buckets.models, MODELS_PREFIX)
            scan = self._deletion.list_orphans(principal)
            orphan_bytes, complete = sum(orphan.size_bytes for orphan in scan.orphans), scan.complete
        return StorageUsage(dataset_bytes, jobs, complete, base_model_bytes, orphan_bytes)

    def _measure_datasets(self, tenant_id: str) -> int:
        total, cursor = 0, None
        while True:
            page = self._repository.store.list_datasets(tenant_id, PAGE_ROWS, cursor)
            prefixes = [f"datasets/{dataset.processed_dataset_id}/" for dataset in page.rows]
            total += sum(map_concurrently(lambda prefix: _sum_bytes(self._buckets.datasets, prefix), prefixes))
            cursor = page.next_cursor
            if cursor is None:
                return total

    def _measure_jobs(self, tenant_id: str) -> tuple[list[JobUsage], bool]:
        measured: list[JobUsage] = []
        for batch in self._iter_batches(tenant_id):
            if remaining_s(MIN_BATCH_BUDGET_S) < MIN_BATCH_BUDGET_S:
                return measured, False
            measured += map_concurrently(self._measure_job, batch)
        return measured, True

    def _iter_batches(self, tenant_id: str) -> Iterator[Sequence[JobSummary]]:
        cursor: str | None = None
        while True:
            page = self._repository.store.list_jobs(JobQuery(tenant_id=tenant_id, limit=PAGE_ROWS, after=cursor))
            for start in range(0, len(page.rows), JOBS_AT_ONCE):
                yield [row.summary for row in page.rows[start : start + JOBS_AT_ONCE]]
            cursor = page.next_cursor
            if cursor is None:
                return

    def _measure_job(self, job: JobSummary) -> JobUsage:
        models = self._buckets.models
        stored = UsageBytes(
            checkpoints=_sum_bytes(models, checkpoints_prefix(job.job_id, job.project_id)),
            artifacts=sum(_sum_bytes(models, f"{folder}/{job.job_id}/") for folder in JOB_FOLDERS),
            logs=sum(launcher.measure_logs(job.job_id) for launcher in self._launchers if isinstance(launcher, LogMeter)),
        )
        return JobUsage(job.job_id, job.job_name, job.status, job.finished_at, stored)


def _sum_bytes(store: ObjectStore, prefix: str) -> int:
    return sum(stored.size_bytes for stored in store.iter_objects(prefix))
