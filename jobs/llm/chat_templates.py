"""Checks a base model's chat template before anything is rendered with it: its size, its output, and the time and memory that it takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from jobs.llm.data.turns import Turns
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed, exchange_json
from schema.base import ForwardCompatible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from schema.training import TrainingConfig

MAX_TEMPLATE_CHARACTERS = 262_144  # the largest known templates, with tools and images, have 60,000
TIMEOUT_S = 30.0  # importing transformers on a busy machine takes several seconds
# What a template may add to a conversation: an introduction, and markers around every turn and piece.
MAX_ADDED_CHARACTERS = 1_000_000
MAX_GROWTH = 20

TEST_CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
)

# What rendering raises: the template's own message, or what its operations raise for values that it did not expect.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Conversation(ForwardCompatible):
    """Messages, and the tools that the assistant may call."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> "Conversation":
        """The messages without keys that are null, as templates get them."""
        return cls(messages=[{key: value for key, value in message.items() if value is not None} for message in messages], tools=tools)


class RenderRequest(ForwardCompatible):
    """A template, the variables that transformers gives it, and conversations to render."""

    template: str
    special_tokens: dict[str, Any]  # names of the tokens: text, or a list of texts
    conversations: list[Conversation]


class RenderResponse(ForwardCompatible):
    """What is wrong with the template; None if nothing is."""

    problem: str | None = None


def check_chat_template(
    template: str | None, tokenizer: "PreTrainedTokenizerBase", config: "TrainingConfig", sample: Sequence[Turns | str], folder: Path
) -> None:
    """Render some rows and other conversations with the base's or the caller's template, in a child process. Raises JobFailed.

    Without a template there is nothing to check: the neutral ones are our own.
    """
    if template is None:
        return
    owner = (
        "training_config.chat_template" if config.chat_template is not None else f"the chat template of base model {config.base_model_id}"
    )
    hint = "use another base_model_id" if config.chat_template is None else "send another template"
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        message = f"{owner} has {len(template)} characters; the limit is {MAX_TEMPLATE_CHARACTERS}"
        raise JobFailed("invalid_config", message, hint)
    rows = [turns for turns in sample if isinstance(turns, Turns)]
    conversations = [*map(Conversation.of, TEST_CONVERSATIONS), *(Conversation.of(turns.messages, turns.tools) for turns in rows)]
    request = RenderRequest(template=template, special_tokens=tokenizer.special_tokens_map, conversations=conversations)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        response = exchange_json("chat-template", "jobs.llm.chat_template_process", request, RenderResponse, folder, timeout_s=TIMEOUT_S)
    except SubprocessFailed as error:
        raise JobFailed("invalid_config", f"{owner} cannot be rendered within its limits of time and memory: {error}", hint) from error
    if response.problem:
        raise JobFailed("invalid_config", f"{owner} cannot be used: {response.problem}", hint)


def find_output_problem(text: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the size of a rendered conversation; None if it is plausible."""
    limit = MAX_ADDED_CHARACTERS + MAX_GROWTH * sum(len(str(message)) for message in messages)
    return f"it makes {len(text)} characters of a conversation that may have {limit}" if len(text) > limit else None
