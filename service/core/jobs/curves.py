"""The metrics of one job as curves: columns sorted by step, and views of them in so many buckets that no spike is lost. Pure.

A step that a later attempt repeated, because it continued from an earlier checkpoint, counts once: the newest wins.
"""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from schema.events import CheckpointRestored, EvaluationCompleted, MetricsLogged
from service.core.event_store import StoredEvent

MAX_STEP = 2**63 - 1  # of the arrays


@dataclass(frozen=True)
class Selection:
    """The part of the curves to show: steps, both ends included, in at most `points` buckets; `names` None: all metrics."""

    from_step: int = 0
    to_step: int = MAX_STEP
    points: int = 500
    names: tuple[str, ...] | None = None
    max_cells: int = 250_000  # buckets × metrics; without `names`, metrics beyond it are left out


@dataclass(frozen=True)
class Buckets:
    """One metric. An item is None where the bucket has no value of it."""

    min: list[float | None]
    max: list[float | None]
    last: list[float | None]


@dataclass(frozen=True)
class CurveView:
    """The curves of a selection. All lists of `step`, `epoch`, `at`, `attempt` and `metrics` have one item for each bucket."""

    steps: int  # how many steps with metrics are in the selection
    step: list[int]  # the last one of each bucket, as the next three
    epoch: list[float | None]
    at: list[datetime]
    attempt: list[int]
    metrics: dict[str, Buckets]
    notes: dict[str, str]  # why the newest value of a metric is missing that could not be computed
    names_left_out: int
    evaluations: list[StoredEvent]
    attempts: dict[int, int]  # the step from which each attempt started


@dataclass
class _Column:
    """The values of one metric, by their steps."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def put(self, step: int, value: float) -> None:
        index = _find_place(self.steps, step)
        if index < len(self.steps) and self.steps[index] == step:
            self.values[index] = value
        else:
            self.steps.insert(index, step)
            self.values.insert(index, value)

    def drop(self, step: int) -> None:
        index = bisect_left(self.steps, step)
        del self.steps[index:], self.values[index:]

    def split(self, last_steps: Sequence[int], from_step: int) -> Buckets:
        """The buckets that end with these steps."""
        buckets = Buckets([], [], [])
        begin = bisect_left(self.steps, from_step)
        for last_step in last_steps:
            end = bisect_right(self.steps, last_step, begin)
            values = self.values[begin:end]
            buckets.min.append(min(values, default=None))
            buckets.max.append(max(values, default=None))
            buckets.last.append(values[-1] if values else None)
            begin = end
        return buckets


class Curves:
    """All metrics of a job up to an event. Not safe for several threads at once."""

    def __init__(self) -> None:
        self.cursor = 0  # of the newest event that was added
        self._steps: array[int] = array("q")
        self._epochs: array[float] = array("d")  # NaN: not reported
        self._times: array[float] = array("d")
        self._attempts: array[int] = array("q")
        self._columns: dict[str, _Column] = {}
        self._notes: dict[str, str] = {}
        self._evaluations: dict[tuple[int, str], StoredEvent] = {}
        self._starts: dict[int, int] = {}
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """About how much memory the curves use; never too little by much."""
        return self._size_bytes

    def add(self, stored: StoredEvent) -> None:
        """Add the next event of the job. One that is no metric only counts as read."""
        self.cursor = stored.cursor
        if stored.attempt:
            self._starts.setdefault(stored.attempt, 0)
        match stored.event:
            case CheckpointRestored(step=step):
                self._starts[stored.attempt] = step
            case EvaluationCompleted() as evaluation:
                self._evaluations.pop((evaluation.step, evaluation.when), None)  # so that the newest comes last
                self._evaluations[evaluation.step, evaluation.when] = stored
                self._size_bytes += 2000
            case MetricsLogged(step=step) as metrics if step <= MAX_STEP:
                self._add_metrics(stored, metrics)
            case _:
                return

    def _add_metrics(self, stored: StoredEvent, metrics: MetricsLogged) -> None:
        if self._steps and stored.attempt > self._attempts[-1]:
            self._drop_repeated(metrics.step, stored.attempt)
        index = _find_place(self._steps, metrics.step)
        if index == len(self._steps) or self._steps[index] != metrics.step:
            for column, blank in ((self._steps, metrics.step), (self._attempts, 0)):
                column.insert(index, blank)
            for column in (self._epochs, self._times):
                column.insert(index, math.nan)
            self._size_bytes += 32
        self._attempts[index], self._times[index] = stored.attempt, stored.at.timestamp()
        if metrics.epoch is not None:
            self._epochs[index] = metrics.epoch
        for name, value in metrics.values.items():
            if value is not None:
                self._find_column(name).put(metrics.step, value)
                self._size_bytes += 16
                self._notes.pop(name, None)
        for name, reason in metrics.notes.items():
            if metrics.values.get(name) is None:
                self._notes[name] = reason
                self._size_bytes += len(reason)

    def _find_column(self, name: str) -> _Column:
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = _Column()
            self._size_bytes += 400 + len(name)
        return column

    def _drop_repeated(self, step: int, attempt: int) -> None:
        """Forget what earlier attempts reported of this step and later ones: the attempt trains them again."""
        index = bisect_left(self._steps, step)
        for column in (self._steps, self._epochs, self._times, self._attempts):
            del column[index:]
        for column in self._columns.values():
            column.drop(step)
        repeated = [key for key, stored in self._evaluations.items() if key[0] >= step and stored.attempt < attempt]
        for key in repeated:
            del self._evaluations[key]

    def view(self, selection: Selection) -> CurveView:
        """The selected part."""
        begin, end = bisect_left(self._steps, selection.from_step), bisect_right(self._steps, selection.to_step)
        rows = max(0, end - begin)
        count = min(selection.points, rows)
        last_rows = [begin + (number + 1) * rows // count - 1 for number in range(count)]
        last_steps = [self._steps[row] for row in last_rows]
        names = sorted(self._columns) if selection.names is None else list(selection.names)
        shown = names[: max(1, selection.max_cells // max(1, count))]
        return CurveView(
            steps=rows,
            step=last_steps,
            epoch=[None if math.isnan(self._epochs[row]) else self._epochs[row] for row in last_rows],
            at=[datetime.fromtimestamp(self._times[row], UTC) for row in last_rows],
            attempt=[self._attempts[row] for row in last_rows],
            metrics={name: self._columns.get(name, _Column()).split(last_steps, selection.from_step) for name in shown},
            notes={name: reason for name, reason in self._notes.items() if selection.names is None or name in selection.names},
            names_left_out=len(names) - len(shown),
            evaluations=[stored for (step, _), stored in self._evaluations.items() if selection.from_step <= step <= selection.to_step],
            attempts=dict(sorted(self._starts.items())),
        )


def _find_place(steps: "array[int]", step: int) -> int:
    """Where a step is or belongs; nearly always at the end."""
    return len(steps) if not steps or steps[-1] < step else bisect_left(steps, step)
