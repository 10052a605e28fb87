"""Rows whose tools and calls are made to use up the stack, time or memory, or to say two things at once. Each must be refused."""

import json
from collections.abc import Iterator

DEEP = 100_000
ARGUMENTS = b'"ARGUMENTS"'
PARAMETERS = b'"PARAMETERS"'
ROW = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "ARGUMENTS"}}],
            },
            {"role": "tool", "content": "x", "tool_call_id": "1"},
            {"role": "assistant", "content": "x"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": "PARAMETERS"}}],
    }
).encode()


def make_rows() -> Iterator[tuple[str, bytes]]:
    """Uploads of one row, each with what is wrong with it."""
    deep = b'{"a":' * DEEP + b"1" + b"}" * DEEP
    shallow = b'{"a":' * 100 + b"1" + b"}" * 100
    for name, value in (
        ("deep", deep),
        ("a hundred levels of", shallow),
        ("a list of", b"[" * DEEP + b"]" * DEEP),
        ("a number of a million digits in", b'{"a": ' + b"9" * 1_000_000 + b"}"),
        ("infinity in", b'{"a": 1e999}'),
        ("NaN in", b'{"a": NaN}'),
        ("a duplicate field in", b'{"a": 1, "a": 2}'),
        ("half a surrogate in", b'{"a": "\\ud800"}'),
        ("NUL in a name of", b'{"\\u0000": 1}'),
    ):
        yield f"{name} arguments", _fill(arguments=value)
        yield f"{name} arguments in a string", _fill(arguments=json.dumps(value.decode()).encode())
        yield f"{name} parameters", _fill(parameters=value)
    calls = b'{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}'
    yield "a thousand calls of one id", _fill().replace(calls, b", ".join([calls] * 1000))
    tools = b'{"type": "function", "function": {"name": "f", "parameters": {}}}'
    yield "five thousand tools of one name", _fill().replace(tools, b", ".join([tools] * 5000))
    yield "a call of a function that is not offered", _fill().replace(tools, tools.replace(b'"f"', b'"g"'))
    yield "a tool that is named like a path", _fill().replace(b'"name": "f"', b'"name": "../../canary"')
    yield "a result of no call", _fill().replace(b'"tool_call_id": "1"', b'"tool_call_id": "2"')
    yield "a weight that is a list", _fill().replace(b'"content": null', b'"content": null, "weight": [[[]]]')


def make_valid_row() -> bytes:
    """The row that the others are made of: it is accepted."""
    return _fill()


def _fill(arguments: bytes = b"{}", parameters: bytes = b"{}") -> bytes:
    return ROW.replace(ARGUMENTS, arguments).replace(PARAMETERS, parameters)
