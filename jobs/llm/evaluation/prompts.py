"""Turns held-out rows into prompts with reference answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt as token ids and as text, and the row's own answer."""

    prompt_ids: tuple[int, ...]
    prompt_text: str
    reference: str
    row_index: int  # the index of its row


def make_eval_prompts(rows: Sequence[TokenizedExample], tokenizer: "PreTrainedTokenizerBase", count: int) -> list[EvalPrompt]:
    """The first `count` prompts of the rows; deterministic.

    Every labeled turn gives one, with all previous turns as its prompt, so a conversation gives several. A row
    without a prompt, such as one of type text, or with a blank answer gives none.
    """
    return list(islice((prompt for n, row in enumerate(rows) for prompt in _iter_row_prompts(n, row, tokenizer)), count))


def _iter_row_prompts(row_index: int, row: TokenizedExample, tokenizer: "PreTrainedTokenizerBase") -> Iterator[EvalPrompt]:
    spans = _labeled_spans(row.labels)
    if any(label != IGNORE_INDEX for label in row.labels[: row.prompt_tokens]):  # inputs are trained too: only the last answer is a turn
        spans = _labeled_spans([*[IGNORE_INDEX] * row.prompt_tokens, *row.labels[row.prompt_tokens :]])
    for start, end in spans:
        prompt_ids = row.input_ids[:start]
        # The template's newline after a turn has a label, but is not part of the answer.
        reference = str(tokenizer.decode(row.labels[start:end], skip_special_tokens=True)).rstrip()
        if reference and any(token != tokenizer.bos_token_id for token in prompt_ids):
            text = row.prompt_text if start == row.prompt_tokens else str(tokenizer.decode(prompt_ids))
            yield EvalPrompt(tuple(prompt_ids), text, reference, row_index)


def _labeled_spans(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The start and end of each run of labels."""
    start: int | None = None
    for n, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = n
        elif label == IGNORE_INDEX and start is not None:
            yield start, n
            start = None
