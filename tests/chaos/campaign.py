"""The rows of the campaign: their type, their names and how to run one."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal

import httpx2
import psutil

from storage import StorageError

Size = Literal["full", "short"]

# In the order of the table. Each is a module of this package with `run(size) -> Row`.
ROWS = (
    "service_kills",
    "same_request",
    "training_kills",
    "broken_checkpoints",
    "zombies",
    "launcher_crashes",
    "silent_status",
    "launcher_away",
    "storage_faults",
    "reports",
    "clocks",
    "out_of_memory",
    "full_disk",
)

# Rows that take longest, in the order in which they start when several run at the same time.
LONGEST_FIRST = ("service_kills", "training_kills", "out_of_memory", "reports", "clocks", "zombies", "full_disk")


class CampaignError(Exception):
    """The campaign itself failed: a part did not start, or something exceeded its timeout."""


# Errors of processes, servers and files that fail one row and leave the others worth running.
FAILURES = (CampaignError, OSError, RuntimeError, ValueError, LookupError, AssertionError, subprocess.SubprocessError)
LIBRARY_FAILURES = (httpx2.HTTPError, psutil.Error, StorageError, ImportError)


def by_duration(names: Sequence[str]) -> list[str]:
    """The names of rows, longest first."""
    return sorted(names, key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST))


@dataclass(frozen=True)
class Row:
    """One fault: what was injected, what is expected and what was observed."""

    fault: str
    injected: str
    expected: str
    observed: str
    passed: bool
    seconds: float = 0.0  # set by `run_row`


def run_row(name: str, size: Size) -> Row:
    """Run a row and measure its time. A row that raises counts as failed, with the error as its observation."""
    began = time.monotonic()
    try:
        row: Row = import_module(f"tests.chaos.{name}").run(size)
    except (*FAILURES, *LIBRARY_FAILURES) as error:
        row = Row(name.replace("_", " "), "", "", f"did not finish: {type(error).__name__}: {error}", passed=False)
    return replace(row, seconds=time.monotonic() - began)
