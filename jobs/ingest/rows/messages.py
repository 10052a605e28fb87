"""Messages in rows: their roles, content, calls and weights, and the order of turns, which every chat template accepts.

What is stored is what chat templates read. The content of a message is a string, empty beside calls where there was none, or a list of
parts if one is an image. A message of role `developer` is stored as one of `system`. Weight 1 is not stored: every message has it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NotRequired, TypedDict, cast

from jobs.ingest.rows.images import is_image_part, normalize_image_part
from jobs.ingest.rows.tools import ToolCall, parse_call_id, parse_function_name, parse_tool_calls
from jobs.ingest.rows.values import (
    InvalidValue,
    JsonObject,
    Number,
    as_object,
    check_keys,
    check_text,
    describe_type,
    is_json_safe,
    join_names,
    json_safe,
    preview,
    suggest,
)

Part = dict[str, str]
Values = list[object]
LastRole = Literal["user", "assistant"]


class Message(TypedDict):
    """A checked message, as it is stored."""

    role: str
    content: str | list[Part]
    tool_calls: NotRequired[list[ToolCall]]  # of an assistant
    weight: NotRequired[Literal[0]]  # of an assistant: the message is not learned
    tool_call_id: NotRequired[str]  # of a tool
    name: NotRequired[str]  # of a tool


MAX_MESSAGES = 1000
ROLES = ("system", "developer", "user", "assistant", "tool")
PLAIN_KEYS = ("role", "content")
KEYS_BY_ROLE = {
    "system": PLAIN_KEYS,
    "user": PLAIN_KEYS,
    "assistant": (*PLAIN_KEYS, "tool_calls", "weight"),
    "tool": (*PLAIN_KEYS, "tool_call_id", "name"),
}
# Exports of tables and of API clients write null for what a message does not have.
NULLABLE_KEYS = ("tool_calls", "weight", "tool_call_id", "name", "function_call", "refusal", "audio")
ADVICE_BY_KEY = {
    "name": "; a chat template has no place for it",
    "weight": "; it is for assistant messages",
    "tool_calls": "; they are for assistant messages",
    "tool_call_id": "; it is for tool messages",
    "function_call": "; it is OpenAI's older form: write tool_calls",
}
TURN_ORDER_RULE = (
    "after one optional system message, user and assistant take turns, and user begins; "
    "tool messages answer the tool_calls of the assistant message before them"
)
TEXT_PART_TYPES = ("text", "input_text")
WEIGHTS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # by how JSON writes them


def parse_conversation(value: object, field: str, *, last_role: LastRole, has_weights: bool = False) -> list[Message]:
    """Messages whose order every chat template accepts. Raises InvalidValue.

    With last role `user` a tool message may be the last too. `has_weights`: whether messages may have weights.
    """
    messages = parse_messages(value, field, has_weights=has_weights)
    first_turn = 1 if messages[0]["role"] == "system" else 0
    expected = "user"
    calls: dict[str, str] = {}  # those without an answer: the function of each, by its id
    answered: set[str] = set()
    for index in range(first_turn, len(messages)):
        message = messages[index]
        if message["role"] != expected:
            rule = f"{_describe_calls(calls)} without an answer" if calls else TURN_ORDER_RULE
            raise InvalidValue(f"{field}[{index}].role", f"is '{message['role']}'; it must be '{expected}': {rule}", "role_order")
        if expected == "assistant":
            calls = {call["id"]: call["function"]["name"] for call in message.get("tool_calls", [])}
            answered = set()
            expected = "tool" if calls else "user"
        elif expected == "tool":
            _answer_call(message, f"{field}[{index}]", calls, answered)
            expected = "tool" if calls else "assistant"
        else:
            expected = "assistant"
    _check_last_message(messages, field, last_role, calls)
    return messages


def is_plain_conversation(value: Any) -> bool:  # noqa: ANN401  # whatever JSON has
    """Whether a value surely is what `parse_conversation` returns for it, with the last role `assistant`: nearly every conversation."""
    if type(value) is not list or not 1 <= len(value) <= MAX_MESSAGES:
        return False
    expected = ""
    for message in value:
        if type(message) is not dict or tuple(message) != PLAIN_KEYS:
            return False
        role, content = message.values()
        if type(content) is not str or not content or content.isspace() or not is_json_safe(content):
            return False
        if role == (expected or "user"):
            expected = "assistant" if role == "user" else "user"
        elif not expected and role == "system":
            expected = "user"
        else:
            return False
    return expected == "user" and value[-1]["role"] == "assistant"


def parse_messages(value: object, field: str, *, has_weights: bool = False) -> list[Message]:
    """A list of messages in any order. Raises InvalidValue."""
    if not isinstance(value, list):
        raise InvalidValue(field, f"is {describe_type(value)}; it must be a list of messages", "wrong_type")
    messages = cast(Values, value)
    if not 1 <= len(messages) <= MAX_MESSAGES:
        code = "too_many" if messages else "empty"
        raise InvalidValue(field, f"has {len(messages)} messages; it must have 1 to {MAX_MESSAGES}", code)
    return [_parse_message(message, f"{field}[{index}]", has_weights=has_weights) for index, message in enumerate(messages)]


def iter_image_parts(messages: Sequence[Message], field: str) -> Iterator[tuple[str, str]]:
    """The images of messages, each with its place."""
    for index, message in enumerate(messages):
        if isinstance(message["content"], list):
            for part_index, part in enumerate(message["content"]):
                if part["type"] == "image":
                    yield f"{field}[{index}].content[{part_index}]", part["image"]


def iter_calls(messages: Sequence[Message], field: str) -> Iterator[tuple[str, ToolCall]]:
    """The calls of messages, each with its place."""
    for index, message in enumerate(messages):
        for call_index, call in enumerate(message.get("tool_calls", [])):
            yield f"{field}[{index}].tool_calls[{call_index}]", call


def _answer_call(message: Message, field: str, calls: dict[str, str], answered: set[str]) -> None:
    """Move the call that a tool message answers from `calls` to `answered`. Raises InvalidValue."""
    call_id = message.get("tool_call_id", "")
    if call_id in answered:
        raise InvalidValue(f"{field}.tool_call_id", f"is {preview(call_id)}, which an earlier tool message answers", "call_mismatch")
    if call_id not in calls:
        reason = f"is {preview(call_id)}; the assistant message before has {_describe_calls(calls)}"
        raise InvalidValue(f"{field}.tool_call_id", reason, "call_mismatch")
    function = calls.pop(call_id)
    answered.add(call_id)
    if message.get("name", function) != function:
        reason = f"is {preview(message.get('name', ''))}, but {preview(call_id)} calls {preview(function)}"
        raise InvalidValue(f"{field}.name", reason, "call_mismatch")


def _describe_calls(calls: dict[str, str]) -> str:
    return f"{'the call' if len(calls) == 1 else 'the calls'} {join_names([preview(call_id) for call_id in list(calls)[:3]])}"


def _check_last_message(messages: list[Message], field: str, last_role: LastRole, calls: dict[str, str]) -> None:
    role = messages[-1]["role"]
    if role == "tool" and calls:
        reason = f"ends with {_describe_calls(calls)} without an answer; each call needs a tool message"
        raise InvalidValue(field, reason, "call_mismatch")
    if role != last_role and not (role == "tool" and last_role == "user"):
        expected = "'user' or 'tool'" if last_role == "user" else f"'{last_role}'"
        reason = f"is '{role}'; the last message must be from {expected}"
        raise InvalidValue(f"{field}[{len(messages) - 1}].role", reason, "role_order")


def _parse_message(value: object, field: str, *, has_weights: bool) -> Message:
    message = as_object(value, field, 'a message is {"role": ..., "content": ...}')
    role = _parse_role(message, field)
    if tuple(message) == PLAIN_KEYS and role != "tool" and isinstance(message["content"], str):  # the fast path, for nearly every message
        return {"role": role, "content": check_text(message["content"], f"{field}.content")}
    message = {key: inner for key, inner in message.items() if inner is not None or key not in NULLABLE_KEYS}
    _check_message_keys(message, role, field)
    calls = parse_tool_calls(message["tool_calls"], f"{field}.tool_calls") if "tool_calls" in message else []
    parsed: Message = {"role": role, "content": _parse_content(message, role, f"{field}.content", has_calls=bool(calls))}
    if calls:
        parsed["tool_calls"] = calls
    if "weight" in message and _parse_weight(message["weight"], f"{field}.weight", has_weights=has_weights) == 0:
        parsed["weight"] = 0
    if role == "tool":
        parsed["tool_call_id"] = parse_call_id(message["tool_call_id"], f"{field}.tool_call_id")
        if "name" in message:
            parsed["name"] = parse_function_name(message["name"], f"{field}.name")
    return parsed


def _parse_role(message: JsonObject, field: str) -> str:
    if "role" not in message:
        raise InvalidValue(f"{field}.role", f"is missing{suggest('role', message)}", "missing_field")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        described = preview(role) if isinstance(role, str) else describe_type(role)
        meant = suggest(role, ROLES) if isinstance(role, str) else ""
        code = "unknown_role" if isinstance(role, str) else "wrong_type"
        raise InvalidValue(f"{field}.role", f"is {described}; known roles: {', '.join(ROLES)}{meant}", code)
    return "system" if role == "developer" else role


def _check_message_keys(message: JsonObject, role: str, field: str) -> None:
    known = KEYS_BY_ROLE[role]
    for key in message:
        if key not in known:
            missing = [name for name in known if name not in message]
            advice = ADVICE_BY_KEY.get(key, "") + (suggest(key, missing) or "; drop it")
            raise InvalidValue(f"{field}.{preview(key)}", f"would not be used: only {join_names(known)} are{advice}", "unused_field")
    for key in ("content", "tool_call_id") if role == "tool" else () if message.get("tool_calls") else ("content",):
        if key not in message:
            raise InvalidValue(f"{field}.{key}", "is missing", "missing_field")


def _parse_content(message: JsonObject, role: str, field: str, *, has_calls: bool) -> str | list[Part]:
    content = message.get("content")
    if isinstance(content, list):
        content = _join_parts(cast(Values, content), role, field)
        if isinstance(content, list):
            return content
    if content is None and has_calls:
        return ""
    if isinstance(content, str) and (has_calls or role == "tool"):  # which may be empty
        return json_safe(content, field)
    return check_text(content, field)


def _parse_weight(value: object, field: str, *, has_weights: bool) -> int:
    if not has_weights:
        raise InvalidValue(field, "would not be used: weights are for rows of messages; drop it", "unused_field")
    weight = WEIGHTS.get(value.literal) if isinstance(value, Number) else None
    if weight is None:
        described = value.literal[:20] if isinstance(value, Number) else describe_type(value)
        raise InvalidValue(field, f"is {described}; it must be 0, which leaves the message out of the loss, or 1", "wrong_value")
    return weight


def _join_parts(values: Values, role: str, field: str) -> str | list[Part]:
    """The content of a message written in parts: one text if there is no image, else a list."""
    parts = [_parse_part(value, f"{field}[{index}]") for index, value in enumerate(values)]
    first_image = next((index for index, part in enumerate(parts) if part["type"] == "image"), None)
    if first_image is None:
        return "".join(part["text"] for part in parts)
    if role != "user":
        reason = f"is an image in a message of role '{role}'; only 'user' messages may have images"
        raise InvalidValue(f"{field}[{first_image}]", reason, "image_not_allowed")
    return parts


def _parse_part(value: object, field: str) -> Part:
    part = as_object(value, field, 'a part is {"type": "text", "text": "..."}')
    if is_image_part(part):
        return {"type": "image", "image": normalize_image_part(part, field)}
    check_keys(part, field, ("type", "text"))
    if part["type"] not in TEXT_PART_TYPES:
        raise InvalidValue(f"{field}.type", "only 'text' and 'image' parts are supported", "wrong_value")
    text = part["text"]
    if not isinstance(text, str):
        raise InvalidValue(f"{field}.text", f"is {describe_type(text)}; it must be a string", "wrong_type")
    return {"type": "text", "text": json_safe(text, f"{field}.text")}
