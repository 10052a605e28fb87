"""Held-out rows as questions: what a model is asked, and what the row itself answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt as the model reads it, and the answer that the row gives."""

    prompt_ids: tuple[int, ...]
    prompt_text: str
    reference: str
    row_index: int  # its place among the rows


def make_eval_prompts(rows: Sequence[TokenizedExample], tokenizer: "PreTrainedTokenizerBase", count: int) -> list[EvalPrompt]:
    """The first `count` questions of the rows, the same at every call.

    Every turn that is to be learned is one, with all that was said before it as its prompt: a conversation has several. A row
    without a prompt, such as one of type text, or without words in its answer has none.
    """
    return list(islice((question for n, row in enumerate(rows) for question in _iter_row_prompts(n, row, tokenizer)), count))


def _iter_row_prompts(row_index: int, row: TokenizedExample, tokenizer: "PreTrainedTokenizerBase") -> Iterator[EvalPrompt]:
    for start, end in _labeled_spans(row.labels):
        prompt = row.input_ids[:start]
        # The template's line feed behind the end of a turn is learned as well, and is nobody's answer.
        reference = str(tokenizer.decode(row.labels[start:end], skip_special_tokens=True)).rstrip()
        if reference and any(token != tokenizer.bos_token_id for token in prompt):
            text = row.prompt_text if start == row.prompt_tokens else str(tokenizer.decode(prompt))
            yield EvalPrompt(tuple(prompt), text, reference, row_index)


def _labeled_spans(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where runs of labels begin and end."""
    start: int | None = None
    for n, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = n
        elif label == IGNORE_INDEX and start is not None:
            yield start, n
            start = None
