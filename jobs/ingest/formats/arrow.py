"""Arrow: IPC files, which Feather 2 is too, and IPC streams, which `datasets` saves. Read batch by batch; rows are counted from 1."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import BinaryIO

from jobs.ingest.formats.arrow_values import (
    RecordBatch,
    RecordReader,
    UnpackedSize,
    check_schema,
    choose_batch_rows,
    iter_batch,
    use_system_memory,
)
from jobs.ingest.formats.header import check_same_columns
from jobs.ingest.formats.parquet import describe_arrow_error
from jobs.ingest.formats.parts import Part
from jobs.ingest.formats.reader import Reader
from jobs.ingest.records import InvalidInput, Record
from schema.ingestion import IngestLimits, IngestOptions, RowProblem

FILE_MAGIC = b"ARROW1"


def open_arrow(parts: Sequence[Part], options: IngestOptions, limits: IngestLimits) -> Reader:  # noqa: ARG001 - as every format
    """The reader of Arrow files with the same columns. Raises InvalidInput."""
    import pyarrow

    use_system_memory()
    first = parts[0]
    try:
        with first.open_seekable() as stream:
            columns = check_schema(first, _open(stream).schema, limits)
    except (pyarrow.ArrowException, OSError) as error:
        raise _refuse(first, error) from error
    return Reader(partial(_read, columns=columns, first=first.name, limits=limits), "row", columns)


def _read(part: Part, columns: tuple[str, ...], first: str, limits: IngestLimits) -> Iterator[Record | RowProblem]:
    import pyarrow

    number = 1
    try:
        with part.open_seekable() as stream:
            size_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            source = _open(stream)
            check_same_columns(part, check_schema(part, source.schema, limits), columns, first)
            unpacked = UnpackedSize(part, size_bytes)
            for batch in _iter_batches(source):
                unpacked.add(batch)
                rows = choose_batch_rows(batch.nbytes, batch.num_rows)
                for start in range(0, batch.num_rows, rows):
                    yield from iter_batch(batch.slice(start, rows), part, number + start)
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _refuse(part, error) from error


def _open(stream: BinaryIO) -> RecordReader:
    """The reader of a file or a stream, whichever it is."""
    from pyarrow import ipc

    magic = stream.read(len(FILE_MAGIC))
    stream.seek(0)
    return ipc.open_file(stream) if magic == FILE_MAGIC else ipc.open_stream(stream)


def _iter_batches(source: RecordReader) -> Iterator[RecordBatch]:
    if hasattr(source, "num_record_batches"):  # of a file
        return (source.get_batch(index) for index in range(source.num_record_batches))
    return iter(source)


def _refuse(part: Part, error: Exception) -> InvalidInput:
    return part.refuse(f"cannot be read as Arrow: {describe_arrow_error(error)}", "it may have been cut off; save or send it again")
