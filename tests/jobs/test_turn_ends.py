"""Labels that end a turn are told from those of the answers, and perplexity is reported with and without them."""

from typing import Any

import pytest

from jobs.llm.data.tokenize import IGNORE_INDEX
from jobs.llm.loss import evaluate_likelihood
from jobs.llm.turn_ends import TurnEnds
from schema.job import EvalMetrics
from schema.training import SftConfig
from tests.jobs.conftest import make_row_tokenizer


@pytest.fixture(scope="module")
def turn_ends(tokenizer: Any) -> TurnEnds:
    return TurnEnds(tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]), tokenizer)


def content_of(turn_ends: TurnEnds, tokenizer: Any, labels: list[int]) -> str:
    """The text of the labels that do not end a turn."""
    import torch

    is_end = turn_ends.find(torch.tensor([labels]))[0].tolist()
    return tokenizer.decode([label for label, end in zip(labels, is_end, strict=True) if not end and label != IGNORE_INDEX])


def test_content_of_chat_is_its_answers(turn_ends: TurnEnds, tokenizer: Any) -> None:
    turns = [("user", "what does copy do"), ("assistant", "copy files\n\n"), ("user", "and open"), ("assistant", "\nopen a file")]
    row = make_row_tokenizer(tokenizer).tokenize({"messages": [{"role": role, "content": text} for role, text in turns]}, "messages")
    learned = tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])
    assert learned == "copy files<end_of_turn>\nopen a file<end_of_turn>\n"  # Gemma's template strips the messages
    assert content_of(turn_ends, tokenizer, row.labels) == "copy filesopen a file"


def test_content_of_text_is_everything_before_eos(turn_ends: TurnEnds, tokenizer: Any) -> None:
    row = make_row_tokenizer(tokenizer).tokenize({"text": "a list of files\n"}, "text")
    assert row.labels[-1] == tokenizer.eos_token_id
    assert content_of(turn_ends, tokenizer, row.labels) == "a list of files\n"


def test_whitespace_and_special_tokens_count_only_after_a_stop_token(turn_ends: TurnEnds, tokenizer: Any) -> None:
    import torch

    stop, start = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<start_of_turn>"])
    newline, word = (tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("\n", "file"))
    labels = [
        [newline, start, word, stop, newline, start, newline, word, newline],
        [word, stop, IGNORE_INDEX, newline, word, word, stop, 1, word],
    ]
    expected = [[0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 1, 1, 0]]
    assert turn_ends.find(torch.tensor(labels)).int().tolist() == expected


def test_answer_without_content_has_no_content_perplexity(base: Any, turn_ends: TurnEnds, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    row = make_row_tokenizer(tokenizer).tokenize(
        {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": ""}]}, "messages"
    )
    metrics = evaluate_likelihood(AutoModelForCausalLM.from_pretrained(base), [row], 0, SftConfig(base_model_id="a/b"), turn_ends)
    assert metrics.perplexity is not None
    assert metrics.content_perplexity is None
    assert metrics.notes == {"content_perplexity": "every label ends a turn"}


def test_metrics_of_earlier_versions_have_no_content_perplexity() -> None:
    assert EvalMetrics.model_validate_json('{"eval_loss": 0.5, "perplexity": 1.6}').content_perplexity is None
