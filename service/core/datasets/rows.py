"""The rows of an upload: read, checked and split as they stream by.

A file of gigabytes is fine: one row is held at a time, plus about 150 bytes for each row already seen. The first row that
cannot be used ends the reading with a BadRow, which names the line, the field and what would work. Nothing is dropped in
silence: a column that no trainer would use is refused, and exact duplicates are counted.

What a row must hold is in `row_forms.py`. A stored row is one line of JSON that ends in a line feed and holds no other;
U+2028 and its like may stand in it as they are, so readers split at line feeds only.

Held-out rows are chosen by the hash of their prompt (everything before the last answer, images too; a whole `text`), so that
a row never lies on both sides, nor two answers to one prompt, and so that the choice does not depend on the order of the rows.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO, Literal, NamedTuple

import orjson

from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.types import DatasetType
from service.core.datasets.formats import FORMATS, ValidatedRow, parse_row
from service.core.datasets.values import InvalidValue, Number

MAX_EVAL_FRACTION = 0.5
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_WHITESPACE = b" \t\r\n"
DATA_URI_PATTERN = re.compile(rb'"data:[^"]*', re.IGNORECASE)  # a file within a row, whole or as far as it was read


class InvalidRow(ValueError):
    """A row that cannot be used. `line` counts from 1, blank lines too; `field` is a path such as messages[2].content, or empty."""

    def __init__(self, line: int, field: str, reason: str) -> None:
        self.line = line
        self.field = field
        self.reason = reason
        super().__init__(f"line {line}: {field}: {reason}" if field else f"line {line}: {reason}")


@dataclass(frozen=True)
class RowLimits:
    """How much one upload may hold."""

    max_row_bytes: int = 1 << 20  # without its images
    max_image_row_bytes: int = 16 << 20  # with them
    max_rows: int = 1_000_000


class Row(NamedTuple):
    """One usable row."""

    line: int
    dataset_type: DatasetType
    canonical: bytes  # one line of JSON without its line feed: fixed order of keys, no space between tokens, content untouched
    digest: bytes  # equal for equal rows
    prompt_digest: bytes  # equal for rows that must stay on the same side of the split
    images: int = 0
    columns: tuple[str, ...] = ()  # beside a prompt, sorted


@dataclass(frozen=True)
class SplitStats:
    """What was written for one split."""

    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class IngestResult:
    """What an upload came to."""

    dataset_type: DatasetType
    rows_read: int
    duplicates_dropped: int
    train: SplitStats
    eval: SplitStats | None  # None: nothing was to be held out, or all rows have the same prompt
    images: int  # in the rows of both splits
    columns: tuple[str, ...]  # beside the prompt, in rows of that form


def ingest(
    stream: BinaryIO,
    limits: RowLimits,
    eval_fraction: float,
    seed: int,
    train_out: BinaryIO,
    eval_out: BinaryIO,
    scratch: BinaryIO,
) -> IngestResult:
    """Read an upload, drop exact duplicates, and write both splits, each in the order of the upload.

    `scratch` is an empty file open for writing and reading; it grows to the size of the rows. The outputs are only written
    once every row was found usable. Raises BadRow.
    """
    splitter = Splitter(eval_fraction, seed)
    dataset_type: DatasetType = "text"
    columns: tuple[str, ...] = ()
    rows_read = images = 0
    for row in read_rows(stream, limits):
        dataset_type, columns = row.dataset_type, row.columns
        rows_read += 1
        if splitter.add(row):
            images += row.images
            scratch.write(row.canonical + b"\n")
    scratch.seek(0)
    train, held_out = _SplitWriter(train_out), _SplitWriter(eval_out)
    for side, line in zip(splitter.assign_splits(), scratch, strict=True):
        (train if side == TRAIN_SPLIT else held_out).write(line)
    held_out_facts = held_out.stats() if held_out.rows else None
    return IngestResult(dataset_type, rows_read, splitter.duplicates_dropped, train.stats(), held_out_facts, images, columns)


def read_rows(stream: BinaryIO, limits: RowLimits) -> Iterator[Row]:
    """The rows of a JSONL upload, one by one; blank lines are skipped.

    Raises BadRow, also when there are no rows or too many, or when all have the same label.
    """
    alike = _ConsistencyChecker()
    for number, line in _read_lines(stream, limits):
        if alike.rows == limits.max_rows:
            raise InvalidRow(number, "", f"more than {limits.max_rows:,} rows; split the file into several datasets")
        try:
            content = parse_row(line)
        except InvalidValue as refused:
            raise InvalidRow(number, refused.field, refused.reason) from refused
        alike.add(number, content)
        row = _make_row(number, content)
        if len(line) > limits.max_row_bytes:
            _check_text_size(row, content, limits)
        yield row
    alike.check_labels()


class Splitter:
    """Decides which rows are held out, once it has seen them all.

    Exactly the nearest whole number to `eval_fraction` of the distinct rows is held out when no two rows share a prompt.
    Prompts are never torn apart, so where they are shared it may be fewer; it is more only when even the rarest prompt
    has more rows than asked for. Without two different prompts nothing can be held out.
    """

    def __init__(self, eval_fraction: float, seed: int) -> None:
        if not 0 <= eval_fraction <= MAX_EVAL_FRACTION:
            raise ValueError(f"eval_fraction is {eval_fraction}; it lies between 0 and {MAX_EVAL_FRACTION}")
        self.duplicates_dropped = 0
        self._eval_fraction = eval_fraction
        self._seed = f"{seed}:".encode()
        self._seen: set[int] = set()  # 128 bits each; as int they take less memory than as bytes
        self._keys = array("Q")  # where each kept row's prompt stands in the seed's order

    def add(self, row: Row) -> bool:
        """Take note of a row; False for a duplicate, which is to be dropped."""
        digest = int.from_bytes(row.digest)
        if digest in self._seen:
            self.duplicates_dropped += 1
            return False
        self._seen.add(digest)
        self._keys.append(int.from_bytes(hashlib.blake2b(self._seed + row.prompt_digest, digest_size=8).digest()))
        return True

    def assign_splits(self) -> Iterator[Literal["train", "eval"]]:
        """The side of each row that was kept, in the order they were added."""
        held_out = _choose_held_out(self._keys, self._eval_fraction)
        return (EVAL_SPLIT if key in held_out else TRAIN_SPLIT for key in self._keys)


def _choose_held_out(keys: "array[int]", eval_fraction: float) -> set[int]:
    """The prompts to hold out: in the seed's order, every one whose rows still fit into the number asked for."""
    if eval_fraction == 0 or not keys or min(keys) == max(keys):
        return set()
    ordered = sorted(keys)
    room = max(1, round(eval_fraction * len(ordered)))
    held_out: set[int] = set()
    for key, rows in _count_rows_per_prompt(ordered):
        if rows <= room:
            held_out.add(key)
            room -= rows
        if not room:
            break
    return held_out or {min(_count_rows_per_prompt(ordered), key=lambda prompt: prompt[1])[0]}


def _count_rows_per_prompt(ordered: list[int]) -> Iterator[tuple[int, int]]:
    """Each prompt's key, with its number of rows."""
    return ((key, sum(1 for _ in rows)) for key, rows in groupby(ordered))


class _SplitWriter:
    """Writes the lines of one split, and keeps count."""

    def __init__(self, out: BinaryIO) -> None:
        self.rows = 0
        self._out = out
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()

    def write(self, line: bytes) -> None:
        self._out.write(line)
        self._sha256.update(line)
        self._size_bytes += len(line)
        self.rows += 1

    def stats(self) -> SplitStats:
        return SplitStats(self.rows, self._size_bytes, self._sha256.hexdigest())


def _read_lines(stream: BinaryIO, limits: RowLimits) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers. Never holds more of a line than is allowed."""
    number = 0
    while line := _read_raw_line(stream, limits, len(b"\r\n") + (0 if number else len(BYTE_ORDER_MARK))):
        number += 1
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) > limits.max_row_bytes and (reason := _line_length_error(line, limits)):
            raise InvalidRow(number, "", reason)
        if line.strip(JSON_WHITESPACE):
            yield number, line


def _read_raw_line(stream: BinaryIO, limits: RowLimits, slack: int) -> bytes:
    """A line with its end, or as much of it as shows that it is too long."""
    raw = stream.readline(limits.max_row_bytes + slack)
    if len(raw) > limits.max_row_bytes and not raw.endswith(b"\n") and DATA_URI_PATTERN.search(raw):
        raw += stream.readline(max(0, limits.max_image_row_bytes + slack - len(raw)))
    return raw


def _line_length_error(line: bytes, limits: RowLimits) -> str | None:
    """Why a line is too long. What is not image is counted apart: in memory, a list of short values takes twenty times its bytes."""
    images = sum(found.end() - found.start() for found in DATA_URI_PATTERN.finditer(line))
    if len(line) - images > limits.max_row_bytes:
        return _text_length_error(limits, images)
    if len(line) > max(limits.max_row_bytes, limits.max_image_row_bytes):
        return f"longer than {limits.max_image_row_bytes:,} bytes with its images; use fewer or smaller ones"
    return None


def _text_length_error(limits: RowLimits, images: int) -> str:
    return f"longer than {limits.max_row_bytes:,} bytes{' without its images' if images else ''}; shorten the row, or cut it into several"


def _check_text_size(row: Row, content: ValidatedRow, limits: RowLimits) -> None:
    """Refuse a row that looked as if it had images, and is too long without them."""
    images = sum(len(image) for image in content.images)
    if len(row.canonical) - images > limits.max_row_bytes:
        raise InvalidRow(row.line, "", _text_length_error(limits, images))


class _ConsistencyChecker:
    """What the rows of one upload must have in common, and the labels that they must not."""

    def __init__(self) -> None:
        self.rows = 0
        self._first_line = 0
        self._first_shape = ""
        self._last_line = 1
        self._labels = Counter[bool]()

    def add(self, number: int, content: ValidatedRow) -> None:
        if not self.rows:
            self._first_line, self._first_shape = number, content.shape
        elif content.shape != self._first_shape:
            found = f"this row is {content.shape}, but line {self._first_line} is {self._first_shape}"
            raise InvalidRow(number, "", f"{found}; a dataset has rows of one form")
        if content.label is not None:
            self._labels[content.label] += 1
        self._last_line = number
        self.rows += 1

    def check_labels(self) -> None:
        """Raises BadRow, also when there were no rows."""
        if not self.rows:
            raise InvalidRow(1, "", f"no rows; a row is one line such as {FORMATS}")
        if len(self._labels) == 1:
            found = f"{self._labels[True]:,} rows are true and {self._labels[False]:,} are false"
            raise InvalidRow(self._last_line, "label", f"is the same in all rows: {found}; there must be some of each")


def _make_row(number: int, content: ValidatedRow) -> Row:
    canonical = orjson.dumps(content.columns, default=_serialize_number, option=orjson.OPT_PASSTHROUGH_DATACLASS)
    digest = _digest(canonical)
    prompt_digest = digest if content.prompt is None else _digest(orjson.dumps(content.prompt))
    return Row(number, content.dataset_type, canonical, digest, prompt_digest, len(content.images), content.extra_columns)


def _serialize_number(value: object) -> orjson.Fragment:
    """A number, as the upload writes it."""
    if not isinstance(value, Number):
        raise TypeError(f"{type(value).__name__} is no value of a row")
    return orjson.Fragment(value.literal)


def _digest(canonical: bytes) -> bytes:
    return hashlib.blake2b(canonical, digest_size=16).digest()
