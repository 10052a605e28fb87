"""Pages of a dataset's rows: with an index and without one, and that they hold what was stored."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.dataset import Split
from service.core.datasets import rows as pages
from service.core.datasets.ingestion import Upload
from service.core.datasets.rows import read_rows
from service.core.principals import LOCAL_PRINCIPAL
from storage.file import LocalStore
from tests.ingest.dataset_harness import TEXT, make_image_bytes, make_image_part, make_vision_row, to_jsonl
from tests.unit.dataset_records import make_datasets

INTERVAL = 256


class CountingStore(LocalStore):
    """A folder that remembers which ranges were read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.ranges: list[tuple[str, int, int]] = []

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self.ranges.append((key, start, end))
        return super().read_range(key, start, end)


def store_rows(folder: Path, rows: Sequence[object], *, indexed: bool = True) -> tuple[CountingStore, Split]:
    """A split as the ingestion stores it."""
    store = CountingStore((folder / "objects").as_uri())
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    offsets, size_bytes = b"", 0
    for number, line in enumerate(lines):
        offsets += size_bytes.to_bytes(8, "little") if number % INTERVAL == 0 else b""
        size_bytes += len(line)
    store.write("train.jsonl", b"".join(lines))
    store.write("train.index", offsets)
    index_key = "train.index" if indexed else None
    return store, Split(rows=len(rows), size_bytes=size_bytes, sha256="", key="train.jsonl", index_key=index_key)


@given(
    count=st.integers(1, 3 * INTERVAL + 5),
    offset=st.one_of(st.integers(0, 4 * INTERVAL), st.sampled_from([INTERVAL - 1, INTERVAL, INTERVAL + 1])),
    limit=st.integers(1, 200),
    indexed=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_page_has_the_rows_of_its_numbers(
    tmp_path_factory: pytest.TempPathFactory, count: int, offset: int, limit: int, indexed: bool
) -> None:
    rows: list[object] = [{"text": f"row {number} " + "ä\n" * (number % 7)} for number in range(count)]
    store, split = store_rows(tmp_path_factory.mktemp("rows"), rows, indexed=indexed)
    page = read_rows(store, split, offset, limit)
    assert page.rows == rows[offset : offset + limit]
    assert page.next_offset == (offset + limit if offset + limit < count else None)


def test_page_far_behind_takes_two_short_reads(tmp_path: Path) -> None:
    store, split = store_rows(tmp_path, [{"text": f"{number}"} for number in range(50_000)])
    assert read_rows(store, split, 40_100, 20).rows[0] == {"text": "40100"}
    (index_range, rows_range) = store.ranges
    assert index_range[0] == "train.index"
    assert rows_range[2] - rows_range[1] < 2 * INTERVAL * 20


def test_long_rows_end_a_page_early(tmp_path: Path) -> None:
    rows: list[object] = [{"text": "x" * (3 << 20)} for _ in range(4)]
    store, split = store_rows(tmp_path, rows)
    page = read_rows(store, split, 1, 3)
    assert (page.rows, page.next_offset) == (rows[1:2], 2)


def test_rows_longer_than_a_read_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "READ_BYTES", 10)
    rows: list[object] = [{"text": f"{number}" * number} for number in range(40)]
    store, split = store_rows(tmp_path, rows)
    assert read_rows(store, split, 30, 5).rows == rows[30:35]


def test_page_counts_images_by_what_is_shown(tmp_path: Path) -> None:
    content = make_image_bytes(size=(900, 900), file_format="PNG")
    rows = [make_vision_row(TEXT, make_image_part(content, "image/png")) for _ in range(3)]
    store, split = store_rows(tmp_path, rows)
    page = read_rows(store, split, 0, 3)
    assert len(page.rows) == 3
    assert f"({len(content)} bytes)" in json.dumps(page.rows[0])


def test_ingested_dataset_has_an_index(tmp_path: Path) -> None:
    datasets = make_datasets(tmp_path)
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(700)]
    dataset = datasets.ingestion.ingest(LOCAL_PRINCIPAL, Upload("rows.jsonl", "rows", stream=io.BytesIO(to_jsonl(rows))))
    assert dataset.splits["train"].index_key
    split, page = datasets.records.read_page(LOCAL_PRINCIPAL, dataset.processed_dataset_id, "train", 600, 50)
    assert (split.rows, len(page.rows), page.next_offset) == (630, 30, None)
    stored = (tmp_path / "objects" / split.key).read_text().splitlines()
    assert page.rows == [json.loads(line) for line in stored[600:]]
