"""Rows of a dataset as tokens and labels: what the model reads, and what it is to learn to say.

messages           the chat template; labels on what the assistant says, its end of turn included
prompt_completion  labels on the completion and the end
text               labels on everything and the end
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime.errors import JobFailed
from schema.types import DatasetType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # torch's cross entropy ignores it

Message = dict[str, str]
Span = tuple[int, int]  # characters of a text, from and to


@dataclass(frozen=True)
class TokenizedExample:
    """One row. `labels` is as long as `input_ids`: the token itself where it is to be learned, else NO_LABEL."""

    input_ids: list[int]
    labels: list[int]
    prompt_text: str
    prompt_tokens: int

    @property
    def has_labels(self) -> bool:
        """There is something to learn: the first token is never a label, for nothing comes before it."""
        return any(label != IGNORE_INDEX for label in self.labels[1:])

    def truncate(self, length: int) -> "TokenizedExample":
        """The first tokens of the row, at most so many."""
        return TokenizedExample(self.input_ids[:length], self.labels[:length], self.prompt_text, min(self.prompt_tokens, length))


@dataclass
class TokenizedSplit:
    """The rows that can be learned from, and how many could not, or not wholly."""

    rows: list[TokenizedExample] = field(default_factory=list)
    truncated: int = 0  # longer than the longest sequence
    dropped: int = 0  # without anything to learn in what was left


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a split, in order."""
    with path.open("rb") as lines:
        for line in lines:
            yield json.loads(line)


def set_default_chat_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Give a tokenizer without a chat template Gemma's own; whether that was done."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = files("trl").joinpath("chat_templates/gemma3.jinja").read_text()
    return True


def tokenize_split(
    rows: Iterator[dict[str, Any]], dataset_type: DatasetType, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TokenizedSplit:
    """Tokens and labels of every row, cut to `max_length` tokens."""
    rendered = TokenizedSplit()
    for row in rows:
        tokens = tokenize_row(row, dataset_type, tokenizer)
        rendered.truncated += len(tokens.input_ids) > max_length
        tokens = tokens.truncate(max_length)
        if tokens.has_labels:
            rendered.rows.append(tokens)
        else:
            rendered.dropped += 1
    return rendered


def tokenize_row(row: dict[str, Any], dataset_type: DatasetType, tokenizer: "PreTrainedTokenizerBase") -> TokenizedExample:
    """Tokens and labels of a whole row. Raises JobFailed."""
    text, spans, chat = _render_row(row, dataset_type, tokenizer)
    return _tokenize_text(text, spans, tokenizer, chat=chat)


def _render_row(row: dict[str, Any], dataset_type: DatasetType, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[Span], bool]:
    """The row as one text, the parts of it that are to be learned, and whether the chat template wrote it."""
    match dataset_type:
        case "messages":
            return *_render_conversation(row["messages"], 0, tokenizer), True
        case "prompt_completion" if isinstance(row["prompt"], list):
            return *_render_conversation(row["prompt"] + row["completion"], len(row["prompt"]), tokenizer), True
        case "prompt_completion":
            text = row["prompt"] + row["completion"]
            return text, [(len(row["prompt"]), len(text))], False
        case "text":
            return row["text"], [(0, len(row["text"]))], False
        case "preference" | "unpaired_preference" | "prompt":
            raise JobFailed("invalid_data", f"rows of the form {dataset_type} have no single answer to learn", "use another trainer_type")


def _render_conversation(messages: list[Message], first: int, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[Span]]:
    """A conversation as text; what the assistant says from message `first` on is to be learned, with its end of turn.

    A turn is found by writing the conversation up to it. That holds only while the template leaves alone what it wrote: some
    drop the thoughts of earlier turns, or sign the last turn alone, and would put the labels in the wrong place.
    """
    text = _apply_chat_template(tokenizer, messages, add_generation_prompt=False)
    spans: list[Span] = []
    for n in range(first, len(messages)):
        if messages[n]["role"] == "assistant":
            before = _apply_chat_template(tokenizer, messages[:n], add_generation_prompt=True)
            until = _apply_chat_template(tokenizer, messages[: n + 1], add_generation_prompt=False)
            if not (until.startswith(before) and text.startswith(until)):
                hint = "send every answer as a row of its own (prompt and completion), or use a base model with another chat template"
                raise JobFailed("invalid_config", "the base model's chat template rewrites earlier turns; no label can be placed", hint)
            spans.append((len(before), len(until)))
    return text, spans


def _apply_chat_template(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:  # the template's own words, such as: System role not supported
        roles = ", ".join(message["role"] for message in messages) or "none"
        hint = "write the rows with the roles that the base model knows, or use another base model"
        raise JobFailed("invalid_data", f"the base model's chat template refuses the roles {roles}: {error.message}", hint) from error


def _tokenize_text(text: str, spans: list[Span], tokenizer: "PreTrainedTokenizerBase", *, chat: bool) -> TokenizedExample:
    """A token is learned when it begins inside a span. A chat template writes its own beginning and ends; other texts get them here."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    labels = [
        token if any(start <= offset[0] < end for start, end in spans) else IGNORE_INDEX
        for token, offset in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    if not chat:
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        ids = [*begin, *ids, tokenizer.eos_token_id]
        labels = [*[IGNORE_INDEX] * len(begin), *labels, tokenizer.eos_token_id]
    first = next((n for n, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    return TokenizedExample(ids, labels, text[: spans[0][0]] if spans else text, first)
