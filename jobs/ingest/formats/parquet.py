"""Parquet: read in small batches of rows, whatever the size of its row groups. Rows are counted from 1."""

import os
from collections.abc import Iterator, Sequence
from functools import partial

from jobs.ingest.formats.arrow_values import UnpackedSize, check_schema, choose_batch_rows, iter_batch, use_system_memory
from jobs.ingest.formats.header import check_same_columns
from jobs.ingest.formats.parts import BUFFER_BYTES, Part
from jobs.ingest.formats.reader import Reader
from jobs.ingest.records import InvalidInput, Record
from schema.ingestion import IngestLimits, IngestOptions, RowProblem


def open_parquet(parts: Sequence[Part], options: IngestOptions, limits: IngestLimits) -> Reader:  # noqa: ARG001 - as every format
    """The reader of Parquet files with the same columns. Raises InvalidInput."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    use_system_memory()
    first = parts[0]
    try:
        with first.open_seekable() as stream, ParquetFile(stream) as file:
            columns = check_schema(first, file.schema_arrow, limits)
    except (pyarrow.ArrowException, OSError) as error:
        raise _refuse(first, error) from error
    return Reader(partial(_read, columns=columns, first=first.name, limits=limits), "row", columns)


def _read(part: Part, columns: tuple[str, ...], first: str, limits: IngestLimits) -> Iterator[Record | RowProblem]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 1
    try:
        with part.open_seekable() as stream, ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
            check_same_columns(part, check_schema(part, file.schema_arrow, limits), columns, first)
            unpacked = UnpackedSize(part, stream.seek(0, os.SEEK_END))  # the reader seeks wherever it reads
            sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups)]
            for batch in file.iter_batches(choose_batch_rows(sum(sizes), file.metadata.num_rows), use_threads=False):
                unpacked.add(batch)
                yield from iter_batch(batch, part, number)
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _refuse(part, error) from error


def _refuse(part: Part, error: Exception) -> InvalidInput:
    return part.refuse(f"cannot be read as Parquet: {describe_arrow_error(error)}", "it may have been cut off; save or send it again")


def describe_arrow_error(error: Exception) -> str:
    """The first sentence of an error of Arrow; others are about its insides."""
    return str(error).splitlines()[0].split(". ")[0][:200] if str(error) else type(error).__name__
