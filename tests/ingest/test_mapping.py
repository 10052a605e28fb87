"""What is refused or asked about, how rows are described in the words of their file, and mappings that a request brings."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.ingest.mapping import RowMapper, choose_mapper
from jobs.ingest.records import InvalidInput
from jobs.ingest.rows.forms import check_row
from jobs.ingest.rows.row import make_row
from jobs.ingest.rows.values import InvalidValue
from schema.ingestion import Detected, IngestOptions, InputProblem, RowMapping
from tests.ingest.dataset_harness import get_bytes_error, ingest_bytes, to_jsonl
from tests.ingest.test_mapping_shapes import FROM, Q, convert, recognize, to_records

QUICK_SETTINGS = settings(max_examples=60, deadline=None, database=None)


def parse_mapping(**fields: object) -> RowMapping:
    return RowMapping.model_validate_json(json.dumps(fields))


def map_rows(rows: Iterable[object], **fields: object) -> RowMapper:
    return choose_mapper(to_records(*rows), IngestOptions(mapping=parse_mapping(**fields)))


def map_row(row: object, **fields: object) -> Any:
    return convert(map_rows([row], **fields), row)


def get_problem(*rows: object, **fields: object) -> InputProblem:
    with pytest.raises(InvalidInput) as excinfo:
        map_rows(rows, **fields) if fields else recognize(*rows)
    return excinfo.value.problem


def get_field_and_reason(mapper: RowMapper, row: object) -> tuple[str, str]:
    with pytest.raises(InvalidValue) as excinfo:
        make_row(check_row(mapper.convert(to_records(row)[0])))
    return mapper.describe_field(excinfo.value.field), excinfo.value.reason


def extract_mappings(text: str) -> list[dict[str, Any]]:
    """The mappings that a message shows."""
    found, decoder = [], json.JSONDecoder()
    while (start := text.find("{")) >= 0:
        mapping, end = decoder.raw_decode(text[start:])
        found.append(mapping)
        text = text[start + end :]
    return found


# --- what is not guessed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "a", "answer": "b", "response": "c"}, "question, answer and response"),
        ({"question": "a", "query": "b", "answer": "c"}, "question, query and answer"),
        ({"question": "a", "answer": "b", "text": "c"}, "question, answer and text"),
        ({"messages": FROM, "conversation": [Q, {"role": "assistant", "content": "other"}]}, "messages and conversation"),
        ({"prompt": "a", "answer": "b", "question": "c", "response": "d"}, "prompt, answer, question and response"),
        ({"dialog": FROM, "chat": [{**turn, "value": "c"} for turn in FROM]}, "dialog and chat"),
        ({"content": "a", "body": "b"}, "content and body"),
        ({"text": "a", "label": "b"}, "text and label"),
        ({"document": "a", "summary": "b"}, "document and summary"),
        ({"question": "a", "answer": "b", "chosen": "c", "rejected": "d"}, "question, answer, chosen and rejected"),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "instruction, input and context"),
        ({"question": "a", "answer": "b", "liked": "yes", "label": 1}, "question, answer, liked and label"),
        (
            {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0, "safer_response_id": 1},
            "response_0, response_1, better_response_id and safer_response_id",
        ),
    ],
)
def test_file_with_two_meanings_is_refused_with_mappings_that_work(row: dict[str, Any], columns: str) -> None:
    problem = get_problem(row)
    assert problem.message == f"The columns {columns} can be read in more than one way"
    assert problem.param == "mapping"
    examples = extract_mappings(problem.hint)
    assert len(examples) >= 2
    for example in examples:
        check_row(map_rows([row], **example).convert(to_records(row)[0]))


def test_unknown_columns_are_named_with_a_mapping_for_this_file() -> None:
    problem = get_problem({"Kunde sagt": "a", "wir sagen": "b", "n": [1]})
    assert problem.message == "The file has the columns Kunde sagt, wir sagen and n, which are in no known form"
    assert 'a mapping such as {"prompt": "Kunde sagt", "completion": "wir sagen"}' in problem.hint
    assert "native, openai, sharegpt, alpaca, question_answer, dpo_pair, kto and text" in problem.hint
    assert map_row({"Kunde sagt": "a", "wir sagen": "b"}, **extract_mappings(problem.hint)[0]) == {"prompt": "a", "completion": "b"}


def test_only_the_first_unknown_columns_are_listed() -> None:
    problem = get_problem({f"c{n}": "x" for n in range(100)})
    assert "c19 and 80 more" in problem.message
    assert len(problem.message) < 300


def test_example_for_unknown_columns_has_those_with_most_text() -> None:
    row = {"n": "7", "wir sagen": "a long text", "lang": "de", "Kunde sagt": "another long text"}
    assert extract_mappings(get_problem(row, row).hint)[0] == {"prompt": "wir sagen", "completion": "Kunde sagt"}


def test_one_unknown_column_may_be_text() -> None:
    assert '{"text": "zeile"}' in get_problem({"zeile": "x"}).hint


@pytest.mark.parametrize("name", ["image", "Images", "audio", "choices", "options", "role"])
def test_column_that_may_be_part_of_the_question_is_not_left_out(name: str) -> None:
    row = {"question": "a", "answer": "b", name: ["x"]}
    problem = get_problem(row)
    assert f"The column {name} would be left out" in problem.message
    assert map_row(row, **extract_mappings(problem.hint)[0]) == {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role", "known roles"),
        ({"messages": [{"role": "human", "content": "a"}], "id": 1}, "messages[0].role", "known roles"),
        ({"messages": [Q], "images": ["a.png"]}, "'images'", "put each image into its message"),
        ({"chosen": "a", "rejected": "b"}, "prompt", "is missing"),
        ({"completion": "a", "n": 1}, "prompt", "is missing"),
    ],
)
def test_rows_that_are_nearly_native_say_what_is_wrong(row: object, field: str, reason: str) -> None:
    error = get_bytes_error(to_jsonl([row]))
    assert (error.line, error.field) == (1, field)
    assert reason in error.reason


def test_native_rows_stay_native_beside_a_few_others() -> None:
    rows = [{"messages": [Q, {"role": "assistant", "content": "So."}]}] * 3 + [{"conversations": FROM}]
    error = get_bytes_error(to_jsonl(rows))
    assert (error.line, error.field) == (4, "")


def test_rows_that_are_all_empty_in_a_column_are_not_recognized_by_it() -> None:
    assert recognize({"text": "", "content": "a"}).mapping == parse_mapping(text="content")


# --- what is told ----------------------------------------------------------------------------------------------------


def test_reason_names_columns_and_what_they_become() -> None:
    assert recognize({"Frage": "a", "Antwort": "b"}).reason == "columns Frage and Antwort -> prompt and completion"
    assert recognize({"conversations": FROM}).reason == "column conversations -> messages"
    assert recognize({"text": "a"}).reason == "rows of text as they are"


def test_prompt_with_an_answer_says_how_to_learn_it() -> None:
    mapper = recognize({"prompt": "a", "answer": "b"})
    assert (mapper.dataset_type, mapper.mapping) == ("prompt", None)
    assert map_row({"prompt": "a", "answer": "b"}, **extract_mappings(mapper.reason)[0]) == {"prompt": "a", "completion": "b"}


def test_columns_that_occur_later_are_told_too() -> None:
    mapper = recognize({"question": "a", "answer": "b", "id": 1})
    mapper.convert({"question": "a", "answer": "b", "source": "x", "\ud800": "y"})
    assert mapper.unused_columns == ("id", "source", "'\\ud800'")


def test_keys_of_messages_that_are_left_out_are_told() -> None:
    mapper = recognize({"conversations": [{**FROM[0], "timestamp": 1}, FROM[1]]})
    mapper.convert({"conversations": [{**FROM[0], "timestamp": 1}, FROM[1]]})
    assert mapper.unused_columns == ("conversations[].timestamp",)


def test_name_that_is_no_unicode_is_told_escaped() -> None:
    for row in ({"question": "a", "answer": "b", "\ud800": 1}, {"prompt": "a", "completion": "b", "\udfff": 1}):
        detected = ingest_bytes(to_jsonl([row])).outcome.detected
        assert detected is not None
        assert Detected.model_validate_json(detected.model_dump_json()).unused_columns == (ascii(list(row)[2]),)
    assert "'\\ud800'" in get_problem({"\ud800": "a", "b": "c"}).message


def test_messages_as_python_prints_them_say_what_to_do() -> None:
    for messages in ([Q, {"role": "assistant", "content": "So."}], FROM):
        error = get_bytes_error(to_jsonl([{"messages": str(messages)}]))
        assert (error.line, error.field) == (1, "messages")
        assert "write it with json.dumps" in error.reason


def test_unused_columns_are_limited() -> None:
    mapper = recognize({"question": "a", "answer": "b"})
    for n in range(30):
        mapper.convert({"question": "a", "answer": "b", **{f"c{n}_{m}": "" for m in range(100)}})
    assert len(mapper.unused_columns) == 1000


def test_outcome_says_what_was_detected() -> None:
    outcome = ingest_bytes(to_jsonl([{"question": "a", "answer": " b\n", "source": "x"}])).outcome
    assert outcome.samples == ({"prompt": "a", "completion": " b\n"},)
    assert outcome.detected is not None
    detected = Detected.model_validate_json(outcome.detected.model_dump_json())
    assert (detected.shape, detected.unused_columns) == ("question_answer", ("source",))
    assert detected.mapping == parse_mapping(prompt="question", completion="answer")


# --- how problems are named ------------------------------------------------------------------------------------------


ORCA = {"system_prompt": "Be brief.", "question": "Why?", "response": "So."}


@pytest.mark.parametrize(
    ("good", "bad", "field", "reason"),
    [
        ({"question": "a", "answer": "b"}, {"question": "a", "answer": None}, "answer", "is empty"),
        ({"question": "a", "answer": "b"}, {"question": "a", "answer": " \n"}, "answer", "is empty"),
        ({"question": "a", "answer": "b"}, {"question": "a"}, "answer", "is missing"),
        ({"User Prompt": "a", "n": 1, "answer": "b"}, {"User Prompt": "a\0", "answer": "b"}, "User Prompt", "NUL character"),
        ({"question": "a", "answer": "b"}, {"question": "a", "answer": {"text": "b"}}, "answer[0].role", "is missing"),
        ({"question": "a", "answer": "b"}, {"question": ["x"], "answer": "b"}, "question[0]", "not an object"),
        ({"instruction": "a", "input": "", "output": "b"}, {"instruction": "", "output": "b"}, "instruction and input", "is empty"),
        (
            {"conversations": FROM},
            {"conversations": [FROM[0], {"from": "gpt", "value": 4}, FROM[0]]},
            "conversations[2].from",
            "last message",
        ),
        ({"conversations": FROM}, {"conversations": [FROM[0], {"from": "gpt", "value": ""}]}, "conversations[1].value", "is empty"),
        ({"conversations": FROM}, {"conversations": [{"from": "narrator", "value": "a"}]}, "conversations[0].from", "'narrator'"),
        ({"conversations": FROM}, {"conversations": [{"value": "a"}]}, "conversations[0].from", "is missing"),
        ({"conversations": FROM}, {"conversations": "hello"}, "conversations", "not JSON"),
        ({"conversations": FROM}, {"conversations": "[{'from': 'human'}]"}, "conversations", "write it with json.dumps"),
        ({"conversations": FROM}, {"conversations": []}, "conversations", "is empty"),
        ({"conversations": FROM}, {"conversations": 7}, "conversations", "is a number; it must be a list of messages"),
        (
            {"conversations": FROM, "system": "s"},
            {"conversations": [FROM[0], {"from": "gpt", "value": " "}], "system": "s"},
            "conversations[1].value",
            "is empty",
        ),
        ({"conversations": FROM, "system": "s"}, {"conversations": FROM, "system": "\0"}, "system", "NUL"),
        (
            {"conversations": FROM, "system": "s"},
            {"conversations": [{"from": "system", "value": "t"}, *FROM], "system": "s"},
            "system",
            "differs from the system message",
        ),
        (
            {"conversations": FROM, "tools": "[]"},
            {"conversations": [FROM[0], {"from": "function_call", "value": "get_time()"}], "tools": "[]"},
            "conversations[1].value",
            "not JSON",
        ),
        ({"conversations": FROM, "tools": "[]"}, {"conversations": FROM, "tools": "{"}, "tools", "not JSON"),
        (ORCA, {**ORCA, "question": "\0"}, "question", "NUL"),
        (ORCA, {**ORCA, "response": "\0"}, "response", "NUL"),
        (ORCA, {**ORCA, "system_prompt": "\0"}, "system_prompt", "NUL"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            {"instruction": "a", "output": "b", "history": [["c", "d"], ["e", ""]]},
            "history[1][1]",
            "is empty",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            {"instruction": "a", "output": "b", "history": [["c"]]},
            "history[0]",
            "has 1 items",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            {"instruction": "a\0", "output": "b", "history": [["c", "d"]]},
            "instruction",
            "NUL",
        ),
        ({"text": "a", "id": 1}, {"text": "", "id": 1}, "text", "is empty"),
        ({"Story": "a"}, {"Story": ["a"]}, "Story", "is a list"),
        (
            {"prompt": "a", "completion": "b", "kto_tag": True},
            {"prompt": "a", "completion": "b", "kto_tag": "maybe"},
            "kto_tag",
            "is 'maybe'",
        ),
        ({"prompt": "a", "completion": "b", "kto_tag": True}, {"prompt": "a", "completion": "b"}, "kto_tag", "is empty"),
        (
            {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0},
            {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": "tie"},
            "better_response_id",
            "is 'tie', which names no answer; it must be '0' or '1'",
        ),
        (
            {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0},
            {"prompt": "a", "response_0": "\0", "response_1": "c", "better_response_id": 1},
            "response_0",
            "NUL",
        ),
        (
            {"question": "a", "chosen": "b", "rejected": "c"},
            {"question": "a", "chosen": "b", "rejected": "b"},
            "rejected",
            "the same as chosen",
        ),
        (
            {"messages": FROM, "rejected_response": "c"},
            {"messages": FROM, "rejected_response": ""},
            "rejected_response",
            "is empty",
        ),
    ],
)
def test_problem_names_the_column_of_the_file(good: object, bad: object, field: str, reason: str) -> None:
    mapper = recognize(good)
    found, why = get_field_and_reason(mapper, bad)
    assert found == field
    assert reason in why
    convert(mapper, good)  # what is wrong with one row says nothing of the next


def test_problem_of_an_uploaded_row_has_its_column() -> None:
    error = get_bytes_error(to_jsonl([{"Frage": "a", "Antwort": "b"}, {"Frage": "a", "Antwort": ""}]))
    assert (error.line, error.field) == (2, "Antwort")


# --- mappings of a request -------------------------------------------------------------------------------------------


def test_template_makes_the_prompt() -> None:
    row = {"title": "T", "body": "B\n", "tldr": " x"}
    mapped = map_row(row, prompt="{title}\n\n{body}\nTL;DR:", completion="tldr")
    assert mapped == {"prompt": "T\n\nB\n\nTL;DR:", "completion": " x"}


def test_system_may_be_the_same_text_in_each_row() -> None:
    mapped = map_row({"q": "a", "a": "b"}, prompt="q", completion="a", system="You are a pirate.")
    assert mapped["prompt"][0] == {"role": "system", "content": "You are a pirate."}


def test_misspelled_system_column_is_not_taken_for_text() -> None:
    problem = get_problem({"q": "a", "a": "b", "System Prompt": "c"}, prompt="q", completion="a", system="system promt")
    assert "did you mean 'System Prompt'?" in problem.hint
    assert problem.param == "mapping.system"


def test_prompts_keep_columns_for_graders() -> None:
    row = {"question": "a", "answer": 4, "level": "x", "id": "7"}
    assert map_row(row, prompt="question", keep=["answer", "level"]) == {"prompt": "a", "answer": 4, "level": "x"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": "question", "keep": ["my level"]}, "mapping.keep", "graders cannot read"),
        ({"prompt": "question", "keep": ["answr"]}, "mapping.keep", "did you mean 'answer'?"),
        ({"prompt": "question", "completion": "Answer"}, "mapping.completion", "did you mean 'answer'?"),
        ({"messages": "chat"}, "mapping.messages", "the file has the columns question, answer and my level"),
        ({"prompt": "question", "completion": "answer", "label": "ok"}, "mapping.label", "names the column 'ok'"),
        ({"prompt": "question", "chosen": "{answer}.", "rejected": "{answer}."}, "mapping.chosen", "is a template"),
    ],
)
def test_mapping_that_does_not_fit_the_file_is_refused(fields: dict[str, Any], param: str, words: str) -> None:
    problem = get_problem({"question": "a", "answer": "b", "my level": "c"}, **fields)
    assert problem.param == param
    assert words in f"{problem.message}; {problem.hint}"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "no field makes no row"),
        ({"completion": "a"}, "completion makes no row; what makes one: messages: messages; prompt_completion: prompt, completion"),
        ({"text": "a", "prompt": "b"}, "prompt, text makes no row"),
        ({"prompt": "a", "completion": "b", "keep": ["c"]}, "makes no row"),
        ({"messages": "a", "history": "b"}, "makes no row"),
    ],
)
def test_fields_that_make_no_row_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as excinfo:
        parse_mapping(**fields)
    assert words in str(excinfo.value)


def test_mapping_decides_the_type_of_the_dataset() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": "c"}
    assert map_rows([row], messages="messages").dataset_type == "messages"
    assert map_row(row, text="text") == {"text": "c"}


def test_roles_of_the_file_can_be_named() -> None:
    row = {"turns": [{"speaker": "Kunde", "said": "a"}, {"speaker": "Wir", "said": "b"}]}
    roles = {"Kunde": "user", "Wir": "assistant"}
    mapper = map_rows([row], messages="turns", role_key="speaker", content_key="said", roles=roles)
    assert convert(mapper, row) == {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    unknown = {"turns": [{"speaker": "Kunde", "said": "a"}, {"speaker": "Er", "said": "b"}]}
    assert get_field_and_reason(mapper, unknown)[0] == "turns[1].speaker"


def test_usual_roles_are_known_where_their_key_is_named() -> None:
    mapper = recognize({"conversations": FROM})
    assert mapper.mapping == parse_mapping(messages="conversations", role_key="from", content_key="value")
    with pytest.raises(InvalidValue, match="known roles"):
        map_row({"messages": [{"role": "human", "content": "a"}]}, messages="messages")


def test_prompt_that_is_no_part_of_its_conversations_is_refused() -> None:
    answers = {name: [Q, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    mapper = map_rows([{"prompt": "Why?", **answers}], prompt="prompt", chosen="chosen", rejected="rejected")
    assert convert(mapper, {"prompt": "Why?", **answers})["prompt"] == [Q]
    assert get_field_and_reason(mapper, {"prompt": "How?", **answers})[0] == "prompt"


def test_one_label_of_many_that_is_none_is_an_error_of_its_row() -> None:
    labels = ["yes", "no", "yes", "maybe"]
    error = get_bytes_error(to_jsonl([{"prompt": f"{n}", "completion": "b", "label": label} for n, label in enumerate(labels)]))
    assert (error.line, error.field) == (4, "label")
    assert "is 'maybe'; labels are" in error.reason


def test_json_text_stays_text_where_no_messages_are_expected() -> None:
    text = '[{"role": "user", "content": "a"}]'
    assert map_row({"q": text, "a": "{}"}, prompt="q", completion="a") == {"prompt": text, "completion": "{}"}


# --- properties ------------------------------------------------------------------------------------------------------


columns = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda text: text.strip()
)


@QUICK_SETTINGS
@given(names=st.lists(columns, min_size=2, max_size=2, unique=True), values=st.tuples(texts, texts))
def test_mapped_texts_are_kept_byte_for_byte(names: list[str], values: tuple[str, str]) -> None:
    row = dict(zip(names, values, strict=True))
    assert map_row(row, prompt=names[0], completion=names[1]) == {"prompt": values[0], "completion": values[1]}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=5) | st.sampled_from(["true", "[{", '[{"role": "user"}]', "0"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "from", "value", "content", "name"]), inner, max_size=3)
    ),
    max_leaves=8,
)
PAIR_NAMES = ["question", "answer", "prompt", "instruction", "input", "output", "history", "system", "tools", "text", "content", "id"]
CHOICE_NAMES = ["response_0", "response_1", "better_response_id", "chosen", "rejected", "rejected_response", "label", "kto_tag"]
known_names = st.sampled_from(["messages", "conversations", *PAIR_NAMES, *CHOICE_NAMES])


@settings(QUICK_SETTINGS, max_examples=300)
@given(rows=st.lists(st.dictionaries(known_names, json_values, max_size=5), max_size=4))
def test_any_records_are_read_or_refused_with_a_remedy(rows: list[dict[str, Any]]) -> None:
    records = to_records(*rows)
    try:
        mapper = choose_mapper(records, IngestOptions())
    except InvalidInput as error:
        assert error.problem.hint
        return
    for record in records:
        try:
            content = check_row(mapper.convert(record))
        except InvalidValue as error:
            assert mapper.describe_field(error.field).isprintable()
            continue
        if mapper.mapping is not None:
            assert content.dataset_type == mapper.dataset_type
