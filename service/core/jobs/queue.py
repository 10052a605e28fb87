"""Which queued jobs a launcher takes now, and at which of their placements.

A job prefers its first placement. A launcher further down the list takes it at once when the earlier ones are known to be full, else
after MAX_PREFERENCE_WAIT: an earlier one may not answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from schema.job import Job
from schema.placement import Placement
from service.core.jobs.budget import Budget
from service.core.jobs.repository import JobRepository
from service.core.launchers import LauncherPool
from service.core.ports import Launcher, SlotReserver

MAX_PREFERENCE_WAIT = timedelta(seconds=60)  # how long a job waits for a launcher that it prefers and that is not known to be full
LOOKAHEAD = 20  # more jobs than free slots are read: some of them wait for a launcher that they prefer
MAX_QUEUE_SCAN = 1000


@dataclass(frozen=True)
class _Slots:
    """The free slots of a launcher: those that it keeps for an environment, and those for all others."""

    shared: int
    reserved: Mapping[str, int]

    @classmethod
    def count(cls, launcher: Launcher, active: int) -> "_Slots":
        """The slots that are free now, while `active` jobs hold the launcher's compute."""
        reserved = dict[str, int]()
        if isinstance(launcher, SlotReserver):
            reserved = {name: launcher.count_free_reserved_slots(name) for name in launcher.reserved_environments}
        return cls(launcher.count_free_slots(active), reserved)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(max(0, count) for count in (self.shared, *self.reserved.values()))

    def has_one(self, placement: Placement) -> bool:
        """Whether an attempt at that placement finds a slot."""
        return self.reserved.get(placement.environment, self.shared) > 0

    def take(self, placement: Placement) -> "_Slots":
        """The slots that are left when an attempt at that placement has one."""
        environment = placement.environment
        if environment in self.reserved:
            return replace(self, reserved={**self.reserved, environment: self.reserved[environment] - 1})
        return replace(self, shared=self.shared - 1)


class LaunchQueue:
    """Chooses jobs for one launcher after the other. Remembers which launchers were full a moment ago, in this process."""

    def __init__(self, repository: JobRepository, launchers: LauncherPool, budget: Budget) -> None:
        self._repository = repository
        self._budget = budget
        self._launchers = launchers
        self._full_at: dict[str, datetime] = {}  # when a launcher last had no free slot left; it is removed when it has one again

    def choose(self, launcher: Launcher, active: int, limit: int) -> list[tuple[Job, Placement]]:
        """The jobs to launch now, oldest first, at most `limit`. `active` jobs hold the launcher's compute. Raises Unavailable."""
        slots = _Slots.count(launcher, active)
        chosen = self._choose_oldest(launcher.name, slots, limit) if slots.total > 0 else []
        if sum(placement.environment not in slots.reserved for _, placement in chosen) >= slots.shared:
            self._full_at[launcher.name] = self._repository.clock()
        else:
            self._full_at.pop(launcher.name, None)
        return chosen

    def _choose_oldest(self, launcher: str, slots: "_Slots", limit: int) -> list[tuple[Job, Placement]]:
        """Read further into the queue until there are enough jobs that the launcher may take."""
        now, count = self._repository.clock(), min(limit, slots.total)
        scanned = min(count + LOOKAHEAD, MAX_QUEUE_SCAN)
        while True:
            queued = self._repository.store.list_queued_jobs(launcher, scanned)
            admission, chosen, free = self._budget.open_admission(), list[tuple[Job, Placement]](), slots
            for job in queued:
                placement = self._choose_placement(job, launcher, now)
                if len(chosen) < count and placement and free.has_one(placement) and admission.admit(job, placement):
                    chosen.append((job, placement))
                    free = free.take(placement)
            if len(chosen) >= count or len(queued) < scanned or scanned == MAX_QUEUE_SCAN:
                return chosen
            scanned = min(4 * scanned, MAX_QUEUE_SCAN)

    def _choose_placement(self, job: Job, launcher: str, now: datetime) -> Placement | None:
        """The job's first placement at the launcher, unless an earlier one may still take the job."""
        has_waited = now - job.status_changed_at >= MAX_PREFERENCE_WAIT
        for placement in job.placements:
            if placement.launcher == launcher:
                return placement
            if not (has_waited or self._is_full_or_removed(placement.launcher, now)):
                return None
        return None

    def _is_full_or_removed(self, launcher: str, now: datetime) -> bool:
        full_at = self._full_at.get(launcher)
        return self._launchers.find(launcher) is None or (full_at is not None and now - full_at < MAX_PREFERENCE_WAIT)
