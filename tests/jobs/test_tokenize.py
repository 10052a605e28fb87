"""The tokens and labels of messages, prompt_completion and text rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.chat_format import ChatFormat
from jobs.llm.data.tokenize import IGNORE_INDEX, RowTokenizer, TokenizedExample, tokenize_split
from jobs.runtime.errors import JobFailed
from tests.jobs.conftest import make_row_tokenizer

RAW = ChatFormat("raw", "raw", None, None, (), (), turn_tokens_are_trained=True)
TURNS = [
    {"role": "user", "content": "what does open do"},
    {"role": "assistant", "content": "it returns a file"},
    {"role": "user", "content": "and close"},
    {"role": "assistant", "content": "it returns  the path 🙂"},
]


def tokenize_row(row: dict[str, Any], dataset_type: Any, tokenizer: Any, max_length: int = 1000) -> TokenizedExample:
    return tokenize_split(iter([row]), dataset_type, make_row_tokenizer(tokenizer), max_length).rows[0]


def decode_labels(row: TokenizedExample, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX]))


def test_assistant_turns_are_labeled_with_end_of_turn(tokenizer: Any) -> None:
    row = tokenize_row({"messages": TURNS}, "messages", tokenizer)
    assert decode_labels(row, tokenizer) == "it returns a file<end_of_turn>\nit returns  the path 🙂<end_of_turn>\n"
    assert row.input_ids == tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)


@pytest.mark.parametrize("turns", [TURNS, TURNS[:2], [{"role": "system", "content": "be short"}, *TURNS]])
def test_labels_match_training_template_assistant_mask(tokenizer: Any, turns: list[dict[str, str]]) -> None:
    from importlib.resources import files

    template = files("trl").joinpath("chat_templates/gemma3_training.jinja").read_text()
    expected = tokenizer.apply_chat_template(turns, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
    row = tokenize_row({"messages": turns}, "messages", tokenizer)
    assert row.input_ids == expected["input_ids"]
    assert [label != IGNORE_INDEX for label in row.labels] == [mask == 1 for mask in expected["assistant_masks"]]


def test_completion_and_eos_are_labeled(tokenizer: Any) -> None:
    raw = RowTokenizer(tokenizer, RAW)
    row = raw.tokenize({"prompt": "what does open do?", "completion": " it returns"}, "prompt_completion")
    assert decode_labels(row, tokenizer) == " it returns<eos>"
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(row.input_ids) == "<bos>what does open do? it returns<eos>"


def test_only_completion_of_conversational_prompt_is_labeled(tokenizer: Any) -> None:
    row = tokenize_row({"prompt": TURNS[:3], "completion": TURNS[3:]}, "prompt_completion", tokenizer)
    assert decode_labels(row, tokenizer) == "it returns  the path 🙂<end_of_turn>\n"
    assert row.input_ids == tokenize_row({"messages": TURNS}, "messages", tokenizer).input_ids


def test_text_is_labeled_except_bos(tokenizer: Any) -> None:
    row = tokenize_row({"text": "def f(x):\n    return x + 1"}, "text", tokenizer)
    assert decode_labels(row, tokenizer) == "def f(x):\n    return x + 1<eos>"
    assert row.labels[0] == IGNORE_INDEX
    assert row.labels[1:] == row.input_ids[1:]


def test_prompt_tokens_end_where_first_answer_starts(tokenizer: Any) -> None:
    row = tokenize_row({"messages": TURNS}, "messages", tokenizer)
    assert row.labels[row.prompt_tokens] == row.input_ids[row.prompt_tokens]
    assert set(row.labels[: row.prompt_tokens]) == {IGNORE_INDEX}
    assert row.prompt_text.endswith("<start_of_turn>model\n")


def test_long_rows_are_truncated_or_dropped_and_counted(tokenizer: Any) -> None:
    full = tokenize_row({"messages": TURNS[:2]}, "messages", tokenizer)
    rows = [{"messages": TURNS[:2]}, {"messages": [{"role": "user", "content": "x " * 40}, TURNS[1]]}]
    length = len(full.input_ids) - 2
    split = tokenize_split(iter(rows), "messages", make_row_tokenizer(tokenizer), length)
    assert (split.truncated, split.dropped) == (2, 1)
    assert split.rows[0].input_ids == full.input_ids[:length]
    assert split.rows[0].labels == full.labels[:length]


def test_conversation_without_answer_is_dropped(tokenizer: Any) -> None:
    split = tokenize_split(iter([{"messages": TURNS[:1]}]), "messages", make_row_tokenizer(tokenizer), 100)
    assert (split.rows, split.dropped) == ([], 1)


THINKING_TEMPLATE = (  # as Qwen 3's: only the last turn keeps its reasoning
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
EOS_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if not add_generation_prompt %}<eos>{% endif %}"
NO_SYSTEM_TEMPLATE = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}"
)


@pytest.fixture
def make_tokenizer(base: Path) -> Callable[[str], Any]:
    """Makes a tokenizer with another chat template."""

    def make(template: str) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.mark.parametrize("template", [THINKING_TEMPLATE, EOS_TEMPLATE], ids=["removes reasoning", "marks only the last turn"])
def test_template_that_changes_earlier_turns_is_rejected(make_tokenizer: Callable[[str], Any], template: str) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "<think>hm</think>it returns"}, *TURNS[2:]]
    with pytest.raises(JobFailed) as failed:
        tokenize_row({"messages": turns}, "messages", make_tokenizer(template))
    assert failed.value.failure.code == "invalid_config"
    assert "changes earlier turns" in failed.value.failure.message
    assert "separate row" in failed.value.failure.hint


def test_template_that_changes_earlier_turns_is_accepted_if_only_last_turn_is_labeled(make_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = make_tokenizer(THINKING_TEMPLATE)
    answer = [{"role": "assistant", "content": "<think>hm</think>it returns"}]
    row = tokenize_row({"prompt": TURNS[:3], "completion": answer}, "prompt_completion", tokenizer)
    assert decode_labels(row, tokenizer) == "<think>hm</think>it returns<end_of_turn>\n"


def test_inconsistent_generation_prompt_is_rejected(make_tokenizer: Callable[[str], Any]) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}model: {% endif %}"
    with pytest.raises(JobFailed, match="chat template"):
        tokenize_row({"messages": TURNS}, "messages", make_tokenizer(template))


def test_template_error_fails_the_job_with_its_message(make_tokenizer: Callable[[str], Any]) -> None:
    with pytest.raises(JobFailed) as failed:
        tokenize_row({"messages": [{"role": "system", "content": "be short"}, *TURNS]}, "messages", make_tokenizer(NO_SYSTEM_TEMPLATE))
    assert failed.value.failure.code == "invalid_data"
    assert "System role not supported" in failed.value.failure.message
    assert "be short" not in failed.value.failure.message


def test_labels_match_manual_labels(tokenizer: Any) -> None:
    row = tokenize_row({"messages": TURNS}, "messages", tokenizer)
    expected = []
    for n, turn in enumerate(TURNS):
        header = f"{'<bos>' if n == 0 else ''}<start_of_turn>{'user' if turn['role'] == 'user' else 'model'}\n"
        content = f"{turn['content']}<end_of_turn>\n"
        for text, is_learned in ((header, False), (content, turn["role"] == "assistant")):
            ids = tokenizer.encode(text, add_special_tokens=False)
            expected += [(token, token if is_learned else IGNORE_INDEX) for token in ids]
    assert list(zip(row.input_ids, row.labels, strict=True)) == expected


@pytest.mark.parametrize("row", [{"text": ""}, {"text": "a"}])
def test_eos_is_labeled_for_nearly_empty_text(tokenizer: Any, row: dict[str, str]) -> None:
    assert tokenize_row(row, "text", tokenizer).labels[-1] == tokenizer.eos_token_id
