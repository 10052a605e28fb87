"""What an upload may hold, what is refused and how, and how rows are held out."""

import hashlib
import io
import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.dataset_rows import BadRow, Ingested, Row, RowLimits, Splitter, ingest, read_rows

QUICK = settings(max_examples=60, deadline=None, database=None)
QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "So."}


@dataclass(frozen=True)
class Outcome:
    """An upload, and what was written for it."""

    ingested: Ingested
    train: list[bytes]
    held_out: list[bytes]


def upload(*rows: object, eval_fraction: float = 0.0, seed: int = 0, limits: RowLimits | None = None) -> Outcome:
    return upload_bytes(jsonl(*rows), eval_fraction=eval_fraction, seed=seed, limits=limits)


def upload_bytes(content: bytes, *, eval_fraction: float = 0.0, seed: int = 0, limits: RowLimits | None = None) -> Outcome:
    train, held_out = io.BytesIO(), io.BytesIO()
    ingested = ingest(io.BytesIO(content), limits or RowLimits(), eval_fraction, seed, train, held_out, io.BytesIO())
    assert ingested.train.size_bytes == len(train.getvalue())
    assert ingested.train.sha256 == hashlib.sha256(train.getvalue()).hexdigest()
    assert (ingested.eval.sha256 if ingested.eval else None) == (hashlib.sha256(held_out.getvalue()).hexdigest() if ingested.eval else None)
    return Outcome(ingested, lines_of(train), lines_of(held_out))


def lines_of(stream: io.BytesIO) -> list[bytes]:
    return stream.getvalue().split(b"\n")[:-1]


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def refusal(content: bytes, limits: RowLimits | None = None) -> BadRow:
    with pytest.raises(BadRow) as caught:
        upload_bytes(content, limits=limits)
    return caught.value


def texts(count: int) -> list[object]:
    return [{"text": f"row {number}"} for number in range(count)]


def read(*rows: object) -> list[Row]:
    return list(read_rows(io.BytesIO(jsonl(*rows)), RowLimits()))


# --- what is accepted


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
def test_each_form_is_stored_as_it_came(row: object, dataset_type: str) -> None:
    outcome = upload(row)
    assert outcome.ingested.dataset_type == dataset_type
    assert [json.loads(line) for line in outcome.train] == [row]


def test_keys_are_stored_in_a_fixed_order_on_one_line() -> None:
    (row,) = read({"completion": "b\n", "prompt": "a"})
    assert row.canonical == b'{"prompt":"a","completion":"b\\n"}'


def test_typed_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "So"}, {"text": ".", "type": "text"}]
    joined, plain = read({"messages": [QUESTION, {"role": "assistant", "content": parts}]}, {"messages": [QUESTION, ANSWER]})
    assert joined.canonical == plain.canonical


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_tolerated() -> None:
    rows = list(read_rows(io.BytesIO(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}'), RowLimits()))
    assert [(row.line, row.canonical) for row in rows] == [(1, b'{"text":"a"}'), (4, b'{"text":"b"}')]


def test_a_row_just_at_the_limit_is_accepted() -> None:
    row = jsonl({"text": "x" * 50})
    limits = RowLimits(max_row_bytes=len(row) - 1)
    assert upload_bytes(b"\xef\xbb\xbf" + row[:-1] + b"\r\n" + row, limits=limits).ingested.rows_read == 2
    assert refusal(row, RowLimits(max_row_bytes=len(row) - 2)).line == 1


# --- what is refused, where and why


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
        (b'{"instruction": "a", "output": "b"}', "", "has the columns 'instruction', 'output'"),
        (b'{"text": "a", "text": "b"}', "'text'", "stands twice"),
        (b'{"text": NaN}', "", "NaN is not JSON"),
        (b'{"text": -Infinity}', "", "-Infinity is not JSON"),
        (b'{"text": "a\\ud800b"}', "text", "half a character, \\ud800, at position 2"),
        (b'{"text": "a\\u0000b"}', "text", "NUL character at position 2"),
        (b'{"text": " \\n"}', "text", "is empty"),
        (b'{"text": ' + b"1" * 5000 + b"}", "text", "is a number"),
        (b'{"text": null}', "text", "is null"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "", "nested too deeply"),
        (b'{"text": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "", "nested too deeply"),
        (b'{"text": "a", "id": 7}', "'id'", "drop the column"),
        (b'{"text": "a", "messages": []}', "'text'", "drop the column"),
        (b'{"text": "a", "\\ud800' + b"x" * 90 + b'": 1}', "'\\ud800" + "x" * 39 + "...'", "drop the column"),
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
def test_a_bad_row_is_refused_with_its_line_field_and_reason(line: bytes, field: str, reason: str) -> None:
    refused = refusal(b"\n" + line + b"\n")
    assert (refused.line, refused.field) == (2, field)
    assert reason in refused.reason
    assert str(refused).encode().decode().isprintable()


@pytest.mark.parametrize(
    ("messages", "field", "reason"),
    [
        ("hello", "messages", "is a string; it must be a list of messages"),
        ([], "messages", "has 0 messages"),
        ([QUESTION, ANSWER] * 501, "messages", "has 1002 messages"),
        (["hello"], "messages[0]", "is a string, not an object"),
        ([{"role": "user"}], "messages[0].content", "is missing"),
        ([{**QUESTION, "name": "Ann"}, ANSWER], "messages[0].'name'", "would not be used"),
        ([{**QUESTION, "role": "tool"}], "messages[0].role", "is 'tool'; known roles: system, user, assistant"),
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
def test_a_conversation_out_of_order_is_refused_with_the_message_named(messages: object, field: str, reason: str) -> None:
    refused = refusal(jsonl({"messages": messages}))
    assert refused.field == field
    assert reason in refused.reason


@pytest.mark.parametrize(
    ("prompt", "completion", "field"),
    [
        ([QUESTION, ANSWER], [ANSWER], "prompt[1].role"),
        ([QUESTION], [ANSWER, QUESTION, ANSWER], "completion"),
        ([QUESTION], [QUESTION], "completion[0].role"),
        ([QUESTION], "So.", "completion"),
    ],
)
def test_a_prompt_ends_with_the_user_and_its_completion_is_one_answer(prompt: object, completion: object, field: str) -> None:
    assert refusal(jsonl({"prompt": prompt, "completion": completion})).field == field


def test_a_file_has_rows_of_one_form() -> None:
    assert "is text, but line 1 is messages" in refusal(jsonl({"messages": [QUESTION, ANSWER]}, {"text": "a"})).reason


def test_strings_and_messages_do_not_mix_in_one_column() -> None:
    mixed = jsonl({"prompt": "a", "completion": "b"}, {"prompt": [QUESTION], "completion": [ANSWER]})
    assert "with messages, but line 1 is prompt_completion with strings" in refusal(mixed).reason


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_refused(content: bytes) -> None:
    assert refusal(content).reason.startswith("no rows")


def test_one_row_too_many_is_refused() -> None:
    limits = RowLimits(max_rows=2)
    assert upload(*texts(2), limits=limits).ingested.rows_read == 2
    assert "more than 2 rows" in refusal(jsonl(*texts(3)), limits).reason


class EndlessLine(io.RawIOBase):
    """A line that never ends, and remembers how much of it was asked for."""

    read_bytes = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size >= 0, "the whole line was asked for"
        self.read_bytes += size
        return b"x" * size


def test_an_endless_line_is_refused_at_the_limit() -> None:
    stream = EndlessLine()
    with pytest.raises(BadRow, match="longer than 1,000 bytes"):
        next(read_rows(stream, RowLimits(max_row_bytes=1000)))  # type: ignore[arg-type]  # it has the one method that is used
    assert stream.read_bytes < 1100


def test_nothing_is_written_when_the_last_row_is_bad() -> None:
    train, held_out = io.BytesIO(), io.BytesIO()
    with pytest.raises(BadRow):
        ingest(io.BytesIO(jsonl(*texts(5)) + b"{"), RowLimits(), 0.5, 0, train, held_out, io.BytesIO())
    assert (train.getvalue(), held_out.getvalue()) == (b"", b"")


def test_a_row_of_very_many_columns_is_refused_at_once() -> None:
    columns = ",".join(f'"{number}":1' for number in [*range(80_000), 79_999])
    assert refusal(b"{" + columns.encode() + b"}").field == "'79999'"


# --- what is held out


@pytest.mark.parametrize(("rows", "eval_fraction", "held_out"), [(100, 0.1, 10), (1000, 0.05, 50), (3, 0.5, 2), (2, 0.01, 1), (7, 0.0, 0)])
def test_just_the_fraction_asked_for_is_held_out(rows: int, eval_fraction: float, held_out: int) -> None:
    ingested = upload(*texts(rows), eval_fraction=eval_fraction).ingested
    assert (ingested.eval.rows if ingested.eval else 0) == held_out
    assert ingested.train.rows == rows - held_out


def test_a_single_row_is_trained_on() -> None:
    ingested = upload(*texts(1), eval_fraction=0.5).ingested
    assert (ingested.train.rows, ingested.eval) == (1, None)


def test_one_prompt_with_many_answers_cannot_be_held_out() -> None:
    ingested = upload(*({"prompt": "Why?", "completion": f"{n}"} for n in range(9)), eval_fraction=0.5).ingested
    assert (ingested.train.rows, ingested.eval) == (9, None)


def test_the_rarest_prompt_is_held_out_when_every_one_has_too_many_rows() -> None:
    rows = [{"prompt": prompt, "completion": f"{n}"} for prompt, count in (("a", 6), ("b", 4), ("c", 5)) for n in range(count)]
    outcome = upload(*rows, eval_fraction=0.1)
    assert {json.loads(line)["prompt"] for line in outcome.held_out} == {"b"}


def test_exact_duplicates_are_dropped_and_counted() -> None:
    outcome = upload({"text": "a"}, {"text": "b"}, {"text": "a"}, {"text": "a"})
    assert outcome.train == [b'{"text":"a"}', b'{"text":"b"}']
    assert (outcome.ingested.rows_read, outcome.ingested.duplicates_dropped) == (4, 2)


def test_another_seed_holds_out_other_rows() -> None:
    assert upload(*texts(50), eval_fraction=0.5, seed=1).held_out != upload(*texts(50), eval_fraction=0.5, seed=2).held_out


@pytest.mark.parametrize("eval_fraction", [-0.1, 0.51, float("nan")])
def test_a_fraction_that_makes_no_sense_is_refused(eval_fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        Splitter(eval_fraction, 0)


# --- what holds for every upload

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
    said = [("system", text) for text in system] + [
        (role, text) for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return {"messages": [{"role": role, "content": text} for role, text in said]}


UPLOADS = st.one_of(
    st.lists(CONTENT.map(lambda text: {"text": text}), min_size=1, max_size=8),
    st.lists(st.builds(lambda p, c: {"prompt": p, "completion": c}, CONTENT, CONTENT), min_size=1, max_size=8),
    st.lists(conversations(), min_size=1, max_size=4),
)


@QUICK
@given(UPLOADS, st.booleans())
def test_content_is_never_changed(rows: list[object], escaped: bool) -> None:
    content = b"".join(json.dumps(row, ensure_ascii=escaped).encode() + b"\r\n" for row in rows)
    assert [json.loads(row.canonical) for row in read_rows(io.BytesIO(content), RowLimits())] == rows


@QUICK
@given(PAIRS, FRACTIONS, SEEDS)
def test_the_splits_are_disjoint_cover_everything_and_share_no_prompt(rows: list[object], eval_fraction: float, seed: int) -> None:
    outcome = upload(*rows, eval_fraction=eval_fraction, seed=seed)
    distinct = {row.canonical for row in read(*rows)}
    assert sorted(outcome.train + outcome.held_out) == sorted(distinct)
    assert outcome.ingested.duplicates_dropped == len(rows) - len(distinct)
    assert not prompts_of(outcome.train) & prompts_of(outcome.held_out)
    assert outcome.train
    assert bool(outcome.held_out) == (eval_fraction > 0 and len(prompts_of(distinct)) > 1)


def prompts_of(lines: list[bytes] | set[bytes]) -> set[str]:
    return {json.loads(line)["prompt"] for line in lines}


@QUICK
@given(PAIRS.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(rows))), FRACTIONS, SEEDS)
def test_the_order_of_the_rows_does_not_matter(orders: tuple[list[object], list[object]], eval_fraction: float, seed: int) -> None:
    one, other = (upload(*rows, eval_fraction=eval_fraction, seed=seed) for rows in orders)
    assert sorted(one.held_out) == sorted(other.held_out)
    assert sorted(one.train) == sorted(other.train)


@QUICK
@given(st.lists(CONTENT, min_size=2, max_size=60, unique=True), FRACTIONS.filter(bool), SEEDS)
def test_distinct_prompts_are_held_out_to_the_row(contents: list[str], eval_fraction: float, seed: int) -> None:
    ingested = upload(*({"text": text} for text in contents), eval_fraction=eval_fraction, seed=seed).ingested
    assert ingested.eval is not None
    assert ingested.eval.rows == max(1, round(eval_fraction * len(contents)))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "type", "text", "prompt", "completion", "x"]), inner, max_size=4)
        | st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": inner})
    ),
    max_leaves=12,
)
TOKENS = [b'{"text":', b'"a"', b"}", b"\n", b"\r", b"[", b"\xff", b"NaN", b'"\\ud800"', b'"\\u0000"', b'"', b",", b"\xef\xbb\xbf"]
ANYTHING = st.one_of(
    st.binary(max_size=80),
    st.lists(st.sampled_from(TOKENS), max_size=12).map(b"".join),
    st.lists(JSON, max_size=3).map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode()),
    st.tuples(UPLOADS, st.binary(max_size=3), st.integers(0, 200)).map(
        lambda cut: jsonl(*cut[0])[: cut[2]] + cut[1] + jsonl(*cut[0])[cut[2] :]
    ),
)


@settings(QUICK, max_examples=200)
@given(ANYTHING, FRACTIONS, SEEDS)
def test_whatever_is_uploaded_is_either_taken_or_refused_politely(content: bytes, eval_fraction: float, seed: int) -> None:
    try:
        outcome = upload_bytes(content, eval_fraction=eval_fraction, seed=seed, limits=RowLimits(max_row_bytes=400, max_rows=10))
    except BadRow as refused:
        assert refused.line >= 1
        assert str(refused).isprintable()
        str(refused).encode()
    else:
        assert outcome.ingested.train.rows >= 1
