"""How long the service waits for an attempt before it acts. Each launcher has limits of its own."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from schema.job import Job


@dataclass(frozen=True)
class Limits:
    """The waiting times of one launcher. The defaults are for attempts on the service's own machine."""

    heartbeat_timeout: timedelta = timedelta(seconds=60)  # without a heartbeat for this long: ask the launcher
    cancel_grace: timedelta = timedelta(seconds=1)  # for an attempt to obey the directive; then the launcher cancels it
    kill_grace: timedelta = timedelta(seconds=8)  # then the launcher cancels it by force
    launch_lookup_delay: timedelta = timedelta(seconds=5)  # an attempt without a handle is looked up by name this long after it was sent
    start_timeout: timedelta = timedelta(minutes=10)  # for a launched attempt to claim itself
    lease: timedelta = timedelta(minutes=5)  # silent for this long after `suspected_at`: the launcher cancels it by force
    lease_grace: timedelta = timedelta(minutes=1)  # then it counts as lost, whatever the launcher reports

    def is_heartbeat_expired(self, job: Job, received_at: datetime | None, now: datetime) -> bool:
        """Whether the current attempt, which last reported at `received_at`, has been silent for longer than `heartbeat_timeout`."""
        launched_at = job.attempt.launched_at if job.attempt else None
        return now - (received_at or launched_at or job.updated_at) > self.heartbeat_timeout
