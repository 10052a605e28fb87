"""Reconciling: one step for each open job, decided from its record, the bucket and the launcher, toward the state it should have.

Any process may reconcile at any time and as often as it likes: each step is a compare-and-set on the job's record.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import datetime

from pydantic import ValidationError

from schema.job import Job, Status
from schema.result import Result
from schema.spec import attempt_name, result_key
from service.core import lifecycle
from service.core.errors import TunesmithError
from service.core.jobs.attempts import Attempts
from service.core.jobs.checkpoints import find_last_checkpoint_step
from service.core.jobs.launch import AttemptStarter
from service.core.jobs.limits import Limits
from service.core.jobs.repository import JobRepository
from service.core.ports import Buckets, ExitReasonReader, Launcher, Wake
from storage import NoSuchObject, StorageError
from storage.deadline import remaining_s

log = logging.getLogger(__name__)

MAX_JOBS_PER_RECONCILE = 1000  # the oldest come first
RECONCILE_CONCURRENCY = 8  # a thousand jobs at a tenth of a second each fit into the scheduler's minute
MIN_STEP_BUDGET_S = 2.0  # a launch is a handful of calls; with less time it would be cut off half-way


class Reconciliation:
    """Launches queued jobs, ends attempts whose compute is gone, and enforces cancels and leases."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        launcher: Launcher,
        starter: AttemptStarter,
        attempts: Attempts,
        buckets: Buckets,
        limits: Limits,
        wake: Wake,
    ) -> None:
        self._repository = repository
        self._launcher = launcher
        self._starter = starter
        self._attempts = attempts
        self._buckets = buckets
        self._limits = limits
        self._wake = wake

    def reconcile(self) -> int:
        """Take one step with every open job; returns how many jobs changed. An error of one job never stops the others.

        Raises Unavailable when the job store does not answer.
        """
        active = self._repository.store.list_active_jobs(MAX_JOBS_PER_RECONCILE)
        return self._step_all(self._reconcile_active, active) + self._launch_queued(active=len(active))

    def reconcile_job(self, job_id: str) -> None:
        """Take one step with one job inside a request, for a service without a background task. Errors are logged: `reconcile` follows.

        A job that has ended frees a slot, so the oldest queued job is launched in its place.
        """
        if remaining_s(MIN_STEP_BUDGET_S) < MIN_STEP_BUDGET_S:
            return
        try:
            job = self._repository.store.find_job(job_id)
            if job is not None and job.status.is_active:
                self._try_step(self._reconcile_active, job)
            else:
                self._launch_queued(active=len(self._repository.store.list_active_jobs(MAX_JOBS_PER_RECONCILE)), limit=1)
        except TunesmithError as error:
            log.warning("job could not be reconciled", extra={"job_id": job_id, "error": error.message})

    def _launch_queued(self, active: int, limit: int = MAX_JOBS_PER_RECONCILE) -> int:
        free_slots = min(limit, self._launcher.count_free_slots(active))
        queued = self._repository.store.list_queued_jobs(free_slots) if free_slots > 0 else []
        return self._step_all(self._starter.start_next, queued)

    def _step_all(self, step: Callable[[Job], Job], jobs: Sequence[Job]) -> int:
        """Take a step with every job, several at a time where each one calls over a network; returns how many jobs changed."""
        if self._launcher.polling_is_free or len(jobs) < 2:
            return sum(self._try_step(step, job) for job in jobs)
        with ThreadPoolExecutor(RECONCILE_CONCURRENCY, "reconcile") as pool:
            futures = [pool.submit(copy_context().run, self._try_step, step, job) for job in jobs]
        return sum(future.result() for future in futures)

    def _try_step(self, step: Callable[[Job], Job], job: Job) -> bool:
        """Whether the step changed the job."""
        try:
            return step(job).revision != job.revision
        except (TunesmithError, StorageError) as error:
            log.warning("job could not be reconciled", extra={"job_id": job.job_id, "error": str(error)})
            return False

    # --- one step with an active job ---------------------------------------------------------------------------------

    def _reconcile_active(self, job: Job) -> Job:
        assert job.attempt is not None
        if job.attempt.handle is None:
            return self._recover_launch(job)
        if (result := self._read_result(job)) is not None:
            return self._attempts.finish(job.job_id, result)
        if job.status is Status.CANCELLING:
            self._escalate_cancel(job, job.attempt.handle)
        elif not self._launcher.polling_is_free and not self._is_silent(job):
            return job  # asking the launcher costs a call, and the attempt reports
        match self._launcher.check(job.attempt.handle):
            case "ended":
                return self._end_without_compute(job)
            case "running":
                return self._enforce_lease(job, job.attempt.handle)
            case "unknown":
                return job  # unknown is not lost

    def _recover_launch(self, job: Job) -> Job:
        """A process died between recording the attempt and storing its handle: look the attempt up before launching it again."""
        attempt = job.attempt
        assert attempt is not None
        if self._repository.clock() - (attempt.launch_started_at or attempt.created_at) < self._limits.launch_lookup_delay:
            return job  # another process may be launching it now
        handle = self._launcher.find_handle(attempt_name(job.job_id, attempt.number))
        if handle is not None:
            return self._repository.change(job.job_id, lambda job, now: lifecycle.mark_launched(job, attempt.number, handle, now))
        if attempt.claimed_by is not None:  # a process claimed it and cannot be found: it counts as running while it reports
            if (result := self._read_result(job)) is not None:
                return self._attempts.finish(job.job_id, result)
            return self._mark_lost(job) if self._is_silent(job) else job
        if job.status in (Status.CANCELLING, Status.PAUSING):
            return self._mark_lost(job)
        return self._starter.start_again(job, attempt.number)

    def _escalate_cancel(self, job: Job, handle: str) -> None:
        """The attempt has received the directive. If it does not end, the launcher cancels it, and later kills it."""
        waited = self._repository.clock() - job.status_changed_at
        if waited >= self._limits.cancel_grace:
            self._launcher.cancel(handle, force=waited >= self._limits.kill_grace)

    def _enforce_lease(self, job: Job, handle: str) -> Job:
        """The compute runs. An attempt that stays silent for a whole lease after it was first suspected is ended.

        The suspicion is stored: a service that was asleep or just started gives the attempt a lease to report before judging it.
        """
        attempt, heartbeat = job.attempt, self._repository.find_heartbeat(job)
        assert attempt is not None
        now, suspected_at = self._repository.clock(), attempt.suspected_at
        may_be_starting = attempt.claimed_by is None and now - (attempt.launched_at or attempt.created_at) < self._limits.start_timeout
        if may_be_starting or not self._limits.is_heartbeat_expired(job, heartbeat, now):
            return job
        if suspected_at is None or (heartbeat is not None and heartbeat.received_at > suspected_at):
            log.warning("attempt is silent", extra={"job_id": job.job_id, "attempt": attempt.number})
            return self._repository.change(job.job_id, lambda job, _: lifecycle.suspect(job, attempt.number, now))
        if now - suspected_at >= self._limits.lease:
            self._launcher.cancel(handle, force=True)
        return self._mark_lost(job) if now - suspected_at >= self._limits.lease + self._limits.lease_grace else job

    def _end_without_compute(self, job: Job) -> Job:
        """The compute is gone. The attempt may have written its result since the result was last read."""
        result = self._read_result(job)
        return self._attempts.finish(job.job_id, result) if result else self._mark_lost(job)

    def _mark_lost(self, job: Job) -> Job:
        """End the current attempt without a result. Raises Unavailable while the reason cannot be read: the next reconcile tries again."""
        attempt = job.attempt
        assert attempt is not None
        exit_reason = None
        if attempt.handle and isinstance(self._launcher, ExitReasonReader):
            exit_reason = self._launcher.get_exit_reason(attempt.handle)
        saved_step = find_last_checkpoint_step(self._buckets.models, job, attempt.number)

        def mark_lost(job: Job, now: datetime) -> Job:
            return lifecycle.mark_lost(
                job,
                attempt.number,
                now,
                exit_reason.failure if exit_reason else None,
                preempted=exit_reason.preempted if exit_reason else False,
                last_checkpoint_step=saved_step,
            )

        job = self._repository.change(job.job_id, mark_lost)
        if job.status.is_final:
            self._repository.destroy_secrets(job)
        self._wake(job.job_id)
        return job

    def _is_silent(self, job: Job) -> bool:
        return self._limits.is_heartbeat_expired(job, self._repository.find_heartbeat(job), self._repository.clock())

    def _read_result(self, job: Job) -> Result | None:
        """The result of the current attempt, if it has written one."""
        assert job.attempt is not None
        try:
            return Result.load(self._buckets.configs.read(result_key(job.job_id, job.attempt.number)))
        except NoSuchObject:
            return None
        except ValidationError:
            log.error("result is not readable", extra={"job_id": job.job_id, "attempt": job.attempt.number})
            return None
