"""Rows that say which answer is the better one, as tokens and labels; a chat is read as by every other trainer.

preference           two answers to one prompt: the chosen one, and the rejected one
unpaired_preference  one answer, and whether it is good
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobs.data.render import Message, TokenRow, tokens_of
from schema.words import DatasetType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each a row with the prompt before it and labels on the answer."""

    chosen: TokenRow
    rejected: TokenRow


@dataclass(frozen=True)
class JudgedRow:
    """An answer with its prompt, and whether it is good."""

    row: TokenRow
    is_good: bool


@dataclass
class RenderedPairs:
    """The pairs that can be learned from, and how many could not, or not wholly."""

    rows: list[Pair] = field(default_factory=list)
    cut: int = 0  # an answer is longer than the longest sequence
    dropped: int = 0  # an answer is wholly cut away, or both are the same in what was left


@dataclass
class RenderedJudged:
    """The same for answers that are judged one by one."""

    rows: list[JudgedRow] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0


def render_pairs(rows: Iterable[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> RenderedPairs:
    """Both answers of every preference row, each cut to `max_length` tokens. Raises JobFailed."""
    rendered = RenderedPairs()
    for row in rows:
        answers = [_answer(row["prompt"], row[name], tokenizer) for name in ("chosen", "rejected")]
        rendered.cut += any(len(answer.input_ids) > max_length for answer in answers)
        chosen, rejected = (answer.cut_to(max_length) for answer in answers)
        if chosen.teaches and rejected.teaches and chosen.input_ids != rejected.input_ids:
            rendered.rows.append(Pair(chosen, rejected))
        else:
            rendered.dropped += 1
    return rendered


def render_judged(
    rows: Iterable[dict[str, Any]], dataset_type: DatasetType, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> RenderedJudged:
    """Every answer with its judgement, cut to `max_length` tokens; of a pair, the chosen answers and then the rejected ones."""
    if dataset_type == "preference":
        pairs = render_pairs(rows, tokenizer, max_length)
        judged = [JudgedRow(pair.chosen, True) for pair in pairs.rows] + [JudgedRow(pair.rejected, False) for pair in pairs.rows]
        return RenderedJudged(judged, pairs.cut, pairs.dropped)
    rendered = RenderedJudged()
    for row in rows:
        answer = _answer(row["prompt"], row["completion"], tokenizer)
        rendered.cut += len(answer.input_ids) > max_length
        answer = answer.cut_to(max_length)
        if answer.teaches:
            rendered.rows.append(JudgedRow(answer, bool(row["label"])))
        else:
            rendered.dropped += 1
    return rendered


def _answer(prompt: str | list[Message], completion: str | list[Message], tokenizer: "PreTrainedTokenizerBase") -> TokenRow:
    return tokens_of({"prompt": prompt, "completion": completion}, "prompt_completion", tokenizer)
