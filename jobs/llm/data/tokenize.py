"""Tokenizes the rows of a dataset, with labels on the tokens to learn.

messages           rendered by the chat template; labels on the assistant's messages and their end-of-turn tokens
prompt_completion  labels on the completion and the EOS token
text               labels on the whole text and the EOS token
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.chat_format import ChatFormat
from jobs.llm.chat_templates import TEMPLATE_ERRORS, find_output_problem
from jobs.runtime.errors import JobFailed
from schema.types import DatasetType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # torch's cross_entropy ignores labels of this value

Message = dict[str, Any]
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


def tokenize_split(
    rows: Iterable[dict[str, Any]], dataset_type: DatasetType, row_tokenizer: "RowTokenizer", max_length: int
) -> TokenizedSplit:
    """Tokens and labels of every row, cut to `max_length` tokens."""
    split = TokenizedSplit()
    for row in rows:
        tokens = row_tokenizer.tokenize(row, dataset_type)
        split.truncated += len(tokens.input_ids) > max_length
        tokens = tokens.truncate(max_length)
        if tokens.has_labels:
            split.rows.append(tokens)
        else:
            split.dropped += 1
    return split


@dataclass(frozen=True)
class Turns:
    """A row as a conversation."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None  # that the assistant may call
    first: int  # index of the first message that may be learned


@dataclass(frozen=True)
class RowTokenizer:
    """Turns rows into tokens and labels, the same in every process: it can be pickled, and depends on nothing else."""

    tokenizer: Any  # of transformers; its own chat template is not used
    chat_format: ChatFormat
    # What an image is in a rendered conversation, and the text that replaces it.
    image_text: tuple[str, str] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything besides the tokenizer's vocabulary that the tokens depend on, as JSON values."""
        return {"chat_format": asdict(self.chat_format), "image_text": self.image_text}

    def read_turns(self, row: dict[str, Any], dataset_type: DatasetType) -> Turns | str:
        """The row as a conversation; the prompt of a row that is continued without a template, empty where it has none."""
        match dataset_type:
            case "messages":
                return Turns(row["messages"], row.get("tools"), 0)
            case "prompt_completion" if isinstance(row["prompt"], list):
                return Turns(row["prompt"] + row["completion"], row.get("tools"), len(row["prompt"]))
            case "prompt_completion":
                return str(row["prompt"])
            case "text":
                return ""
            case _:
                raise JobFailed("invalid_data", f"rows of type {dataset_type} have no single answer to learn", "use another trainer_type")

    def tokenize(self, row: dict[str, Any], dataset_type: DatasetType) -> TokenizedExample:
        """Tokens and labels of a whole row. Raises JobFailed."""
        turns = self.read_turns(row, dataset_type)
        if isinstance(turns, Turns):
            text, spans = self._render_conversation(turns)
            return _tokenize_text(text, spans, self.tokenizer, chat=True)
        text = row["text"] if dataset_type == "text" else turns + row["completion"]
        return _tokenize_text(text, [(len(turns), len(text))], self.tokenizer, chat=False)

    def tokenize_prompt(self, prompt: str | list[Message]) -> TokenizedExample:
        """The prompt as tokens without labels: messages up to the start of the assistant's turn. Raises JobFailed."""
        if isinstance(prompt, str):
            row = self.tokenize({"text": prompt}, "text")
            ids = row.input_ids[:-1]  # without the end-of-text token
            return TokenizedExample(ids, [IGNORE_INDEX] * len(ids), prompt, len(ids))
        with_empty_completion = {"prompt": prompt, "completion": [{"role": "assistant", "content": ""}]}
        row = self.tokenize(with_empty_completion, "prompt_completion")
        ids = row.input_ids[: row.prompt_tokens]
        return TokenizedExample(ids, [IGNORE_INDEX] * len(ids), row.prompt_text, len(ids))

    def _render_conversation(self, turns: Turns) -> tuple[str, list[Span]]:
        """A conversation as text, and the spans of the assistant's messages from the first on, with their end of turn.

        Rendering the conversation up to a turn gives the turn's position. That requires a template that never changes what it rendered
        before: some remove the reasoning of earlier turns, or mark only the last turn, which would misplace the labels.
        """
        messages = turns.messages
        text = self._apply_template(messages, add_generation_prompt=False)
        spans: list[Span] = []
        for n in range(turns.first, len(messages)):
            if messages[n]["role"] == "assistant":
                prefix = self._apply_template(messages[:n], add_generation_prompt=True)
                with_answer = self._apply_template(messages[: n + 1], add_generation_prompt=False)
                if not (with_answer.startswith(prefix) and text.startswith(with_answer)):
                    hint = "send every answer as a separate row (prompt and completion), or use a base model with another chat template"
                    raise JobFailed(
                        "invalid_config", "the base model's chat template changes earlier turns, so the answers cannot be labeled", hint
                    )
                spans.append((len(prefix), len(with_answer)))
        return text, spans

    def _apply_template(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        template = self.chat_format.template
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TEMPLATE_ERRORS as error:  # often the template's own message, such as: System role not supported
            roles = ", ".join(message["role"] for message in messages) or "none"
            hint = "use roles that the base model's chat template accepts, or another base model"
            raise JobFailed("invalid_data", f"the base model's chat template rejects the roles {roles}: {error}", hint) from error
        if problem := find_output_problem(text, messages):
            raise JobFailed("invalid_config", f"the base model's chat template cannot be used: {problem}", "use another base_model_id")
        return text.replace(*self.image_text) if self.image_text else text


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
