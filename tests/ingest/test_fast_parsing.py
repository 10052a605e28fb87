"""The fast path for usual lines accepts nothing that the strict parser does not, and gives the same."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ingest.rows.messages import is_plain_conversation, parse_conversation
from jobs.ingest.rows.values import InvalidValue, parse_plain, parse_strictly

SETTINGS = settings(max_examples=150, deadline=None, database=None)
TEXTS = st.text(st.sampled_from('a"\\é \n\t\0\u2028😀\ud800/'), max_size=6) | st.text(max_size=8)
NAMES = st.sampled_from(["messages", "role", "content", "text", "prompt", "label", '"', "\\", "é"])
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer", "", "User"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS | JSON}), max_size=5)
ROWS = st.dictionaries(NAMES, TEXTS | st.booleans() | MESSAGES | JSON, max_size=4)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " :\r")])
INSERTIONS = st.sampled_from(
    [b'"', b"\\", b'\\"', b"\\\\", b"\\u0022", b'"text":"b",', b"1", b"NaN", b"\xff", b"\xef\xbb\xbf", b"\0", b",", b"}"]
)


def parse_or_none(line: bytes) -> Any:
    try:
        return parse_strictly(line, "a row")
    except InvalidValue:
        return None


def check_fast_path(line: bytes) -> None:
    if (fast := parse_plain(line)) is not None:
        assert fast == parse_or_none(line)
        assert list(fast) == list(parse_or_none(line))


@SETTINGS
@given(ROWS, SEPARATORS, st.booleans())
def test_rows_are_parsed_alike(row: object, separators: tuple[str, str], escaped: bool) -> None:
    line = json.dumps(row, separators=separators, ensure_ascii=escaped).encode(errors="surrogatepass")
    check_fast_path(line)


@SETTINGS
@given(ROWS, st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), INSERTIONS), min_size=1, max_size=3))
def test_mutated_rows_are_parsed_alike(row: object, mutations: list[tuple[int, int, bytes]]) -> None:
    line = json.dumps(row).encode()
    for position, removed, inserted in mutations:
        position %= len(line) + 1
        line = line[:position] + inserted + line[position + removed :]
    check_fast_path(line)


@SETTINGS
@given(st.lists(st.tuples(NAMES, TEXTS | MESSAGES), max_size=4), st.booleans())
def test_names_that_occur_twice_are_never_accepted(pairs: list[tuple[str, object]], unicode_quotes: bool) -> None:
    members = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs]
    line = "{" + ", ".join(members) + "}"
    if unicode_quotes:
        line = line.replace('\\"', "\\u0022")
    fast = parse_plain(line.encode())
    if len({name for name, _ in pairs}) < len(pairs):
        assert fast is None
    check_fast_path(line.encode())


@pytest.mark.parametrize(
    "line",
    [
        b'{"text":"\\u0022\\u0022","text":"b"}',
        b'{"text":"b","text":"\\u0022\\u0022\\u0022\\u0022"}',
        b'{"messages":[{"role":"user","role":"\\u0022\\u0022"}]}',
        b'{"a":"\\"","a":"b"}',
        b'{"text":1}',
        b'{"text":[["a"]]}',
        b'{"text":{"a":"b"}}',
        b'\xef\xbb\xbf{"text":"a"}',
        b'["text"]',
    ],
)
def test_unusual_lines_are_left_to_the_strict_parser(line: bytes) -> None:
    assert parse_plain(line) is None


@pytest.mark.parametrize(
    "line", [b'{"text":"a"}', b' {"prompt" : "\\"\\\\", "completion":"\\\\\\"","label":true}\r', b'{"messages":[],"tools":null}']
)
def test_usual_lines_take_the_fast_path(line: bytes) -> None:
    assert parse_plain(line) == parse_strictly(line, "a row") == orjson.loads(line)


@SETTINGS
@given(MESSAGES | JSON)
def test_plain_conversations_are_valid_as_they_are(value: object) -> None:
    if is_plain_conversation(value):
        assert parse_conversation(value, "messages", last_role="assistant", has_weights=True) == value


@pytest.mark.parametrize("first", [[], [{"role": "system", "content": "Be brief."}]])
@pytest.mark.parametrize("turns", [1, 3])
def test_usual_conversations_are_plain(first: list[object], turns: int) -> None:
    turn = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]
    assert is_plain_conversation([*first, *turn * turns])
    assert not is_plain_conversation([*first, *turn * turns, turn[0]])
    assert not is_plain_conversation([*first, *turn, *first, {"role": "", "content": "a"}])
