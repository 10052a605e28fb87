"""Text and Markdown: each file, paragraph or line is one row, `{"text": ...}`.

A unit keeps its line breaks, indentation and characters as they are; only the line breaks around it are left out. Paragraphs are
separated by lines with nothing but spaces.
"""

from collections.abc import Iterator, Sequence
from typing import TextIO

from jobs.ingest.formats.encodings import choose_encoding, describe_encoding, open_text, refuse_encoding
from jobs.ingest.formats.parts import Part
from jobs.ingest.formats.reader import Reader
from jobs.ingest.records import Record
from schema.ingestion import IngestLimits, IngestOptions, RowProblem

COLUMN = "text"
SHORTER_UNITS = {"file": "text_unit=paragraph or line", "paragraph": "text_unit=line", "line": ""}


def open_texts(parts: Sequence[Part], options: IngestOptions, limits: IngestLimits) -> Reader:
    """The reader of text files. Raises InvalidInput."""

    def read(part: Part) -> Iterator[Record | RowProblem]:
        codec = choose_encoding(part.read_sample(), options)
        try:
            with open_text(part, codec, newline="\n") as text:
                yield from _Units(part, options.text_unit, limits.max_row_bytes).read(text)
        except UnicodeError as error:
            raise refuse_encoding(part, codec) from error

    return Reader(read, "line", (COLUMN,), describe_encoding(choose_encoding(parts[0].read_sample(), options)))


class _Units:
    """Collects the lines of one unit after another."""

    def __init__(self, part: Part, unit: str, max_bytes: int) -> None:
        self._part = part
        self._unit = unit
        self._max_bytes = max_bytes
        self._start()

    def _start(self) -> None:
        self._lines: list[str] = []
        self._first_line = 0
        self._size = 0  # in characters, so never more than in bytes

    def read(self, text: TextIO) -> Iterator[Record | RowProblem]:
        """The units of a text."""
        for number, line in _iter_lines(text, self._max_bytes + 2):
            is_blank = not line or line.isspace()
            if is_blank and (self._unit != "file" or not self._lines):
                yield from self._finish()
                continue
            self._first_line = self._first_line or number
            self._size += len(line)
            if self._size <= self._max_bytes + 2:  # what is longer is refused, and not kept
                self._lines.append(line)
            if self._unit == "line" and line.endswith("\n"):
                yield from self._finish()
        yield from self._finish()

    def _finish(self) -> Iterator[Record | RowProblem]:
        if not self._first_line:
            return
        content = "".join(self._lines)
        content = content.rstrip("\r\n") if self._unit == "file" else content.removesuffix("\n").removesuffix("\r")
        if self._size > self._max_bytes + 2 or len(content.encode("utf-8", "surrogatepass")) > self._max_bytes:
            shorter = SHORTER_UNITS[self._unit]
            reason = f"this {self._unit} is longer than {self._max_bytes:,} bytes; split it{f', or send {shorter}' if shorter else ''}"
            yield self._part.problem(self._first_line, reason, "too_long")
        else:
            yield Record(self._first_line, {COLUMN: content}, self._part.label)
        self._start()


def _iter_lines(text: TextIO, max_characters: int) -> Iterator[tuple[int, str]]:
    """The lines, each with its number; one that is very long comes in pieces of the same number."""
    number = 1
    while line := text.readline(max_characters):
        yield number, line
        number += line.endswith("\n")
