"""Any page of a dataset's rows: with the split's index in two ranged reads, however large the split is."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from schema.dataset import Split
from schema.ingestion import INDEX_INTERVAL_ROWS
from schema.row_preview import shorten_images
from storage import ObjectStore

OFFSET_BYTES = 8
READ_BYTES = 8 << 20  # of one read: a page of text lies in much less, one of images may need several
MAX_PAGE_BYTES = 4 << 20  # of the rows as they are shown; a page has at least one row


@dataclass(frozen=True)
class RowPage:
    """Some rows of a split, with images replaced by their type and size."""

    rows: list[object]
    next_offset: int | None  # None: these are the last rows


def read_rows(objects: ObjectStore, split: Split, offset: int, limit: int) -> RowPage:
    """At most `limit` rows from number `offset`, fewer if they are long. Raises StorageError."""
    last = min(offset + limit, split.rows)
    if offset >= last:
        return RowPage([], None)
    rows, shown_bytes = list[object](), 0
    for line in islice(_iter_lines(objects, split, offset), last - offset):
        row = shorten_images(json.loads(line))
        shown_bytes += len(json.dumps(row)) if b"data:image/" in line else len(line)
        if rows and shown_bytes > MAX_PAGE_BYTES:
            break
        rows.append(row)
    end = offset + len(rows)
    return RowPage(rows, end if end < split.rows else None)


def _iter_lines(objects: ObjectStore, split: Split, offset: int) -> Iterator[bytes]:
    """The lines of a split from a row on."""
    if split.index_key is None:
        with objects.open_read(split.key) as stream:
            yield from islice(stream, offset, None)
        return
    block = offset // INDEX_INTERVAL_ROWS
    start, end = _read_block(objects, split, block)
    yield from islice(_iter_range(objects, split, start, end), offset - block * INDEX_INTERVAL_ROWS, None)


def _read_block(objects: ObjectStore, split: Split, block: int) -> tuple[int, int]:
    """Where the block of a row begins, and where the block after the next one does: a page is not longer than a block."""
    assert split.index_key is not None
    packed = objects.read_range(split.index_key, block * OFFSET_BYTES, (block + 3) * OFFSET_BYTES)
    offsets = struct.unpack(f"<{len(packed) // OFFSET_BYTES}Q", packed)
    return offsets[0], offsets[2] if len(offsets) > 2 else split.size_bytes


def _iter_range(objects: ObjectStore, split: Split, start: int, end: int) -> Iterator[bytes]:
    """The lines between two offsets, of which the first one begins a line."""
    rest = b""
    while start < end:
        chunk = objects.read_range(split.key, start, min(end, start + READ_BYTES))
        if not chunk:
            return
        start += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
