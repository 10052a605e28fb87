"""Tokenized rows in memory-mapped files are the rows that were written, in every order of reading them."""

import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.llm.data.arrow_rows import (
    PROMPT_TEXTS,
    ArrowPairs,
    ArrowRows,
    RowFileWriter,
    compress_rows,
    count_lengths,
    decompress_rows,
    find_label_spans,
    find_tokens,
)
from jobs.llm.data.blocks import make_single_blocks, pack_rows
from jobs.llm.data.preference import PreferencePair
from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample

labels_strategy = st.lists(st.booleans(), min_size=1, max_size=40)


def make_row(number: int, is_labeled: list[bool]) -> TokenizedExample:
    ids = [1000 * number + position for position in range(len(is_labeled))]
    labels = [token if labeled else IGNORE_INDEX for token, labeled in zip(ids, is_labeled, strict=True)]
    return TokenizedExample(ids, labels, f"prompt {number}", is_labeled.index(True) if any(is_labeled) else len(ids))


def make_rows(count: int) -> list[TokenizedExample]:
    return [make_row(number, [position % 5 < number % 4 for position in range(3 + number % 17)]) for number in range(count)]


def write_rows(path: Path, rows: list[TokenizedExample]) -> Path:
    with RowFileWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return path


@given(labels_strategy)
def test_label_spans_name_exactly_the_labels(is_labeled: list[bool]) -> None:
    spans = find_label_spans([7 if labeled else IGNORE_INDEX for labeled in is_labeled])
    inside = set(chain.from_iterable(range(start, end) for start, end in zip(spans[::2], spans[1::2], strict=True)))
    assert inside == {position for position, labeled in enumerate(is_labeled) if labeled}
    assert sorted(spans) == spans
    assert len(set(spans)) == len(spans)


@pytest.fixture(scope="module")
def written() -> list[TokenizedExample]:
    return make_rows(2500)  # more than two record batches


@pytest.fixture(scope="module")
def rows(written: list[TokenizedExample], tmp_path_factory: pytest.TempPathFactory) -> ArrowRows:
    """The rows in two files, the first with 2,100 of them."""
    folder = tmp_path_factory.mktemp("rows")
    return ArrowRows([write_rows(folder / "a.arrow", written[:2100]), write_rows(folder / "b.arrow", written[2100:])])


def without_text(row: TokenizedExample) -> tuple[list[int], list[int], int]:
    return row.input_ids, row.labels, row.prompt_tokens


def test_rows_are_those_that_were_written(rows: ArrowRows, written: list[TokenizedExample]) -> None:
    assert len(rows) == len(written)
    assert [without_text(row) for row in rows] == [without_text(row) for row in written]
    for number in (0, 1023, 1024, 2099, 2100, 2499, -1, -2500):
        assert without_text(rows[number]) == without_text(written[number])
    assert rows[:PROMPT_TEXTS] == written[:PROMPT_TEXTS]
    with pytest.raises(IndexError):
        rows[2500]


def test_unpickled_rows_read_the_same_files(rows: ArrowRows, written: list[TokenizedExample]) -> None:
    content = pickle.dumps(pack_rows(rows, 64))
    assert len(content) < 20 * len(written)  # numbers of rows, no tokens
    assert list(pickle.loads(content)) == list(pack_rows(rows, 64))


def test_lengths_and_tokens_are_found_without_reading_rows(rows: ArrowRows, written: list[TokenizedExample]) -> None:
    assert count_lengths(rows).tolist() == count_lengths(written).tolist() == [len(row.input_ids) for row in written]
    wanted = [written[3].input_ids[1], written[2400].input_ids[0], 5_000_000]
    assert find_tokens(rows, wanted) == find_tokens(written, wanted) == set(wanted[:2])


def test_empty_file_has_no_rows(tmp_path: Path) -> None:
    empty = ArrowRows([write_rows(tmp_path / "empty.arrow", [])])
    assert (len(empty), list(empty), empty.lengths.tolist(), empty.find_tokens([1])) == (0, [], [], set())


def test_rows_survive_compression(rows: ArrowRows, tmp_path: Path) -> None:
    compress_rows(rows, tmp_path / "stored.arrow", b"counts")
    assert (tmp_path / "stored.arrow").stat().st_size < sum(path.stat().st_size for path in rows.paths)
    assert decompress_rows(tmp_path / "stored.arrow", tmp_path / "rows.arrow") == b"counts"
    assert list(ArrowRows([tmp_path / "rows.arrow"])) == list(rows)


@pytest.mark.parametrize("cut", [1, 200, 5000])
def test_damaged_file_is_an_error_and_not_other_rows(rows: ArrowRows, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "stored.arrow"
    compress_rows(rows, path, b"counts")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises((ValueError, KeyError, OSError)):
        decompress_rows(path, tmp_path / "rows.arrow")


def test_pairs_are_two_rows_each(written: list[TokenizedExample]) -> None:
    pairs = ArrowPairs(written[:6])
    assert list(pairs) == [PreferencePair(written[n], written[n + 1]) for n in (0, 2, 4)]
    assert list(pairs.chosen) == [written[0], written[2], written[4]]
    assert pairs[-1].rejected == written[5]


@given(st.lists(st.integers(min_value=1, max_value=64), max_size=60))
def test_packed_blocks_hold_every_row_once_and_never_too_many_tokens(lengths: list[int]) -> None:
    rows = [TokenizedExample([number] * length, [number] * length, "", 0) for number, length in enumerate(lengths)]
    blocks = list(pack_rows(rows, 64))
    assert sorted(row.input_ids[0] for block in blocks for row in block) == list(range(len(rows)))
    sizes = [sum(len(row.input_ids) for row in block) for block in blocks]
    assert all(0 < size <= 64 for size in sizes)
    assert len([size for size in sizes if size <= 32]) <= 1  # two of them would have been one


def test_single_blocks_keep_the_order(written: list[TokenizedExample]) -> None:
    blocks = make_single_blocks(written[:5])
    assert (list(blocks), blocks[-1], blocks[1:3]) == ([[row] for row in written[:5]], [written[4]], [[written[1]], [written[2]]])
    assert np.array_equal(blocks.ends, [1, 2, 3, 4, 5])


def test_types_hold_no_lists_of_rows(rows: ArrowRows) -> None:
    held: list[Any] = [value for batch in rows._batches for value in vars(batch).values()]
    assert not any(isinstance(value, list) for value in held)
