"""B18: how long a page of a dataset of a million rows takes, from any place of it, in a folder."""

import random
import time
from pathlib import Path

from bench.context import BenchmarkContext
from bench.figures import Measurement, at_most
from schema.dataset import Split
from schema.ingestion import INDEX_INTERVAL_ROWS
from service.core.datasets.rows import OFFSET_BYTES, read_rows
from storage.file import LocalStore

NAME = "dataset_pages"
ROWS = 1_000_000
ROW_BYTES = 1000
PAGE_ROWS = 20
PAGES = 200
MAX_PAGE_MS = 50


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Measure pages at random places, and the last one."""
    store, split = _write_split(context.folder / "objects")
    places = [*random.Random(0).choices(range(ROWS), k=PAGES), ROWS - PAGE_ROWS]  # the same places each time
    times_ms = sorted(_time_page(store, split, offset) for offset in places)
    note = f"{PAGES} random places of {ROWS:,} rows of {ROW_BYTES} bytes"
    return [
        Measurement(NAME, f"page of {PAGE_ROWS} rows, median", times_ms[len(times_ms) // 2], "ms", note=note),
        Measurement(NAME, f"page of {PAGE_ROWS} rows, slowest", times_ms[-1], "ms", at_most(MAX_PAGE_MS), note),
    ]


def _write_split(folder: Path) -> tuple[LocalStore, Split]:
    """A split as an ingestion stores it."""
    folder.mkdir()
    size_bytes, offsets = 0, bytearray()
    with (folder / "train.jsonl").open("wb") as stream:
        for number in range(ROWS):
            if number % INDEX_INTERVAL_ROWS == 0:
                offsets += size_bytes.to_bytes(OFFSET_BYTES, "little")
            line = b'{"text": "%d %s"}\n' % (number, b"x" * (ROW_BYTES - 20))
            stream.write(line)
            size_bytes += len(line)
    (folder / "train.index").write_bytes(offsets)
    split = Split(rows=ROWS, size_bytes=size_bytes, sha256="", key="train.jsonl", index_key="train.index")
    return LocalStore(folder.as_uri()), split


def _time_page(store: LocalStore, split: Split, offset: int) -> float:
    began = time.perf_counter()
    page = read_rows(store, split, offset, PAGE_ROWS)
    elapsed_ms = (time.perf_counter() - began) * 1000
    if not page.rows or not str(page.rows[0]).startswith(f"{{'text': '{offset} "):
        raise ValueError(f"the page at {offset} begins with another row")
    return elapsed_ms
