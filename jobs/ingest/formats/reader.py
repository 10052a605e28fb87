"""What a format's module makes of the parts that it is given."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from jobs.ingest.formats.parts import Part
from jobs.ingest.records import Record
from schema.ingestion import RowProblem


@dataclass(frozen=True)
class Reader:
    """How to read the records of each part, and what was found out about all of them."""

    read: Callable[[Part], Iterator[Record | RowProblem]]
    unit: Literal["line", "row"]  # what the numbers of its records count
    columns: tuple[str, ...] = ()  # of a table; empty where each record has its own
    encoding: str | None = None
    delimiter: str | None = None
    sheet: str | None = None
