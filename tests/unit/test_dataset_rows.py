"""Rows of an upload: what is usable is kept to the byte, and everything else is refused by line."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.dataset_rows import BadRow, Ingested, RowLimits, ingest, read_rows

LIMITS = RowLimits(max_row_bytes=2000, max_rows=1000)
Row = dict[str, Any]


def lines(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def split(content: bytes, fraction: float = 0.2, seed: int = 42) -> tuple[Ingested, list[Row], list[Row]]:
    train, held_out = io.BytesIO(), io.BytesIO()
    found = ingest(io.BytesIO(content), LIMITS, fraction, seed, train, held_out, io.BytesIO())
    sides = [[json.loads(line) for line in out.getvalue().split(b"\n") if line] for out in (train, held_out)]
    return found, sides[0], sides[1]


def refusal(content: bytes | str) -> BadRow:
    with pytest.raises(BadRow) as error:
        list(read_rows(io.BytesIO(content.encode() if isinstance(content, str) else content), LIMITS))
    return error.value


def a_chat(question: str = "q", answer: str = "a") -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


says_something = st.text(min_size=1, max_size=30).filter(lambda text: text.strip() != "" and not text.isspace() and "\0" not in text)
chats = st.builds(a_chat, says_something, says_something)
completions = st.fixed_dictionaries({"prompt": says_something, "completion": says_something})
texts = st.fixed_dictionaries({"text": says_something})
files = st.one_of(*(st.lists(rows, min_size=1, max_size=30) for rows in (chats, completions, texts)))


def as_text(rows: list[Row]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


@given(files, st.floats(0, 0.5), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_every_row_comes_out_once_as_it_went_in(rows: list[Row], fraction: float, seed: int) -> None:
    found, train, held_out = split(lines(rows), fraction, seed)
    distinct = {json.dumps(row, sort_keys=True) for row in rows}
    assert as_text(train + held_out) == sorted(distinct)
    assert found.rows_read == len(rows)
    assert found.duplicates_dropped == len(rows) - len(distinct)
    assert train
    assert not held_out or fraction > 0


@given(files, st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_split_does_not_depend_on_the_order(rows: list[Row], random: Any) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert as_text(split(lines(rows))[2]) == as_text(split(lines(shuffled))[2])


@given(st.lists(st.builds(a_chat, st.sampled_from("pqrs"), says_something), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_one_prompt_is_never_on_both_sides(rows: list[Row]) -> None:
    _, train, held_out = split(lines(rows), 0.3)
    prompts = [{row["messages"][0]["content"] for row in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1]


@given(
    st.binary(max_size=300)
    | st.lists(st.sampled_from([b'{"text":', b'"a"', b"}", b"\n", b"[", b"\xff", b"NaN", b"\\ud800", b'"']), max_size=20).map(b"".join)
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_rows_or_a_bad_row(content: bytes) -> None:
    try:
        split(content)
    except BadRow as error:
        assert error.line >= 1
        assert error.reason


def test_the_share_held_out_is_what_was_asked_for() -> None:
    rows = [{"text": f"row {n}"} for n in range(100)]
    assert [len(side) for side in split(lines(rows), 0.1)[1:]] == [90, 10]
    assert [len(side) for side in split(lines(rows[:2]), 0.01)[1:]] == [1, 1]
    assert split(lines(rows), 0)[0].eval is None


def test_another_seed_holds_out_other_rows() -> None:
    content = lines([{"text": f"row {n}"} for n in range(100)])
    assert as_text(split(content, seed=1)[2]) != as_text(split(content, seed=2)[2])


def test_whitespace_and_every_character_survive() -> None:
    text = "  def f():\n\treturn '\u2028é🙂'\r\n\n"
    assert split(lines([{"text": text}]))[1] == [{"text": text}]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]}
    assert split(lines([row]))[1][0]["messages"][0]["content"] == "a b"


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_tolerated() -> None:
    assert [row.line for row in read_rows(io.BytesIO(b'\xef\xbb\xbf{"text":"a"}\r\n\r\n{"text":"b"}'), LIMITS)] == [1, 3]


@pytest.mark.parametrize(
    ("content", "line", "field", "reason"),
    [
        (b"", 1, "", "no rows"),
        (b"\xff", 1, "", "UTF-8"),
        ('{"text": "a"}\n{"text"', 2, "", "not JSON at column"),
        ("3", 1, "", "not an object"),
        ("{}", 1, "", "no columns"),
        ('{"id": 3}', 1, "", "columns"),
        ('{"text": "a", "id": 3}', 1, "id", "drop the column"),
        ('{"prompt": "a"}', 1, "completion", "missing"),
        ('{"text": "a", "text": "b"}', 1, "text", "twice"),
        ('{"text": null}', 1, "text", "string"),
        ('{"text": "  "}', 1, "text", "empty"),
        ('{"text": NaN}', 1, "", "NaN"),
        ('{"text": "a\\u0000"}', 1, "text", "NUL"),
        ('{"text": "\\ud800"}', 1, "text", "half a character"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', 2, "", "one form"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', 1, "completion", "both"),
        ("[" * 1999, 1, "", "nested"),
        ('{"text": "' + "x" * 3000 + '"}', 1, "", "longer than 2,000 bytes"),
        (json.dumps(a_chat() | {"messages": []}), 1, "messages", "1 to 1000"),
        (json.dumps({"messages": [{"role": "user", "content": "a"}]}), 1, "messages[0].role", "last message"),
        (json.dumps({"messages": [{"role": "assistant", "content": "a"}]}), 1, "messages[0].role", "user"),
        (json.dumps({"messages": [{"role": "robot", "content": "a"}]}), 1, "messages[0].role", "known roles"),
        (json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), 1, "messages[0].content[0]", "images"),
        (json.dumps({"messages": [{"role": "user", "content": "a", "name": "x"}]}), 1, "messages[0].'name'", "drop it"),
    ],
    ids=range(24),
)
def test_a_bad_row_is_named_by_line_and_field(content: bytes | str, line: int, field: str, reason: str) -> None:
    error = refusal(content)
    assert error.line == line
    assert field.replace("'", "") in error.field.replace("'", "")
    assert reason in error.reason


def test_more_rows_than_allowed_are_refused() -> None:
    assert "more than 1,000 rows" in refusal(lines([{"text": str(n)} for n in range(1001)])).reason


def test_a_line_without_end_is_not_held_in_memory() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.given += len(buffer)
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    endless = Endless()
    with pytest.raises(BadRow, match="longer"):
        list(read_rows(io.BufferedReader(endless), LIMITS))
    assert endless.given < 100_000
