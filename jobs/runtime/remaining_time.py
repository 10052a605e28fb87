"""How long the attempt still takes, over all phases that are left: `remaining_s` of its progress.

A family plans the phases with the seconds that each takes, and corrects them by what it measures. A phase that takes longer than
planned counts as nearly done: the time left never reaches zero before the end.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from schema.types import Phase

MIN_PHASE_SHARE = 0.05  # of its planned time: what a phase that takes longer still counts
MIN_PHASE_S = 1.0


@dataclass(frozen=True)
class PlannedPhase:
    """A phase and the seconds that it takes; None: not known."""

    phase: Phase
    seconds: float | None


@dataclass(frozen=True)
class _Current:
    """The current phase: when it is planned to end, and what it counts at least. `ends_at` None: not known."""

    ends_at: float | None = None
    min_s: float = MIN_PHASE_S


class RemainingTime:
    """The time left of one attempt. One thread changes it, others read it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._plan: tuple[_Current, tuple[PlannedPhase, ...]] = (_Current(), ())  # replaced as a whole, for readers in other threads

    def plan(self, phases: Sequence[PlannedPhase]) -> None:
        """Set the phases that follow the current one, in their order. A phase may come twice."""
        self._plan = (self._plan[0], tuple(phases))

    @property
    def planned(self) -> tuple[PlannedPhase, ...]:
        """The phases that follow the current one."""
        return self._plan[1]

    def estimate(self, phase: Phase, seconds: float) -> None:
        """Set how long the next planned phase of this name takes. Does nothing if none is planned."""
        current, later = self._plan
        index = next((n for n, planned in enumerate(later) if planned.phase == phase), None)
        if index is not None:
            self._plan = (current, (*later[:index], replace(later[index], seconds=seconds), *later[index + 1 :]))

    def enter(self, phase: Phase) -> None:
        """A phase begins. Those planned before it are over; a phase that is not planned leaves the plan as it is."""
        _, later = self._plan
        index = next((n for n, planned in enumerate(later) if planned.phase == phase), None)
        if index is None:
            self._plan = (_Current(), later)
        else:
            self._plan = (self._make_current(later[index].seconds), later[index + 1 :])

    def estimate_current(self, seconds: float | None) -> None:
        """Set how much longer the current phase takes."""
        self._plan = (self._make_current(seconds), self._plan[1])

    def end(self) -> None:
        """The work is over: nothing more is known or needed."""
        self._plan = (_Current(), ())

    def read(self) -> float | None:
        """Seconds until the attempt ends; None where the current phase, or a later one, is not known."""
        current, later = self._plan
        if current.ends_at is None:
            return None
        left_s = max(current.ends_at - self._clock(), current.min_s)
        for planned in later:
            if planned.seconds is None:
                return None
            left_s += planned.seconds
        return left_s

    def _make_current(self, seconds: float | None) -> _Current:
        if seconds is None:
            return _Current()
        return _Current(self._clock() + seconds, max(MIN_PHASE_S, MIN_PHASE_SHARE * seconds))
