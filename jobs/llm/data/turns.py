"""Reads rows as conversations, before any template renders them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.runtime.errors import JobFailed
from schema.types import DatasetType

Message = dict[str, Any]

ROWS_SAMPLED = 16  # of each split
MAX_SAMPLED_ROW_CHARACTERS = 65_536  # longer rows are not among them


@dataclass(frozen=True)
class Turns:
    """A row as a conversation."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None  # that the assistant may call
    first: int = 0  # index of the first message that may be learned


def read_row(row: dict[str, Any], dataset_type: DatasetType, *, is_raw: bool) -> Turns | str:
    """A row with one answer as a conversation. Strings are turns of the user and the assistant.

    A row that is continued without a template gives its prompt: a string of a raw row, and the empty string for a text.
    """
    match dataset_type:
        case "messages":
            return Turns(row["messages"], row.get("tools"))
        case "prompt_completion" if is_raw and isinstance(row["prompt"], str):
            return row["prompt"]
        case "prompt_completion":
            prompt = as_messages(row["prompt"], "user")
            return Turns(prompt + as_messages(row["completion"], "assistant"), row.get("tools"), len(prompt))
        case "text":
            return ""
        case _:
            raise JobFailed("invalid_data", f"rows of type {dataset_type} have no single answer to learn", "use another trainer_type")


def as_messages(content: str | list[Message], role: str) -> list[Message]:
    """Messages as they are; a string is one message of that role."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def sample_rows(splits: Iterable[Path], dataset_type: DatasetType, *, is_raw: bool) -> list[Turns | str]:
    """The first rows of each split: conversations, and the texts of rows that are not."""
    return [
        sample
        for path in splits
        for line in _read_first_lines(path)
        for sample in _iter_samples(json.loads(line), dataset_type, is_raw=is_raw)
    ]


def _read_first_lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [line for line in islice(lines, ROWS_SAMPLED) if len(line) <= MAX_SAMPLED_ROW_CHARACTERS]


def _iter_samples(row: dict[str, Any], dataset_type: DatasetType, *, is_raw: bool) -> Iterator[Turns | str]:
    if dataset_type == "text":
        yield str(row["text"])
        return
    if dataset_type == "messages":
        yield Turns(row["messages"], row.get("tools"))
        return
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    for answer in answers or [""]:  # rows of prompts alone have none
        turns = read_row({**row, "completion": answer}, "prompt_completion", is_raw=is_raw)
        yield turns if isinstance(turns, Turns) else turns + str(answer)


def change_calls(turns: Turns) -> Iterator[tuple[str, Turns]]:
    """The conversation with another first call, by what is changed: a template that renders calls renders another text."""
    for n, message in enumerate(turns.messages):
        if not message.get("tool_calls"):
            continue
        first, *others = message["tool_calls"]
        for what, change in (("calls of tools", {"name": "another_tool"}), ("the arguments of calls", {"arguments": {"another": "value"}})):
            changed = {**first, "function": {**first["function"], **change}}
            yield (
                what,
                replace(turns, messages=[*turns.messages[:n], {**message, "tool_calls": [changed, *others]}, *turns.messages[n + 1 :]]),
            )
        return
