"""The values of a row: strict JSON parsing, and the checks on strings and numbers before they are stored.

What is true of rows of any format belongs here; the forms themselves are in `forms.py`.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, cast

JsonObject = dict[str, object]

MAX_PREVIEW_CHARS = 40  # of a caller's text in an error
MAX_PLACE_CHARS = 200  # of the place of a nested value in an error
MAX_NUMBER_CHARS = 40  # more digits than any float has, and than 128 bits need


class InvalidValue(ValueError):
    """A value is not valid; its line is not known yet.

    `field` is a path such as messages[2].content, or empty; `code` names the kind of problem, by which reports count.
    """

    def __init__(self, field: str, reason: str, code: str = "invalid") -> None:
        self.field = field
        self.reason = reason
        self.code = code
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as the upload has it: unlike an int it parses in linear time whatever its length, and unlike a float it is not rounded."""

    literal: str


def parse(line: bytes, expected: str) -> JsonObject:
    """Parse one line of an upload. Raises InvalidValue; `expected` describes a row for its message."""
    try:
        value: object = DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidValue("", f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InvalidValue("", f"not JSON at column {error.colno}: {error.msg}; each line is one JSON object") from error
    except RecursionError as error:
        raise InvalidValue("", f"nested too deeply; {expected}") from error
    return as_object(value, "", expected)


def parse_object(text: str, field: str, example: str) -> JsonObject:
    """Parse a string of JSON that a row contains. Raises InvalidValue; `example` shows an object in its message."""
    try:
        value: object = DECODER.decode(text)
    except InvalidValue as error:  # its place is one within the string
        raise InvalidValue(field, f"{error.field} {error.reason}".strip()) from error
    except json.JSONDecodeError as error:
        raise InvalidValue(field, f"is not JSON at character {error.pos + 1}: {error.msg}; {example}") from error
    except RecursionError as error:
        raise InvalidValue(field, f"is nested too deeply; {example}") from error
    return as_object(value, field, example)


def _reject_duplicate_keys(pairs: list[tuple[str, object]]) -> JsonObject:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise InvalidValue(preview(counts.most_common(1)[0][0]), "appears twice in the same object; keep one")
    return columns


def _reject_constant(name: str) -> NoReturn:
    raise InvalidValue("", f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_reject_duplicate_keys, parse_constant=_reject_constant, parse_int=Number, parse_float=Number)


def as_object(value: object, field: str, example: str) -> JsonObject:
    """The value, which must be an object. Raises InvalidValue; `example` shows one in its message."""
    if not isinstance(value, dict):
        raise InvalidValue(field, f"is {describe_type(value)}, not an object; {example}")
    return cast(JsonObject, value)


def check_keys(value: JsonObject, field: str, names: tuple[str, ...]) -> None:
    """Raise InvalidValue unless the object has exactly these keys."""
    if tuple(value) == names:  # the fast path, for nearly every row
        return
    for name in names:
        if name not in value:
            raise InvalidValue(f"{field}.{name}", "is missing")
    for extra in (name for name in value if name not in names):
        raise InvalidValue(
            f"{field}.{preview(extra)}", f"would not be used: only {join_names(names)} {'is' if len(names) == 1 else 'are'}; drop it"
        )


def check_text(value: object, field: str) -> str:
    """The value, which must be a string that is not blank and can be stored. Raises InvalidValue."""
    if not isinstance(value, str):
        raise InvalidValue(field, f"is {describe_type(value)}; it must be a string")
    if not value or value.isspace():
        raise InvalidValue(field, "is empty; drop the row, or fill it in")
    return json_safe(value, field)


def json_safe(value: str, field: str) -> str:
    """The string, if every reader of a stored row can decode it. Raises InvalidValue."""
    if "\0" in value:
        raise InvalidValue(field, f"has a NUL character at position {value.index(chr(0)) + 1}; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(value[error.start]):04x}"
        raise InvalidValue(
            field, f"has an unpaired surrogate, {surrogate}, at position {error.start + 1}; write both halves of the pair"
        ) from error
    return value


def check_finite(value: Number, field: str) -> Number:
    """The number, if every reader of a stored row can parse it. Raises InvalidValue."""
    if len(value.literal) > MAX_NUMBER_CHARS:
        raise InvalidValue(field, f"is a number of {len(value.literal):,} characters; at most {MAX_NUMBER_CHARS}, or write it as a string")
    if math.isinf(float(value.literal)):
        raise InvalidValue(field, f"is {value.literal}, which is too large for a number; write it as a string")
    return value


def check_json(value: object, field: str, max_depth: int) -> None:
    """Raise InvalidValue unless every reader of a stored row can parse the value, which may be of any JSON type.

    `max_depth` limits how many objects and lists may be inside each other. Errors name the upper levels of their place.
    """
    match value:
        case str():
            json_safe(value, field)
        case Number():
            check_finite(value, field)
        case dict() | list() if max_depth == 0:
            raise InvalidValue(field, "is nested too deeply; write its inner part as a string of JSON")
        case dict():
            for name, inner in cast(JsonObject, value).items():
                json_safe(name, f"{field}.{preview(name)}"[:MAX_PLACE_CHARS])
                check_json(inner, f"{field}.{preview(name)}"[:MAX_PLACE_CHARS], max_depth - 1)
        case list():
            for index, inner in enumerate(cast(list[object], value)):
                check_json(inner, f"{field}[{index}]"[:MAX_PLACE_CHARS], max_depth - 1)
        case _:
            return  # true, false or null


def describe_type(value: object) -> str:
    """The JSON type of a value, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "a string"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return "a number"


def join_names(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), names[-1]])


def preview(text: str) -> str:
    """A caller's text, shortened and printable, for an error."""
    return ascii(text if len(text) <= MAX_PREVIEW_CHARS else text[:MAX_PREVIEW_CHARS] + "...")
