"""JSON files: lists of objects, wrapped lists and objects one after another give the rows that JSON lines give."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobs.ingest.formats import json_cursor
from schema.ingestion import IngestLimits, RowProblem
from tests.ingest.dataset_harness import to_jsonl
from tests.ingest.formats_harness import get_refusal, read_only_problem, read_problems_and_rows, read_rows

QUICK_SETTINGS = settings(max_examples=80, deadline=None, database=None)
ROWS: list[dict[str, Any]] = [{"text": 'a"]}\\', "n": [1, {"x": []}]}, {"text": "\u2028{", "n": None}]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=5)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few characters at a time, so that every value is cut off somewhere."""
    monkeypatch.setattr(json_cursor, "CHUNK_CHARACTERS", 3)


@QUICK_SETTINGS
@given(OBJECTS, st.sampled_from([None, 1, "\t"]), st.booleans(), st.integers(1, 20))
@example([{"\\": '"\\"'}], None, True, 1)
def test_list_has_the_rows_of_json_lines(rows: list[object], indent: int | None, ascii_only: bool, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_cursor, "CHUNK_CHARACTERS", chunk)
        content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        found = read_rows("rows.json", content, format="json")
    assert found == (read_rows("rows.jsonl", to_jsonl(rows), format="jsonl") if rows else [])


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    "wrapper",
    [{"data": ROWS * 5}, {"v": "1", "tags": ["a"], "about": {"n": [{}]}, "rows": ROWS * 5, "more": []}, {"none": [], "data": ROWS * 5}],
)
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("max_row_bytes", [120, 4000])  # whether the whole file is longer than a row
def test_only_list_of_objects_in_an_object_is_read(wrapper: object, indent: int | None, max_row_bytes: int) -> None:
    limits = IngestLimits(max_row_bytes=max_row_bytes)
    expected = read_rows("rows.jsonl", to_jsonl(ROWS * 5))
    assert read_rows("rows.json", json.dumps(wrapper, indent=indent).encode(), limits) == expected


@pytest.mark.parametrize("max_row_bytes", [30, 1000])
def test_two_lists_of_objects_are_refused(max_row_bytes: int) -> None:
    content = b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}'
    problem = get_refusal({"rows.json": content}, IngestLimits(max_row_bytes=max_row_bytes))
    assert "has two lists of objects, 'train' and 'test'" in problem.message


def test_object_with_messages_is_one_row() -> None:
    row = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    assert read_rows("rows.json", json.dumps(row, indent=1).encode()) == [row]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_objects_over_several_lines_are_rows(name: str) -> None:
    content = "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()
    assert read_rows(name, content) == read_rows("rows.jsonl", to_jsonl(ROWS))


@pytest.mark.parametrize(
    ("rows", "row", "reason"),
    [
        ('[{"a": 1}, {"a": 1, "a": 2}, {"a": 3}]', 2, "appears twice in the same object"),
        ('[{"a": 1},\n{"a": tru},\n{"a": 3}]', 2, "not JSON in line 2 of the file"),
        ('[{"a": 1}, "b", {"a": 3}]', 2, "is a string, not an object"),
        ('[{"a": 1}, 12.5, {"a": 3}]', 2, "is a number, not an object"),
        ('[{"a": 1}, {"a": NaN}, {"a": 3}]', 2, "NaN is not JSON"),
        ('[{"a": 1}, {"a": ' + "[" * 3000 + "]" * 3000 + '}, {"a": 3}]', 2, "nested too deeply"),
        ('[{"a": 1}, {"a": "' + "\\\\x" * 20_000 + '"}, {"a": 3}]', 2, "longer than 30,000 bytes"),
        ('{"data": [{"a": 1}, [2], {"a": 3}]}', 2, "is a list, not an object"),
    ],
)
@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_bad_row_is_named_and_others_are_read(rows: str, row: int, reason: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_cursor, "CHUNK_CHARACTERS", chunk)
    limits = IngestLimits(max_row_bytes=30_000, max_image_row_bytes=40_000)
    found = read_problems_and_rows("rows.json", rows.encode(), limits)
    problem = found[row - 1]
    assert isinstance(problem, RowProblem)
    assert (problem.place, reason in problem.reason) == (f"row {row}", True)
    assert [found[0], found[2]] == [(1, {"a": "#1"}), (3, {"a": "#3"})]


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": "b', '[{"a": 1}, {"a": {"b": 2}', '[{"a": 1}, {"a": "}]', '[{"a": 1}, '])
def test_file_that_is_cut_off_keeps_its_whole_rows(content: str) -> None:
    problem = read_only_problem("rows.json", content.encode())
    assert (problem.place, problem.code) == ("row 2", "unreadable")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}\n{"a": 2}]', "in line 2, where ',' or ']' must be"),
        ('[{"a": 1}, ]', "in line 1, where a value must be"),
        ('[{"a": 1}]\n[{"a": 2}]', "has more text in line 2"),
        ('{"a": 1} x', "has more text in line 1"),
        ('"a"', "begins with '\"'"),
        (" \n ", "has nothing but blank lines"),
    ],
)
def test_text_that_is_no_list_of_rows_is_refused(content: str, message: str) -> None:
    problem = get_refusal({"rows.json": content.encode()}, format="json")
    assert message in problem.message
    assert problem.hint


@pytest.mark.parametrize(
    ("content", "message"), [('{"a": 1, "b": 2, c: [1]}', "'c' in line 1"), ('{"a": [1], "bcdef": 2}', "without a list")]
)
def test_long_object_without_rows_is_refused(content: str, message: str) -> None:
    assert message in get_refusal({"rows.json": content.encode()}, IngestLimits(max_row_bytes=9)).message


def test_long_text_is_too_long_and_a_long_image_is_not() -> None:
    limits = IngestLimits(max_row_bytes=100, max_image_row_bytes=1000)
    image = "data:image/png;base64," + "A" * 500
    assert read_rows("rows.json", json.dumps([{"image": image}]).encode(), limits) == [{"image": image}]
    assert read_only_problem("rows.json", json.dumps([{"text": "A" * 500}]).encode(), limits).code == "too_long"


@QUICK_SETTINGS
@given(st.text(alphabet='[]{}",:\\ \n1a', max_size=30))
@example('{"a": [{')
@example('[{"a":"\\')
def test_any_text_as_json_gives_rows_or_a_message(text: str) -> None:
    limits = IngestLimits(max_row_bytes=12, max_image_row_bytes=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_cursor, "CHUNK_CHARACTERS", 2)
        try:
            read_problems_and_rows("rows.json", text.encode() or b" ", limits, format="json")
        except AssertionError:
            raise
        except ValueError as error:
            assert str(error)
