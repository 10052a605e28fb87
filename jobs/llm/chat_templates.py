"""Checks a base model's chat template before anything is rendered with it: its size, its output, and the time and memory that it takes."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed, exchange_json
from schema.base import ForwardCompatible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE_CHARACTERS = 262_144  # the largest known templates, with tools and images, have 60,000
TIMEOUT_S = 30.0  # importing transformers on a busy machine takes several seconds
# What a template may add to a conversation: an introduction, and markers around every turn and piece.
MAX_ADDED_CHARACTERS = 1_000_000
MAX_GROWTH = 20

ROWS_RENDERED = 16  # of each split
MAX_ROW_CHARACTERS = 65_536  # longer rows are not among them
CONVERSATION_FIELDS = ("messages", "prompt", "completion", "chosen", "rejected")
TEST_CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
)

# What rendering raises: the template's own message, or what its operations raise for values that it did not expect.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class RenderRequest(ForwardCompatible):
    """A template, the variables that transformers gives it, and conversations to render."""

    template: str
    special_tokens: dict[str, Any]  # names of the tokens: text, or a list of texts
    conversations: list[list[dict[str, Any]]]


class RenderResponse(ForwardCompatible):
    """What is wrong with the template; None if nothing is."""

    problem: str | None = None


def check_chat_template(tokenizer: "PreTrainedTokenizerBase", base_model_id: str, splits: Iterable[Path], folder: Path) -> None:
    """Render some rows and other conversations with the tokenizer's chat template, in a child process. Raises JobFailed."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, and none is the default
        raise _make_failure(base_model_id, "has no default") from error
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise _make_failure(base_model_id, f"has {len(template)} characters; the limit is {MAX_TEMPLATE_CHARACTERS}")
    request = RenderRequest(
        template=template,
        special_tokens=tokenizer.special_tokens_map,
        conversations=[*TEST_CONVERSATIONS, *_sample_conversations(splits)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        response = exchange_json("chat-template", "jobs.llm.chat_template_process", request, RenderResponse, folder, timeout_s=TIMEOUT_S)
    except SubprocessFailed as error:
        raise _make_failure(base_model_id, f"cannot be rendered within its limits of time and memory: {error}") from error
    if response.problem:
        raise _make_failure(base_model_id, f"cannot be used: {response.problem}")


def find_output_problem(text: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the size of a rendered conversation; None if it is plausible."""
    limit = MAX_ADDED_CHARACTERS + MAX_GROWTH * sum(len(str(message)) for message in messages)
    return f"it makes {len(text)} characters of a conversation that may have {limit}" if len(text) > limit else None


def _sample_conversations(splits: Iterable[Path]) -> Iterator[list[dict[str, Any]]]:
    for path in splits:
        with path.open(encoding="utf-8") as lines:
            for line in islice(lines, ROWS_RENDERED):
                if len(line) <= MAX_ROW_CHARACTERS:
                    row = json.loads(line)
                    yield from (row[field] for field in CONVERSATION_FIELDS if isinstance(row.get(field), list))


def _make_failure(base_model_id: str, problem: str) -> JobFailed:
    return JobFailed("invalid_config", f"the chat template of base model {base_model_id} {problem}", "use another base_model_id")
