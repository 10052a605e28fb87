"""The rows of an upload: read, checked and split in one pass over the stream.

A file may have gigabytes: memory holds one row at a time, plus about 150 bytes for each earlier row. The first invalid row
ends the reading with an InvalidRow that names the line, the field and what would work. Nothing is dropped silently: a column
that no trainer would use is refused, and exact duplicates are counted.

`formats.py` checks the content of a row. A stored row is one line of JSON that ends in a line feed and contains no other;
it may contain U+2028 and other separators unescaped, so readers must split at line feeds only.

Held-out rows are chosen by the hash of their prompt (everything before the last answer, with its images; for `text`, the whole
text). So a row is never in both splits, nor are two answers to one prompt, and the choice does not depend on the order of the rows.
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

from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT, PromptForm, TextDatasetType
from service.core.datasets.formats import FORMATS, ValidatedRow, parse_row
from service.core.datasets.values import InvalidValue, Number

MAX_EVAL_FRACTION = 0.5
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_WHITESPACE = b" \t\r\n"
DATA_URI_PATTERN = re.compile(rb'"data:[^"]*', re.IGNORECASE)  # a data: URI within a row, whole or as far as it was read


class InvalidRow(ValueError):
    """A row is not valid. `line` counts from 1, blank lines too; `field` is a path such as messages[2].content, or empty."""

    def __init__(self, line: int, field: str, reason: str) -> None:
        self.line = line
        self.field = field
        self.reason = reason
        super().__init__(f"line {line}: {field}: {reason}" if field else f"line {line}: {reason}")


@dataclass(frozen=True)
class RowLimits:
    """The size limits of one upload."""

    max_row_bytes: int = 1 << 20  # without its images
    max_image_row_bytes: int = 16 << 20  # with them
    max_rows: int = 1_000_000
    max_pixels: int = 20_000_000_000  # of all images: to decode them takes about ten seconds per 10⁹


class Row(NamedTuple):
    """One valid row."""

    line: int
    dataset_type: TextDatasetType
    canonical: bytes  # one line of JSON without its line feed: keys in a fixed order, no space between tokens, content unchanged
    digest: bytes  # equal for equal rows
    prompt_digest: bytes  # equal for rows that must stay on the same side of the split
    images: int = 0
    columns: tuple[str, ...] = ()  # beside a prompt, sorted
    prompt_form: PromptForm = "strings"
    has_tools: bool = False
    has_weights: bool = False


@dataclass(frozen=True)
class SplitStats:
    """Counts of one written split."""

    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class IngestResult:
    """What the ingestion of an upload found and wrote."""

    dataset_type: TextDatasetType
    rows_read: int
    duplicates_dropped: int
    train: SplitStats
    eval: SplitStats | None  # None: eval_fraction is 0, or all rows have the same prompt
    images: int  # in the rows of both splits
    columns: tuple[str, ...]  # beside the prompt, in rows of type prompt
    prompt_form: PromptForm
    has_tools: bool  # in some row
    has_weights: bool


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

    `scratch` is an empty file open for writing and reading; it grows to the size of the rows. The outputs are written
    only after every row was found valid. Raises InvalidRow.
    """
    splitter = Splitter(eval_fraction, seed)
    dataset_type: TextDatasetType = "text"
    columns: tuple[str, ...] = ()
    prompt_form: PromptForm = "strings"
    has_tools = has_weights = False
    rows_read = images = 0
    for row in read_rows(stream, limits):
        dataset_type, columns, prompt_form = row.dataset_type, row.columns, row.prompt_form
        has_tools, has_weights = has_tools or row.has_tools, has_weights or row.has_weights
        rows_read += 1
        if splitter.add(row):
            images += row.images
            scratch.write(row.canonical + b"\n")
    scratch.seek(0)
    train, held_out = _SplitWriter(train_out), _SplitWriter(eval_out)
    for split, line in zip(splitter.assign_splits(), scratch, strict=True):
        (train if split == TRAIN_SPLIT else held_out).write(line)
    held_out_stats = held_out.stats() if held_out.rows else None
    return IngestResult(
        dataset_type=dataset_type,
        rows_read=rows_read,
        duplicates_dropped=splitter.duplicates_dropped,
        train=train.stats(),
        eval=held_out_stats,
        images=images,
        columns=columns,
        prompt_form=prompt_form,
        has_tools=has_tools,
        has_weights=has_weights,
    )


def read_rows(stream: BinaryIO, limits: RowLimits) -> Iterator[Row]:
    """The rows of a JSONL upload, one by one; blank lines are skipped.

    Raises InvalidRow, also when there are no rows or too many, or when all rows have the same label.
    """
    consistency = _ConsistencyChecker()
    pixels = 0
    for number, line in _read_lines(stream, limits):
        if consistency.rows == limits.max_rows:
            raise InvalidRow(number, "", f"more than {limits.max_rows:,} rows; split the file into several datasets")
        try:
            content = parse_row(line)
        except InvalidValue as error:
            raise InvalidRow(number, error.field, error.reason) from error
        consistency.add(number, content)
        pixels += content.images.pixels
        if pixels > limits.max_pixels:
            raise InvalidRow(number, "", f"more than {limits.max_pixels:,} pixels in the images so far; scale them down, or split the file")
        row = _make_row(number, content)
        if len(line) > limits.max_row_bytes:
            _check_text_size(row, content, limits)
        yield row
    consistency.check_labels()


class Splitter:
    """Decides which rows are held out, after all rows were added.

    When no two rows share a prompt, exactly `eval_fraction` of the distinct rows, rounded, is held out. Rows that share a
    prompt stay in one split, so it may be fewer; it is more only when even the rarest prompt has more rows than requested.
    Unless there are two different prompts, nothing is held out.
    """

    def __init__(self, eval_fraction: float, seed: int) -> None:
        if not 0 <= eval_fraction <= MAX_EVAL_FRACTION:
            raise ValueError(f"eval_fraction is {eval_fraction}; it must be between 0 and {MAX_EVAL_FRACTION}")
        self.duplicates_dropped = 0
        self._eval_fraction = eval_fraction
        self._seed = f"{seed}:".encode()
        self._seen: set[int] = set()  # 128 bits each; as int they take less memory than as bytes
        self._keys = array("Q")  # each kept row's position in the order that the seed gives to prompts

    def add(self, row: Row) -> bool:
        """Add a row; False for a duplicate, which the caller drops."""
        digest = int.from_bytes(row.digest)
        if digest in self._seen:
            self.duplicates_dropped += 1
            return False
        self._seen.add(digest)
        self._keys.append(int.from_bytes(hashlib.blake2b(self._seed + row.prompt_digest, digest_size=8).digest()))
        return True

    def assign_splits(self) -> Iterator[Literal["train", "eval"]]:
        """The split of each kept row, in the order in which they were added."""
        held_out = _choose_held_out(self._keys, self._eval_fraction)
        return (EVAL_SPLIT if key in held_out else TRAIN_SPLIT for key in self._keys)


def _choose_held_out(keys: "array[int]", eval_fraction: float) -> set[int]:
    """The keys of the prompts to hold out: in ascending order, each one whose rows still fit into the requested number."""
    if eval_fraction == 0 or not keys or min(keys) == max(keys):
        return set()
    ordered = sorted(keys)
    remaining = max(1, round(eval_fraction * len(ordered)))
    held_out: set[int] = set()
    for key, rows in _count_rows_per_prompt(ordered):
        if rows <= remaining:
            held_out.add(key)
            remaining -= rows
        if not remaining:
            break
    return held_out or {min(_count_rows_per_prompt(ordered), key=lambda prompt: prompt[1])[0]}


def _count_rows_per_prompt(ordered: list[int]) -> Iterator[tuple[int, int]]:
    """Each prompt's key, with its number of rows."""
    return ((key, sum(1 for _ in rows)) for key, rows in groupby(ordered))


class _SplitWriter:
    """Writes the lines of one split and counts them."""

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
    """The lines that are not blank, with their numbers. Never reads more of a line than the limits allow."""
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
    """A line with its line feed, or enough of it to show that it is too long."""
    raw = stream.readline(limits.max_row_bytes + slack)
    if len(raw) > limits.max_row_bytes and not raw.endswith(b"\n") and DATA_URI_PATTERN.search(raw):
        raw += stream.readline(max(0, limits.max_image_row_bytes + slack - len(raw)))
    return raw


def _line_length_error(line: bytes, limits: RowLimits) -> str | None:
    """Why a line is too long, or None. Text has its own limit: in memory, a list of short values takes twenty times its bytes."""
    image_bytes = sum(match.end() - match.start() for match in DATA_URI_PATTERN.finditer(line))
    if len(line) - image_bytes > limits.max_row_bytes:
        return _text_length_error(limits, has_images=image_bytes > 0)
    if len(line) > max(limits.max_row_bytes, limits.max_image_row_bytes):
        return f"longer than {limits.max_image_row_bytes:,} bytes with its images; use fewer or smaller ones"
    return None


def _text_length_error(limits: RowLimits, *, has_images: bool) -> str:
    without = " without its images" if has_images else ""
    return f"longer than {limits.max_row_bytes:,} bytes{without}; shorten the row, or split it into several"


def _check_text_size(row: Row, content: ValidatedRow, limits: RowLimits) -> None:
    """Raise InvalidRow when the row is too long without its images: text that looks like a data: URI does not count as one."""
    image_bytes = sum(len(image) for image in content.images.uris)
    if len(row.canonical) - image_bytes > limits.max_row_bytes:
        raise InvalidRow(row.line, "", _text_length_error(limits, has_images=image_bytes > 0))


class _ConsistencyChecker:
    """Checks that all rows of an upload have the same shape, and that their labels are not all the same."""

    def __init__(self) -> None:
        self.rows = 0
        self._first_line = 0
        self._first_shape = ""
        self._last_line = 1
        self._images_line: int | None = None
        self._tools_line: int | None = None
        self._labels = Counter[bool]()

    def add(self, number: int, content: ValidatedRow) -> None:
        if not self.rows:
            self._first_line, self._first_shape = number, content.shape
        elif content.shape != self._first_shape:
            difference = f"this row is {content.shape}, but line {self._first_line} is {self._first_shape}"
            raise InvalidRow(number, "", f"{difference}; all rows of a dataset must have one format")
        self._add_images_and_tools(number, content)
        if content.label is not None:
            self._labels[content.label] += 1
        self._last_line = number
        self.rows += 1

    def _add_images_and_tools(self, number: int, content: ValidatedRow) -> None:
        if content.images.uris and self._images_line is None:
            self._images_line = number
        if content.has_tools and self._tools_line is None:
            self._tools_line = number
        if self._images_line is not None and self._tools_line is not None:
            lines = f"line {self._images_line} has images and line {self._tools_line} has tools"
            raise InvalidRow(number, "", f"{lines}; a dataset may have one or the other")

    def check_labels(self) -> None:
        """Raise InvalidRow when all labels are the same, or when there were no rows."""
        if not self.rows:
            raise InvalidRow(1, "", f"no rows; a row is one line such as {FORMATS}")
        if len(self._labels) == 1:
            counts = f"{self._labels[True]:,} rows are true and {self._labels[False]:,} are false"
            raise InvalidRow(self._last_line, "label", f"is the same in all rows: {counts}; there must be some of each")


def _make_row(number: int, content: ValidatedRow) -> Row:
    canonical = _serialize(content.columns)
    digest = _digest(canonical)
    prompt_digest = digest if content.prompt is None else _digest(_serialize(content.prompt))
    return Row(
        number,
        content.dataset_type,
        canonical,
        digest,
        prompt_digest,
        len(content.images.uris),
        content.extra_columns,
        content.prompt_form,
        content.has_tools,
        content.has_weights,
    )


def _serialize(value: object) -> bytes:
    return orjson.dumps(value, default=_serialize_number, option=orjson.OPT_PASSTHROUGH_DATACLASS)


def _serialize_number(value: object) -> orjson.Fragment:
    """A number, exactly as the upload has it."""
    if not isinstance(value, Number):
        raise TypeError(f"{type(value).__name__} is not a value of a row")
    return orjson.Fragment(value.literal)


def _digest(canonical: bytes) -> bytes:
    return hashlib.blake2b(canonical, digest_size=16).digest()
