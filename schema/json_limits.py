"""Limits of JSON that a caller or an attempt composed freely: what is stored must be readable again by every parser.

Parsers give up somewhere beyond a hundred levels, many read no integer beyond 64 bits, and neither NaN, infinity nor half a surrogate
pair is JSON.
"""

import math
from dataclasses import dataclass
from typing import Annotated, TypeAlias, cast

from pydantic import AfterValidator, JsonValue
from pydantic_core import PydanticCustomError

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class JsonLimits:
    """How deep and how large a JSON value may be. Each object, list, string, number, boolean and null is one value."""

    max_depth: int  # of objects and lists inside each other
    max_values: int
    max_string_chars: int | None = None


# A JSON schema takes two levels for each level of what it describes. A record adds fewer than ten; pydantic reads up to 200.
FREE_FORM_LIMITS = JsonLimits(max_depth=64, max_values=10_000, max_string_chars=65_536)
# A batch of a thousand events has some 40,000 values.
BODY_LIMITS = JsonLimits(max_depth=100, max_values=200_000)


@dataclass(frozen=True)
class JsonProblem:
    """Why a JSON value cannot be accepted, and where: the keys and indexes that lead there."""

    path: tuple[str | int, ...]
    reason: str


# Where a value is: its parent's place and its own key or index; None for the outermost value.
_Place: TypeAlias = "tuple[_Place, str | int] | None"


def find_json_problem(value: object, limits: JsonLimits) -> JsonProblem | None:
    """The first reason why a parsed JSON value is outside the limits or cannot be stored; None if there is none."""
    if (reason := _describe_scalar_problem(value, limits)) is not None:
        return JsonProblem((), reason)
    values = 1
    containers: list[tuple[object, int, _Place]] = [(value, 1, None)]
    while containers:
        container, depth, place = containers.pop()
        if isinstance(container, dict):
            items = list(cast(dict[str, object], container).items())
            for name, _ in items:
                if (reason := _describe_text_problem(name, limits)) is not None:
                    return JsonProblem(_path_of(place), f"the name of a field {reason}")
        elif isinstance(container, list):
            items = list(enumerate(cast(list[object], container)))
        else:
            continue  # the outermost value is a scalar
        values += len(items)
        if values > limits.max_values:
            return JsonProblem(_path_of(place), f"has more than {limits.max_values} values; send less")
        for key, child in items:
            if isinstance(child, dict | list):
                if depth >= limits.max_depth:
                    return JsonProblem(_path_of((place, key)), f"is nested more than {limits.max_depth} levels deep")
                containers.append((cast(object, child), depth + 1, (place, key)))
            elif (reason := _describe_scalar_problem(child, limits)) is not None:
                return JsonProblem(_path_of((place, key)), reason)
    return None


def _describe_scalar_problem(value: object, limits: JsonLimits) -> str | None:
    if isinstance(value, str):
        return _describe_text_problem(value, limits)
    if isinstance(value, float):
        return None if math.isfinite(value) else "must be a finite number"
    if isinstance(value, int):
        return None if INT64_MIN <= value <= INT64_MAX else "is an integer of more than 64 bits"
    return None


def _describe_text_problem(text: str, limits: JsonLimits) -> str | None:
    if limits.max_string_chars is not None and len(text) > limits.max_string_chars:
        return f"is longer than {limits.max_string_chars} characters"
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains half of a surrogate pair, which is not a character"
    return None


def _path_of(place: _Place) -> tuple[str | int, ...]:
    path: list[str | int] = []
    while place is not None:
        place, key = place
        path.append(key)
    return tuple(reversed(path))


def _check_free_form(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    problem = find_json_problem(value, FREE_FORM_LIMITS)
    if problem is None:
        return value
    place = ".".join(str(key)[:40] for key in problem.path[:8])
    raise PydanticCustomError("json_limits", "{reason}", {"reason": f"{place}: {problem.reason}" if place else problem.reason})


# An object of any content within the limits.
JsonObject = Annotated[dict[str, JsonValue], AfterValidator(_check_free_form)]
