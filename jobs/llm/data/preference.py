"""Tokenizes preference rows; prompts and answers are split as in every other trainer.

preference           two answers to one prompt: the chosen one and the rejected one
unpaired_preference  one answer, and whether it is good
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.llm.data.tokenize import RowTokenizer, TokenizedExample


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, each a row of prompt and answer with labels on the answer."""

    chosen: TokenizedExample
    rejected: TokenizedExample


@dataclass(frozen=True)
class UnpairedExample:
    """An answer with its prompt, and whether it is good."""

    row: TokenizedExample
    is_good: bool


@dataclass
class TokenizedPreferenceSplit:
    """The pairs to learn from, and the numbers of truncated and dropped pairs."""

    rows: Sequence[PreferencePair]
    truncated: int = 0  # pairs with an answer longer than the maximum length
    dropped: int = 0  # pairs with an answer cut away entirely, or with two equal answers after cutting


@dataclass
class TokenizedUnpairedSplit:
    """The answers to learn from, and the numbers of truncated and dropped ones."""

    rows: Sequence[UnpairedExample]
    truncated: int = 0
    dropped: int = 0


def tokenize_pairs(rows: Iterable[dict[str, Any]], row_tokenizer: RowTokenizer, max_length: int) -> TokenizedPreferenceSplit:
    """Both answers of every preference row, each cut to `max_length` tokens. Raises JobFailed."""
    kept: list[PreferencePair] = []
    truncated = dropped = 0
    for row in rows:
        answers = [row_tokenizer.tokenize({**row, "completion": row[name]}, "prompt_completion") for name in ("chosen", "rejected")]
        truncated += any(len(answer.input_ids) > max_length for answer in answers)
        chosen, rejected = (answer.truncate(max_length) for answer in answers)
        if chosen.has_labels and rejected.has_labels and chosen.input_ids != rejected.input_ids:
            kept.append(PreferencePair(chosen, rejected))
        else:
            dropped += 1
    return TokenizedPreferenceSplit(kept, truncated, dropped)


def tokenize_unpaired(rows: Iterable[dict[str, Any]], row_tokenizer: RowTokenizer, max_length: int) -> TokenizedUnpairedSplit:
    """Every answer with its flag, cut to `max_length` tokens. Raises JobFailed."""
    kept: list[UnpairedExample] = []
    truncated = dropped = 0
    for row in rows:
        answer = row_tokenizer.tokenize(row, "prompt_completion")
        truncated += len(answer.input_ids) > max_length
        answer = answer.truncate(max_length)
        if answer.has_labels:
            kept.append(UnpairedExample(answer, bool(row["label"])))
        else:
            dropped += 1
    return TokenizedUnpairedSplit(kept, truncated, dropped)


def split_pairs(pairs: TokenizedPreferenceSplit) -> TokenizedUnpairedSplit:
    """The answers of pairs with their flags: all chosen ones, then all rejected ones."""
    chosen = [UnpairedExample(pair.chosen, True) for pair in pairs.rows]
    rejected = [UnpairedExample(pair.rejected, False) for pair in pairs.rows]
    return TokenizedUnpairedSplit(chosen + rejected, pairs.truncated, pairs.dropped)
