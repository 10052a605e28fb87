"""Rows that say which answer is the better one, as tokens and labels; a chat is read as by every other trainer.

preference           two answers to one prompt: the chosen one, and the rejected one
unpaired_preference  one answer, and whether it is good
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobs.llm.data.tokenize import Message, TokenizedExample, tokenize_row
from schema.types import DatasetType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, each a row with the prompt before it and labels on the answer."""

    chosen: TokenizedExample
    rejected: TokenizedExample


@dataclass(frozen=True)
class UnpairedExample:
    """An answer with its prompt, and whether it is good."""

    row: TokenizedExample
    is_good: bool


@dataclass
class TokenizedPreferenceSplit:
    """The pairs that can be learned from, and how many could not, or not wholly."""

    rows: list[PreferencePair] = field(default_factory=list)
    truncated: int = 0  # an answer is longer than the longest sequence
    dropped: int = 0  # an answer is wholly cut away, or both are the same in what was left


@dataclass
class TokenizedUnpairedSplit:
    """The same for answers that are judged one by one."""

    rows: list[UnpairedExample] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0


def tokenize_pairs(rows: Iterable[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> TokenizedPreferenceSplit:
    """Both answers of every preference row, each cut to `max_length` tokens. Raises JobFailed."""
    rendered = TokenizedPreferenceSplit()
    for row in rows:
        answers = [_tokenize_answer(row["prompt"], row[name], tokenizer) for name in ("chosen", "rejected")]
        rendered.truncated += any(len(answer.input_ids) > max_length for answer in answers)
        chosen, rejected = (answer.truncate(max_length) for answer in answers)
        if chosen.has_labels and rejected.has_labels and chosen.input_ids != rejected.input_ids:
            rendered.rows.append(PreferencePair(chosen, rejected))
        else:
            rendered.dropped += 1
    return rendered


def tokenize_unpaired(
    rows: Iterable[dict[str, Any]], dataset_type: DatasetType, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TokenizedUnpairedSplit:
    """Every answer with its judgement, cut to `max_length` tokens; of a pair, the chosen answers and then the rejected ones."""
    if dataset_type == "preference":
        pairs = tokenize_pairs(rows, tokenizer, max_length)
        judged = [UnpairedExample(pair.chosen, True) for pair in pairs.rows] + [
            UnpairedExample(pair.rejected, False) for pair in pairs.rows
        ]
        return TokenizedUnpairedSplit(judged, pairs.truncated, pairs.dropped)
    rendered = TokenizedUnpairedSplit()
    for row in rows:
        answer = _tokenize_answer(row["prompt"], row["completion"], tokenizer)
        rendered.truncated += len(answer.input_ids) > max_length
        answer = answer.truncate(max_length)
        if answer.has_labels:
            rendered.rows.append(UnpairedExample(answer, bool(row["label"])))
        else:
            rendered.dropped += 1
    return rendered


def _tokenize_answer(
    prompt: str | list[Message], completion: str | list[Message], tokenizer: "PreTrainedTokenizerBase"
) -> TokenizedExample:
    return tokenize_row({"prompt": prompt, "completion": completion}, "prompt_completion", tokenizer)
