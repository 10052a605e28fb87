"""Collects rows that a person should look at, by kind. What was found in them is never kept."""

from collections import Counter
from collections.abc import Iterable

from schema.dataset import TRAIN_SPLIT
from schema.ingestion import Finding

MAX_FIRST_ROWS = 10


class FindingCounter:
    """Counts rows by what was found in them."""

    def __init__(self) -> None:
        self._rows = Counter[str]()
        self._first_rows: dict[tuple[str, bool], list[int]] = {}

    def add(self, kinds: Iterable[str], split: str, number: int) -> None:
        """Add the kinds that one row has, by the row's number in its split."""
        for kind in sorted(set(kinds)):
            self._rows[kind] += 1
            first = self._first_rows.setdefault((kind, split == TRAIN_SPLIT), [])
            if len(first) < MAX_FIRST_ROWS:
                first.append(number)

    def findings(self) -> tuple[Finding, ...]:
        """What was found, the most frequent kind first."""
        return tuple(
            Finding(
                kind=kind,
                rows=rows,
                first_rows=tuple(self._first_rows.get((kind, True), ())),
                first_held_out_rows=tuple(self._first_rows.get((kind, False), ())),
            )
            for kind, rows in sorted(self._rows.items(), key=lambda item: (-item[1], item[0]))
        )
