"""Uploads: what is accepted, what is rejected, and which rows are held out."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ingest.formats.jsonl import read_jsonl
from jobs.ingest.splitting import Splitter
from schema.ingestion import IngestLimits, RowProblem
from tests.ingest.dataset_harness import IngestResult, InvalidRow, get_bytes_error, ingest_bytes, parse_rows, read_bytes

QUICK_SETTINGS = settings(max_examples=60, deadline=None, database=None)
QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "So."}


def upload(*rows: object, eval_fraction: float = 0.0, seed: int = 0, limits: IngestLimits | None = None) -> IngestResult:
    return ingest_bytes(to_jsonl(*rows), eval_fraction=eval_fraction, seed=seed, limits=limits)


def to_jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def get_row_error(content: bytes, limits: IngestLimits | None = None) -> InvalidRow:
    return get_bytes_error(content, limits)


def make_text_rows(count: int) -> list[object]:
    return [{"text": f"row {number}"} for number in range(count)]


# --- what is accepted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "dataset_type"),
    [
        ({"text": "  two spaces,\ta tab,\r\nand a line \u2028 separator\n"}, "text"),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "prompt_completion"),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, "prompt_completion"),
        ({"messages": [QUESTION, ANSWER]}, "messages"),
        ({"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, QUESTION, ANSWER]}, "messages"),
    ],
)
def test_each_format_is_stored_unchanged(row: object, dataset_type: str) -> None:
    outcome = upload(row)
    assert outcome.rows.dataset_type == dataset_type
    assert [json.loads(line) for line in outcome.train] == [row]


def test_keys_are_stored_in_fixed_order_on_one_line() -> None:
    (row,) = parse_rows(to_jsonl({"completion": "b\n", "prompt": "a"}))
    assert row.canonical == b'{"prompt":"a","completion":"b\\n"}'


def test_typed_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "So"}, {"text": ".", "type": "text"}]
    joined, plain = parse_rows(
        to_jsonl({"messages": [QUESTION, {"role": "assistant", "content": parts}]}, {"messages": [QUESTION, ANSWER]})
    )
    assert joined.canonical == plain.canonical


def test_bom_crlf_and_blank_lines_are_accepted() -> None:
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}'
    assert list(read_jsonl(io.BytesIO(content), IngestLimits())) == [(1, b'{"text": "a"}', ""), (4, b'{"text": "b"}', "")]
    assert read_bytes(content) == [b'{"text":"a"}', b'{"text":"b"}']


def test_row_at_size_limit_is_accepted() -> None:
    row = to_jsonl({"text": "x" * 50})
    limits = IngestLimits(max_row_bytes=len(row) - 1)
    assert ingest_bytes(b"\xef\xbb\xbf" + row[:-1] + b"\r\n" + row, limits=limits).outcome.rows_read == 2
    assert get_row_error(row, IngestLimits(max_row_bytes=len(row) - 2)).line == 1


# --- what is rejected, where and why ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (b'{"text": "caf\xe9"}', "", "not UTF-8 at byte 14"),
        (b'{"text": "a"', "", "not JSON at column 13"),
        (b'{"text": "a"} {"text": "b"}', "", "not JSON at column 15"),
        (b'{"text": "a\tb\x01"}', "", "Invalid control character"),
        (b'["text"]', "", "is a list, not an object"),
        (b'"text"', "", "is a string, not an object"),
        (b"{}", "", "has no columns"),
        (b'{"text": "a", "text": "b"}', "'text'", "appears twice"),
        (b'{"text": NaN}', "", "NaN is not JSON"),
        (b'{"text": -Infinity}', "", "-Infinity is not JSON"),
        (b'{"text": "a\\ud800b"}', "text", "an unpaired surrogate, \\ud800, at position 2"),
        (b'{"text": "a\\u0000b"}', "text", "NUL character at position 2"),
        (b'{"text": " \\n"}', "text", "is empty"),
        (b'{"text": ' + b"1" * 5000 + b"}", "text", "is a number"),
        (b'{"text": null}', "text", "is null"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "", "nested too deeply"),
        (b'{"text": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "", "nested too deeply"),
        (b'{"text": "a", "completion": 7}', "'completion'", "drop the column"),
        (b'{"text": "a", "messages": [7]}', "'text'", "drop the column"),
        (b'{"messages": "a", "\\ud800' + b"x" * 90 + b'": 1}', "'\\ud800" + "x" * 39 + "...'", "drop the column"),
        (b'{"completion": "a"}', "prompt", "is missing"),
        (b'{"prompt": "a", "completion": ""}', "completion", "is empty"),
        (b'{"prompt": "a", "completion": 4}', "completion", "is a number; it must be a string or a list of messages"),
        (
            b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}',
            "completion",
            "must all be strings, or all lists of messages",
        ),
    ],
)
def test_invalid_row_error_has_line_field_and_reason(line: bytes, field: str, reason: str) -> None:
    error = get_row_error(b"\n" + line + b"\n")
    assert (error.line, error.field) == (2, field)
    assert reason in error.reason
    assert str(error).encode().decode().isprintable()


@pytest.mark.parametrize(
    ("messages", "field", "reason"),
    [
        ("hello", "messages", "is a string; it must be a list of messages"),
        ([], "messages", "has 0 messages"),
        ([QUESTION, ANSWER] * 501, "messages", "has 1002 messages"),
        (["hello"], "messages[0]", "is a string, not an object"),
        ([{"role": "user"}], "messages[0].content", "is missing"),
        ([{**QUESTION, "name": "Ann"}, ANSWER], "messages[0].'name'", "would not be used"),
        ([{**QUESTION, "role": "bot"}], "messages[0].role", "is 'bot'; known roles: system, developer, user, assistant, tool"),
        ([{"content": "Why?"}], "messages[0].role", "is missing"),
        ([{**QUESTION, "role": ["user"]}], "messages[0].role", "is a list; known roles"),
        ([QUESTION, {**ANSWER, "content": None}], "messages[1].content", "is null"),
        ([QUESTION, {**ANSWER, "content": []}], "messages[1].content", "is empty"),
        ([QUESTION, {**ANSWER, "content": ["So."]}], "messages[1].content[0]", "is a string, not an object"),
        (
            [QUESTION, {**ANSWER, "content": [{"type": "audio", "text": ""}]}],
            "messages[1].content[0].type",
            "only 'text' and 'image' parts",
        ),
        ([QUESTION, {**ANSWER, "content": [{"type": "text", "text": 1}]}], "messages[1].content[0].text", "is a number"),
        ([ANSWER], "messages[0].role", "it must be 'user'"),
        ([QUESTION, QUESTION, ANSWER], "messages[1].role", "it must be 'assistant'"),
        ([QUESTION, {"role": "system", "content": "Late."}, ANSWER], "messages[1].role", "is 'system'; it must be 'assistant'"),
        ([QUESTION], "messages[0].role", "the last message must be from 'assistant'"),
        ([{"role": "system", "content": "Alone."}], "messages[0].role", "the last message must be from 'assistant'"),
    ],
)
def test_misordered_conversation_error_names_message(messages: object, field: str, reason: str) -> None:
    error = get_row_error(to_jsonl({"messages": messages}))
    assert error.field == field
    assert reason in error.reason


@pytest.mark.parametrize(
    ("prompt", "completion", "field"),
    [
        ([QUESTION, ANSWER], [ANSWER], "prompt[1].role"),
        ([QUESTION], [ANSWER, QUESTION, ANSWER], "completion"),
        ([QUESTION], [QUESTION], "completion[0].role"),
        ([QUESTION], "So.", "completion"),
    ],
)
def test_prompt_ends_with_user_and_completion_is_one_message(prompt: object, completion: object, field: str) -> None:
    assert get_row_error(to_jsonl({"prompt": prompt, "completion": completion})).field == field


def test_mixed_formats_are_rejected() -> None:
    assert "is text, but line 1 is messages" in get_row_error(to_jsonl({"messages": [QUESTION, ANSWER]}, {"text": "a"})).reason


def test_mixed_strings_and_messages_in_column_are_rejected() -> None:
    mixed = to_jsonl({"prompt": "a", "completion": "b"}, {"prompt": [QUESTION], "completion": [ANSWER]})
    assert "with messages, but line 1 is prompt_completion with strings" in get_row_error(mixed).reason


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_file_without_rows_is_rejected(content: bytes) -> None:
    assert get_row_error(content).reason.startswith("there are no rows")


def test_row_count_over_limit_is_rejected() -> None:
    limits = IngestLimits(max_rows=2)
    assert upload(*make_text_rows(2), limits=limits).outcome.rows_read == 2
    assert "more than 2 rows" in get_row_error(to_jsonl(*make_text_rows(3)), limits).reason


class EndlessLine(io.RawIOBase):
    """A stream with one endless line, which counts the bytes read."""

    read_bytes = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size >= 0, "the whole line was requested"
        if self.read_bytes > 1000:
            return b""  # what reads on skips the line
        self.read_bytes += size
        return b"x" * size


def test_endless_line_is_rejected_at_limit() -> None:
    stream = EndlessLine()
    problem = next(read_jsonl(stream, IngestLimits(max_row_bytes=1000)))  # type: ignore[arg-type]  # it has the one method that is called
    assert isinstance(problem, RowProblem)
    assert "longer than 1,000 bytes" in problem.reason
    assert stream.read_bytes < 1100


def test_nothing_is_written_when_last_row_is_invalid() -> None:
    assert get_row_error(to_jsonl(*make_text_rows(5)) + b"{").line == 6  # the harness asserts that the folder is empty


def test_row_with_too_many_columns_is_rejected_quickly() -> None:
    columns = ",".join(f'"{number}":1' for number in [*range(80_000), 79_999])
    assert get_row_error(b"{" + columns.encode() + b"}").field == "'79999'"


# --- what is held out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "eval_fraction", "held_out"), [(100, 0.1, 10), (1000, 0.05, 50), (3, 0.5, 2), (2, 0.01, 1), (7, 0.0, 0)])
def test_requested_fraction_is_held_out(rows: int, eval_fraction: float, held_out: int) -> None:
    splits = upload(*make_text_rows(rows), eval_fraction=eval_fraction).rows.splits
    assert (splits["eval"].rows if "eval" in splits else 0) == held_out
    assert splits["train"].rows == rows - held_out


def test_single_row_is_used_for_training() -> None:
    splits = upload(*make_text_rows(1), eval_fraction=0.5).rows.splits
    assert (splits["train"].rows, "eval" in splits) == (1, False)


def test_single_prompt_is_not_held_out() -> None:
    splits = upload(*({"prompt": "Why?", "completion": f"{n}"} for n in range(9)), eval_fraction=0.5).rows.splits
    assert (splits["train"].rows, "eval" in splits) == (9, False)


def test_smallest_prompt_group_is_held_out_when_all_are_too_large() -> None:
    rows = [{"prompt": prompt, "completion": f"{n}"} for prompt, count in (("a", 6), ("b", 4), ("c", 5)) for n in range(count)]
    outcome = upload(*rows, eval_fraction=0.1)
    assert {json.loads(line)["prompt"] for line in outcome.held_out} == {"b"}


def test_duplicates_are_dropped_and_counted() -> None:
    outcome = upload({"text": "a"}, {"text": "b"}, {"text": "a"}, {"text": "a"})
    assert outcome.train == [b'{"text":"a"}', b'{"text":"b"}']
    assert (outcome.outcome.rows_read, outcome.rows.duplicates_dropped) == (4, 2)


def test_another_seed_holds_out_other_rows() -> None:
    first, second = (upload(*make_text_rows(50), eval_fraction=0.5, seed=seed) for seed in (1, 2))
    assert first.held_out != second.held_out


@pytest.mark.parametrize("eval_fraction", [-0.1, 0.51, float("nan")])
def test_invalid_eval_fraction_is_rejected(eval_fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        Splitter(eval_fraction, 0)


# --- what holds for every upload -------------------------------------------------------------------------------------

CONTENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30).filter(
    lambda text: text.strip()
)
SEEDS = st.integers(-(2**70), 2**70)
FRACTIONS = st.floats(0, 0.5)
# Few prompts and answers, so that duplicates and shared prompts are common.
PAIRS = st.lists(
    st.builds(lambda p, c: {"prompt": p, "completion": c}, st.sampled_from("abcdef"), st.sampled_from("xyz")), min_size=1, max_size=40
)


@st.composite
def conversations(draw: st.DrawFn) -> object:
    system = draw(st.lists(CONTENT, max_size=1))
    turns = draw(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
    messages = [("system", text) for text in system] + [
        (role, text) for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return {"messages": [{"role": role, "content": text} for role, text in messages]}


VALID_ROWS = st.one_of(
    st.lists(CONTENT.map(lambda text: {"text": text}), min_size=1, max_size=8),
    st.lists(st.builds(lambda p, c: {"prompt": p, "completion": c}, CONTENT, CONTENT), min_size=1, max_size=8),
    st.lists(conversations(), min_size=1, max_size=4),
)


@QUICK_SETTINGS
@given(VALID_ROWS, st.booleans())
def test_content_is_never_changed(rows: list[object], escaped: bool) -> None:
    content = b"".join(json.dumps(row, ensure_ascii=escaped).encode() + b"\r\n" for row in rows)
    assert [json.loads(line) for line in read_bytes(content)] == rows


@QUICK_SETTINGS
@given(PAIRS, FRACTIONS, SEEDS)
def test_splits_are_disjoint_complete_and_share_no_prompt(rows: list[object], eval_fraction: float, seed: int) -> None:
    outcome = upload(*rows, eval_fraction=eval_fraction, seed=seed)
    distinct = {row.canonical for row in parse_rows(to_jsonl(*rows))}
    assert sorted(outcome.train + outcome.held_out) == sorted(distinct)
    assert outcome.rows.duplicates_dropped == len(rows) - len(distinct)
    assert not get_prompts(outcome.train) & get_prompts(outcome.held_out)
    assert outcome.train
    assert bool(outcome.held_out) == (eval_fraction > 0 and len(get_prompts(distinct)) > 1)


def get_prompts(lines: list[bytes] | set[bytes]) -> set[str]:
    return {json.loads(line)["prompt"] for line in lines}


@QUICK_SETTINGS
@given(PAIRS.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(rows))), FRACTIONS, SEEDS)
def test_row_order_does_not_affect_splits(orders: tuple[list[object], list[object]], eval_fraction: float, seed: int) -> None:
    first, second = (upload(*rows, eval_fraction=eval_fraction, seed=seed) for rows in orders)
    assert sorted(first.held_out) == sorted(second.held_out)
    assert sorted(first.train) == sorted(second.train)


@QUICK_SETTINGS
@given(st.lists(CONTENT, min_size=2, max_size=60, unique=True), FRACTIONS.filter(bool), SEEDS)
def test_distinct_prompts_give_exact_held_out_count(contents: list[str], eval_fraction: float, seed: int) -> None:
    splits = upload(*({"text": text} for text in contents), eval_fraction=eval_fraction, seed=seed).rows.splits
    assert splits["eval"].rows == max(1, round(eval_fraction * len(contents)))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "type", "text", "prompt", "completion", "x"]), inner, max_size=4)
        | st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": inner})
    ),
    max_leaves=12,
)
JSON_FRAGMENTS = [b'{"text":', b'"a"', b"}", b"\n", b"\r", b"[", b"\xff", b"NaN", b'"\\ud800"', b'"\\u0000"', b'"', b",", b"\xef\xbb\xbf"]
ARBITRARY_BYTES = st.one_of(
    st.binary(max_size=80),
    st.lists(st.sampled_from(JSON_FRAGMENTS), max_size=12).map(b"".join),
    st.lists(JSON, max_size=3).map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode()),
    st.tuples(VALID_ROWS, st.binary(max_size=3), st.integers(0, 200)).map(
        lambda drawn: to_jsonl(*drawn[0])[: drawn[2]] + drawn[1] + to_jsonl(*drawn[0])[drawn[2] :]
    ),
)


@settings(QUICK_SETTINGS, max_examples=200)
@given(ARBITRARY_BYTES, FRACTIONS, SEEDS)
def test_any_upload_is_accepted_or_rejected_cleanly(content: bytes, eval_fraction: float, seed: int) -> None:
    try:
        outcome = ingest_bytes(content, eval_fraction=eval_fraction, seed=seed, limits=IngestLimits(max_row_bytes=400, max_rows=10))
    except InvalidRow as error:
        assert error.line >= 1
        assert str(error).isprintable()
        str(error).encode()
    else:
        assert outcome.rows.splits["train"].rows >= 1
