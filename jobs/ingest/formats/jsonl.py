"""JSON Lines: each line is one JSON object. Blank lines are skipped; lines are counted with them."""

from collections.abc import Iterator
from typing import BinaryIO

from jobs.ingest.records import Record
from jobs.ingest.rows.size import DATA_URI_PATTERN, describe_long_row
from schema.ingestion import IngestLimits, RowProblem

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_WHITESPACE = b" \t\r\n"


def read_jsonl(stream: BinaryIO, limits: IngestLimits, part: str = "") -> Iterator[Record | RowProblem]:
    """The records of a file. Never reads more of a line than the limits allow."""
    number = 0
    while line := _read_raw_line(stream, limits, len(b"\r\n") + (0 if number else len(BYTE_ORDER_MARK))):
        number += 1
        is_whole = line.endswith(b"\n")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) > limits.max_row_bytes and (reason := _describe_long_line(line, limits)):
            if not is_whole:
                _skip_line(stream)
            yield RowProblem(part=part, line=number, reason=reason, code="too_long")
        elif line.strip(JSON_WHITESPACE):
            yield Record(number, line, part)


def _skip_line(stream: BinaryIO) -> None:
    """Read to the end of the line, a block at a time."""
    while (block := stream.readline(1 << 20)) and not block.endswith(b"\n"):
        pass


def _read_raw_line(stream: BinaryIO, limits: IngestLimits, slack: int) -> bytes:
    """A line with its line feed, or enough of it to show that it is too long."""
    raw = stream.readline(limits.max_row_bytes + slack)
    if len(raw) > limits.max_row_bytes and not raw.endswith(b"\n") and DATA_URI_PATTERN.search(raw):
        raw += stream.readline(max(0, limits.max_image_row_bytes + slack - len(raw)))
    return raw


def _describe_long_line(line: bytes, limits: IngestLimits) -> str | None:
    """Why a line is too long, or None. Text has its own limit: in memory, a list of short values takes twenty times its bytes."""
    image_bytes = sum(match.end() - match.start() for match in DATA_URI_PATTERN.finditer(line))
    if len(line) - image_bytes > limits.max_row_bytes:
        return describe_long_row(limits, has_images=image_bytes > 0)
    if len(line) > max(limits.max_row_bytes, limits.max_image_row_bytes):
        return f"longer than {limits.max_image_row_bytes:,} bytes with its images; use fewer or smaller ones"
    return None
