"""Reconciling: one step for each open job, decided from its record, the bucket and its launcher, toward the state it should have.

Any process may reconcile at any time and as often as it likes: each step is a compare-and-set on the job's record. Each launcher is
reconciled by itself, so one that does not answer delays no job of another.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import datetime

from schema.job import Job, Status
from schema.result import Result
from schema.spec import attempt_name, result_key
from service.core import lifecycle
from service.core.errors import TooLarge, TunesmithError, Unavailable
from service.core.jobs.attempts import Attempts
from service.core.jobs.budget import Budget
from service.core.jobs.checkpoints import find_last_checkpoint_step
from service.core.jobs.launch import AttemptStarter
from service.core.jobs.queue import LaunchQueue
from service.core.jobs.repository import JobRepository
from service.core.launchers import LauncherPool
from service.core.limits import Limits
from service.core.ports import Buckets, ExitReasonReader, Launcher, Wake
from service.core.principals import Principal, Scope
from service.core.stored_json import MAX_RESULT_BYTES, dump_record
from storage import NoSuchObject, StorageError
from storage.deadline import remaining_s

log = logging.getLogger(__name__)

MAX_JOBS_PER_RECONCILE = 1000  # of one launcher; the oldest come first
RECONCILE_CONCURRENCY = 8  # a thousand jobs at a tenth of a second each fit into the scheduler's minute
MIN_STEP_BUDGET_S = 2.0  # a launch is a handful of calls; with less time it would be cut off half-way
REMOVED_LAUNCHER_LIMITS = Limits()  # for attempts of a launcher that this deployment no longer has


class Reconciliation:
    """Launches queued jobs, ends attempts whose compute is gone, and enforces cancels and leases."""

    def __init__(
        self,
        repository: JobRepository,
        *,
        launchers: LauncherPool,
        starter: AttemptStarter,
        attempts: Attempts,
        budget: Budget,
        buckets: Buckets,
        wake: Wake,
    ) -> None:
        self._repository = repository
        self._launchers = launchers
        self._starter = starter
        self._attempts = attempts
        self._budget = budget
        self._buckets = buckets
        self._wake = wake
        self._queue = LaunchQueue(repository, launchers, budget)

    def reconcile(self, principal: Principal) -> int:
        """Take one step with every open job, all launchers at the same time; returns how many jobs changed.

        An error of one job never stops the others. Raises Unavailable when the job store does not answer.
        """
        names = [launcher.name for launcher in self._launchers]
        if len(names) == 1:
            return self.reconcile_launcher(principal, names[0])
        with ThreadPoolExecutor(len(names), "reconcile") as pool:
            futures = [pool.submit(copy_context().run, self.reconcile_launcher, principal, name) for name in names]
        return sum(future.result() for future in futures)

    def reconcile_launcher(self, principal: Principal, name: str) -> int:
        """Take one step with every open job of one launcher; returns how many jobs changed. Raises Unavailable."""
        principal.require(Scope.UPKEEP)
        launcher = self._launchers.get(name)
        active = self._repository.store.list_active_jobs(name, MAX_JOBS_PER_RECONCILE)
        changed = self._step_all(launcher, lambda job: self._reconcile_active(launcher, job), active)
        return changed + self._launch_queued(launcher, active=len(active))

    def reconcile_removed_launchers(self, principal: Principal) -> int:
        """End the silent attempts of launchers that this deployment no longer has; returns how many jobs changed. Raises Unavailable."""
        principal.require(Scope.UPKEEP)
        active = self._repository.store.list_active_jobs(None, MAX_JOBS_PER_RECONCILE)
        return sum(self._try_step(self._reconcile_removed, job) for job in active if self._launcher_of(job) is None)

    def reconcile_job(self, job_id: str) -> None:
        """Take one step with one job inside a request, for a service without a background task. Errors are logged: `reconcile` follows.

        A job that has ended frees a slot of its launcher, so the oldest queued job is launched in its place.
        """
        if remaining_s(MIN_STEP_BUDGET_S) < MIN_STEP_BUDGET_S:
            return
        try:
            job = self._repository.store.find_job(job_id)
            if job is not None and job.status.is_active:
                self._try_step(self._reconcile_open, job)
            elif job is not None:
                self._launch_next(job)
        except TunesmithError as error:
            log.warning("job could not be reconciled", extra={"job_id": job_id, "error": error.message})
        except Exception:  # what concerns other jobs must not fail the request; `reconcile` tries again
            log.exception("job could not be reconciled", extra={"job_id": job_id})

    def _launch_next(self, job: Job) -> None:
        """Launch one queued job on a launcher that the given job waits for, or whose slot it has freed."""
        freed = (job.attempt.placement.launcher,) if job.attempt else ()
        for launcher in filter(None, map(self._launchers.find, job.launchers or freed)):
            active = self._repository.store.list_active_jobs(launcher.name, MAX_JOBS_PER_RECONCILE)
            if self._launch_queued(launcher, active=len(active), limit=1):
                return

    def _launch_queued(self, launcher: Launcher, active: int, limit: int = MAX_JOBS_PER_RECONCILE) -> int:
        chosen = self._queue.choose(launcher, active, limit)
        placements = {job.job_id: placement for job, placement in chosen}
        return self._step_all(
            launcher, lambda job: self._starter.start_next(launcher, job, placements[job.job_id]), [job for job, _ in chosen]
        )

    def _step_all(self, launcher: Launcher, step: Callable[[Job], Job], jobs: Sequence[Job]) -> int:
        """Take a step with every job, several at a time where each one calls over a network; returns how many jobs changed."""
        if launcher.polling_is_free or len(jobs) < 2:
            return sum(self._try_step(step, job) for job in jobs)
        with ThreadPoolExecutor(RECONCILE_CONCURRENCY, f"reconcile-{launcher.name}") as pool:
            futures = [pool.submit(copy_context().run, self._try_step, step, job) for job in jobs]
        return sum(future.result() for future in futures)

    def _try_step(self, step: Callable[[Job], Job], job: Job) -> bool:
        """Whether the step changed the job."""
        try:
            return step(job).revision != job.revision
        except (TunesmithError, StorageError) as error:
            log.warning("job could not be reconciled", extra={"job_id": job.job_id, "error": str(error)})
            return False
        except Exception:  # a defect that one job brings to light must not stop the others
            log.exception("job could not be reconciled", extra={"job_id": job.job_id})
            return False

    def _launcher_of(self, job: Job) -> Launcher | None:
        """The launcher of the current attempt; None when this deployment no longer has it."""
        return self._launchers.find(job.attempt.placement.launcher) if job.attempt else None

    # --- one step with an active job ---------------------------------------------------------------------------------

    def _reconcile_open(self, job: Job) -> Job:
        launcher = self._launcher_of(job)
        return self._reconcile_active(launcher, job) if launcher else self._reconcile_removed(job)

    def _reconcile_active(self, launcher: Launcher, job: Job) -> Job:
        assert job.attempt is not None
        if job.attempt.handle is None:
            return self._recover_launch(launcher, job)
        if (result := self._read_result(job)) is not None:
            return self._attempts.apply_result(job.job_id, result)
        handle, job = job.attempt.handle, self._budget.enforce(job)
        if not job.status.is_active:
            return job
        if job.status is Status.CANCELLING:
            self._escalate_cancel(launcher, job, handle)
        elif self._budget.should_end(job):
            self._budget.end(launcher, job, handle)
        elif not launcher.polling_is_free and not self._is_silent(job, launcher.limits):
            return job  # asking the launcher costs a call, and the attempt reports
        match launcher.check(handle):
            case "ended":
                return self._end_without_compute(launcher, job)
            case "running":
                return self._enforce_lease(launcher, job, handle)
            case "waiting":
                return self._keep_waiting(launcher, job, handle)
            case "unknown":
                return job  # unknown is not lost

    def _recover_launch(self, launcher: Launcher, job: Job) -> Job:
        """A process died between recording the attempt and storing its handle: look the attempt up before launching it again."""
        attempt = job.attempt
        assert attempt is not None
        stops = job.status in (Status.CANCELLING, Status.PAUSING)
        if attempt.launch_started_at is None:  # another launcher passed it on, and this one was not asked yet
            return self._mark_lost(launcher, job) if stops else self._starter.start_again(launcher, job, attempt.number)
        if self._repository.clock() - attempt.launch_started_at < launcher.limits.launch_lookup_delay:
            return job  # another process may be launching it now
        handle = launcher.find_handle(attempt_name(job.job_id, attempt.number))
        if handle is not None:
            return self._repository.change(job.job_id, lambda job, now: lifecycle.mark_launched(job, attempt.number, handle, now))
        if attempt.claimed_by is not None:  # a process claimed it and cannot be found: it counts as running while it reports
            if (result := self._read_result(job)) is not None:
                return self._attempts.apply_result(job.job_id, result)
            return self._mark_lost(launcher, job) if self._is_silent(job, launcher.limits) else job
        return self._mark_lost(launcher, job) if stops else self._starter.start_again(launcher, job, attempt.number)

    def _keep_waiting(self, launcher: Launcher, job: Job, handle: str) -> Job:
        """No machine has claimed the attempt yet. It may wait for any time; one that is to stop is withdrawn."""
        if job.status in (Status.CANCELLING, Status.PAUSING):
            launcher.cancel(handle, force=False)
            return job
        number = len(job.attempts)
        return self._repository.change(job.job_id, lambda job, now: lifecycle.mark_waiting(job, number, now))

    def _reconcile_removed(self, job: Job) -> Job:
        """Nobody can be asked about the attempt: it counts as running while it reports, and as lost after a lease of silence."""
        if (result := self._read_result(job)) is not None:
            return self._attempts.apply_result(job.job_id, result)
        heartbeat, limits = self._repository.find_heartbeat(job), REMOVED_LAUNCHER_LIMITS
        silent_since = heartbeat.received_at if heartbeat else job.status_changed_at
        waited = self._repository.clock() - silent_since
        return self._mark_lost(None, job) if waited >= limits.lease + limits.lease_grace else job

    def _escalate_cancel(self, launcher: Launcher, job: Job, handle: str) -> None:
        """The attempt has received the directive. If it does not end, the launcher cancels it, and later kills it."""
        waited = self._repository.clock() - job.status_changed_at
        if waited >= launcher.limits.cancel_grace:
            launcher.cancel(handle, force=waited >= launcher.limits.kill_grace)

    def _enforce_lease(self, launcher: Launcher, job: Job, handle: str) -> Job:
        """The compute runs. An attempt that stays silent for a whole lease after it was first suspected is ended.

        The suspicion is stored: a service that was asleep or just started gives the attempt a lease to report before judging it.
        """
        attempt, heartbeat, limits = job.attempt, self._repository.find_heartbeat(job), launcher.limits
        assert attempt is not None
        now, suspected_at = self._repository.clock(), attempt.suspected_at
        may_be_starting = attempt.claimed_by is None and now - (attempt.launched_at or attempt.created_at) < limits.start_timeout
        if may_be_starting or not self._is_silent(job, limits):
            return job
        if suspected_at is None or (heartbeat is not None and heartbeat.received_at > suspected_at):
            log.warning("attempt is silent", extra={"job_id": job.job_id, "attempt": attempt.number})
            return self._repository.change(job.job_id, lambda job, _: lifecycle.suspect(job, attempt.number, now))
        if now - suspected_at >= limits.lease:
            launcher.cancel(handle, force=True)
        return self._mark_lost(launcher, job) if now - suspected_at >= limits.lease + limits.lease_grace else job

    def _end_without_compute(self, launcher: Launcher, job: Job) -> Job:
        """The compute is gone. The attempt may have written its result since the result was last read."""
        result = self._read_result(job)
        return self._attempts.apply_result(job.job_id, result) if result else self._mark_lost(launcher, job)

    def _mark_lost(self, launcher: Launcher | None, job: Job) -> Job:
        """End the current attempt without a result. Raises Unavailable while the reason cannot be read: the next reconcile tries again."""
        attempt = job.attempt
        assert attempt is not None
        exit_reason = None
        if attempt.handle and isinstance(launcher, ExitReasonReader):
            exit_reason = launcher.get_exit_reason(attempt.handle)
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

    def _is_silent(self, job: Job, limits: Limits) -> bool:
        heartbeat = self._repository.find_heartbeat(job)
        return limits.is_heartbeat_expired(job, heartbeat.received_at if heartbeat else None, self._repository.clock())

    def _read_result(self, job: Job) -> Result | None:
        """The result of the current attempt, if it has written one."""
        assert job.attempt is not None
        try:
            with self._buckets.configs.open_read(result_key(job.job_id, job.attempt.number)) as stream:
                content = stream.read(MAX_RESULT_BYTES + 1)
            if len(content) > MAX_RESULT_BYTES:
                raise TooLarge(f"the result is larger than {MAX_RESULT_BYTES} bytes")
            result = Result.load(content)
            dump_record(result)
        except NoSuchObject:
            return None
        except Unavailable:
            raise  # the bucket does not answer: that says nothing of the result
        except (TunesmithError, ValueError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            log.error("result is not readable", extra={"job_id": job.job_id, "attempt": job.attempt.number, "error": reason})
            return None
        return result
