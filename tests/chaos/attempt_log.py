"""A log in which attempts record that they started, so that launches are counted without asking the service."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Entry = Literal["started", "claimed"]


@dataclass(frozen=True)
class AttemptLog:
    """The number of processes of each attempt, and of those that got the claim, by the attempt's name."""

    started: Counter[str]
    claimed: Counter[str]


def append_entry(name: str, entry: Entry) -> None:
    """Append one line atomically: many processes write at the same time."""
    descriptor = os.open(os.environ["CHAOS_ATTEMPT_LOG"], os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{entry} {name}\n".encode())
    os.close(descriptor)


def read_attempt_log(path: Path) -> AttemptLog:
    """Read all entries."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return AttemptLog(*(Counter(name for logged, name in lines if logged == entry) for entry in ("started", "claimed")))
