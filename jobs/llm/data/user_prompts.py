"""The questions of some rows, as a user asks them: every exported file must give the model the same tokens as the training did."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from jobs.llm.data.tokenize import RowTokenizer, Turns, read_rows
from jobs.llm.trained_model import UserPrompt
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.types import DatasetType

if TYPE_CHECKING:
    from jobs.llm.training_context import TrainingContext

NUM_USER_PROMPTS = 8
ROWS_READ = 64  # of which the first suitable ones are taken
MAX_PROMPT_TOKENS = 2048  # longer ones are not among them: a file reads every prompt when it is verified


def make_user_prompts(training: "TrainingContext") -> tuple[UserPrompt, ...]:
    """The questions of the first held-out rows, or training rows without those. Raises JobFailed for a row that cannot be rendered."""
    path = training.splits.get(EVAL_SPLIT) or training.splits[TRAIN_SPLIT]
    rows = islice(read_rows(path), ROWS_READ)
    return tuple(islice(iter_user_prompts(rows, training.context.spec.dataset.dataset_type, training.row_tokenizer), NUM_USER_PROMPTS))


def iter_user_prompts(rows: Iterable[dict[str, Any]], dataset_type: DatasetType, row_tokenizer: RowTokenizer) -> Iterator[UserPrompt]:
    """The questions of those rows that hold text alone and are not too long.

    Rows that hold the text of a special token are left out: in training it is text, and a program that tokenizes a rendered conversation
    cannot know that.
    """
    special_tokens = _special_token_pattern(row_tokenizer.tokenizer)
    for row in rows:
        if not _has_text_alone(row) or (special_tokens and any(special_tokens.search(text) for text in _iter_texts(row))):
            continue
        prompt = _make_user_prompt(row, dataset_type, row_tokenizer)
        if prompt is not None and prompt.prompt_tokens <= MAX_PROMPT_TOKENS:
            yield prompt


def _make_user_prompt(row: dict[str, Any], dataset_type: DatasetType, row_tokenizer: RowTokenizer) -> UserPrompt | None:
    """The question of a row; None for a row without an answer to learn."""
    if dataset_type == "prompt":
        return _make_question_alone(row, row_tokenizer)
    if dataset_type in ("preference", "unpaired_preference"):
        answer = row["chosen"] if dataset_type == "preference" else row["completion"]
        row, dataset_type = row | {"completion": answer}, "prompt_completion"
    turns, tokens = row_tokenizer.read_turns(row, dataset_type), row_tokenizer.tokenize(row, dataset_type)
    if not isinstance(turns, Turns):
        text = row["text"] if dataset_type == "text" else f"{row['prompt']}{row['completion']}"
        ends_with_eos = tokens.input_ids[-1:] == [row_tokenizer.tokenizer.eos_token_id]
        return UserPrompt((), (), text, tuple(tokens.input_ids), len(tokens.input_ids) - ends_with_eos)
    answers = [n for n in range(turns.first, len(turns.messages)) if _is_learned(turns.messages[n])]
    if not answers or not tokens.has_labels:
        return None
    return UserPrompt(tuple(turns.messages[: answers[0]]), tuple(turns.tools or ()), None, tuple(tokens.input_ids), tokens.prompt_tokens)


def _make_question_alone(row: dict[str, Any], row_tokenizer: RowTokenizer) -> UserPrompt:
    """The question of a row that has no answer: a trainer that generates answers reads it to its end."""
    empty_answer = "" if isinstance(row["prompt"], str) else [{"role": "assistant", "content": ""}]
    turns = row_tokenizer.read_turns(row | {"completion": empty_answer}, "prompt_completion")
    ids = tuple(row_tokenizer.tokenize_prompt(row["prompt"]).input_ids)
    if not isinstance(turns, Turns):
        return UserPrompt((), (), str(row["prompt"]), ids, len(ids))
    return UserPrompt(tuple(turns.messages[: turns.first]), tuple(turns.tools or ()), None, ids, len(ids))


def _is_learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _special_token_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches the text of a token that is not made of ordinary text; None for a tokenizer without one."""
    texts = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _iter_texts(value: Any) -> Iterator[str]:
    """Every text in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _iter_texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _iter_texts(part)


def _has_text_alone(row: Mapping[str, Any]) -> bool:
    messages = [message for name in ("messages", "prompt") if isinstance(row.get(name), list) for message in row[name]]
    return not row.get("images") and all(isinstance(message.get("content"), str | None) for message in messages)
