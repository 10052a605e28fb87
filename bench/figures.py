"""Measurements and their goals."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

Direction = Literal["at least", "at most", "exactly"]


@dataclass(frozen=True)
class Goal:
    """The goal of a measurement."""

    direction: Direction
    value: float

    def is_met_by(self, value: float) -> bool:
        """Whether a measured value meets the goal. NaN never does."""
        match self.direction:
            case "at least":
                return value >= self.value
            case "at most":
                return value <= self.value
            case "exactly":
                return value == self.value


@dataclass(frozen=True)
class Measurement:
    """One number of one benchmark. Without a goal it is informative; without a value, `note` is the reason."""

    benchmark: str
    name: str
    value: float | None
    unit: str = ""
    goal: Goal | None = None
    note: str = ""

    @property
    def is_goal_met(self) -> bool | None:
        """None without a goal. A goal without a measured value is not met."""
        if self.goal is None:
            return None
        return self.value is not None and self.goal.is_met_by(self.value)


def at_least(value: float) -> Goal:
    """A goal that larger values meet."""
    return Goal("at least", value)


def at_most(value: float) -> Goal:
    """A goal that smaller values meet."""
    return Goal("at most", value)


def exactly(value: float) -> Goal:
    """A goal that only this value meets."""
    return Goal("exactly", value)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed; NaN without values."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def median(values: Sequence[float]) -> float:
    """The 50th percentile."""
    return percentile(values, 50)


def print_table(figures: Sequence[Measurement]) -> None:
    """Print the measurements as a table."""
    table = Table("benchmark", "figure", "measured", "goal", "met", "note")
    for figure in figures:
        goal = f"{figure.goal.direction} {_format_number(figure.goal.value)} {figure.unit}".strip() if figure.goal else ""
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[figure.is_goal_met]
        table.add_row(figure.benchmark, figure.name, _format_value(figure), goal, met, figure.note)
    Console().print(table)


def write_json(figures: Sequence[Measurement], path: Path) -> None:
    """Write the measurements as JSON."""
    path.write_text(json.dumps([asdict(figure) | {"met": figure.is_goal_met} for figure in figures], indent=1) + "\n")


def _format_value(figure: Measurement) -> str:
    return "–" if figure.value is None else f"{_format_number(figure.value)} {figure.unit}".strip()


def _format_number(value: float) -> str:
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
