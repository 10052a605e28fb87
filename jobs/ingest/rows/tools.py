"""Tools in rows, in OpenAI's form: the functions that the model may call, its calls, and the arguments of a call.

A row offers tools in a column of its own, `{"tools": [{"type": "function", "function": {"name", "description", "parameters"}}]}`. A call
is part of an assistant message. Its arguments may be uploaded as a string of JSON, as OpenAI's API writes them, or as an object; they
are stored as an object, which is what chat templates read.
"""

import re
from collections.abc import Iterable
from typing import TypedDict, cast

from jobs.ingest.rows.values import (
    InvalidValue,
    JsonObject,
    as_object,
    check_json,
    check_keys,
    check_text,
    describe_type,
    join_names,
    json_safe,
    parse_object,
    preview,
    suggest,
)
from schema.json_limits import FREE_FORM_LIMITS

MAX_TOOLS = 128  # in a row, as in OpenAI's API
MAX_CALLS = 128  # in a message
MAX_ID_CHARS = 256
# Letters as in OpenAI's API, and the dot that names of packages and of MCP servers have.
FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
EXAMPLE_TOOL = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
EXAMPLE_CALL = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": {...}}}'
# Objects that describe what a function takes and returns: `return` is transformers' name for it, `response` Gemma 4's.
SCHEMA_FIELDS = ("parameters", "return", "response")


class FunctionCall(TypedDict):
    """The function that is called, and with what."""

    name: str
    arguments: JsonObject


class ToolCall(TypedDict):
    """A call in an assistant message. A tool message names its id."""

    id: str
    type: str
    function: FunctionCall


def parse_tools(value: object, field: str) -> list[JsonObject]:
    """The tools that a row offers; none for null or an empty list, which say the same as no column. Raises InvalidValue."""
    if value is None or value == []:
        return []
    if not isinstance(value, list):
        hint = ": write the list itself, not its JSON as a string" if isinstance(value, str) else ""
        raise InvalidValue(field, f"is {describe_type(value)}; it must be a list of tools such as {EXAMPLE_TOOL}{hint}", "wrong_type")
    values = cast(list[object], value)
    if len(values) > MAX_TOOLS:
        raise InvalidValue(field, f"has {len(values):,} tools; at most {MAX_TOOLS}", "too_many")
    tools = [_parse_tool(tool, f"{field}[{index}]") for index, tool in enumerate(values)]
    names: set[str] = set()
    for index, tool in enumerate(tools):
        name = cast(str, cast(JsonObject, tool["function"])["name"])
        if name in names:
            raise InvalidValue(
                f"{field}[{index}].function.name", f"is {preview(name)}, which an earlier tool has; keep one", "repeated_name"
            )
        names.add(name)
    return tools


def get_tool_names(tools: Iterable[JsonObject]) -> tuple[str, ...]:
    """The names of the functions of checked tools."""
    return tuple(cast(str, cast(JsonObject, tool["function"])["name"]) for tool in tools)


def parse_tool_calls(value: object, field: str) -> list[ToolCall]:
    """The calls of an assistant message; none for null or an empty list. Raises InvalidValue."""
    if value is None or value == []:
        return []
    if not isinstance(value, list):
        raise InvalidValue(field, f"is {describe_type(value)}; it must be a list of calls such as {EXAMPLE_CALL}", "wrong_type")
    values = cast(list[object], value)
    if len(values) > MAX_CALLS:
        raise InvalidValue(field, f"has {len(values):,} calls; at most {MAX_CALLS}", "too_many")
    calls = [_parse_call(call, f"{field}[{index}]") for index, call in enumerate(values)]
    ids: set[str] = set()
    for index, call in enumerate(calls):
        if call["id"] in ids:
            reason = f"is {preview(call['id'])}, which another call of this message has"
            raise InvalidValue(f"{field}[{index}].id", reason, "repeated_name")
        ids.add(call["id"])
    return calls


def parse_call_id(value: object, field: str) -> str:
    """The id of a call. Raises InvalidValue."""
    call_id = check_text(value, field)
    if len(call_id) > MAX_ID_CHARS:
        raise InvalidValue(field, f"has {len(call_id):,} characters; at most {MAX_ID_CHARS}", "wrong_name")
    return call_id


def parse_function_name(value: object, field: str) -> str:
    """The name of a function. Raises InvalidValue."""
    name = check_text(value, field)
    if not FUNCTION_NAME.fullmatch(name):
        raise InvalidValue(field, f"is {preview(name)}; a function's name has 1 to 64 letters, digits, '_', '-' and '.'", "wrong_name")
    return name


def _parse_tool(value: object, field: str) -> JsonObject:
    tool = as_object(value, field, f"a tool is {EXAMPLE_TOOL}")
    check_keys(tool, field, ("type", "function"))
    _check_type(tool["type"], f"{field}.type")
    path = f"{field}.function"
    function = as_object(tool["function"], path, f"a tool is {EXAMPLE_TOOL}")
    known = ("name", "description", *SCHEMA_FIELDS, "strict")
    for key in function:
        if key not in known:
            meant = suggest(key, [name for name in known if name not in function]) or "; drop it"
            raise InvalidValue(
                f"{path}.{preview(key)}", f"would not be used: a function has only {join_names(known)}{meant}", "unused_field"
            )
    if "name" not in function:
        raise InvalidValue(f"{path}.name", "is missing", "missing_field")
    stored: JsonObject = {"name": parse_function_name(function["name"], f"{path}.name")}
    if (description := function.get("description")) is not None:
        if not isinstance(description, str):
            raise InvalidValue(f"{path}.description", f"is {describe_type(description)}; it must be a string", "wrong_type")
        stored["description"] = json_safe(description, f"{path}.description")
    for key in SCHEMA_FIELDS:
        if (schema := function.get(key)) is not None:
            stored[key] = as_object(schema, f"{path}.{key}", 'a JSON schema such as {"type": "object", "properties": {...}}')
            check_json(stored[key], f"{path}.{key}", FREE_FORM_LIMITS.max_depth)
    if (strict := function.get("strict")) is not None:
        if not isinstance(strict, bool):
            raise InvalidValue(f"{path}.strict", f"is {describe_type(strict)}; it must be true or false", "wrong_type")
        stored["strict"] = strict
    return {"type": "function", "function": stored}


def _parse_call(value: object, field: str) -> ToolCall:
    call = as_object(value, field, f"a call is {EXAMPLE_CALL}")
    check_keys(call, field, ("id", "type", "function"))
    _check_type(call["type"], f"{field}.type")
    path = f"{field}.function"
    function = as_object(call["function"], path, f"a call is {EXAMPLE_CALL}")
    check_keys(function, path, ("name", "arguments"))
    name = parse_function_name(function["name"], f"{path}.name")
    arguments = _parse_arguments(function["arguments"], f"{path}.arguments")
    return {"id": parse_call_id(call["id"], f"{field}.id"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _parse_arguments(value: object, field: str) -> JsonObject:
    example = 'the arguments are an object such as {"city": "Oslo"}, or its JSON as a string; {} for none'
    arguments = parse_object(value, field, example) if isinstance(value, str) else as_object(value, field, example)
    check_json(arguments, field, FREE_FORM_LIMITS.max_depth)
    return arguments


def _check_type(value: object, field: str) -> None:
    if value != "function":
        described = preview(value) if isinstance(value, str) else describe_type(value)
        raise InvalidValue(field, f"is {described}; only 'function' is supported", "wrong_value")
