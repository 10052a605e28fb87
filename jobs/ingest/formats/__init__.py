"""The formats of files: how each is recognized and read. One module for each format, and a line in `FORMATS`.

A reader yields records as they come, and a RowProblem for what cannot be read; it never keeps a whole file in memory. What records mean
does not belong here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.ingest.formats.jsonl import read_jsonl
from jobs.ingest.records import InvalidInput, Record
from schema.ingestion import IngestLimits, IngestOptions, InputFile, RowProblem

FORMATS = ("jsonl",)


@dataclass
class OpenedInput:
    """The files of an ingestion, recognized as one format."""

    format: str
    files: Sequence[InputFile]
    limits: IngestLimits
    columns: tuple[str, ...] = ()  # of a table; empty where each record has its own
    unit: Literal["line", "row"] = "line"
    bytes_read: int = 0  # of the files as they are, by the iteration that goes on

    def iter_records(self) -> Iterator[Record | RowProblem]:
        """All records, from the first; each call begins again."""
        earlier_bytes = 0
        for file in self.files:
            with Path(file.path).open("rb") as stream:
                for record in read_jsonl(stream, self.limits):
                    self.bytes_read = earlier_bytes + stream.tell()
                    yield record
                earlier_bytes += stream.tell()

    @property
    def total_bytes(self) -> int:
        """The size of the files as they are."""
        return sum(Path(file.path).stat().st_size for file in self.files)


def open_input(files: Sequence[InputFile], options: IngestOptions, limits: IngestLimits) -> OpenedInput:
    """Recognize the format of the files. Raises InvalidInput."""
    if options.format not in (None, *FORMATS):
        raise InvalidInput(f"no format {options.format!r}", f"known: {', '.join(FORMATS)}", "format")
    return OpenedInput("jsonl", files, limits)
