"""Which tokens are read, and which are to be learned, for the three forms of a row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.data.render import NO_LABEL, TokenRow, render
from jobs.errors import JobFailed

TURNS = [
    {"role": "user", "content": "what does open do"},
    {"role": "assistant", "content": "it returns a file"},
    {"role": "user", "content": "and close"},
    {"role": "assistant", "content": "it returns  the path 🙂"},
]


def one(row: dict[str, Any], dataset_type: Any, tokenizer: Any, length: int = 1000) -> TokenRow:
    return render(iter([row]), dataset_type, tokenizer, length).rows[0]


def learned(row: TokenRow, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != NO_LABEL]))


def test_of_a_conversation_the_assistant_s_words_are_learned_with_the_end_of_each_turn(tokenizer: Any) -> None:
    row = one({"messages": TURNS}, "messages", tokenizer)
    assert learned(row, tokenizer) == "it returns a file<end_of_turn>\nit returns  the path 🙂<end_of_turn>\n"
    assert row.input_ids == tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)


@pytest.mark.parametrize("turns", [TURNS, TURNS[:2], [{"role": "system", "content": "be short"}, *TURNS]])
def test_the_labels_are_those_of_the_training_template_with_generation_marks(tokenizer: Any, turns: list[dict[str, str]]) -> None:
    from importlib.resources import files

    template = files("trl").joinpath("chat_templates/gemma3_training.jinja").read_text()
    marked = tokenizer.apply_chat_template(turns, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
    row = one({"messages": turns}, "messages", tokenizer)
    assert row.input_ids == marked["input_ids"]
    assert [label != NO_LABEL for label in row.labels] == [mask == 1 for mask in marked["assistant_masks"]]


def test_of_a_prompt_and_completion_the_completion_and_the_end_are_learned(tokenizer: Any) -> None:
    row = one({"prompt": "what does open do?", "completion": " it returns"}, "prompt_completion", tokenizer)
    assert learned(row, tokenizer) == " it returns<eos>"
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(row.input_ids) == "<bos>what does open do? it returns<eos>"


def test_a_conversational_prompt_is_read_and_its_completion_learned(tokenizer: Any) -> None:
    row = one({"prompt": TURNS[:3], "completion": TURNS[3:]}, "prompt_completion", tokenizer)
    assert learned(row, tokenizer) == "it returns  the path 🙂<end_of_turn>\n"
    assert row.input_ids == one({"messages": TURNS}, "messages", tokenizer).input_ids


def test_of_a_text_everything_but_its_beginning_is_learned(tokenizer: Any) -> None:
    row = one({"text": "def f(x):\n    return x + 1"}, "text", tokenizer)
    assert learned(row, tokenizer) == "def f(x):\n    return x + 1<eos>"
    assert row.labels[0] == NO_LABEL
    assert row.labels[1:] == row.input_ids[1:]


def test_the_prompt_of_a_probe_ends_where_the_first_answer_begins(tokenizer: Any) -> None:
    row = one({"messages": TURNS}, "messages", tokenizer)
    assert row.labels[row.prompt_tokens] == row.input_ids[row.prompt_tokens]
    assert set(row.labels[: row.prompt_tokens]) == {NO_LABEL}
    assert row.prompt_text.endswith("<start_of_turn>model\n")


def test_a_long_row_is_cut_and_counted_and_one_without_an_answer_left_is_dropped_and_counted(tokenizer: Any) -> None:
    whole = one({"messages": TURNS[:2]}, "messages", tokenizer)
    rows = [{"messages": TURNS[:2]}, {"messages": [{"role": "user", "content": "x " * 40}, TURNS[1]]}]
    length = len(whole.input_ids) - 2
    found = render(iter(rows), "messages", tokenizer, length)
    assert (found.cut, found.dropped) == (2, 1)
    assert found.rows[0].input_ids == whole.input_ids[:length]
    assert found.rows[0].labels == whole.labels[:length]


def test_a_conversation_in_which_nobody_answers_has_nothing_to_learn(tokenizer: Any) -> None:
    found = render(iter([{"messages": TURNS[:1]}]), "messages", tokenizer, 100)
    assert (found.rows, found.dropped) == ([], 1)


THINKING = (  # as Qwen 3 does: what was thought is kept in the last turn alone
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
SIGNED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if not add_generation_prompt %}<eos>{% endif %}"
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}"


@pytest.fixture
def templated(base: Path) -> Callable[[str], Any]:
    """Makes a tokenizer with another chat template."""

    def make(template: str) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.mark.parametrize("template", [THINKING, SIGNED], ids=["drops thoughts", "signs the last turn"])
def test_a_template_that_rewrites_earlier_turns_is_refused_in_words(templated: Callable[[str], Any], template: str) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "<think>hm</think>it returns"}, *TURNS[2:]]
    with pytest.raises(JobFailed) as refused:
        one({"messages": turns}, "messages", templated(template))
    assert refused.value.failure.code == "invalid_config"
    assert "rewrites earlier turns" in refused.value.failure.message
    assert "row of its own" in refused.value.failure.hint


def test_such_a_template_serves_where_only_the_last_turn_is_learned(templated: Callable[[str], Any]) -> None:
    tokenizer = templated(THINKING)
    answer = [{"role": "assistant", "content": "<think>hm</think>it returns"}]
    row = one({"prompt": TURNS[:3], "completion": answer}, "prompt_completion", tokenizer)
    assert learned(row, tokenizer) == "<think>hm</think>it returns<end_of_turn>\n"


def test_a_template_that_does_not_ask_as_it_answers_is_refused(templated: Callable[[str], Any]) -> None:
    asks_otherwise = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}model: {% endif %}"
    with pytest.raises(JobFailed, match="chat template"):
        one({"messages": TURNS}, "messages", templated(asks_otherwise))


def test_a_template_that_refuses_a_role_fails_the_job_with_its_own_words(templated: Callable[[str], Any]) -> None:
    with pytest.raises(JobFailed) as refused:
        one({"messages": [{"role": "system", "content": "be short"}, *TURNS]}, "messages", templated(NO_SYSTEM))
    assert refused.value.failure.code == "invalid_data"
    assert "System role not supported" in refused.value.failure.message
    assert "be short" not in refused.value.failure.message


def test_every_position_has_the_label_that_one_would_write_by_hand(tokenizer: Any) -> None:
    row = one({"messages": TURNS}, "messages", tokenizer)
    by_hand = []
    for n, turn in enumerate(TURNS):
        asked = f"{'<bos>' if n == 0 else ''}<start_of_turn>{'user' if turn['role'] == 'user' else 'model'}\n"
        said = f"{turn['content']}<end_of_turn>\n"
        for text, is_learned in ((asked, False), (said, turn["role"] == "assistant")):
            ids = tokenizer.encode(text, add_special_tokens=False)
            by_hand += [(token, token if is_learned else NO_LABEL) for token in ids]
    assert list(zip(row.input_ids, row.labels, strict=True)) == by_hand


@pytest.mark.parametrize("row", [{"text": ""}, {"text": "a"}])
def test_the_end_is_learned_even_from_next_to_nothing(tokenizer: Any, row: dict[str, str]) -> None:
    assert one(row, "text", tokenizer).labels[-1] == tokenizer.eos_token_id
