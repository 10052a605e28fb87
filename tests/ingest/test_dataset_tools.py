"""Rows with tools, calls and weights in OpenAI's form: what is accepted, how it is stored, what is rejected."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.ingestion import IngestedRows
from tests.attack import hostile_tools
from tests.ingest.dataset_harness import (
    CHOSEN_ANSWER,
    PREFERENCE,
    QUESTION,
    REJECTED_ANSWER,
    SYSTEM,
    InvalidRow,
    get_bytes_error,
    get_row_error,
    ingest_bytes,
    make_image_part,
    make_vision_row,
    parse_rows,
    read_bytes,
    store_rows,
    to_jsonl,
    upload,
)

QUICK_SETTINGS = settings(max_examples=30, deadline=None, database=None)

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ARGUMENTS = {"city": "Oslo", "days": 2}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
OTHER_CALL = {**CALL, "id": "call_2"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "-3 °C", "tool_call_id": "call_1"}
CONVERSATION = [SYSTEM, QUESTION, CALLING, RESULT, CHOSEN_ANSWER]
ROW: dict[str, Any] = {"messages": CONVERSATION, "tools": [TOOL]}


def change_call(**changes: Any) -> list[object]:
    """The conversation, whose call differs."""
    return [QUESTION, {**CALLING, "tool_calls": [{**CALL, **changes}]}, RESULT, CHOSEN_ANSWER]


def change_function(**changes: Any) -> list[object]:
    return change_call(function={**CALL["function"], **changes})  # type: ignore[dict-item]


def make_dataset(*rows: object) -> IngestedRows:
    return ingest_bytes(to_jsonl(rows)).rows


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"messages": [QUESTION, CALLING], "tools": [TOOL]},
        {"messages": [QUESTION, {**CALLING, "content": "Let me see."}]},
        {
            "messages": [
                QUESTION,
                {**CALLING, "tool_calls": [CALL, OTHER_CALL]},
                {**RESULT, "tool_call_id": "call_2"},
                RESULT,
                CHOSEN_ANSWER,
            ]
        },
        {"messages": [QUESTION, CALLING, {**RESULT, "name": "get_weather"}, CALLING, {**RESULT, "content": ""}, CHOSEN_ANSWER]},
        {"messages": [*CONVERSATION, QUESTION, CALLING, RESULT, REJECTED_ANSWER], "tools": [TOOL]},
        {"prompt": [QUESTION, CALLING, RESULT], "completion": [CHOSEN_ANSWER], "tools": [TOOL]},
        {"prompt": [QUESTION], "completion": [CALLING], "tools": [TOOL]},
        {"prompt": [QUESTION], "chosen": [CALLING], "rejected": [CHOSEN_ANSWER], "tools": [TOOL]},
        {"prompt": [QUESTION], "answer": "So.", "tools": [TOOL]},
        {"messages": [QUESTION, {**CHOSEN_ANSWER, "weight": 0}, QUESTION, CHOSEN_ANSWER]},
    ],
)
def test_row_with_tools_is_stored_unchanged(row: object) -> None:
    assert store_rows(row) == [row]


def test_labeled_rows_may_have_tools() -> None:
    rows = [{"prompt": [QUESTION], "completion": [CALLING], "label": label, "tools": [TOOL]} for label in (True, False)]
    assert store_rows(*rows) == rows


def test_arguments_are_stored_as_object_with_exact_numbers() -> None:
    row = (
        '{"messages":[{"role":"user","content":"Why?"},{"role":"assistant","content":"","tool_calls":[{"id":"1","type":"function",'
        '"function":{"name":"f","arguments":%s}}]}]}'
    )
    arguments = '{"n":1234567890123456789012345678901234567890,"x":0.10,"y":1E5,"deep":[{"null":null,"yes":true}]}'
    stored = (row % arguments).encode()
    assert read_bytes(stored) == [stored]
    assert read_bytes((row % json.dumps(arguments)).encode()) == [stored]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None, "function_call": None},
        {"role": "assistant", "content": [], "tool_calls": [CALL], "name": None, "weight": 1},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**CALL, "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}}],
        },
    ],
)
def test_forms_of_a_call_are_stored_alike(message: object) -> None:
    assert store_rows({"messages": [QUESTION, message, RESULT, CHOSEN_ANSWER]}) == [
        {"messages": [QUESTION, CALLING, RESULT, CHOSEN_ANSWER]}
    ]


@pytest.mark.parametrize("nothing", [None, []])
def test_empty_tools_are_no_tools(nothing: object) -> None:
    plain = {"messages": [QUESTION, CHOSEN_ANSWER]}
    assert store_rows({"tools": nothing, "messages": [QUESTION, {**CHOSEN_ANSWER, "tool_calls": nothing}]}) == [plain]
    assert not make_dataset({**plain, "tools": nothing}).has_tools


def test_developer_is_stored_as_system() -> None:
    assert store_rows({"messages": [{**SYSTEM, "role": "developer"}, QUESTION, CHOSEN_ANSWER]}) == [
        {"messages": [SYSTEM, QUESTION, CHOSEN_ANSWER]}
    ]


@pytest.mark.parametrize("weight", [1, 1.0, None])
def test_weight_of_one_is_the_same_as_none(weight: object) -> None:
    plain = {"messages": [QUESTION, CHOSEN_ANSWER]}
    assert store_rows({"messages": [QUESTION, {**CHOSEN_ANSWER, "weight": weight}]}) == [plain]
    assert upload(plain, {"messages": [QUESTION, {**CHOSEN_ANSWER, "weight": weight}]})[0].duplicates_dropped == 1


def test_unknown_details_of_a_tool_are_kept() -> None:
    function = {"name": "f", "parameters": {}, "return": {"type": "number"}, "response": {"type": "string"}, "strict": True}
    row = {"messages": [QUESTION, CHOSEN_ANSWER], "tools": [{"type": "function", "function": function}]}
    assert store_rows(row) == [row]


def test_rows_with_and_without_tools_may_be_mixed() -> None:
    dataset = make_dataset({"messages": [QUESTION, CHOSEN_ANSWER]}, ROW)
    assert (dataset.has_tools, dataset.has_weights, dataset.prompt_form) == (True, False, "messages")


@pytest.mark.parametrize(
    ("row", "prompt_form", "has_tools", "has_weights"),
    [
        ({"text": "a"}, "strings", False, False),
        ({"prompt": "a", "completion": "b"}, "strings", False, False),
        (PREFERENCE, "strings", False, False),
        ({"prompt": "a"}, "strings", False, False),
        ({"prompt": [QUESTION]}, "messages", False, False),
        ({"prompt": [QUESTION], "tools": [TOOL]}, "messages", True, False),
        ({"prompt": [QUESTION], "chosen": [CHOSEN_ANSWER], "rejected": [CALLING]}, "messages", True, False),
        ({"messages": [QUESTION, {**CHOSEN_ANSWER, "weight": 0}, QUESTION, CHOSEN_ANSWER]}, "messages", False, True),
    ],
)
def test_dataset_records_form_tools_and_weights(row: object, prompt_form: str, has_tools: bool, has_weights: bool) -> None:
    dataset = make_dataset(row)
    assert (dataset.prompt_form, dataset.has_tools, dataset.has_weights) == (prompt_form, has_tools, has_weights)


# --- what is held out ------------------------------------------------------------------------------------------------


def read_prompt_digests(*rows: object) -> list[bytes]:
    return [row.prompt_digest for row in parse_rows(to_jsonl(rows))]


def test_tools_belong_to_the_prompt() -> None:
    plain = {"messages": [QUESTION, CHOSEN_ANSWER]}
    other = {"messages": [QUESTION, REJECTED_ANSWER], "tools": [TOOL]}
    without, with_tools, again = read_prompt_digests(plain, {**plain, "tools": [TOOL]}, other)
    assert without != with_tools == again


def test_numbers_in_calls_of_the_prompt_are_part_of_it() -> None:
    first, second, third = (
        {"prompt": [QUESTION, *change_function(arguments={"n": n})[1:3]], "completion": [answer]}
        for n, answer in ((10**39, CHOSEN_ANSWER), (10**39, REJECTED_ANSWER), (10**39 - 1, CHOSEN_ANSWER))
    )
    digests = read_prompt_digests(first, second, third)
    assert digests[0] == digests[1] != digests[2]


def test_weights_do_not_change_the_prompt() -> None:
    turns = [QUESTION, REJECTED_ANSWER, QUESTION, CHOSEN_ANSWER]
    weighted = [QUESTION, {**REJECTED_ANSWER, "weight": 0}, QUESTION, CHOSEN_ANSWER]
    first, second = read_prompt_digests({"messages": turns}, {"messages": weighted})
    assert first == second


# --- what is rejected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "field", "reason"),
    [
        ([QUESTION, RESULT, CHOSEN_ANSWER], "messages[1].role", "is 'tool'; it must be 'assistant': after one optional system"),
        ([QUESTION, CALLING, QUESTION, CHOSEN_ANSWER], "messages[2].role", "must be 'tool': the call 'call_1' without an answer"),
        ([QUESTION, CALLING, CHOSEN_ANSWER], "messages[2].role", "is 'assistant'; it must be 'tool'"),
        ([QUESTION, CALLING, RESULT, QUESTION, CHOSEN_ANSWER], "messages[3].role", "is 'user'; it must be 'assistant'"),
        ([QUESTION, CALLING, RESULT], "messages[2].role", "the last message must be from 'assistant'"),
        ([QUESTION, CHOSEN_ANSWER, RESULT], "messages[2].role", "is 'tool'; it must be 'user'"),
        (
            [QUESTION, {**CALLING, "tool_calls": [CALL, OTHER_CALL]}, RESULT, CHOSEN_ANSWER],
            "messages[3].role",
            "the call 'call_2' without an answer",
        ),
        (
            [QUESTION, {**CALLING, "tool_calls": [CALL, OTHER_CALL]}, RESULT, RESULT, CHOSEN_ANSWER],
            "messages[3].tool_call_id",
            "is 'call_1', which an earlier tool message answers",
        ),
        (
            [QUESTION, CALLING, {**RESULT, "tool_call_id": "x"}, CHOSEN_ANSWER],
            "messages[2].tool_call_id",
            "is 'x'; the assistant message before has the call 'call_1'",
        ),
        ([QUESTION, CALLING, {**RESULT, "name": "f"}, CHOSEN_ANSWER], "messages[2].name", "is 'f', but 'call_1' calls 'get_weather'"),
        ([QUESTION, CALLING, {"role": "tool", "content": "x"}, CHOSEN_ANSWER], "messages[2].tool_call_id", "is missing"),
        ([QUESTION, CALLING, {**RESULT, "tool_call_id": 7}, CHOSEN_ANSWER], "messages[2].tool_call_id", "is a number"),
        ([QUESTION, CALLING, {**RESULT, "tool_call_id": "x" * 257}, CHOSEN_ANSWER], "messages[2].tool_call_id", "has 257 characters"),
        ([QUESTION, CALLING, {**RESULT, "content": {"c": -3}}, CHOSEN_ANSWER], "messages[2].content", "is an object; it must be a string"),
        ([QUESTION, CALLING, {**RESULT, "weight": 0}, CHOSEN_ANSWER], "messages[2].'weight'", "it is for assistant messages"),
        ([{**QUESTION, "tool_calls": [CALL]}, CHOSEN_ANSWER], "messages[0].'tool_calls'", "they are for assistant messages"),
        ([{**QUESTION, "name": "Ann"}, CHOSEN_ANSWER], "messages[0].'name'", "a chat template has no place for it"),
        ([QUESTION, {**CHOSEN_ANSWER, "function_call": {}}], "messages[1].'function_call'", "write tool_calls"),
        ([QUESTION, {**CHOSEN_ANSWER, "tool_calls": {}}], "messages[1].tool_calls", "is an object; it must be a list of calls"),
        ([QUESTION, {**CALLING, "tool_calls": [CALL] * 129}], "messages[1].tool_calls", "has 129 calls; at most 128"),
        ([QUESTION, {**CALLING, "tool_calls": [CALL, CALL]}], "messages[1].tool_calls[1].id", "another call of this message has"),
        ([QUESTION, {**CALLING, "tool_calls": ["x"]}], "messages[1].tool_calls[0]", "is a string, not an object"),
        ([QUESTION, {**CALLING, "tool_calls": [{"name": "f", "arguments": {}}]}], "messages[1].tool_calls[0].id", "is missing"),
        ([QUESTION, {"role": "assistant", "tool_calls": []}], "messages[1].content", "is missing"),
        ([QUESTION, {**CHOSEN_ANSWER, "content": None, "tool_calls": []}], "messages[1].content", "is null"),
        (change_call(type="custom"), "messages[1].tool_calls[0].type", "is 'custom'; only 'function' is supported"),
        (change_call(index=0), "messages[1].tool_calls[0].'index'", "would not be used"),
        (change_call(id=""), "messages[1].tool_calls[0].id", "is empty"),
        (change_call(function="f"), "messages[1].tool_calls[0].function", "is a string, not an object"),
        (change_function(name="a b"), "messages[1].tool_calls[0].function.name", "is 'a b'; a function's name has 1 to 64 letters"),
        (change_function(arguments=None), "messages[1].tool_calls[0].function.arguments", "is null, not an object"),
        (change_function(arguments="[1]"), "messages[1].tool_calls[0].function.arguments", "is a list, not an object"),
        (change_function(arguments="{'a': 1}"), "messages[1].tool_calls[0].function.arguments", "is not JSON at character 2"),
        (change_function(arguments='{"a": 1, "a": 2}'), "messages[1].tool_calls[0].function.arguments", "'a' appears twice"),
        (change_function(arguments='{"a": NaN}'), "messages[1].tool_calls[0].function.arguments", "NaN is not JSON"),
        (change_function(arguments={"a": 10**40}), "messages[1].tool_calls[0].function.arguments.'a'", "a number of 41 characters"),
        (change_function(arguments='{"a": [1e999]}'), "messages[1].tool_calls[0].function.arguments.'a'[0]", "too large for a number"),
        (change_function(arguments={"a": "\ud800"}), "messages[1].tool_calls[0].function.arguments.'a'", "an unpaired surrogate"),
        (change_function(arguments={"a\0": 1}), "messages[1].tool_calls[0].function.arguments.'a\\x00'", "NUL"),
        ([QUESTION, {**CHOSEN_ANSWER, "weight": 0.5}], "messages[1].weight", "is 0.5; it must be 0"),
        ([QUESTION, {**CHOSEN_ANSWER, "weight": 2}], "messages[1].weight", "is 2; it must be 0"),
        ([QUESTION, {**CHOSEN_ANSWER, "weight": True}], "messages[1].weight", "is true or false; it must be 0"),
        ([{**QUESTION, "weight": 1}, CHOSEN_ANSWER], "messages[0].'weight'", "it is for assistant messages"),
        ([QUESTION, {**CHOSEN_ANSWER, "weight": 0}], "messages", "has weight 0 on every assistant message"),
    ],
)
def test_invalid_call_or_weight_is_rejected_with_its_place(messages: object, field: str, reason: str) -> None:
    error = get_row_error({"messages": [QUESTION, CHOSEN_ANSWER]}, {"messages": messages})
    assert (error.line, error.field) == (2, field)
    assert reason in error.reason


@pytest.mark.parametrize(
    ("tools", "field", "reason"),
    [
        ("a hammer", "tools", "it must be JSON text of a list of tools"),
        ({"type": "function"}, "tools", "is an object; it must be a list of tools"),
        ([TOOL, TOOL], "tools[1].function.name", "is 'get_weather', which an earlier tool has"),
        ([TOOL] * 129, "tools", "has 129 tools; at most 128"),
        ([TOOL["function"]], "tools[0].type", "is missing"),
        (["get_weather"], "tools[0]", "is a string, not an object"),
        ([{"type": "code_interpreter", "function": {}}], "tools[0].type", "is 'code_interpreter'; only 'function' is supported"),
        ([{"type": "function", "function": {}}], "tools[0].function.name", "is missing"),
        ([{"type": "function", "function": {"name": "x" * 65}}], "tools[0].function.name", "1 to 64 letters"),
        ([{"type": "function", "function": {"name": "f", "url": "x"}}], "tools[0].function.'url'", "would not be used"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": "{}"}}],
            "tools[0].function.parameters",
            "is a string, not an object",
        ),
        ([{"type": "function", "function": {"name": "f", "description": 1}}], "tools[0].function.description", "is a number"),
        ([{"type": "function", "function": {"name": "f", "strict": "yes"}}], "tools[0].function.strict", "is a string"),
        (
            [{"type": "function", "function": {"name": "f"}}],
            "messages[2].tool_calls[0].function.name",
            "is 'get_weather'; the row's tools are 'f'",
        ),
    ],
)
def test_invalid_tool_is_rejected_with_its_place(tools: object, field: str, reason: str) -> None:
    error = get_row_error({**ROW, "tools": tools})
    assert error.field == field
    assert reason in error.reason


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"text": "a", "tools": [TOOL]}, "'tools'", "a text row has only text"),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "tools", "tools need messages"),
        ({**PREFERENCE, "tools": [TOOL]}, "tools", "tools need messages"),
        ({"prompt": "a", "tools": [TOOL]}, "tools", "tools need messages"),
        ({"prompt": "a", "tools": "a hammer"}, "tools", "it must be a list of tools"),
        ({"prompt": [QUESTION, CALLING], "completion": [CHOSEN_ANSWER]}, "prompt[1].role", "must be from 'user' or 'tool'"),
        ({"prompt": [QUESTION], "completion": [CALLING, RESULT, CHOSEN_ANSWER]}, "completion", "has 3 messages; it must have one"),
        (
            {"prompt": [QUESTION], "completion": [{**CHOSEN_ANSWER, "weight": 1}]},
            "completion[0].weight",
            "weights are for rows of messages",
        ),
        (
            {"prompt": [QUESTION], "chosen": [CHOSEN_ANSWER], "rejected": [{**CALLING, "weight": 0}]},
            "rejected[0].weight",
            "would not be used",
        ),
        (
            {"prompt": [QUESTION, {**CALLING, "tool_calls": [CALL, OTHER_CALL]}, RESULT]},
            "prompt",
            "ends with the call 'call_2' without an answer",
        ),
        ({**make_vision_row(make_image_part()), "tools": [TOOL]}, "", "has images and tools"),
        ({"messages": [{"role": "user", "content": [make_image_part()]}, CALLING]}, "", "has images and tools"),
    ],
)
def test_row_that_cannot_have_tools_is_rejected(row: object, field: str, reason: str) -> None:
    error = get_row_error(row)
    assert error.field == field
    assert reason in error.reason


def test_images_and_tools_in_different_rows_are_rejected() -> None:
    error = get_row_error(ROW, make_vision_row(make_image_part()))
    assert (error.line, error.reason) == (2, "line 2 has images and line 1 has tools; a dataset may have one or the other")


@pytest.mark.parametrize("depth", [64, 1_000, 100_000])
def test_deep_arguments_are_rejected_in_each_form(depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    row = json.dumps({"messages": change_function(arguments="HERE")})
    if depth <= 64:
        assert len(read_bytes(row.replace('"HERE"', deep).encode())) == 1
        deep = f'{{"a":{deep}}}'
    for arguments in (deep, json.dumps(deep)):
        error = get_bytes_error(row.replace('"HERE"', arguments).encode())
        assert "nested too deeply" in error.reason
        assert len(error.field) < 250


@pytest.mark.parametrize(("name", "row"), list(hostile_tools.make_rows()), ids=lambda value: value if isinstance(value, str) else "")
def test_hostile_row_is_rejected(name: str, row: bytes) -> None:
    error = get_bytes_error(row)
    assert len(str(error)) < 1000, name
    assert len(read_bytes(hostile_tools.make_valid_row())) == 1


# --- what holds for every upload -------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
WORDS = TEXT.filter(lambda text: bool(text.strip()))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**38), 10**39) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXT, JSON_VALUES, max_size=3)
NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch=True)


@st.composite
def tool_rows(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    functions = [{"name": name, "description": draw(TEXT), "parameters": draw(OBJECTS)} for name in names]
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(WORDS)})
        for _ in range(draw(st.integers(0, 2))):
            ids = draw(st.lists(WORDS, min_size=1, max_size=3, unique=True))
            calls = [
                {"id": call_id, "type": "function", "function": {"name": draw(st.sampled_from(names)), "arguments": draw(OBJECTS)}}
                for call_id in ids
            ]
            messages.append({"role": "assistant", "content": draw(TEXT), "tool_calls": calls})
            messages += [{"role": "tool", "content": draw(TEXT), "tool_call_id": call_id} for call_id in draw(st.permutations(ids))]
        answer = {"role": "assistant", "content": draw(WORDS)}
        messages.append(answer | ({"weight": 0} if draw(st.booleans()) else {}))
    messages[-1].pop("weight", None)
    return {"messages": messages, "tools": [{"type": "function", "function": function} for function in functions]}


@QUICK_SETTINGS
@given(st.lists(tool_rows(), min_size=1, max_size=3))
def test_valid_rows_are_accepted_unchanged_and_again(rows: list[dict[str, Any]]) -> None:
    once = read_bytes(to_jsonl(rows))
    assert [json.loads(line) for line in once] == rows
    assert read_bytes(b"\n".join(once)) == once


@QUICK_SETTINGS
@given(tool_rows())
def test_arguments_as_string_equal_arguments_as_object(row: dict[str, Any]) -> None:
    as_strings = json.loads(json.dumps(row))
    for message in as_strings["messages"]:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    assert store_rows(as_strings) == [row]


ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
KEYS = ["role", "content", "tool_calls", "tool_call_id", "name", "weight", "id", "type", "function", "arguments", "parameters", "tools"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["function", "call_1", "{}", '{"a":', "\ud800", "\0", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
        | st.fixed_dictionaries({"role": ROLES, "content": inner}, optional={"tool_calls": inner, "tool_call_id": inner, "weight": inner})
        | st.fixed_dictionaries({"id": inner, "type": st.just("function"), "function": inner})
        | st.fixed_dictionaries({"name": inner, "arguments": inner})
    ),
    max_leaves=12,
)


@settings(QUICK_SETTINGS, max_examples=80)
@given(tool_rows(), ANYTHING, st.data())
def test_any_change_is_accepted_or_rejected_cleanly(row: dict[str, Any], value: object, data: st.DataObject) -> None:
    target: Any = row
    while isinstance(target, dict | list) and target:
        place = data.draw(st.sampled_from(list(target) if isinstance(target, dict) else list(range(len(target)))))
        if not isinstance(target[place], dict | list) or data.draw(st.booleans()):
            target[place] = value
            break
        target = target[place]
    try:
        read_bytes(to_jsonl([row]))
    except InvalidRow as error:
        assert error.line == 1
        assert str(error).isprintable()
        str(error).encode()
