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
        """Whether a measured value is good enough. A value that is not a number never is."""
        match self.direction:
            case "at least":
                return value >= self.value
            case "at most":
                return value <= self.value
            case "exactly":
                return value == self.value


@dataclass(frozen=True)
class Measurement:
    """One number of one benchmark. Without a goal it is there to explain the others; without a value, `note` says why."""

    benchmark: str
    name: str
    value: float | None
    unit: str = ""
    goal: Goal | None = None
    note: str = ""

    @property
    def is_goal_met(self) -> bool | None:
        """None where nothing was wanted. A goal whose figure could not be had is not met."""
        if self.goal is None:
            return None
        return self.value is not None and self.goal.is_met_by(self.value)


def at_least(value: float) -> Goal:
    """More is better."""
    return Goal("at least", value)


def at_most(value: float) -> Goal:
    """Less is better."""
    return Goal("at most", value)


def exactly(value: float) -> Goal:
    """Nothing else will do."""
    return Goal("exactly", value)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed; nan of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return percentile(values, 50)


def print_table(figures: Sequence[Measurement], console: Console | None = None) -> None:
    """The figures for a person."""
    table = Table("benchmark", "figure", "measured", "goal", "met", "remark")
    for figure in figures:
        goal = f"{figure.goal.direction} {_format_number(figure.goal.value)} {figure.unit}".strip() if figure.goal else ""
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[figure.is_goal_met]
        table.add_row(figure.benchmark, figure.name, _format_value(figure), goal, met, figure.note)
    (console or Console()).print(table)


def write_json(figures: Sequence[Measurement], path: Path) -> None:
    """The figures for a program."""
    path.write_text(json.dumps([asdict(figure) | {"met": figure.is_goal_met} for figure in figures], indent=1) + "\n")


def _format_value(figure: Measurement) -> str:
    return "–" if figure.value is None else f"{_format_number(figure.value)} {figure.unit}".strip()


def _format_number(value: float) -> str:
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
