"""A format: each line is `call = reply`."""

from collections.abc import Iterator, Sequence

from jobs.ingest.formats.parts import Part
from jobs.ingest.formats.reader import Reader
from jobs.ingest.records import Record
from schema.ingestion import IngestLimits, IngestOptions, RowProblem


def open_toys(parts: Sequence[Part], options: IngestOptions, limits: IngestLimits) -> Reader:
    """The reader of such files."""
    return Reader(_read, "line", ("call", "reply"))


def _read(part: Part) -> Iterator[Record | RowProblem]:
    with part.open() as stream:
        for number, line in enumerate(stream, start=1):
            call, sign, reply = line.decode().rstrip("\n").partition(" = ")
            if sign:
                yield Record(number, {"call": call, "reply": reply}, part.label)
            else:
                yield part.problem(number, "has no ' = '; write the call, ' = ' and the reply", "not_a_toy")
