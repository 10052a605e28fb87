"""The forms that people's records have: how each is recognized, and what row it becomes."""

import json
from typing import Any

import pytest

from jobs.ingest.mapping import SHAPES, RowMapper, choose_mapper
from jobs.ingest.rows.forms import check_row
from jobs.ingest.rows.row import make_row
from jobs.ingest.rows.values import JsonObject, parse
from schema.ingestion import IngestOptions

Q, A = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
WORSE = {"role": "assistant", "content": "Dunno."}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": "Why?", "completion": "So."}
CHAT = {"messages": [Q, A]}
FROM = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
PREFERENCE = {"prompt": "Why?", "chosen": "So.", "rejected": "Dunno."}
FUNCTION = {"name": "get_time", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}


def make_call(call_id: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "get_time", "arguments": arguments or {}}}


def to_records(*rows: object) -> list[JsonObject]:
    return [parse(json.dumps(row).encode(), "a row is an object") for row in rows]


def recognize(*rows: object) -> RowMapper:
    return choose_mapper(to_records(*rows), IngestOptions())


def convert(mapper: RowMapper, row: object) -> Any:
    return json.loads(make_row(check_row(mapper.convert(to_records(row)[0]))).canonical)


TABLES = {
    # headings of questions and answers
    "question,answer": PAIR,
    "Question,Answer": PAIR,
    "QUESTION,ANSWER": PAIR,
    " Question : ,Answer?": PAIR,
    "question,response": PAIR,
    "query,response": PAIR,
    "Prompt,Response": PAIR,
    "prompt,response": PAIR,
    "prompt,output": None,
    "userPrompt,modelResponse": PAIR,
    "User Input,Expected Output": PAIR,
    "input,output": PAIR,
    "Input,Target": PAIR,
    "instruction,response": PAIR,
    "instruction,output": PAIR,
    "user,assistant": PAIR,
    "human,assistant": PAIR,
    "human,bot": PAIR,
    "q,a": PAIR,
    "problem,solution": PAIR,
    "source,target": PAIR,
    "Frage,Antwort": PAIR,
    "Pregunta,Respuesta": PAIR,
    "question,réponse": PAIR,
    "Pergunta,Resposta": PAIR,
    "domanda,risposta": PAIR,
    "Вопрос,Ответ": PAIR,
    "问题,答案": PAIR,
    "问题,回答": PAIR,
    "質問,回答": PAIR,
    "질문,답변": PAIR,
    "السؤال,الجواب": PAIR,
    "soru,cevap": PAIR,
    "vraag,antwoord": PAIR,
    "otázka,odpověď": PAIR,
    "câu hỏi,trả lời": PAIR,
}


@pytest.mark.parametrize(("headings", "expected"), TABLES.items())
def test_headings_of_questions_and_answers(headings: str, expected: object) -> None:
    question, answer = headings.split(",")
    row = {question: "Why?", answer: "So.", "id": "7"}
    mapper = recognize(row)
    assert convert(mapper, row) == (expected or PAIR)
    assert mapper.shape in ("question_answer", "alpaca")
    assert mapper.unused_columns == ("id",)
    assert mapper.mapping is not None
    assert (mapper.mapping.prompt, mapper.mapping.completion) == (question, answer)


SHARED: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    # name, shape, the record, the row
    ("messages", "native", CHAT, CHAT),
    ("text", "native", {"text": "a "}, {"text": "a "}),
    ("prompts", "native", {"prompt": "a"}, {"prompt": "a"}),
    ("prompts with an answer for graders", "native", {"prompt": "a", "answer": "4"}, {"prompt": "a", "answer": "4"}),
    ("labels", "native", {**PAIR, "label": True}, {**PAIR, "label": True}),
    ("whole conversations", "native", {"chosen": [Q, A], "rejected": [Q, WORSE]}, {"prompt": [Q], "chosen": [A], "rejected": [WORSE]}),
    ("messages with an id", "openai", {**CHAT, "id": 7, "metadata": {"a": 1}}, CHAT),
    ("messages as JSON text", "openai", {"messages": json.dumps([Q, A])}, CHAT),
    ("messages with a system column", "openai", {**CHAT, "system": "Be brief."}, {"messages": [SYSTEM, Q, A]}),
    ("messages with an empty system column", "openai", {**CHAT, "system": ""}, CHAT),
    (
        "a developer",
        "openai",
        {"messages": [{"role": "developer", "content": "Be brief."}, Q, A], "parallel_tool_calls": True},
        {"messages": [SYSTEM, Q, A]},
    ),
    ("functions", "openai", {**CHAT, "functions": [FUNCTION]}, {**CHAT, "tools": [TOOL]}),
    ("tools as JSON text", "openai", {**CHAT, "tools": json.dumps([TOOL])}, {**CHAT, "tools": [TOOL]}),
    ("tools as empty text", "openai", {**CHAT, "tools": ""}, CHAT),
    (
        "weights",
        "openai",
        {"messages": [Q, {**A, "weight": 0}, Q, {**A, "weight": 1}], "source": "x"},
        {"messages": [Q, {**A, "weight": 0}, Q, A]},
    ),
    (
        "calls whose arguments are JSON text",
        "openai",
        {
            "messages": [
                Q,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "x", "type": "function", "function": {"name": "get_time", "arguments": '{"at": 1}'}}],
                },
                {"role": "tool", "content": "12", "tool_call_id": "x"},
                A,
            ],
            "tools": [TOOL],
            "id": 1,
        },
        {
            "messages": [
                Q,
                {"role": "assistant", "content": "", "tool_calls": [make_call("x", {"at": 1})]},
                {"role": "tool", "content": "12", "tool_call_id": "x"},
                A,
            ],
            "tools": [TOOL],
        },
    ),
    (
        "OpenAI's older function calls",
        "openai",
        {
            "messages": [
                Q,
                {"role": "assistant", "content": None, "function_call": {"name": "get_time", "arguments": "{}"}},
                {"role": "function", "name": "get_time", "content": "12"},
                A,
            ],
            "functions": [FUNCTION],
        },
        {
            "messages": [
                Q,
                {"role": "assistant", "content": "", "tool_calls": [make_call("call_1")]},
                {"role": "tool", "content": "12", "tool_call_id": "call_1", "name": "get_time"},
                A,
            ],
            "tools": [TOOL],
        },
    ),
    (
        "keys of messages that say nothing",
        "openai",
        {"messages": [{**Q, "id": "1", "timestamp": 5}, {**A, "refusal": None}], "id": 1},
        CHAT,
    ),
    ("conversation with roles", "openai", {"conversation_id": "x", "model": "m", "conversation": [Q, A]}, CHAT),
    ("dialogue with other roles", "openai", {"dialogue": [{"role": "human", "content": "Why?"}, {"role": "bot", "content": "So."}]}, CHAT),
    ("a prompt that the messages repeat", "openai", {"prompt": "Why?", "prompt_id": "x", **CHAT}, CHAT),
    ("ShareGPT", "sharegpt", {"conversations": FROM}, CHAT),
    ("ShareGPT with an id", "sharegpt", {"id": "x_0", "conversations": FROM}, CHAT),
    ("ShareGPT with a system column", "sharegpt", {"conversations": FROM, "system": "Be brief."}, {"messages": [SYSTEM, Q, A]}),
    ("ShareGPT as JSON text", "sharegpt", {"conversations": json.dumps(FROM)}, CHAT),
    ("ShareGPT in a column messages", "sharegpt", {"messages": FROM}, CHAT),
    (
        "SlimOrca's weights",
        "sharegpt",
        {"conversations": [{"from": "system", "value": "Be brief.", "weight": None}, {**FROM[0], "weight": 0}, {**FROM[1], "weight": 1}]},
        {"messages": [SYSTEM, Q, A]},
    ),
    (
        "ShareGPT with calls",
        "sharegpt",
        {
            "conversations": [
                FROM[0],
                {"from": "function_call", "value": '{"name": "get_time", "arguments": {"at": 1}}'},
                {"from": "observation", "value": "12"},
                FROM[1],
            ],
            "tools": json.dumps([FUNCTION]),
        },
        {
            "messages": [
                Q,
                {"role": "assistant", "content": "", "tool_calls": [make_call("call_1", {"at": 1})]},
                {"role": "tool", "content": "12", "tool_call_id": "call_1"},
                A,
            ],
            "tools": [TOOL],
        },
    ),
    (
        "ShareGPT with two calls at once",
        "sharegpt",
        {
            "conversations": [
                FROM[0],
                {"from": "function_call", "value": '[{"name": "get_time", "arguments": {}}, {"name": "get_time", "arguments": {}}]'},
                {"from": "observation", "value": "12"},
                {"from": "observation", "value": "13"},
                FROM[1],
            ]
        },
        {
            "messages": [
                Q,
                {"role": "assistant", "content": "", "tool_calls": [make_call("call_1"), make_call("call_2")]},
                {"role": "tool", "content": "12", "tool_call_id": "call_1"},
                {"role": "tool", "content": "13", "tool_call_id": "call_2"},
                A,
            ]
        },
    ),
    ("Alpaca", "alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, {"prompt": "Add.\n\n1 2", "completion": "3"}),
    ("Alpaca without an input", "alpaca", {"instruction": "Add.", "input": "", "output": "3"}, {"prompt": "Add.", "completion": "3"}),
    ("Alpaca with a null input", "alpaca", {"instruction": "Add.", "input": None, "output": "3"}, {"prompt": "Add.", "completion": "3"}),
    (
        "Alpaca with numbers",
        "alpaca",
        {"instruction": "Add.", "input": 1.50, "output": 3},
        {"prompt": "Add.\n\n1.5", "completion": "3"},
    ),
    (
        "Alpaca with the text that was made of it",
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "### Instruction:\nAdd.\n### Input:\n1 2\n\n### Response:\n3"},
        {"prompt": "Add.\n\n1 2", "completion": "3"},
    ),
    (
        "Dolly",
        "alpaca",
        {"instruction": "Why?", "context": "Because so.", "response": "So.", "category": "closed_qa"},
        {"prompt": "Why?\n\nBecause so.", "completion": "So."},
    ),
    (
        "Alpaca with a system message",
        "alpaca",
        {"instruction": "Why?", "input": "", "output": "So.", "system": "Be brief."},
        {"prompt": [SYSTEM, Q], "completion": [A]},
    ),
    (
        "Alpaca with earlier turns",
        "alpaca",
        {"instruction": "Why?", "input": "", "output": "So.", "history": [["Hi.", "Hello."]]},
        {"prompt": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, Q], "completion": [A]},
    ),
    ("OpenOrca", "question_answer", {"id": "n", "system_prompt": "Be brief.", "question": "Why?", "response": "So."}, {
        "prompt": [SYSTEM, Q],
        "completion": [A],
    }),
    ("messages with a response", "question_answer", {"prompt": [Q], "response": "So."}, {"prompt": [Q], "completion": [A]}),
    (
        "two lists of messages",
        "question_answer",
        {"question": FROM[:1], "answer": FROM[1:], "id": 1},
        {"prompt": [Q], "completion": [A]},
    ),
    (
        "JSON text of messages with a response",
        "question_answer",
        {"question": json.dumps([Q]), "answer": "So."},
        {"prompt": [Q], "completion": [A]},
    ),
    (
        "roles in capitals",
        "sharegpt",
        {"conversations": [{"from": "Human", "value": "Why?"}, {"from": "Assistant", "value": "So."}]},
        CHAT,
    ),
    ("native columns with an id", "question_answer", {**PAIR, "id": 3}, PAIR),
    ("DPO with scores", "dpo_pair", {**PREFERENCE, "score_chosen": 7.5, "score_rejected": 2}, PREFERENCE),
    ("DPO of a question", "dpo_pair", {"question": "Why?", "chosen": "So.", "rejected": "Dunno."}, PREFERENCE),
    (
        "Orca pairs",
        "dpo_pair",
        {"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "Dunno."},
        {"prompt": [SYSTEM, Q], "chosen": [A], "rejected": [WORSE]},
    ),
    (
        "UltraFeedback",
        "dpo_pair",
        {"prompt": "Why?", "prompt_id": "x", "chosen": [Q, A], "rejected": [Q, WORSE], "messages": [Q, A], "score_chosen": 8},
        {"prompt": [Q], "chosen": [A], "rejected": [WORSE]},
    ),
    (
        "whole conversations with scores",
        "dpo_pair",
        {"chosen": [Q, A], "rejected": [Q, WORSE], "score_chosen": 8},
        {"prompt": [Q], "chosen": [A], "rejected": [WORSE]},
    ),
    (
        "whole conversations as JSON text",
        "dpo_pair",
        {"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, WORSE])},
        {"prompt": [Q], "chosen": [A], "rejected": [WORSE]},
    ),
    (
        "a prompt and answers that are messages",
        "dpo_pair",
        {"question": "Why?", "chosen": [A], "rejected": [WORSE]},
        {"prompt": [Q], "chosen": [A], "rejected": [WORSE]},
    ),
    (
        "ShareGPT with two answers",
        "dpo_pair",
        {"conversations": FROM[:1], "chosen": {"from": "gpt", "value": "So."}, "rejected": {"from": "gpt", "value": "Dunno."}},
        {"prompt": [Q], "chosen": [A], "rejected": [WORSE]},
    ),
    (
        "messages and a rejected response",
        "dpo_pair",
        {"messages": [Q, A], "rejected_response": "Dunno."},
        {"prompt": [Q], "chosen": [A], "rejected": [WORSE]},
    ),
    ("a query with a rejected response", "dpo_pair", {"query": "Why?", "response": "So.", "rejected_response": "Dunno."}, PREFERENCE),
    ("Alpaca with two outputs", "dpo_pair", {"instruction": "Why?", "input": "", "output": ["So.", "Dunno."]}, PREFERENCE),
    (
        "two responses, the first is better",
        "dpo_pair",
        {"prompt": "Why?", "response_0": "So.", "response_1": "Dunno.", "better_response_id": 0},
        PREFERENCE,
    ),
    (
        "two responses, the second is better",
        "dpo_pair",
        {"prompt": "Why?", "response_0": "Dunno.", "response_1": "So.", "better_response_id": 1},
        PREFERENCE,
    ),
    (
        "two responses, counted from 1",
        "dpo_pair",
        {"prompt": "Why?", "response_1": "Dunno.", "response_2": "So.", "preferred": "2"},
        PREFERENCE,
    ),
    (
        "two models of an arena",
        "dpo_pair",
        {"question": "Why?", "answer_a": "So.", "answer_b": "Dunno.", "winner": "model_a", "judge": "x"},
        PREFERENCE,
    ),
    (
        "OpenAI's pairs",
        "dpo_pair",
        {"input": {"messages": [Q], "tools": [], "parallel_tool_calls": True}, "preferred_output": [A], "non_preferred_output": [WORSE]},
        {"prompt": [Q], "chosen": [A], "rejected": [WORSE]},
    ),
    ("KTO with text", "kto", {"instruction": "Why?", "output": "So.", "kto_tag": True}, {**PAIR, "label": True}),
    ("KTO with a conversation", "kto", {**CHAT, "label": False}, {"prompt": [Q], "completion": [A], "label": False}),
    ("KTO of ShareGPT", "kto", {"conversations": FROM, "kto_tag": "true"}, {"prompt": [Q], "completion": [A], "label": True}),
    *(
        (f"label {label!r}", "kto", {**PAIR, "label": label, "id": "x"}, {**PAIR, "label": expected})
        for label, expected in [
            ("true", True), ("False", False), (1, True), (0, False), ("1", True), ("0.0", False), ("yes", True), ("No", False),
            ("good", True), ("BAD", False), ("thumbs_up", True), ("thumbs down", False), ("👍", True), ("👎", False), ("-1", False),
        ]
    ),
    ("a column of content", "text", {"content": "a\n"}, {"text": "a\n"}),
    ("a document with a title", "text", {"title": "T", "Document": " a"}, {"text": " a"}),
    ("a story", "text", {"story": "a"}, {"text": "a"}),
    ("text with an id", "text", {"id": 4, "text": "a", "url": "u"}, {"text": "a"}),
    ("text in Spanish", "text", {"Texto": "a"}, {"text": "a"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "record", "row"), SHARED, ids=[name for name, *_ in SHARED])
def test_record_becomes_a_row(name: str, shape: str, record: dict[str, Any], row: dict[str, Any]) -> None:
    mapper = recognize(record)
    assert convert(mapper, record) == row
    assert mapper.shape == shape
    assert mapper.reason


@pytest.mark.parametrize(("name", "shape", "record", "row"), SHARED, ids=[name for name, *_ in SHARED])
def test_detected_mapping_sent_back_gives_the_same_row(name: str, shape: str, record: dict[str, Any], row: dict[str, Any]) -> None:
    detected = recognize(record)
    if detected.mapping is None:
        assert detected.shape == "native"
        return
    sent = IngestOptions.model_validate_json(json.dumps({"mapping": detected.mapping.model_dump(mode="json", exclude_defaults=True)}))
    mapper = choose_mapper(to_records(record), sent)
    assert convert(mapper, record) == row
    assert (mapper.dataset_type, mapper.mapping) == (detected.dataset_type, detected.mapping)
    convert(detected, record)
    assert mapper.unused_columns == detected.unused_columns


def test_examples_cover_all_shapes() -> None:
    assert {shape for _, shape, _, _ in SHARED} | {"question_answer"} == set(SHAPES)
