"""Tokenizes the rows of a dataset, with labels on the tokens to learn.

messages           rendered by the chat template; labels on the assistant's messages and their end-of-turn tokens
prompt_completion  the same, with labels on the completion; strings are a user's and an assistant's message, or joined as they are (raw)
text               labels on the whole text and the EOS token
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.llm.chat_format import ChatFormat, make_tools_failure
from jobs.llm.chat_rendering import Span, render
from jobs.llm.data.text_encoder import Offsets, TextEncoder
from jobs.llm.data.turns import Message, Turns, as_messages, read_row
from jobs.runtime.errors import JobFailed
from schema.types import DatasetType

SPACES = re.compile(r"\s*")
IGNORE_INDEX = -100  # torch's cross_entropy ignores labels of this value


@dataclass(frozen=True)
class TokenizedExample:
    """One row. `labels` is as long as `input_ids`: the token itself where it is to be learned, else IGNORE_INDEX.

    `prompt_tokens` counts the tokens before the first answer with labels; `prompt_text` is their text.
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

    rows: Sequence[TokenizedExample]
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
    kept: list[TokenizedExample] = []
    truncated = dropped = 0
    for row in rows:
        tokens = row_tokenizer.tokenize(row, dataset_type)
        truncated += len(tokens.input_ids) > max_length
        tokens = tokens.truncate(max_length)
        if tokens.has_labels:
            kept.append(tokens)
        else:
            dropped += 1
    return TokenizedSplit(kept, truncated, dropped)


@dataclass(frozen=True)
class RowTokenizer:
    """Turns rows into tokens and labels, the same in every process: it can be pickled, and depends on nothing else."""

    tokenizer: Any  # of transformers; its own chat template is not used
    chat_format: ChatFormat
    # What an image is in a rendered conversation, and the text that replaces it.
    image_text: tuple[str, str] | None = None
    train_on_inputs: bool = False  # labels on every token of a conversation after BOS
    last_turn_only: bool = False  # labels on the last answer only

    @property
    def settings(self) -> dict[str, Any]:
        """Everything besides the tokenizer's vocabulary that the tokens depend on, as JSON values."""
        options = {name: getattr(self, name) for name in ("image_text", "train_on_inputs", "last_turn_only")}
        return {"chat_format": asdict(self.chat_format)} | options

    def read_turns(self, row: dict[str, Any], dataset_type: DatasetType) -> Turns | str:
        """The row as a conversation; the prompt of a row that is continued without a template, empty where it has none."""
        return read_row(row, dataset_type, is_raw=self._is_raw)

    def tokenize(self, row: dict[str, Any], dataset_type: DatasetType) -> TokenizedExample:
        """Tokens and labels of a whole row. Raises JobFailed."""
        turns = self.read_turns(row, dataset_type)
        if isinstance(turns, Turns):
            return self._tokenize_conversation(turns)
        if dataset_type == "text":
            return self._tokenize_text(row["text"])
        text = self._encoder.hide_control_tokens(turns + row["completion"])
        ids, offsets = self._encoder.encode(text, [len(turns)] if turns else [])
        labels = _label(ids, offsets, [(len(turns), len(text))])
        bos, eos = self._bos, self.tokenizer.eos_token_id
        return _make_example([*bos, *ids, eos], [*[IGNORE_INDEX] * len(bos), *labels, eos], turns)

    def tokenize_prompt(self, prompt: str | list[Message], tools: list[dict[str, Any]] | None = None) -> TokenizedExample:
        """The prompt as tokens without labels: messages up to the start of the assistant's turn. Raises JobFailed."""
        if self._is_raw and isinstance(prompt, str):
            ids = [*self._bos, *self._encoder.encode(self._encoder.hide_control_tokens(prompt))[0]]
            return TokenizedExample(ids, [IGNORE_INDEX] * len(ids), prompt, len(ids))
        turns = self._hide(Turns(as_messages(prompt, "user"), tools))
        text, _ = self._render(str(self.chat_format.template), turns, add_generation_prompt=True)
        text, _ = self._insert_image_texts(text, [])
        ids = self._encoder.encode(text)[0]
        return TokenizedExample(ids, [IGNORE_INDEX] * len(ids), self._encoder.show_control_tokens(text), len(ids))

    @property
    def _is_raw(self) -> bool:
        return self.chat_format.source == "raw"

    @property
    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        return dict(self.tokenizer.special_tokens_map)

    def _tokenize_text(self, text: str) -> TokenizedExample:
        """A text with BOS and EOS. Control tokens in it are meant where the model is asked with a template, and else stay text."""
        ids, _ = self._encoder.encode(self._encoder.hide_control_tokens(text) if self._is_raw else text)
        if not self._is_raw and self._bos and ids[:1] == self._bos:
            ids = ids[1:]
        last = next((token for token in reversed(ids) if str(self.tokenizer.decode([token])).strip()), None)
        has_end = not self._is_raw and last in self.chat_format.stop_token_ids
        ids = ids if has_end else [*ids, self.tokenizer.eos_token_id]
        return _make_example([*self._bos, *ids], [*[IGNORE_INDEX] * len(self._bos), *ids], "")

    # --- conversations ---

    def _tokenize_conversation(self, turns: Turns) -> TokenizedExample:
        turns = self._hide(turns)
        text, spans = self._render_conversation(turns)
        _check_tools(turns, text, self.chat_format.owner)
        text, spans = self._insert_image_texts(text, spans)
        ids, offsets = self._encoder.encode(text, [start for start, _ in spans], in_pieces=self.chat_format.in_pieces)
        if self.train_on_inputs:
            labels = [IGNORE_INDEX if [token] == self._bos else token for token in ids]
            prompt_end = spans[-1][0] if spans else 0
            prompt_tokens = sum(start < prompt_end for start, _ in offsets)
            return TokenizedExample(ids, labels, self._encoder.show_control_tokens(text[:prompt_end]), prompt_tokens)
        prompt = text[: spans[0][0]] if spans else text
        return _make_example(ids, _label(ids, offsets, spans), self._encoder.show_control_tokens(prompt))

    def _hide(self, turns: Turns) -> Turns:
        messages, tools = self._encoder.hide_control_tokens(turns.messages), self._encoder.hide_control_tokens(turns.tools)
        return Turns(messages, tools, turns.first)

    def _render_conversation(self, turns: Turns) -> tuple[str, list[Span]]:
        """A conversation as text, and the spans to learn: the answers of the assistant, with their end of turn."""
        answers = [n for n, message in enumerate(turns.messages) if message["role"] == "assistant"]
        learned = [n for n in answers if n >= turns.first and turns.messages[n].get("weight") != 0]
        if self.last_turn_only:
            learned = [n for n in learned if n == answers[-1]]
        training_template = self.chat_format.training_template
        if training_template is None:
            return self._find_answers(turns, learned)
        text, marked = self._render(training_template, turns)
        spans = _merge(marked)
        if len(spans) != len(answers):  # a template may write a message as several turns, or several messages as one
            if learned != answers:
                return self._find_answers(turns, learned)
        else:
            spans = [span for n, span in zip(answers, spans, strict=True) if n in learned]
        return text, [self._fit_span(text, span) for span in spans]

    def _fit_span(self, text: str, span: Span) -> Span:
        """The span from the end of the generation prompt to the spaces after the end of the turn."""
        start, end = span
        prompt = self.chat_format.generation_prompt
        for position in range(start, min(start + len(prompt), end) + 1):
            if position >= len(prompt) and text.startswith(prompt, position - len(prompt)):
                start = position
                break
        for token in self._stop_tokens:
            if text.startswith(token, end):
                end += len(token)
                break
        spaces = SPACES.match(text, end)
        return start, spaces.end() if spaces else end

    @cached_property
    def _stop_tokens(self) -> list[str]:
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(self.chat_format.stop_token_ids))]

    def _find_answers(self, turns: Turns, learned: list[int]) -> tuple[str, list[Span]]:
        """The conversation and the spans of the learned messages, found by rendering the conversation up to each.

        That requires a template that never changes what it rendered before: some remove the reasoning of earlier turns, or mark only the
        last turn, which would misplace the labels.
        """
        template, messages = str(self.chat_format.template), turns.messages
        text, _ = self._render(self.chat_format.training_template or template, turns)
        spans: list[Span] = []
        for n in learned:
            prefix, _ = self._render(template, Turns(messages[:n], turns.tools), add_generation_prompt=True)
            is_last = n + 1 == len(messages)
            with_answer = text if is_last else self._render(template, Turns(messages[: n + 1], turns.tools))[0]
            if not (with_answer.startswith(prefix) and text.startswith(with_answer)):
                message = f"{self.chat_format.owner} changes earlier turns, so the answers cannot be labeled"
                hint = "send every answer as a separate row (prompt and completion), or send training_config.chat_template"
                raise JobFailed("invalid_config", message, hint)
            spans.append((len(prefix), len(with_answer)))
        return text, spans

    def _render(self, template: str, turns: Turns, *, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        return render(
            template,
            turns.messages,
            turns.tools,
            self._special_tokens,
            owner=self.chat_format.owner,
            content_parts=self.chat_format.content_parts,
            add_generation_prompt=add_generation_prompt,
        )

    def _insert_image_texts(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        if self.image_text is None:
            return text, spans
        token, replacement = self.image_text
        growth = len(replacement) - len(token)
        moved = [tuple(position + growth * text.count(token, 0, position) for position in span) for span in spans]
        return text.replace(token, replacement), [(start, end) for start, end in moved]


def _check_tools(turns: Turns, text: str, owner: str) -> None:
    """Raise JobFailed for a template that does not render tools, or calls of them."""
    calls = [call for message in turns.messages for call in message.get("tool_calls") or []]
    names = [tool.get("function", tool).get("name") for tool in [*(turns.tools or []), *calls]]
    if missing := next((str(name) for name in names if str(name) not in text), None):
        raise make_tools_failure(owner, f"the calls or the description of {missing}")


def _merge(spans: list[Span]) -> list[Span]:
    """Spans without gaps become one."""
    merged: list[Span] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        elif end > start:
            merged.append((start, end))
    return merged


def _label(ids: list[int], offsets: Offsets, spans: list[Span]) -> list[int]:
    """The tokens that start inside a span, else IGNORE_INDEX."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        first, after = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
        labels[first:after] = ids[first:after]
    return labels


def _make_example(ids: list[int], labels: list[int], prompt_text: str) -> TokenizedExample:
    first = next((n for n, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    return TokenizedExample(ids, labels, prompt_text, first)
