"""Enforces caps and quotas while jobs run and before they are launched: at one of them a job is asked to pause, and says why.

The request comes early enough to save a checkpoint. An attempt that has not ended when the cap is used up is canceled by its launcher.
"""

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from schema.job import ComputeRate, Job, PauseReason, Status
from schema.placement import Placement
from service.core import lifecycle
from service.core.errors import QuotaExceeded
from service.core.jobs.repository import JobRepository
from service.core.launchers import LauncherPool
from service.core.ports import Launcher
from service.core.quotas import QuotaChecks
from service.core.spending import find_reached_cap, has_cap, is_cap_exceeded, make_rate

STOP_GRACE = timedelta(minutes=2)  # for an attempt to pause at a quota of its tenant, which has no exact moment

log = logging.getLogger(__name__)


class Budget:
    """What jobs may still use."""

    def __init__(self, repository: JobRepository, launchers: LauncherPool, quotas: QuotaChecks) -> None:
        self._repository = repository
        self._launchers = launchers
        self._quotas = quotas

    def check_new_job(self, tenant_id: str, placements: Sequence[Placement], idempotency_key: str | None, digest: str) -> Job | None:
        """Raise QuotaExceeded unless the tenant may queue one more job for these placements. Raises Unavailable.

        A request that is sent again when its own job has filled the quota gets that job.
        """
        try:
            self._quotas.check_submission(tenant_id, self._rates(placements))
        except QuotaExceeded:
            earlier = self._repository.store.find_job_by_key(tenant_id, idempotency_key, digest) if idempotency_key else None
            if earlier is None:
                raise
            return earlier
        return None

    def check_continuation(self, tenant_id: str, placements: Sequence[Placement]) -> None:
        """Raise QuotaExceeded unless the tenant may queue a job again. Raises Unavailable."""
        self._quotas.check_submission(tenant_id, self._rates(placements))

    def open_admission(self) -> "Admission":
        """Decide about several queued jobs, each counted before the next."""
        return Admission(self)

    def enforce(self, job: Job) -> Job:
        """Ask a running job to pause if a cap or quota would otherwise be exceeded. Raises Unavailable."""
        rate = job.attempt.rate if job.attempt else None
        if job.status not in (Status.PREPARING, Status.TRAINING) or rate is None:
            return job
        reason = find_reached_cap(job, self._repository.clock()) or self._quotas.find_reached_quota(job.tenant_id, (rate,))
        return self._pause(job, reason) if reason else job

    def should_end(self, job: Job) -> bool:
        """Whether the attempt of a job that pauses for a cap or quota has had its time to stop."""
        if job.status is not Status.PAUSING or job.pause_reason in (None, "requested"):
            return False
        now = self._repository.clock()
        return is_cap_exceeded(job, now) or now - job.status_changed_at >= STOP_GRACE

    def end(self, launcher: Launcher, job: Job, handle: str) -> None:
        """Cancel the attempt, and kill it if it has not ended a while later. It keeps its last checkpoint. Raises Unavailable."""
        earlier = self._repository.clock() - launcher.limits.kill_grace
        force = is_cap_exceeded(job, earlier) or earlier - job.status_changed_at >= STOP_GRACE
        log.warning("attempt did not pause in time", extra={"job_id": job.job_id, "reason": job.pause_reason, "force": force})
        launcher.cancel(handle, force=force)

    def describe_wait(self, job: Job) -> str | None:
        """Which quota a queued job waits for; None if for none. Raises Unavailable."""
        return self._quotas.describe_wait(job, self._rates(job.placements))

    def find_rate(self, job: Job) -> ComputeRate:
        """What the job's next attempt will cost at the placement that it prefers, where that is known."""
        return next(iter(self._rates(job.placements)), ComputeRate())

    def count_free_runs(self, tenant_id: str) -> int | None:
        """How many more jobs of the tenant may be launched; None: any number. Raises Unavailable."""
        return self._quotas.count_free_runs(tenant_id)

    def may_launch(self, job: Job, placement: Placement) -> bool:
        """Whether caps and quotas leave room for the next attempt. A job whose cap leaves none is paused. Raises Unavailable."""
        reason = find_reached_cap(job, self._repository.clock()) if has_cap(job) else None
        if reason is not None:
            self._pause(job, reason)
            return False
        return self._quotas.find_reached_quota(job.tenant_id, self._rates((placement,)), starts=True) is None

    def _pause(self, job: Job, reason: PauseReason) -> Job:
        expected = (Status.QUEUED, Status.PREPARING, Status.TRAINING)

        def request_pause(current: Job, now: datetime) -> Job:
            is_same = current.status in expected and len(current.attempts) == len(job.attempts)
            return lifecycle.request_pause(current, now, reason) if is_same else current

        paused = self._repository.change(job.job_id, request_pause)
        log.info("job is paused by the service", extra={"job_id": job.job_id, "reason": reason})
        return paused

    def _rates(self, placements: Sequence[Placement]) -> tuple[ComputeRate, ...]:
        found = ((self._launchers.find(placement.launcher), placement) for placement in placements)
        return tuple(make_rate(launcher, placement) for launcher, placement in found if launcher)


class Admission:
    """Decides which queued jobs may be launched now."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._free_runs: dict[str, int | None] = {}  # by tenant

    def admit(self, job: Job, placement: Placement) -> bool:
        """Whether the job may be launched, together with those admitted before. Raises Unavailable."""
        tenant_id = job.tenant_id
        if tenant_id not in self._free_runs:
            self._free_runs[tenant_id] = self._budget.count_free_runs(tenant_id)
        free_runs = self._free_runs[tenant_id]
        if free_runs is not None and free_runs <= 0:
            return False
        if not self._budget.may_launch(job, placement):
            return False
        if free_runs is not None:
            self._free_runs[tenant_id] = free_runs - 1
        return True
