"""CSV and TSV: a header, then rows. Cells are strings exactly as they are written, numbers too; an empty cell is null.

Rows are counted as a spreadsheet shows them: a row with line breaks in a cell is one row. Blank rows are skipped, but counted.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from itertools import chain, islice
from typing import TextIO

from jobs.ingest.formats.encodings import choose_encoding, decode_sample, describe_encoding, open_text, refuse_encoding
from jobs.ingest.formats.header import Header, check_same_columns, make_header
from jobs.ingest.formats.parts import Part
from jobs.ingest.formats.reader import Reader
from jobs.ingest.records import InvalidInput, Record
from schema.ingestion import IngestLimits, IngestOptions, RowProblem

DELIMITERS = (",", ";", "\t", "|")
SNIFFED_LINES = 50
EXCEL_DIRECTIVE = re.compile(r"\ufeff?sep=(.)\r?\n?\Z", re.IGNORECASE)  # a first line that Excel reads and does not show


class _RowTooLong(Exception):
    """A row has more characters than any valid row."""


class _Lines:
    """The lines of a text for `csv.reader`, never more of them in memory than a row may have."""

    def __init__(self, text: TextIO, max_characters: int) -> None:
        self._readline = text.readline
        self._max_characters = max_characters
        self.characters = 0  # of the row that is being read
        self.lines = 0  # of it

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._readline(self._max_characters)
        if not line:
            raise StopIteration
        self.characters += len(line)
        self.lines += 1
        if self.characters >= self._max_characters:
            raise _RowTooLong
        return line

    def skip_line(self) -> None:
        """Read to the end of the line."""
        while (rest := self._readline(1 << 16)) and rest[-1] not in "\r\n":
            pass


def open_delimited(parts: Sequence[Part], options: IngestOptions, limits: IngestLimits) -> Reader:
    """The reader of CSV files with the same columns. Raises InvalidInput."""
    first = parts[0]
    sample = first.read_sample()
    codec = choose_encoding(sample, options)
    lines = StringIO(decode_sample(first, sample, codec), newline="").readlines()
    delimiter = options.delimiter or choose_delimiter(lines[:SNIFFED_LINES], first.suffix)
    if delimiter in '"\r\n':
        raise InvalidInput("the delimiter cannot be a quotation mark or a line break", "usual ones: , ; tab |", "delimiter")
    columns = _Table(first, codec, delimiter, limits).read_header().names

    def read(part: Part) -> Iterator[Record | RowProblem]:
        return _Table(part, choose_encoding(part.read_sample(), options), delimiter, limits).iter_rows(columns, first.name)

    return Reader(read, "row", columns, describe_encoding(codec), delimiter)


def choose_delimiter(lines: Sequence[str], suffix: str = "") -> str:
    """The delimiter of a table that begins with these lines: one that is in the header, and for which most rows fit it."""
    if lines and (directive := EXCEL_DIRECTIVE.match(lines[0])):
        return directive[1]
    preferred = "\t" if suffix in (".tsv", ".tab") else ","
    ordered = sorted(DELIMITERS, key=lambda delimiter: delimiter != preferred)
    return max(ordered, key=lambda delimiter: _rate(lines, delimiter))


def count_columns(lines: Sequence[str], delimiter: str) -> int:
    """How many columns a table has that begins with these lines; 0 if rows do not fit its header."""
    share, columns = _rate(lines, delimiter)
    return columns if share == 1 else 0


def _rate(lines: Sequence[str], delimiter: str) -> tuple[float, int]:
    """How well a delimiter fits: the share of the rows with as many cells as the header, then the number of its cells."""
    try:
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    except csv.Error:
        return 0, 0
    if not rows or len(rows[0]) < 2:
        return 0, 0
    complete = rows[1:-1] or rows[1:]  # the last row may be cut off by the end of the sample
    return sum(len(row) == len(rows[0]) for row in complete) / max(1, len(complete)), len(rows[0])


class _Table:
    """One file."""

    def __init__(self, part: Part, codec: str, delimiter: str, limits: IngestLimits) -> None:
        self._part = part
        self._codec = codec
        self._delimiter = delimiter
        self._limits = limits
        self._max_characters = max(limits.max_row_bytes, limits.max_image_row_bytes) + 2

    def read_header(self) -> Header:
        """Its header. Raises InvalidInput."""
        try:
            with open_text(self._part, self._codec, newline="") as text:
                return self._start(text)[2]
        except UnicodeError as error:
            raise refuse_encoding(self._part, self._codec) from error

    def iter_rows(self, expected: tuple[str, ...], first: str) -> Iterator[Record | RowProblem]:
        """Its records. Raises InvalidInput."""
        try:
            with open_text(self._part, self._codec, newline="") as text:
                lines, rows, header = self._start(text)
                check_same_columns(self._part, header.names, expected, first)
                yield from self._iter_under_header(lines, rows, header)
        except UnicodeError as error:
            raise refuse_encoding(self._part, self._codec) from error

    def _start(self, text: TextIO) -> "tuple[_Lines, Iterator[list[str]], Header]":
        """Read up to the header. Raises InvalidInput."""
        csv.field_size_limit(self._max_characters)
        lines = _Lines(text, self._max_characters)
        try:
            first = list(islice(lines, 1))
            directive = first and EXCEL_DIRECTIVE.match(first[0])
            rows = csv.reader(lines if directive else chain(first, lines), delimiter=self._delimiter, strict=True)
            cells = next(rows, [])
        except (csv.Error, _RowTooLong) as error:
            reason = f"its header, row 1, cannot be read: {_explain(error, self._max_characters)}"
            raise self._part.refuse(reason, "write the names of the columns into the first row") from error
        lines.characters = lines.lines = 0
        return lines, rows, make_header(self._part, cells, 1, self._limits)

    def _iter_under_header(self, lines: _Lines, rows: Iterator[list[str]], header: Header) -> Iterator[Record | RowProblem]:
        names, width, label = header.names, len(header.names), self._part.label
        number = 1
        while True:
            number += 1
            lines.characters = lines.lines = 0
            try:
                cells = next(rows)
            except StopIteration:
                return
            except _RowTooLong as error:
                reason = _explain(error, self._max_characters)
                if lines.lines > 1:  # where the row ends cannot be told, nor where the next one begins
                    raise self._part.refuse(f"row {number} {reason}", 'if a cell begins with ", it must end with one') from error
                lines.skip_line()
                yield self._part.problem(number, reason, "too_long", is_row=True)
                continue
            except csv.Error as error:
                if lines.lines > 1 and "end of data" in str(error):  # it took the rows after it with it
                    raise self._part.refuse(f"row {number} {_explain(error, self._max_characters)}") from error
                yield self._part.problem(number, _explain(error, self._max_characters), "unreadable", is_row=True)
                continue
            values = [cell or None for cell in cells]
            if len(cells) == width:
                if any(cells):
                    yield Record(number, dict(zip(names, values, strict=True)), label)
            elif any(cells):
                if misfit := header.find_misfit(values):
                    yield self._part.problem(number, misfit, "ragged", is_row=True)
                else:
                    yield Record(number, dict(zip(names, values, strict=False)), label)


def _explain(error: Exception, max_characters: int) -> str:
    """Why a row cannot be read, and what would work."""
    text = str(error)
    if isinstance(error, _RowTooLong) or "field limit" in text:
        return f"has more than {max_characters:,} characters; shorten the row, or end the cell that begins with a quotation mark"
    if "expected after" in text:
        return 'has text after the quotation mark that ends a cell; write a quotation mark within a quoted cell twice: ""'
    if "unexpected end of data" in text:
        return 'has a cell that begins with a quotation mark and never ends; add the ", or write one within a cell twice: ""'
    return f"is not CSV: {text}"
