"""Renders conversations with a chat template, as transformers does."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.llm.chat_templates import TEMPLATE_ERRORS, find_output_problem
from jobs.runtime.errors import JobFailed

Span = tuple[int, int]  # start and end, in characters of a text

GENERATION_TAG = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
# Keys of stored messages that say how to train, and not what is said.
TRAINING_KEYS = frozenset({"weight"})


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    special_tokens: Mapping[str, Any],
    *,
    owner: str,
    content_parts: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[str, list[Span]]:
    """The conversation as text, and the spans that the template marks as said by the assistant. Raises JobFailed.

    `owner` is what errors call the template. With `content_parts`, strings become parts of text.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    marks = GENERATION_TAG.search(template) is not None
    try:
        rendered, spans = render_jinja_template(
            conversations=[[_prepare(message, content_parts=content_parts) for message in messages]],
            tools=list(tools) if tools else None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marks,
            **special_tokens,
        )
    except TEMPLATE_ERRORS as error:  # often the template's own message, such as: System role not supported
        roles = ", ".join(message["role"] for message in messages) or "none"
        hint = "send rows that the template accepts, another base_model_id, or training_config.chat_template"
        raise JobFailed("invalid_data", f"{owner} rejects the roles {roles}: {error}", hint) from error
    if problem := find_output_problem(rendered[0], [*messages, *(tools or [])]):
        raise JobFailed("invalid_config", f"{owner} cannot be used: {problem}", "use another base_model_id or chat_template")
    return rendered[0], spans[0] if marks else []


def _prepare(message: Mapping[str, Any], *, content_parts: bool) -> dict[str, Any]:
    """Without keys that are null: templates would write `None`. A call of tools without content has an empty one."""
    prepared = {key: value for key, value in message.items() if value is not None and key not in TRAINING_KEYS}
    if prepared.get("tool_calls"):
        prepared.setdefault("content", "")
    if content_parts and isinstance(prepared.get("content"), str):
        prepared["content"] = [{"type": "text", "text": prepared["content"]}]
    return prepared


def remove_generation_tags(template: str) -> str:
    """The template without marks; it renders the same, spaces included."""
    return GENERATION_TAG.sub(lambda tag: "{%" + tag[1] + (" endif " if tag[2] else " if true ") + tag[3] + "%}", template)
