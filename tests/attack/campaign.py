"""The rows of the attack suite: their type, their names and how to run one."""

import sqlite3
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal

from tests.chaos.campaign import FAILURES, LIBRARY_FAILURES

Size = Literal["full", "short"]

# In the order of the table. Each is a module of this package with `run(size) -> Row`.
ROWS = (
    "fuzz",
    "access",
    "foreign_page",
    "hostile_models",
    "hostile_uploads",
    "ssrf",
    "attempt_tokens",
    "canaries",
    "load",
    "poison",
    "similar_systems",
)
# Rows that measure response times: they run alone, after the others.
EXCLUSIVE = ("hostile_uploads", "load")
# Rows that take longest, in the order in which they start when several run at the same time.
LONGEST_FIRST = ("fuzz", "hostile_models", "canaries")


@dataclass(frozen=True)
class Row:
    """One attack: what is allowed to happen and what was measured."""

    attack: str
    figure: str
    measured: str
    passed: bool
    seconds: float = 0.0  # set by `run_row`


def make_row(attack: str, figure: str, measured: str, problems: Sequence[str]) -> Row:
    """A row that passes when there are no problems; the first few are named in it, and all of them on standard error."""
    for problem in problems:
        print(f"{attack}: {problem}", file=sys.stderr)
    shown = "; ".join(dict.fromkeys(problem[:300] for problem in problems[:4]))
    return Row(attack, figure, f"{measured}{'; ' + shown if shown else ''}", passed=not problems)


def by_duration(names: Sequence[str]) -> list[str]:
    """The names of rows, longest first."""
    return sorted(names, key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST))


def run_row(name: str, size: Size) -> Row:
    """Run a row and measure its time. A row that raises counts as failed, with the error as its measurement."""
    began = time.monotonic()
    try:
        row: Row = import_module(f"tests.attack.{name}").run(size)
    except (*FAILURES, *LIBRARY_FAILURES, sqlite3.Error) as error:
        row = Row(name.replace("_", " "), "", f"did not finish: {type(error).__name__}: {error}", passed=False)
    return replace(row, seconds=time.monotonic() - began)
