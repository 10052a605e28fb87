"""The time limit of an attempt's preparation: what it does before it evaluates or trains, where a hostile file could hold it forever."""

import logging
from datetime import datetime, timedelta

from schema.job import Failure, Job, Status
from schema.types import Phase
from service.core import lifecycle
from service.core.jobs.repository import JobRepository
from service.core.ports import Launcher, Wake

log = logging.getLogger(__name__)

DEFAULT_PREPARATION_LIMIT = timedelta(hours=2)  # a base of 140 GB at 25 MB/s takes 1.6 hours
FIRST_USEFUL_PHASES = ("evaluating", "training")


class PreparationLimit:
    """Ends attempts that report and whose preparation takes too long, on every launcher alike."""

    def __init__(self, repository: JobRepository, limit: timedelta, wake: Wake) -> None:
        self._repository = repository
        self._limit = limit
        self._wake = wake

    def enforce(self, launcher: Launcher, job: Job) -> Job | None:
        """Kill the attempt and fail the job if its preparation has taken too long; None if it has not. Raises Unavailable."""
        if job.status is not Status.PREPARING or job.attempt is None or job.attempt.handle is None:
            return None  # before the heartbeat is read: most jobs are training
        heartbeat, now = self._repository.find_heartbeat(job), self._repository.clock()
        if launcher.limits.is_heartbeat_expired(job, heartbeat.received_at if heartbeat else None, now):
            return None  # a silent attempt may be asleep with its machine; its lease decides
        if not is_overdue(job, heartbeat.phase if heartbeat else None, self._limit, now):
            return None
        number = job.attempt.number
        log.warning("preparation takes too long", extra={"job_id": job.job_id, "attempt": number})
        launcher.cancel(job.attempt.handle, force=True)
        failure = Failure(
            code="timeout",
            message=f"the attempt prepared for more than {self._limit.total_seconds():.0f} s before it trained, and was ended",
            hint="the operator can raise TUNESMITH_PREPARATION_LIMIT_S for large downloads or datasets; see GET /jobs/{id}/logs",
        )
        failed = self._repository.change(job.job_id, lambda job, now: lifecycle.fail_attempt(job, number, failure, now))
        if failed.status.is_final:
            self._repository.destroy_secrets(failed)
        self._wake(job.job_id)
        return failed


def is_overdue(job: Job, phase: Phase | None, limit: timedelta, now: datetime) -> bool:
    """Whether the current attempt, which reports that phase, has prepared for longer than the limit. An export has no preparation."""
    attempt, phases = job.attempt, job.training_config.phases
    useful = [phases.index(name) for name in FIRST_USEFUL_PHASES if name in phases]
    if job.export_of is not None or attempt is None or attempt.claimed_at is None or not useful:
        return False
    is_preparing = phase is None or phase in phases[: min(useful)]
    return is_preparing and now - attempt.claimed_at > limit
