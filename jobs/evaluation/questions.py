"""Held-out rows as questions: what a model is asked, and what the row itself answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from jobs.data.render import NO_LABEL, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it, and the answer that the row gives."""

    prompt_ids: tuple[int, ...]
    prompt_text: str
    reference: str
    row: int  # its place among the rows


def questions_of(rows: Sequence[TokenRow], tokenizer: "PreTrainedTokenizerBase", count: int) -> list[Question]:
    """The first `count` questions of the rows, the same at every call.

    Every turn that is to be learned is one, with all that was said before it as its prompt: a conversation has several. A row
    without a prompt, such as one of type text, or without words in its answer has none.
    """
    return list(islice((question for n, row in enumerate(rows) for question in _questions(n, row, tokenizer)), count))


def _questions(place: int, row: TokenRow, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Question]:
    for start, end in _learned(row.labels):
        prompt = row.input_ids[:start]
        # The template's line feed behind the end of a turn is learned as well, and is nobody's answer.
        reference = str(tokenizer.decode(row.labels[start:end], skip_special_tokens=True)).rstrip()
        if reference and any(token != tokenizer.bos_token_id for token in prompt):
            text = row.prompt_text if start == row.prompt_tokens else str(tokenizer.decode(prompt))
            yield Question(tuple(prompt), text, reference, place)


def _learned(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where runs of labels begin and end."""
    start: int | None = None
    for n, label in enumerate([*labels, NO_LABEL]):
        if label != NO_LABEL and start is None:
            start = n
        elif label == NO_LABEL and start is not None:
            yield start, n
            start = None
