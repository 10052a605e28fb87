"""A log in which attempts record that they started, so that launches are counted without asking the service."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LedgerEntry = Literal["started", "claimed"]


@dataclass(frozen=True)
class Ledger:
    """How many processes each attempt had and how many of them got the claim, by the attempt's name."""

    started: Counter[str]
    claimed: Counter[str]


def append_entry(name: str, entry: LedgerEntry) -> None:
    """Append one line atomically: many processes write at the same time."""
    descriptor = os.open(os.environ["CHAOS_LEDGER"], os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{entry} {name}\n".encode())
    os.close(descriptor)


def read_ledger(path: Path) -> Ledger:
    """Read all entries."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return Ledger(*(Counter(name for noted, name in lines if noted == what) for what in ("started", "claimed")))
