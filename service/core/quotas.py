"""The quotas of a deployment's tenants: the setting, and the checks that read a tenant's use from the job store."""

import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from pydantic import Field

from schema.base import Id, Strict
from schema.estimate.prices import SECONDS_PER_HOUR
from schema.job import ComputeRate, Job, PauseReason, Status
from service.core.accrual import iter_months, month_of
from service.core.errors import QuotaExceeded
from service.core.ports import JobStore
from service.core.spending import MAX_RESERVE_SHARE, estimate_stop_s
from service.core.usage import STORED, Usage

USAGE_MAX_AGE = timedelta(seconds=10)  # of a sum that running jobs are checked against: each report asks for it
NEW_ATTEMPT_S = 70.0  # room for a new attempt: as long to work as it takes to stop
MAX_ACTIVE_JOBS = 1000  # of all tenants, whose running attempts are added to a tenant's usage


class TenantQuotas(Strict):
    """The quotas of one tenant. None: no limit."""

    max_queued_jobs: int | None = Field(None, ge=0)
    max_running_jobs: int | None = Field(None, ge=0)
    max_stored_bytes: int | None = Field(None, ge=0)  # of datasets and published artifacts
    max_gpu_hours_per_month: float | None = Field(None, ge=0)
    max_cost_usd_per_month: float | None = Field(None, ge=0)  # of compute whose price is known


class Quotas(Strict):
    """The quotas of a deployment: of every tenant, and what differs for single ones."""

    default: TenantQuotas = Field(default_factory=lambda: TenantQuotas.model_validate({}))
    tenants: dict[Id, TenantQuotas] = Field(default={})

    def of(self, tenant_id: str) -> TenantQuotas:
        """The quotas of a tenant: its own where it sets one (null: no limit), else the default."""
        own = self.tenants.get(tenant_id)
        return self.default.model_copy(update={name: getattr(own, name) for name in own.model_fields_set}) if own else self.default


class QuotaChecks:
    """Compares what tenants use with their quotas. Each check reads the store only for the quotas that the tenant has."""

    def __init__(self, store: JobStore, quotas: Quotas, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._quotas = quotas
        self._clock = clock
        self._lock = threading.Lock()
        self._usage: dict[str, tuple[datetime, Usage, Usage]] = {}  # by tenant: when summed, the usage, and the reserve of its running jobs

    def check_submission(self, tenant_id: str, rates: Sequence[ComputeRate]) -> None:
        """Raise QuotaExceeded unless the tenant may queue one more job, which may run at these rates. Raises Unavailable."""
        quotas = self._quotas.of(tenant_id)
        if quotas.max_queued_jobs is not None:
            queued = self._store.count_jobs(tenant_id, "queued")
            if queued >= quotas.max_queued_jobs:
                hint = "wait until one starts, or cancel or pause one"
                raise _exceeded("max_queued_jobs", tenant_id, str(quotas.max_queued_jobs), f"{queued} jobs are queued", hint)
        self.check_upload(tenant_id)
        if (reason := self.find_reached_quota(tenant_id, rates, starts=True, use_cache=False)) is not None:
            raise self._month_exceeded(tenant_id, reason)

    def check_upload(self, tenant_id: str, size_bytes: int = 0) -> None:
        """Raise QuotaExceeded unless the tenant may store that many bytes more; with 0, unless it may store any. Raises Unavailable."""
        most = self._quotas.of(tenant_id).max_stored_bytes
        if most is None:
            return
        stored = self._store.sum_usage(tenant_id, STORED).stored_bytes
        if stored + max(size_bytes, 1) > most:
            more = f", and this would add {size_bytes}" if size_bytes else ""
            hint = "delete datasets or completed jobs: DELETE /datasets/{id}, DELETE /jobs/{id}"
            raise _exceeded("max_stored_bytes", tenant_id, str(most), f"{stored} bytes are stored{more}", hint)

    def count_free_runs(self, tenant_id: str) -> int | None:
        """How many more jobs of the tenant may run now; None: any number. Raises Unavailable."""
        most = self._quotas.of(tenant_id).max_running_jobs
        return None if most is None else most - self._store.count_jobs(tenant_id, "active")

    def find_reached_quota(
        self, tenant_id: str, rates: Sequence[ComputeRate], *, starts: bool = False, use_cache: bool = True
    ) -> PauseReason | None:
        """The quota of this month that the tenant would exceed by compute at one of these rates. Raises Unavailable.

        Running compute must have time to stop; compute that `starts` must also have some to work.
        """
        quotas = self._quotas.of(tenant_id)
        gpu_hours = quotas.max_gpu_hours_per_month if any(rate.gpus for rate in rates) else None
        cost_usd = quotas.max_cost_usd_per_month if any(rate.usd_per_hour for rate in rates) else None
        if gpu_hours is None and cost_usd is None:
            return None
        used, reserve = self._sum_usage(tenant_id, use_cache=use_cache)
        if starts:
            gpu_seconds = NEW_ATTEMPT_S * max(rate.gpus for rate in rates)
            reserve += Usage(gpu_seconds, NEW_ATTEMPT_S / SECONDS_PER_HOUR * max(rate.usd_per_hour or 0.0 for rate in rates))
        if gpu_hours is not None and _is_reached(used.gpu_seconds, reserve.gpu_seconds, gpu_hours * SECONDS_PER_HOUR):
            return "gpu_hours_quota"
        if cost_usd is not None and _is_reached(used.usd, reserve.usd, cost_usd):
            return "cost_quota"
        return None

    def describe_wait(self, job: Job, rates: Sequence[ComputeRate]) -> str | None:
        """Which quota a queued job waits for; None if for none. Raises Unavailable."""
        free_runs, tenant_id = self.count_free_runs(job.tenant_id), job.tenant_id
        if free_runs is not None and free_runs <= 0:
            most = self._quotas.of(tenant_id).max_running_jobs
            return f"waits for the quota max_running_jobs of tenant {tenant_id!r}: {most} may run at a time"
        reason = self.find_reached_quota(tenant_id, rates, starts=True)
        return f"waits for next month: {self._month_exceeded(tenant_id, reason).message}" if reason else None

    def _sum_usage(self, tenant_id: str, *, use_cache: bool) -> tuple[Usage, Usage]:
        """The tenant's usage of this month, and what its running jobs would add until they have stopped."""
        now = self._clock()
        with self._lock:
            cached = self._usage.get(tenant_id)
        if use_cache and cached and timedelta() <= now - cached[0] < USAGE_MAX_AGE:
            return cached[1:]
        used, reserve = self._store.sum_usage(tenant_id, month_of(now)), Usage()
        for job in self._store.list_active_jobs(None, MAX_ACTIVE_JOBS):
            if job.tenant_id == tenant_id:
                running = _sum_running(job, now)
                stopped = _sum_running(job, now, timedelta(seconds=estimate_stop_s(job)))
                used += running
                reserve += Usage(stopped.gpu_seconds - running.gpu_seconds, stopped.usd - running.usd)
        with self._lock:
            self._usage[tenant_id] = (now, used, reserve)
        return used, reserve

    def _month_exceeded(self, tenant_id: str, reason: PauseReason) -> QuotaExceeded:
        quotas, (used, _) = self._quotas.of(tenant_id), self._sum_usage(tenant_id, use_cache=True)
        hint = "it begins again with the next month (UTC); the operator of the deployment sets it in TUNESMITH_QUOTAS"
        if reason == "gpu_hours_quota":
            use = f"{used.gpu_seconds / SECONDS_PER_HOUR:.2f} are used, which leaves too little for a job"
            return _exceeded("max_gpu_hours_per_month", tenant_id, f"{quotas.max_gpu_hours_per_month:g}", use, hint)
        return _exceeded(
            "max_cost_usd_per_month",
            tenant_id,
            f"{quotas.max_cost_usd_per_month:g}",
            f"${used.usd:.2f} are used, which leaves too little for a job",
            hint,
        )


def _exceeded(name: str, tenant_id: str, value: str, use: str, hint: str) -> QuotaExceeded:
    return QuotaExceeded(f"the quota {name} of tenant {tenant_id!r} is {value}, and {use}", hint=hint)


def _is_reached(used: float, reserve: float, quota: float) -> bool:
    return used + min(reserve, MAX_RESERVE_SHARE * quota) >= quota


def _sum_running(job: Job, now: datetime, later: timedelta = timedelta()) -> Usage:
    """What the job's running attempt has used of the current month; `later`: if it went on for that long. Ended ones are in the store."""
    attempt = job.attempt
    if attempt is None or attempt.ended_at is not None or job.status is Status.QUEUED:
        return Usage()
    spent = dict(iter_months(attempt, now + later)).get(month_of(now))
    return Usage(gpu_seconds=spent.gpu_seconds, usd=spent.usd or 0.0) if spent else Usage()
