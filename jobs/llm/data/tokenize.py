"""Tokenizes the rows of a dataset, with labels on the tokens to learn.

messages           rendered by the chat template; labels on the assistant's messages and their end-of-turn tokens
prompt_completion  labels on the completion and the EOS token
text               labels on the whole text and the EOS token
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.chat_templates import TEMPLATE_ERRORS, find_output_problem
from jobs.runtime.errors import JobFailed
from schema.types import DatasetType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # torch's cross_entropy ignores labels of this value

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"  # the tokens of Gemma's chat template

Message = dict[str, str]
Span = tuple[int, int]  # start and end, in characters of a text


@dataclass(frozen=True)
class TokenizedExample:
    """One row. `labels` is as long as `input_ids`: the token itself where it is to be learned, else IGNORE_INDEX.

    `prompt_tokens` counts the tokens before the first label; `prompt_text` is their text.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_text: str
    prompt_tokens: int

    @property
    def has_labels(self) -> bool:
        """Whether there is something to learn. The first token does not count: no token predicts it."""
        return any(label != IGNORE_INDEX for label in self.labels[1:])

    @property
    def label_count(self) -> int:
        """The number of tokens to learn."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    def truncate(self, length: int) -> "TokenizedExample":
        """The row cut to at most `length` tokens."""
        return TokenizedExample(self.input_ids[:length], self.labels[:length], self.prompt_text, min(self.prompt_tokens, length))


@dataclass
class TokenizedSplit:
    """The rows to learn from, and the numbers of truncated and dropped rows."""

    rows: list[TokenizedExample] = field(default_factory=list)
    truncated: int = 0  # rows longer than the maximum length
    dropped: int = 0  # rows without labels within the maximum length


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a split, in order."""
    with path.open("rb") as lines:
        for line in lines:
            yield json.loads(line)


def set_default_chat_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Set Gemma's chat template on a tokenizer without one; returns whether it was set."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = files("trl").joinpath("chat_templates/gemma3.jinja").read_text()
    return True


def tokenize_split(
    rows: Iterator[dict[str, Any]], dataset_type: DatasetType, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TokenizedSplit:
    """Tokens and labels of every row, cut to `max_length` tokens."""
    split = TokenizedSplit()
    for row in rows:
        tokens = tokenize_row(row, dataset_type, tokenizer)
        split.truncated += len(tokens.input_ids) > max_length
        tokens = tokens.truncate(max_length)
        if tokens.has_labels:
            split.rows.append(tokens)
        else:
            split.dropped += 1
    return split


def tokenize_row(row: dict[str, Any], dataset_type: DatasetType, tokenizer: "PreTrainedTokenizerBase") -> TokenizedExample:
    """Tokens and labels of a whole row. Raises JobFailed."""
    text, spans, chat = _render_row(row, dataset_type, tokenizer)
    return _tokenize_text(text, spans, tokenizer, chat=chat)


def _render_row(row: dict[str, Any], dataset_type: DatasetType, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[Span], bool]:
    """The row as one text, the spans to learn, and whether the chat template rendered it."""
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
        case _:
            raise JobFailed("invalid_data", f"rows of type {dataset_type} have no single answer to learn", "use another trainer_type")


def _render_conversation(messages: list[Message], first: int, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[Span]]:
    """A conversation as text, and the spans of the assistant's messages from message `first` on, with their end of turn.

    Rendering the conversation up to a turn gives the turn's position. That requires a template that never changes what it rendered
    before: some remove the reasoning of earlier turns, or mark only the last turn, which would misplace the labels.
    """
    text = _apply_chat_template(tokenizer, messages, add_generation_prompt=False)
    spans: list[Span] = []
    for n in range(first, len(messages)):
        if messages[n]["role"] == "assistant":
            prefix = _apply_chat_template(tokenizer, messages[:n], add_generation_prompt=True)
            with_answer = _apply_chat_template(tokenizer, messages[: n + 1], add_generation_prompt=False)
            if not (with_answer.startswith(prefix) and text.startswith(with_answer)):
                hint = "send every answer as a separate row (prompt and completion), or use a base model with another chat template"
                raise JobFailed(
                    "invalid_config", "the base model's chat template changes earlier turns, so the answers cannot be labeled", hint
                )
            spans.append((len(prefix), len(with_answer)))
    return text, spans


def _apply_chat_template(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], *, add_generation_prompt: bool) -> str:
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TEMPLATE_ERRORS as error:  # often the template's own message, such as: System role not supported
        roles = ", ".join(message["role"] for message in messages) or "none"
        hint = "use roles that the base model's chat template accepts, or another base model"
        raise JobFailed("invalid_data", f"the base model's chat template rejects the roles {roles}: {error}", hint) from error
    if problem := find_output_problem(text, messages):
        raise JobFailed("invalid_config", f"the base model's chat template cannot be used: {problem}", "use another base_model_id")
    return text


def _tokenize_text(text: str, spans: list[Span], tokenizer: "PreTrainedTokenizerBase", *, chat: bool) -> TokenizedExample:
    """Tokenize a text; a token that starts inside a span gets a label. Texts that are not chats get BOS and EOS tokens here."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    labels = [
        token if any(start <= offset[0] < end for start, end in spans) else IGNORE_INDEX
        for token, offset in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    if not chat:
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        ids = [*bos, *ids, tokenizer.eos_token_id]
        labels = [*[IGNORE_INDEX] * len(bos), *labels, tokenizer.eos_token_id]
    first = next((n for n, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    return TokenizedExample(ids, labels, text[: spans[0][0]] if spans else text, first)
