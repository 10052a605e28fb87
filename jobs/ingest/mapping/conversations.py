"""Lists of messages and of tools in other spellings, as the messages and tools of rows.

What is made here is checked by `rows/` as every row is: this changes names, it does not judge.
"""

import json
from collections.abc import Callable, Mapping
from typing import cast

from jobs.ingest.mapping.templates import to_text
from jobs.ingest.rows.values import DECODER, InvalidValue, JsonObject, Number, as_object, describe_type

TOOL_CALLS_ROLE = "tool_calls"  # in RowMapping.roles: an assistant whose content is JSON text of calls
# Roles by the names that exports and ShareGPT's tools have, which are understood where a mapping names the key of roles.
ROLE_SYNONYMS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "system": "system",
    "function_call": "tool_calls",
    "function-call": "tool_calls",
    "tool_call": "tool_calls",
    "tool_calls": "tool_calls",
    "observation": "tool",
    "function_response": "tool",
    "function-response": "tool",
    "tool_response": "tool",
    "tool": "tool",
}
KEPT_KEYS = ("tool_calls", "tool_call_id", "name", "weight", "function_call")
# Keys that change what a message says: a row that has them is refused by the check of its messages, not silently shortened.
TELLING_KEYS = ("role", "content", "images", "image", "audio", "video", "videos", "thinking", "reasoning", "reasoning_content")
EXAMPLE_MESSAGE = 'a message is {"role": ..., "content": ...}'
EXAMPLE_CALL = 'a call is {"name": ..., "arguments": {...}}'
EMPTY = "is empty; drop the row, or fill it in"

OnUnusedKey = Callable[[str], None]


class MessageReader:
    """Reads lists of messages with the given keys and roles."""

    def __init__(self, role_key: str, content_key: str, roles: Mapping[str, str], on_unused_key: OnUnusedKey) -> None:
        """`roles` are the names of roles that are not those of rows."""
        self._role_key = role_key
        self._content_key = content_key
        self._roles = roles
        self._on_unused_key = on_unused_key

    def read(self, value: object, field: str) -> list[JsonObject]:
        """The messages of a list, of an object with such a list as `messages`, of one message, or of JSON text. Raises InvalidValue."""
        if isinstance(value, str):
            value = parse_json(value, field, "a list of messages")
        if isinstance(value, dict):
            wrapped = cast(JsonObject, value).get("messages")
            value = wrapped if isinstance(wrapped, list) else [cast(JsonObject, value)]
        if value is None or value == []:
            raise InvalidValue(field, EMPTY, "empty")
        if not isinstance(value, list):
            raise InvalidValue(field, f"is {describe_type(value)}; it must be a list of messages, or its JSON text", "wrong_type")
        calls = _PendingCalls()
        return [self._convert(message, f"{field}[{index}]", calls) for index, message in enumerate(cast(list[object], value))]

    def _convert(self, value: object, field: str, calls: "_PendingCalls") -> JsonObject:
        message = as_object(value, field, EXAMPLE_MESSAGE)
        converted: JsonObject = {}
        if self._role_key in message:
            role = message[self._role_key]
            converted["role"] = self._roles.get(role, self._roles.get(role.casefold(), role)) if isinstance(role, str) else role
        if self._content_key in message:
            content = message[self._content_key]
            converted["content"] = to_text(content, field, self._content_key) if isinstance(content, Number | bool) else content
        if len(converted) < len(message):
            self._add_other_keys(message, converted)
        match converted.get("role"):
            case "assistant" | "tool_calls":
                _write_calls(converted, field, calls)
            case "tool" | "function":
                converted["role"] = "tool"
                calls.answer(converted)
        return converted

    def _add_other_keys(self, message: JsonObject, converted: JsonObject) -> None:
        for key, inner in message.items():
            if key in (self._role_key, self._content_key) or inner is None:
                continue
            if key == "weight" and converted.get("role") != "assistant" and isinstance(inner, Number) and float(inner.literal) == 0:
                continue  # what is true of every message that is not an answer
            if key in KEPT_KEYS or key in TELLING_KEYS:
                converted[key] = inner
            else:
                self._on_unused_key(key)


class _PendingCalls:
    """The calls of a conversation that no tool message has answered, so that calls and answers without ids get some."""

    def __init__(self) -> None:
        self._made = 0
        self._pending: list[tuple[object, object]] = []  # ids and names of functions

    def make_id(self) -> str:
        self._made += 1
        return f"call_{self._made}"

    def ask(self, tool_calls: list[object]) -> None:
        """Remember the calls of an assistant message, which begin anew."""
        self._pending = []
        for call in tool_calls:
            if isinstance(call, dict):
                function = cast(JsonObject, call).get("function")
                name = cast(JsonObject, function).get("name") if isinstance(function, dict) else None
                self._pending.append((cast(JsonObject, call).get("id"), name))

    def answer(self, message: JsonObject) -> None:
        """Give a tool message the id of the call that it answers, unless it has one."""
        if "tool_call_id" not in message:
            named = [pending for pending in self._pending if pending[1] == message.get("name")]
            message["tool_call_id"] = next(iter(named or self._pending), (f"call_{max(1, self._made)}", None))[0]
        self._pending = [pending for pending in self._pending if pending[0] != message["tool_call_id"]]


def _write_calls(message: JsonObject, field: str, calls: _PendingCalls) -> None:
    """Write the calls of an assistant in the form of rows."""
    if message["role"] == TOOL_CALLS_ROLE:
        listed = _parse_calls(message.get("content"), f"{field}.content")
        message |= {"role": "assistant", "content": "", "tool_calls": [_make_call(call, calls) for call in listed]}
    elif "function_call" in message and "tool_calls" not in message:  # OpenAI's older form
        call = as_object(message.pop("function_call"), f"{field}.function_call", EXAMPLE_CALL)
        message["tool_calls"] = [_make_call(call, calls)]
    if isinstance(tool_calls := message.get("tool_calls"), list):
        calls.ask(cast(list[object], tool_calls))


def _parse_calls(content: object, field: str) -> list[JsonObject]:
    value = parse_json(content, field, f"calls; {EXAMPLE_CALL}") if isinstance(content, str) else content
    listed = cast(list[object], value) if isinstance(value, list) else [value]
    return [as_object(call, field, EXAMPLE_CALL) for call in listed]


def _make_call(call: JsonObject, calls: _PendingCalls) -> JsonObject:
    if "function" in call:  # it has the form of rows, perhaps without an id
        return {"id": calls.make_id(), "type": "function", **call}
    return {"id": calls.make_id(), "type": "function", "function": {"arguments": {}, **call}}


def read_tools(value: object, field: str) -> list[object]:
    """The tools of a list of tools or of functions, or of its JSON text; none for an empty value. Raises InvalidValue."""
    if isinstance(value, str):
        value = parse_json(value, field, "a list of tools") if value.strip() else None
    if value is None:
        return []
    listed = cast(list[object], value) if isinstance(value, list) else [value]
    return [_wrap_function(tool) for tool in listed]


def _wrap_function(tool: object) -> object:
    """A function without its envelope gets one."""
    if isinstance(tool, dict) and "name" in tool and "function" not in tool:
        function = {key: inner for key, inner in cast(JsonObject, tool).items() if key != "type"}
        return {"type": "function", "function": function}
    return cast(object, tool)


def parse_json(text: str, field: str, expected: str) -> object:
    """The value of JSON text in a cell or in a message. Raises InvalidValue."""
    if not text.strip():
        raise InvalidValue(field, EMPTY, "empty")
    try:
        return cast(object, DECODER.decode(text.strip()))
    except InvalidValue as error:
        raise InvalidValue(field, f"{error.field} {error.reason}".strip(), "not_json") from error
    except json.JSONDecodeError as error:
        advice = "; this is how Python prints it: write it with json.dumps" if text.lstrip()[:3] in ("[{'", "{'r", "{'f") else ""
        reason = f"is not JSON at character {error.pos + 1}: {error.msg}; it must be JSON text of {expected}{advice}"
        raise InvalidValue(field, reason, "not_json") from error
    except RecursionError as error:
        raise InvalidValue(field, f"is nested too deeply; it must be JSON text of {expected}", "not_json") from error
