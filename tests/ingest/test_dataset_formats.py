"""Preferences and prompts for graders: what is accepted, how it is stored, what is rejected. The property tests include images."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ingest.rows.forms import MAX_COLUMNS
from schema.ingestion import IngestLimits
from tests.ingest.dataset_harness import (
    CHOSEN_ANSWER,
    LABELED_ROWS,
    PREFERENCE,
    QUESTION,
    REJECTED_ANSWER,
    SYSTEM,
    InvalidRow,
    get_bytes_error,
    get_row_error,
    ingest_bytes,
    make_data_uri,
    make_image_bytes,
    make_image_part,
    make_vision_row,
    read_bytes,
    store_rows,
    to_jsonl,
    upload,
)

QUICK_SETTINGS = settings(max_examples=60, deadline=None, database=None)


# --- preferences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        PREFERENCE,
        {"prompt": [QUESTION], "chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]},
        {"prompt": [SYSTEM, QUESTION, REJECTED_ANSWER, QUESTION], "chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]},
    ],
)
def test_preference_row_is_stored_unchanged(row: object) -> None:
    ingested, train, _ = upload(row)
    assert (ingested.dataset_type, train) == ("preference", [row])


def test_preference_conversations_are_split_into_shared_prompt() -> None:
    prompt = [SYSTEM, QUESTION, REJECTED_ANSWER, QUESTION]
    explicit = {"prompt": prompt, "chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]}
    implicit = {"chosen": [*prompt, CHOSEN_ANSWER], "rejected": [*prompt, REJECTED_ANSWER]}
    assert store_rows(implicit, {"prompt": prompt, **implicit}, explicit) == [explicit] * 3


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"chosen": "So.", "rejected": "Dunno."}, "prompt", "send chosen and rejected as whole conversations"),
        ({"prompt": "Why?", "chosen": "So."}, "rejected", "a preference row has the columns prompt, chosen and rejected"),
        ({"prompt": "Why?", "rejected": "So."}, "chosen", "is missing"),
        ({**PREFERENCE, "completion": [7]}, "'completion'", "would not be used: a preference row has only"),
        ({**PREFERENCE, "rejected": "So."}, "rejected", "the same as chosen"),
        ({**PREFERENCE, "chosen": 4}, "chosen", "is a number; it must be a string or a list of messages"),
        (
            {**PREFERENCE, "chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]},
            "chosen",
            "prompt is a string; prompt, chosen and rejected must all be strings",
        ),
        ({"prompt": [QUESTION], "chosen": [CHOSEN_ANSWER], "rejected": [CHOSEN_ANSWER]}, "rejected", "the same as chosen"),
        (
            {"prompt": [QUESTION, REJECTED_ANSWER], "chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]},
            "prompt[1].role",
            "must be from 'user'",
        ),
        ({"prompt": [QUESTION], "chosen": [QUESTION], "rejected": [REJECTED_ANSWER]}, "chosen[0].role", "it must be 'assistant'"),
        (
            {"prompt": [QUESTION], "chosen": [CHOSEN_ANSWER], "rejected": [SYSTEM, QUESTION, REJECTED_ANSWER]},
            "rejected",
            "the messages before it are not the prompt",
        ),
        ({"chosen": [QUESTION, CHOSEN_ANSWER], "rejected": [QUESTION, CHOSEN_ANSWER]}, "rejected", "the same as chosen"),
        (
            {"chosen": [QUESTION, CHOSEN_ANSWER], "rejected": [QUESTION, CHOSEN_ANSWER, QUESTION, REJECTED_ANSWER]},
            "rejected",
            "differs from chosen before its last",
        ),
        (
            {"chosen": [QUESTION, CHOSEN_ANSWER], "rejected": [SYSTEM, QUESTION, REJECTED_ANSWER]},
            "rejected",
            "only the last answers may differ",
        ),
        ({"chosen": [CHOSEN_ANSWER], "rejected": [REJECTED_ANSWER]}, "chosen[0].role", "it must be 'user'"),
        ({"chosen": [QUESTION, CHOSEN_ANSWER], "rejected": [QUESTION]}, "rejected[0].role", "must be from 'assistant'"),
    ],
)
def test_invalid_preference_is_rejected(row: object, field: str, reason: str) -> None:
    error = get_row_error(row)
    assert error.field == field
    assert reason in error.reason


# --- labeled answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [LABELED_ROWS, [{"prompt": [QUESTION], "completion": [CHOSEN_ANSWER], "label": label} for label in (True, False)]]
)
def test_labeled_rows_are_stored_unchanged(rows: list[object]) -> None:
    ingested, train, _ = upload(*rows)
    assert (ingested.dataset_type, train) == ("unpaired_preference", rows)


@pytest.mark.parametrize(("label", "kind"), [(2, "a number"), ("often", "a string"), ([True], "a list"), (None, "null")])
def test_label_must_be_boolean(label: object, kind: str) -> None:
    error = get_row_error({**LABELED_ROWS[0], "label": label})
    assert (error.field, error.reason) == ("label", f"is {kind}; write true for a good completion, false for a bad one")


def test_identical_labels_are_rejected_with_counts() -> None:
    error = get_row_error(*[LABELED_ROWS[1]] * 3)
    assert error.field == "label"
    assert "0 rows are true and 3 are false" in error.reason


def test_label_requires_prompt() -> None:
    assert get_row_error({"completion": "So.", "label": True}).field == "prompt"


# --- prompts for graders ---------------------------------------------------------------------------------------------


def test_prompt_columns_keep_exact_numbers() -> None:
    row = '{"prompt":"2 + 2 =","answer":4,"big":1234567890123456789012345678901234567890,"easy":true,"share":0.10,"why":""}'
    assert read_bytes(row.encode()) == [row.encode()]
    ingested, _, _ = upload(json.loads(row))
    assert (ingested.dataset_type, ingested.columns) == ("prompt", ("answer", "big", "easy", "share", "why"))


def test_prompt_messages_need_no_other_column() -> None:
    ingested, train, _ = upload({"prompt": [SYSTEM, QUESTION]})
    assert (ingested.dataset_type, ingested.columns, train) == ("prompt", (), [{"prompt": [SYSTEM, QUESTION]}])


def test_column_order_does_not_matter() -> None:
    ingested, _, _ = upload({"prompt": "a", "x": 1, "y": 2}, {"y": 2, "x": 1, "prompt": "a"})
    assert ingested.duplicates_dropped == 1


@pytest.mark.parametrize(
    ("columns", "field", "reason"),
    [
        ({"complation": "So."}, "complation", "is close to 'completion'"),
        ({"Chosen": "So."}, "Chosen", "is close to 'chosen'"),
        ({"labels": "So."}, "labels", "is close to 'label'"),
        ({"reject": "So."}, "reject", "is close to 'rejected'"),
        ({"the answer": "So."}, "'the answer'", "is not a valid column name"),
        ({"x" * 65: "So."}, "'" + "x" * 40 + "...'", "is not a valid column name"),
        ({"answer\n": "So."}, "'answer\\n'", "is not a valid column name"),
        ({"answer": None}, "answer", "is null"),
        ({"answer": ["So."]}, "answer", "is a list; a column beside a prompt is a string, a number, true or false"),
        ({"answer": "\0"}, "answer", "NUL"),
        ({"answer": 10**40}, "answer", "a number of 41 characters"),
        ({f"c{n}": 1 for n in range(MAX_COLUMNS + 1)}, "", "has 33 columns beside the prompt; at most 32"),
        ({"prompt": 4}, "prompt", "is a number"),
        ({"prompt": [QUESTION, CHOSEN_ANSWER]}, "prompt[1].role", "must be from 'user'"),
    ],
)
def test_unreadable_grader_column_is_rejected(columns: dict[str, object], field: str, reason: str) -> None:
    error = get_row_error({"prompt": "Why?"} | columns)
    assert error.field == field
    assert reason in error.reason


def test_number_beyond_float_range_is_rejected() -> None:
    error = get_bytes_error(b'{"prompt": "a", "n": 1e999}')
    assert (error.field, error.reason) == ("n", "is 1e999, which is too large for a number; write it as a string")


def test_label_column_is_allowed_with_prompt() -> None:
    assert upload({"prompt": "Good or bad?", "label": "good"})[0].dataset_type == "prompt"


@pytest.mark.parametrize(
    "other", [{"prompt": "b"}, {"prompt": "b", "answer": "4"}, {"prompt": "b", "answer": 4, "more": 1}, {"prompt": [QUESTION], "answer": 4}]
)
def test_prompt_rows_must_share_columns_and_types(other: object) -> None:
    error = get_row_error({"prompt": "a", "answer": 4}, other)
    assert error.line == 2
    assert "line 1 is prompt with strings and answer (a number)" in error.reason


@pytest.mark.parametrize(
    "make",
    [
        lambda prompt, n: {"prompt": prompt, "chosen": f"good {n}", "rejected": "bad"},
        lambda prompt, n: {"prompt": prompt, "completion": f"{n}", "label": bool(n % 2)},
        lambda prompt, n: {"prompt": prompt, "answer": n},
    ],
    ids=["preference", "unpaired", "prompt"],
)
def test_rows_with_same_prompt_stay_in_one_split(make: Any) -> None:
    _, train, held_out = upload(*(make(prompt, n) for n in range(4) for prompt in "abcdefgh"), eval_fraction=0.3)
    assert len(held_out) == 8  # two prompts of four rows; nine or ten would split the rows of one prompt
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


# --- what holds for every upload -------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda text: text.strip()
)
NUMBERS = st.integers(-(10**38), 10**39) | st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.from_regex(r"[xyz_][A-Za-z0-9_]{0,3}", fullmatch=True)  # not similar to a column of another format
IMAGE_PARTS = st.builds(
    lambda file_format, size, color: make_image_part(make_image_bytes(file_format, size, color=color), f"image/{file_format.lower()}"),
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["red", "green", "blue"]),
)


@st.composite
def prompts(draw: st.DrawFn) -> list[dict[str, str]]:
    turns = draw(st.lists(st.tuples(WORDS, WORDS), max_size=2))
    messages = [(role, text) for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": text} for role, text in [*messages, ("user", draw(WORDS))]]


def make_answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


PAIRS = st.lists(WORDS, min_size=2, max_size=2, unique=True)
PREFERENCES = st.one_of(
    st.lists(st.builds(lambda p, pair: {"prompt": p, "chosen": pair[0], "rejected": pair[1]}, WORDS, PAIRS), min_size=1, max_size=4),
    st.lists(
        st.builds(lambda p, pair: {"prompt": p, "chosen": make_answer(pair[0]), "rejected": make_answer(pair[1])}, prompts(), PAIRS),
        min_size=1,
        max_size=4,
    ),
)
UNPAIRED = st.lists(st.tuples(prompts(), WORDS), min_size=2, max_size=5).map(
    lambda rows: [{"prompt": p, "completion": make_answer(c), "label": n % 2 == 0} for n, (p, c) in enumerate(rows)]
)


@st.composite
def graded_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    kinds = draw(st.dictionaries(NAMES, st.sampled_from([WORDS, NUMBERS, st.booleans()]), max_size=3))
    row: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({"prompt": WORDS, **kinds})
    return draw(st.lists(row, min_size=1, max_size=4))


@st.composite
def vision_rows(draw: st.DrawFn) -> dict[str, object]:
    parts = draw(st.lists(IMAGE_PARTS | WORDS.map(lambda text: {"type": "text", "text": text}), max_size=3))
    return make_vision_row(draw(IMAGE_PARTS), *parts)


VALID_ROWS = st.one_of(PREFERENCES, UNPAIRED, graded_rows(), st.lists(vision_rows(), min_size=1, max_size=3))


@QUICK_SETTINGS
@given(VALID_ROWS, st.booleans())
def test_valid_rows_are_accepted_unchanged(rows: list[object], escaped: bool) -> None:
    content = b"".join(json.dumps(row, ensure_ascii=escaped).encode() + b"\n" for row in rows)
    assert [json.loads(line) for line in read_bytes(content)] == rows


@QUICK_SETTINGS
@given(VALID_ROWS)
def test_storing_is_idempotent(rows: list[object]) -> None:
    once = read_bytes(to_jsonl(rows))
    assert read_bytes(b"\n".join(once)) == once


@QUICK_SETTINGS
@given(prompts(), PAIRS)
def test_implicit_prompt_equals_explicit_prompt(prompt: list[dict[str, str]], pair: list[str]) -> None:
    chosen, rejected = (make_answer(text) for text in pair)
    explicit = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert store_rows({"chosen": prompt + chosen, "rejected": prompt + rejected}) == [explicit]


COLUMNS = ["prompt", "completion", "chosen", "rejected", "label", "messages", "role", "content", "type", "image", "image_url", "url", "x"]
EDGE_CASE_STRINGS = st.sampled_from(
    ["user", "assistant", "image", "image_url", "text", "data:image/png;base64,", make_data_uri(), make_data_uri()[:-9], "\ud800", "\0"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | EDGE_CASE_STRINGS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=4)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": inner})
        | st.fixed_dictionaries({"type": st.sampled_from(["image", "image_url", "input_image"]), "image_url": inner})
        | st.fixed_dictionaries({"prompt": inner, "chosen": inner, "rejected": inner})
        | st.fixed_dictionaries({"prompt": inner, "completion": inner, "label": inner})
    ),
    max_leaves=10,
)


@settings(QUICK_SETTINGS, max_examples=200)
@given(st.lists(JSON, max_size=3), st.integers(0, 300), st.binary(max_size=2))
def test_any_upload_is_accepted_or_rejected_cleanly(rows: list[object], position: int, noise: bytes) -> None:
    content = to_jsonl(rows)
    try:
        ingest_bytes(content[:position] + noise + content[position:], limits=IngestLimits(max_row_bytes=300, max_image_row_bytes=600))
    except InvalidRow as error:
        assert error.line >= 1
        assert str(error).isprintable()
        str(error).encode()


@QUICK_SETTINGS
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6))
def test_corrupt_image_is_accepted_or_rejected_cleanly(file_format: str, damage: list[tuple[int, int]]) -> None:
    content = bytearray(make_image_bytes(file_format))
    for position, byte in damage:
        content[position % len(content)] = byte
    try:
        read_bytes(to_jsonl([make_vision_row(make_image_part(bytes(content), f"image/{file_format.lower()}"))]))
    except InvalidRow as error:
        assert error.field.startswith("messages[0].content[0]")
        assert str(error).isprintable()
