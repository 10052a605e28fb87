"""Parquet and Arrow: values of every type, saved datasets, and files that no row can hold."""

import io
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ingest.formats.arrow_values import choose_batch_rows
from schema.ingestion import IngestLimits, RowProblem
from tests.ingest.dataset_harness import make_data_uri, make_image_bytes
from tests.ingest.formats_harness import (
    get_refusal,
    make_gzip,
    make_zip,
    open_files,
    read_only_problem,
    read_problems_and_rows,
    read_rows,
    simplify,
)

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"prompt": "Why?", "completion": "  So.\r\n"}, {"prompt": "\U0001f600", "completion": None}]


def make_parquet(table: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    parquet.write_table(table, out, **options)
    return out.getvalue()


def make_arrow(table: Any, *, is_stream: bool = False, batch_rows: int = 1000) -> bytes:
    out = io.BytesIO()
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new(out, table.schema) as writer:
        writer.write_table(table, batch_rows)
    return out.getvalue()


def to_stream(rows: list[dict[str, Any]]) -> bytes:
    return make_arrow(pa.Table.from_pylist(rows), is_stream=True)


FILES = {
    "parquet": lambda table: make_parquet(table),
    "arrow": lambda table: make_arrow(table),
    "stream": lambda table: make_arrow(table, is_stream=True),
}


@pytest.mark.parametrize("kind", list(FILES))
def test_rows_are_read_in_order_and_counted_from_1(kind: str) -> None:
    content = FILES[kind](pa.Table.from_pylist(ROWS * 300))
    found = read_problems_and_rows("rows", content)
    assert found == [(number, row) for number, row in enumerate(ROWS * 300, 1)]


@pytest.mark.parametrize("kind", list(FILES))
@pytest.mark.parametrize("wrap", [make_gzip, lambda content: make_zip({"rows.bin": content})], ids=["gzip", "zip"])
def test_files_in_containers_are_read(kind: str, wrap: Any) -> None:
    assert read_rows("rows", wrap(FILES[kind](pa.Table.from_pylist(ROWS)))) == ROWS


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([2**63 - 1, None, -5], pa.int64(), ["#9223372036854775807", None, "#-5"]),
        ([2**64 - 1], pa.uint64(), ["#18446744073709551615"]),
        ([0.1, 1e300, 2.0, float("nan"), None], pa.float64(), ["#0.1", "#1e+300", "#2", None, None]),
        ([0.1], pa.float32(), ["#0.1"]),
        ([Decimal("1234567890.123456789000")], pa.decimal128(38, 12), ["#1234567890.123456789000"]),
        ([True, False, None], pa.bool_(), [True, False, None]),
        ([None], pa.null(), [None]),
        ([date(2024, 2, 29)], pa.date32(), ["2024-02-29"]),
        (
            [datetime(2024, 2, 29, 12, 30), datetime(1950, 1, 1, microsecond=250000)],
            pa.timestamp("us"),
            ["2024-02-29T12:30:00", "1950-01-01T00:00:00.25"],
        ),
        ([1], pa.timestamp("ns"), ["1970-01-01T00:00:00.000000001"]),
        ([0], pa.timestamp("s", "UTC"), ["1970-01-01T00:00:00+00:00"]),
        ([0], pa.timestamp("s", "+05:30"), ["1970-01-01T05:30:00+05:30"]),
        ([0], pa.timestamp("s", "Europe/Berlin"), ["1970-01-01T01:00:00+01:00"]),
        ([time(1, 2, 3)], pa.time64("us"), ["01:02:03"]),
        (["a", "b", "a", None], pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a", None]),
        (["  \u2028\t"], pa.large_string(), ["  \u2028\t"]),
        (["view"], pa.string_view(), ["view"]),
        ([[1, 2], None, [], [None]], pa.list_(pa.int32()), [["#1", "#2"], None, [], [None]]),
        ([[1, 2], None], pa.list_(pa.int32(), 2), [["#1", "#2"], None]),
        ([["a"], []], pa.large_list(pa.string()), [["a"], []]),
        ([{"a": 1, "b": None}, None], pa.struct({"a": pa.int8(), "b": pa.string()}), [{"a": "#1"}, None]),
        ([[("k", 1)], None, []], pa.map_(pa.string(), pa.int8()), [{"k": "#1"}, None, {}]),
        ([[(1, "a")]], pa.map_(pa.int8(), pa.string()), [[["#1", "a"]]]),
    ],
    ids=lambda value: str(value) if isinstance(value, pa.DataType) else "",
)
@pytest.mark.parametrize("skip", [0, 1])  # an array that does not begin at its first value
def test_values_of_every_type_are_exact(values: list[Any], kind: Any, expected: list[Any], skip: int) -> None:
    array = pa.array([*values[:1] * skip, *values], kind).slice(skip)
    assert [row["x"] for row in read_rows("rows.arrow", make_arrow(pa.table({"x": array})))] == expected


def test_messages_lose_the_nulls_that_arrow_adds() -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "tool_calls": [{"id": "1"}]}]
    assert read_rows("rows.parquet", make_parquet(pa.Table.from_pylist([{"messages": messages}]))) == [{"messages": messages}]


def test_images_of_datasets_become_data_uris() -> None:
    content = make_image_bytes()
    table = pa.Table.from_pylist([{"image": {"bytes": content, "path": None}, "images": [{"bytes": content, "path": "a.png"}]}])
    assert read_rows("rows.parquet", make_parquet(table)) == [{"image": make_data_uri(), "images": [make_data_uri()]}]


@pytest.mark.parametrize(
    ("column", "field", "reason"),
    [
        (
            pa.array([{"bytes": None, "path": "a.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "x",
            "is only the path of an image",
        ),
        (
            pa.array([[{"bytes": b"BM", "path": None}]], pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))),
            "x[0]",
            "neither PNG",
        ),
        (pa.array([{"a": [float("-inf")]}], pa.struct({"a": pa.list_(pa.float64())})), "x.a[0]", "is infinite"),
        (pa.array([b"caf\xe9"]).view(pa.string()), "x", "is not UTF-8 at byte 4"),
        (pa.array([2**62], pa.timestamp("s")), "x", "is a time out of range"),
    ],
)
def test_value_that_no_row_can_hold_is_named(column: Any, field: str, reason: str) -> None:
    problem = read_only_problem("rows.arrow", make_arrow(pa.table({"x": column})))
    assert (problem.place, problem.field) == ("row 1", field)
    assert reason in problem.reason


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"x": pa.array([b"a"])}), "has the column 'x', which is binary"),
        (pa.table({"x": pa.array([[{"y": b"a"}]])}), "has the column 'x', which is binary"),
        (pa.table({"x": pa.array([timedelta(1)])}), "which is of the type duration[us]"),
        (pa.table([pa.array([1]), pa.array([2])], names=["x", "x"]), "has the column 'x' 2 times"),
        (pa.table({f"c{n}": pa.array([1]) for n in range(11)}), "has 11 columns; at most 10 are read"),
        (pa.table({}), "has no columns"),
        (pa.table({"n" * 300: pa.array([1])}), "of 300 characters"),
    ],
)
def test_schema_that_no_row_can_have_is_refused(table: Any, message: str) -> None:
    assert message in get_refusal({"rows.arrow": make_arrow(table)}, IngestLimits(max_columns=10)).message


@pytest.mark.parametrize("kind", list(FILES))
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_file_that_is_cut_off_is_refused(kind: str, keep: float) -> None:
    content = FILES[kind](pa.table({"x": [str(n) * 9 for n in range(5000)]}))
    problem = get_refusal({"rows.bin": content[: int(len(content) * keep)]})
    assert "cannot be read as" in problem.message
    assert "cut off" in problem.hint


def test_parts_with_other_columns_are_refused() -> None:
    problem = get_refusal({f"{name}.parquet": make_parquet(pa.table({name: ["1"], "x": ["2"]})) for name in "ab"})
    assert problem.message == "b.parquet lacks the column 'a', unlike a.parquet"


def test_long_rows_are_converted_a_few_at_a_time() -> None:
    assert [choose_batch_rows(size, 1000) for size in (0, 1000, 1_000_000_000, 1 << 40)] == [256, 256, 16, 1]


def test_rows_are_counted_against_the_limit_of_all_files() -> None:
    table = pa.table({"x": ["y" * 10_000] * 1000})
    assert "after decompression" in get_refusal({"rows.parquet": make_parquet(table)}, IngestLimits(max_total_bytes=1 << 20)).message


# --- saved datasets --------------------------------------------------------------------------------------------------

SAVED = {
    "state.json": b'{"_data_files": [{"filename": "data-00001.arrow"}, {"filename": "data-00000.arrow"}]}',
    "dataset_info.json": b"{}",
    "data-00000.arrow": to_stream(ROWS[1:]),
    "data-00001.arrow": to_stream(ROWS[:1]),
}
SPLITS = {
    "mine/dataset_dict.json": b'{"splits": ["test", "train"]}',
    **{f"mine/train/{name}": content for name, content in SAVED.items()},
    "mine/test/state.json": b'{"_data_files": [{"filename": "data.arrow"}]}',
    "mine/test/data.arrow": to_stream([{"prompt": "held out", "completion": "yes"}]),
}


@pytest.mark.parametrize("is_zip", [True, False])
def test_saved_dataset_is_read_in_the_order_of_its_state(is_zip: bool, tmp_path: Path) -> None:
    opened = open_files(tmp_path, {"saved.zip": make_zip(SAVED)} if is_zip else SAVED)
    records = [simplify(record) for record in opened.iter_records()]
    assert [record[1] for record in records if not isinstance(record, RowProblem)] == ROWS
    assert (opened.format, opened.container, opened.note) == ("arrow", "zip" if is_zip else "folder", "")


def test_splits_of_a_saved_dataset_are_read_as_one_train_first(tmp_path: Path) -> None:
    opened = open_files(tmp_path, {"saved.zip": make_zip(SPLITS)})
    assert [record.part for record in opened.iter_records()] == [
        *("mine/train/data-00001.arrow", "mine/train/data-00000.arrow", "mine/test/data.arrow")
    ]
    assert opened.note == "the splits train, test are read as one dataset"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("mine/train/data-00000.arrow", "mine/train/state.json names data-00000.arrow, which is missing"),
        ("mine/test/state.json", "mine/dataset_dict.json names the split test, which is missing"),
    ],
)
def test_saved_dataset_without_a_file_is_refused(missing: str, message: str) -> None:
    files = {name: content for name, content in SPLITS.items() if name != missing}
    assert get_refusal({"saved.zip": make_zip(files)}).message == message


@pytest.mark.parametrize("state", [b"", b"[]", b"{}", b'{"_data_files": 1}'])
def test_saved_dataset_with_a_broken_state_is_refused(state: bytes) -> None:
    assert "is not what save_to_disk writes" in get_refusal({"saved.zip": make_zip({**SAVED, "state.json": state})}).message


CELLS = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.lists(st.tuples(CELLS, st.lists(CELLS, max_size=3)), min_size=1, max_size=9),
    st.integers(1, 4),
    st.sampled_from(["parquet", "stream"]),
)
def test_any_strings_and_lists_are_read_back(rows: list[tuple[str | None, list[str | None]]], batch: int, kind: str) -> None:
    table = pa.table(
        {"s": pa.array([one for one, _ in rows], pa.string()), "l": pa.array([many for _, many in rows], pa.list_(pa.string()))}
    )
    content = make_parquet(table, row_group_size=batch) if kind == "parquet" else make_arrow(table, is_stream=True, batch_rows=batch)
    assert read_rows("rows", content) == [{"s": one, "l": many} for one, many in rows]
