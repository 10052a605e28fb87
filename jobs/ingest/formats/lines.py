"""The reader of JSON Lines for `FORMATS`. Lines are UTF-8; a file in another encoding is recoded while it is read."""

from collections.abc import Iterator, Sequence

from jobs.ingest.formats.encodings import choose_encoding, describe_encoding, open_utf8, refuse_encoding
from jobs.ingest.formats.jsonl import read_jsonl
from jobs.ingest.formats.parts import Part
from jobs.ingest.formats.reader import Reader
from jobs.ingest.records import Record
from schema.ingestion import IngestLimits, IngestOptions, RowProblem

UTF8 = ("utf-8", "utf-8-sig")


def open_lines(parts: Sequence[Part], options: IngestOptions, limits: IngestLimits) -> Reader:
    """The reader of files of JSON lines. Raises InvalidInput."""

    def read(part: Part) -> Iterator[Record | RowProblem]:
        codec = choose_encoding(part.read_sample(), options)
        try:
            with part.open() if codec in UTF8 else open_utf8(part, codec) as stream:
                yield from read_jsonl(stream, limits, part.label)
        except UnicodeError as error:
            raise refuse_encoding(part, codec) from error

    return Reader(read, "line", encoding=describe_encoding(choose_encoding(parts[0].read_sample(), options)))
