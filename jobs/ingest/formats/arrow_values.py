"""The values of Arrow's types as JSON: what a row of Parquet or Arrow becomes.

Integers, decimals and floats keep every digit; dates and times become ISO 8601 strings; a struct becomes an object without its fields
that are null, because Arrow cannot leave a field out; an image of Hugging Face `datasets`, a struct of bytes and path, becomes a data:
URI. A number that JSON does not have becomes null if it is NaN, as pandas writes a missing one, and is refused if it is infinite. Binary
values are refused.
"""

import base64
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from jobs.ingest.formats.header import MAX_NAME_CHARACTERS
from jobs.ingest.formats.parts import MAX_RATIO, RATIO_FREE_BYTES, Part, refuse_bomb
from jobs.ingest.records import Record
from jobs.ingest.rows.values import InvalidValue, JsonObject, Number, preview
from schema.ingestion import IngestLimits, RowProblem

# pyarrow's own types are unknown where it is not installed: arrays and types are Any here.
Array = Any
ArrowType = Any
Buffer = Any
RecordBatch = Any
RecordReader = Any
Schema = Any

MAX_BATCH_ROWS = 256
BATCH_BYTES = 16 << 20  # becomes a few times as much in Python; a single row may have 16 MiB
EPOCH = datetime(1970, 1, 1)
UNITS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
IMAGE_FIELDS = {"bytes", "path"}
IMAGE_MAGIC = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"RIFF", "webp"))


def use_system_memory() -> None:
    """Let Arrow allocate with malloc: its own allocator reserves gigabytes of addresses, which are limited here."""
    import pyarrow

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)  # each thread reserves addresses of its own too


def choose_batch_rows(size_bytes: int, rows: int) -> int:
    """How many rows to convert at once, of so many bytes in all: fewer if they have images."""
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * rows // max(1, size_bytes)))


class UnpackedSize:
    """Counts the bytes of a file's values, and refuses a file that is small only because it says the same thousands of times."""

    def __init__(self, part: Part, size_bytes: int) -> None:
        self._part = part
        self._largest = max(RATIO_FREE_BYTES, MAX_RATIO * size_bytes)
        self._bytes = 0

    def add(self, batch: RecordBatch) -> None:
        """Count a batch. Raises InvalidInput."""
        size = batch.nbytes + sum(_count_referred_bytes(column) for column in batch.columns)
        self._part.meter.add_unpacked(size)
        self._bytes += size
        if self._bytes > self._largest:
            raise refuse_bomb(self._part.name)


def _count_referred_bytes(column: Array) -> int:
    """How long the texts of a dictionary's column are, each as often as a row has it."""
    import pyarrow.types as kinds

    if not kinds.is_dictionary(column.type) or not (
        kinds.is_string(column.type.value_type) or kinds.is_large_string(column.type.value_type)
    ):
        return 0
    # Not by pyarrow.compute: it allocates addresses by the gigabyte when it is imported.
    lengths = [len(text or "") for text in column.dictionary.to_pylist()]
    return sum(lengths[index] for index in column.indices.to_pylist() if index is not None)


def check_schema(part: Part, schema: Schema, limits: IngestLimits) -> tuple[str, ...]:
    """The names of the columns. Raises InvalidInput for columns that no row can hold."""
    names = tuple(schema.names)
    if not names:
        raise part.refuse("has no columns")
    if len(names) > limits.max_columns:
        raise part.refuse(
            f"has {len(names):,} columns; at most {limits.max_columns:,} are read", "keep the columns that become part of rows"
        )
    for name in names:
        if names.count(name) > 1:
            raise part.refuse(f"has the column {preview(name)} {names.count(name)} times", "rename one of them, or drop it")
        if not 0 < len(name) <= MAX_NAME_CHARACTERS:
            raise part.refuse(f"has a column whose name is {preview(name)}, of {len(name)} characters", "rename the column")
    for field in schema:
        if problem := find_unreadable(field.type):
            raise part.refuse(f"has the column {preview(field.name)}, which {problem[0]}", problem[1])
    return names


def find_unreadable(arrow_type: ArrowType) -> tuple[str, str] | None:
    """Why no row can hold values of a type, and what would work; None if rows can."""
    import pyarrow.types as kinds

    arrow_type = _get_storage(arrow_type)
    if _is_image(arrow_type):
        return None
    if (
        kinds.is_binary(arrow_type)
        or kinds.is_large_binary(arrow_type)
        or kinds.is_fixed_size_binary(arrow_type)
        or kinds.is_binary_view(arrow_type)
    ):
        return (
            "is binary",
            "cast it to a string, or drop it; an image is a struct of bytes and path, as the Image feature of `datasets` has it",
        )
    if kinds.is_dictionary(arrow_type):
        return find_unreadable(arrow_type.value_type)
    if kinds.is_struct(arrow_type) or _is_list(arrow_type) or kinds.is_map(arrow_type):
        return next(filter(None, (find_unreadable(arrow_type.field(index).type) for index in range(arrow_type.num_fields))), None)
    if kinds.is_union(arrow_type) or kinds.is_interval(arrow_type) or kinds.is_duration(arrow_type) or kinds.is_run_end_encoded(arrow_type):
        return f"is of the type {arrow_type}", "cast it to a string or a number, or drop it"
    return None


def iter_batch(batch: RecordBatch, part: Part, first_number: int) -> Iterator[Record | RowProblem]:
    """The rows of a record batch or table, numbered from `first_number`."""
    names = batch.schema.names
    converted = [convert(column.combine_chunks() if hasattr(column, "chunks") else column) for column in batch.columns]
    for number, values in enumerate(zip(*converted, strict=True), first_number):
        row: JsonObject = dict(zip(names, values, strict=True))
        if problem := next(filter(None, (_find_invalid(value, name) for name, value in row.items())), None):
            yield part.problem(number, problem.reason, problem.code, field=problem.field, is_row=True)
        else:
            yield Record(number, row, part.label)


def convert(array: Array) -> Sequence[object]:
    """The values of an array. What cannot be a value of JSON is an InvalidValue."""
    import pyarrow
    import pyarrow.types as kinds

    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return convert(array.storage)
    if kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind):
        return _convert_strings(array)
    if kinds.is_boolean(kind) or kinds.is_null(kind):
        return array.to_pylist()
    if kinds.is_integer(kind):
        return [None if value is None else Number(str(value)) for value in array.to_pylist()]
    if kinds.is_decimal(kind):
        return [None if value is None else Number(format(value, "f")) for value in array.to_pylist()]
    if kinds.is_floating(kind):
        exact = array.cast(pyarrow.float32()) if kinds.is_float16(kind) else array
        return [_convert_float(text) for text in exact.cast(pyarrow.string()).to_pylist()]
    if kinds.is_date(kind):
        return [None if value is None else value.isoformat() for value in array.to_pylist()]
    if kinds.is_timestamp(kind):
        format_time = partial(_format_timestamp, units=UNITS_PER_SECOND[kind.unit], zone=_find_zone(kind.tz))
        return [None if value is None else format_time(value) for value in array.cast(pyarrow.int64()).to_pylist()]
    if kinds.is_time(kind):
        return [None if text is None else _trim_fraction(text) for text in array.cast(pyarrow.string()).to_pylist()]
    if kinds.is_dictionary(kind):
        values = convert(array.dictionary)
        return [None if index is None else values[index] for index in array.indices.to_pylist()]
    if _is_image(kind):
        return [_convert_image(value) for value in array.to_pylist()]
    if kinds.is_struct(kind):
        return _convert_structs(array)
    if kinds.is_map(kind):
        return _convert_maps(array)
    return _convert_lists(array)


def _convert_strings(array: Array) -> Sequence[object]:
    try:
        return array.to_pylist()
    except UnicodeDecodeError:  # Parquet lets writers say of any bytes that they are UTF-8
        return [_decode(scalar.as_buffer()) for scalar in array]


def _decode(buffer: Buffer) -> object:
    if buffer is None:
        return None
    try:
        return buffer.to_pybytes().decode()
    except UnicodeDecodeError as error:
        return InvalidValue("", f"is not UTF-8 at byte {error.start + 1}; save the file with its strings as UTF-8", "not_utf8")


def _convert_float(text: str | None) -> object:
    if text is None or text in ("nan", "-nan"):
        return None
    if text in ("inf", "-inf"):
        return InvalidValue("", "is infinite, which no JSON number is; write it as a string, or drop the row", "invalid_number")
    return Number(text)


def _find_zone(name: str | None) -> "ZoneInfo | timedelta | None":
    if name is None:
        return None
    if name[:1] in "+-":
        hours, _, minutes = name[1:].partition(":")
        offset = timedelta(hours=int(hours), minutes=int(minutes or 0))
        return -offset if name[0] == "-" else offset
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        return timedelta(0)  # the same moment, in UTC


def _format_timestamp(value: int, units: int, zone: "ZoneInfo | timedelta | None") -> object:
    seconds, fraction = divmod(value, units)
    try:
        moment = EPOCH + timedelta(seconds=seconds)
        if isinstance(zone, ZoneInfo):
            moment = moment.replace(tzinfo=UTC).astimezone(zone)
        elif zone is not None:
            moment = (moment + zone).replace(tzinfo=timezone(zone))
    except OverflowError:
        return InvalidValue("", f"is a time out of range, {value} units after 1970; write it as a string", "wrong_value")
    text = moment.isoformat()
    digits = f"{fraction:0{len(str(units)) - 1}d}".rstrip("0") if fraction else ""
    return f"{text[:19]}.{digits}{text[19:]}" if digits else text


def _trim_fraction(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _convert_image(value: dict[str, Any] | None) -> object:
    """An image of Hugging Face `datasets`."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        return None
    content = value["bytes"]
    if content is None:
        return InvalidValue(
            "", f"is only the path of an image, {preview(str(value['path']))}; save the dataset with its images in it", "invalid_image"
        )
    media_type = next((name for magic, name in IMAGE_MAGIC if content.startswith(magic)), None)
    if media_type is None:
        return InvalidValue("", "is an image that is neither PNG, JPEG nor WebP; save it as one of these", "invalid_image")
    return f"data:image/{media_type};base64,{base64.b64encode(content).decode()}"


def _convert_structs(array: Array) -> Sequence[object]:
    names = [array.type.field(index).name for index in range(array.type.num_fields)]
    columns = [convert(column) for column in array.flatten()]
    valid = array.is_valid().to_pylist()
    rows = zip(*columns, strict=True) if columns else ((),) * len(array)
    return [
        {name: value for name, value in zip(names, values, strict=True) if value is not None} if is_valid else None
        for is_valid, values in zip(valid, rows, strict=True)
    ]


def _convert_maps(array: Array) -> Sequence[object]:
    """Maps with keys of strings as objects; others as lists of pairs."""
    valid = array.is_valid().to_pylist()
    offsets = array.offsets.to_pylist()
    keys, items = convert(array.keys), convert(array.items)
    are_names = all(isinstance(key, str) for key in keys)
    start = offsets[0] if offsets else 0

    def make(begin: int, end: int) -> object:
        pairs = list(zip(keys[begin - start : end - start], items[begin - start : end - start], strict=True))
        return dict(pairs) if are_names else [list(pair) for pair in pairs]

    return [make(offsets[index], offsets[index + 1]) if is_valid else None for index, is_valid in enumerate(valid)]


def _convert_lists(array: Array) -> Sequence[object]:
    import pyarrow.compute as compute

    values = convert(array.flatten())  # of those that are not null
    lengths = compute.list_value_length(array).to_pylist()
    lists: list[object] = []
    position = 0
    for length in lengths:
        lists.append(None if length is None else list(values[position : position + length]))
        position += length or 0
    return lists


def _find_invalid(value: object, field: str) -> InvalidValue | None:
    """The first value within a value that JSON does not have, with its place."""
    match value:
        case InvalidValue():
            return InvalidValue(field, value.reason, value.code)
        case dict():
            return next(filter(None, (_find_invalid(inner, f"{field}.{name}") for name, inner in value.items())), None)
        case list():
            return next(filter(None, (_find_invalid(inner, f"{field}[{index}]") for index, inner in enumerate(value))), None)
        case _:
            return None


def _get_storage(arrow_type: ArrowType) -> ArrowType:
    """The type of which the values of an extension type are stored."""
    return _get_storage(arrow_type.storage_type) if hasattr(arrow_type, "storage_type") else arrow_type


def _is_image(arrow_type: ArrowType) -> bool:
    import pyarrow.types as kinds

    return (
        kinds.is_struct(arrow_type)
        and {arrow_type.field(index).name for index in range(arrow_type.num_fields)} == IMAGE_FIELDS
        and (kinds.is_binary(arrow_type.field("bytes").type) or kinds.is_large_binary(arrow_type.field("bytes").type))
    )


def _is_list(arrow_type: ArrowType) -> bool:
    import pyarrow.types as kinds

    return (
        kinds.is_list(arrow_type)
        or kinds.is_large_list(arrow_type)
        or kinds.is_fixed_size_list(arrow_type)
        or kinds.is_list_view(arrow_type)
        or kinds.is_large_list_view(arrow_type)
    )
