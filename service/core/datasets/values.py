"""The values of a row: one line of JSON read strictly, and what a string or a number must be to be stored.

Here belongs what is true of any row; what makes a row of one form or another is in `row_forms.py`.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, cast

JsonObject = dict[str, object]  # of JSON

MAX_PREVIEW_CHARS = 40  # of a caller's own word in an error
MAX_NUMBER_CHARS = 40  # more digits than any float has, and than 128 bits need


class InvalidValue(ValueError):
    """A value that cannot be used, before its line is known. `field` is a path such as messages[2].content, or empty."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as the upload writes it: unlike an int or a float it is read in linear time whatever its length, and nothing is rounded."""

    literal: str


def parse(line: bytes, expected: str) -> JsonObject:
    """One line of an upload. Raises Refused, where that helps with what is `expected` of a row."""
    try:
        value: object = DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidValue("", f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InvalidValue("", f"not JSON at column {error.colno}: {error.msg}; each line is one JSON object") from error
    except RecursionError as error:
        raise InvalidValue("", f"nested too deeply; {expected}") from error
    return as_object(value, "", expected)


def _reject_duplicate_keys(pairs: list[tuple[str, object]]) -> JsonObject:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise InvalidValue(preview(counts.most_common(1)[0][0]), "stands twice in the same object; keep one")
    return columns


def _reject_constant(name: str) -> NoReturn:
    raise InvalidValue("", f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_reject_duplicate_keys, parse_constant=_reject_constant, parse_int=Number, parse_float=Number)


def as_object(value: object, field: str, example: str) -> JsonObject:
    """The value, if it is an object."""
    if not isinstance(value, dict):
        raise InvalidValue(field, f"is {describe_type(value)}, not an object; {example}")
    return cast(JsonObject, value)


def check_keys(found: JsonObject, field: str, names: tuple[str, ...]) -> None:
    """Refuse an object that does not have just these names."""
    if tuple(found) == names:  # nearly always
        return
    for name in names:
        if name not in found:
            raise InvalidValue(f"{field}.{name}", "is missing")
    for extra in (name for name in found if name not in names):
        raise InvalidValue(
            f"{field}.{preview(extra)}", f"would not be used: only {join_names(names)} {'is' if len(names) == 1 else 'are'}; drop it"
        )


def check_text(value: object, field: str) -> str:
    """A string that says something and can be stored."""
    if not isinstance(value, str):
        raise InvalidValue(field, f"is {describe_type(value)}; it must be a string")
    if not value or value.isspace():
        raise InvalidValue(field, "is empty; drop the row, or write something there")
    return json_safe(value, field)


def json_safe(value: str, field: str) -> str:
    """A string that every reader of a stored row can take."""
    if "\0" in value:
        raise InvalidValue(field, f"has a NUL character at position {value.index(chr(0)) + 1}; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(value[error.start]):04x}"
        raise InvalidValue(
            field, f"has half a character, {surrogate}, at position {error.start + 1}; write both halves of the pair"
        ) from error
    return value


def check_finite(value: Number, field: str) -> Number:
    """A number that every reader of a stored row can take."""
    if len(value.literal) > MAX_NUMBER_CHARS:
        raise InvalidValue(field, f"is a number of {len(value.literal):,} characters; at most {MAX_NUMBER_CHARS}, or write it as a string")
    if math.isinf(float(value.literal)):
        raise InvalidValue(field, f"is {value.literal}, which is too large for a number; write it as a string")
    return value


def describe_type(value: object) -> str:
    """What a value is, in words."""
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


def preview(word: str) -> str:
    """A caller's own word, short and printable whatever it holds."""
    return ascii(word if len(word) <= MAX_PREVIEW_CHARS else word[:MAX_PREVIEW_CHARS] + "...")
