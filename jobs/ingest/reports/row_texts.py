"""The texts of a stored row: what a model reads, what it learns, and what a person wrote in it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]  # as a split has it, after JSON

ANSWER_COLUMNS = ("completion", "chosen", "rejected")


class RowTexts(NamedTuple):
    """A row without its form. What a row does not have is empty."""

    system: str | None  # None without a system message
    prompt: str  # the last message before the answer
    answer: str  # the last answer; of a pair the chosen one
    spoken: tuple[str, ...]  # every text besides the system message
    columns: tuple[str, ...] = ()  # texts that only graders read

    @property
    def conversation(self) -> str:
        """Everything besides the system message, which many rows share."""
        return "\n".join(self.spoken)

    @property
    def everything(self) -> str:
        """All texts."""
        return "\n".join(filter(None, (self.system, *self.spoken, *self.columns)))

    @property
    def characters(self) -> int:
        """Of all texts that a model reads or learns."""
        return len(self.system or "") + sum(map(len, self.spoken))


def read_texts(row: Row) -> RowTexts:
    """The texts of a row of any type of dataset."""
    if "text" in row and "messages" not in row:
        return RowTexts(None, "", "", (str(row["text"]),))
    if "messages" in row:
        messages = list(row["messages"])
        spoken = [text for message in messages if message["role"] != "system" for text in _iter_message_texts(message)]
        answer = messages[-1] if messages[-1]["role"] == "assistant" else {}
        prompt = _find_last_prompt(messages[:-1] if answer else messages)
        return RowTexts(_find_system(messages), prompt, _join(answer), tuple(spoken))
    prompt = row["prompt"]
    answers = [row[name] for name in ANSWER_COLUMNS if name in row]
    spoken = list(_iter_texts(prompt))
    for answer in answers:
        spoken += _iter_texts(answer)
    has_answers = bool(answers)
    columns = () if has_answers else tuple(value for name, value in row.items() if name != "prompt" and isinstance(value, str))
    return RowTexts(
        None if isinstance(prompt, str) else _find_system(prompt),
        prompt if isinstance(prompt, str) else _find_last_prompt(prompt),
        "\n".join(_iter_texts(answers[0])) if has_answers else "",
        tuple(spoken),
        columns,
    )


def _iter_texts(value: str | list[Row]) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        return
    for message in value:
        if message["role"] != "system":
            yield from _iter_message_texts(message)


def _iter_message_texts(message: Row) -> Iterator[str]:
    content = message.get("content") or ""
    if isinstance(content, str):
        if content:
            yield content
    else:
        yield from (part["text"] for part in content if part.get("type") == "text")
    for call in message.get("tool_calls") or ():
        yield from _iter_values(call["function"]["arguments"])


def _iter_values(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _iter_values(item)
    elif isinstance(value, list):
        for item in value:
            yield from _iter_values(item)


def _join(message: Row) -> str:
    return "\n".join(_iter_message_texts(message))


def _find_system(messages: list[Row]) -> str | None:
    return _join(messages[0]) if messages and messages[0]["role"] == "system" else None


def _find_last_prompt(messages: list[Row]) -> str:
    return next((_join(message) for message in reversed(messages) if message["role"] == "user"), "")
