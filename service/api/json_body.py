"""JSON bodies: read by one parser, within limits, before anything is validated.

Python's own parser accepts NaN, infinity, half surrogate pairs and any nesting until the stack ends. None of them can be stored.
"""

import json
import re
from typing import Any

from fastapi import Request
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from schema.json_limits import BODY_LIMITS, JsonProblem, find_json_problem

LARGE_NUMBER = re.compile(rb"[0-9]{19}|[eE][+-]?[0-9]{3}")  # an integer beyond 64 bits, or a float that may be infinite


class MalformedBody(HTTPException):
    """The body is JSON that cannot be stored. An HTTPException, because FastAPI makes a 400 of every other error of reading a body."""

    def __init__(self, problem: JsonProblem) -> None:
        super().__init__(422, problem.reason)
        self.param = ".".join(map(str, problem.path)) or None


class JsonRequest(Request):
    """A request whose JSON body is checked when it is read."""

    # Any: what the caller sent; the endpoint's model validates it.
    async def json(self) -> Any:  # noqa: ANN401
        """The parsed body. Raises MalformedBody, and JSONDecodeError for what is not JSON."""
        if not hasattr(self, "_json"):  # as Starlette's own method, which this one replaces
            self._json = parse_body(await self.body())
        return self._json


def parse_body(body: bytes) -> Any:  # noqa: ANN401  # as above
    """The parsed body. Raises MalformedBody, and JSONDecodeError for what is not JSON."""
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError:
        parsed = _parse_leniently(body)  # so that the error can name the field
    else:
        if not _may_exceed_limits(body):
            return parsed
    if (problem := find_json_problem(parsed, BODY_LIMITS)) is not None:
        raise MalformedBody(problem)
    return parsed


def _may_exceed_limits(body: bytes) -> bool:
    """Whether the values of valid JSON need a closer look: of most bodies a glance at the text shows that they do not."""
    brackets = body.count(b"{") + body.count(b"[")
    return brackets > BODY_LIMITS.max_depth or len(body) > BODY_LIMITS.max_values or LARGE_NUMBER.search(body) is not None


def _parse_leniently(body: bytes) -> Any:  # noqa: ANN401  # as above
    try:
        return json.loads(body)
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise MalformedBody(JsonProblem((), "the body is not UTF-8")) from error
    except RecursionError as error:
        raise MalformedBody(JsonProblem((), f"the body is nested more than {BODY_LIMITS.max_depth} levels deep")) from error
    except ValueError as error:  # an integer of thousands of digits
        raise MalformedBody(JsonProblem((), "the body has an integer of more than 64 bits")) from error
