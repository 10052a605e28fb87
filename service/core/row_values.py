"""The values of a row: one line of JSON read strictly, and what a string or a number must be to be stored.

Here belongs what is true of any row; what makes a row of one form or another is in `row_forms.py`.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, cast

Object = dict[str, object]  # of JSON

SHOWN_CHARS = 40  # of a caller's own word in an error
MAX_NUMBER_CHARS = 40  # more digits than any float has, and than 128 bits need


class Refused(ValueError):
    """A value that cannot be used, before its line is known. `field` is a path such as messages[2].content, or empty."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as the upload writes it: unlike an int or a float it is read in linear time whatever its length, and nothing is rounded."""

    literal: str


def parse(line: bytes, expected: str) -> Object:
    """One line of an upload. Raises Refused, where that helps with what is `expected` of a row."""
    try:
        value: object = DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused("", f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise Refused("", f"not JSON at column {error.colno}: {error.msg}; each line is one JSON object") from error
    except RecursionError as error:
        raise Refused("", f"nested too deeply; {expected}") from error
    return as_object(value, "", expected)


def _without_duplicates(pairs: list[tuple[str, object]]) -> Object:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise Refused(shown(counts.most_common(1)[0][0]), "stands twice in the same object; keep one")
    return columns


def _refuse_constant(name: str) -> NoReturn:
    raise Refused("", f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_int=Number, parse_float=Number)


def as_object(value: object, field: str, example: str) -> Object:
    """The value, if it is an object."""
    if not isinstance(value, dict):
        raise Refused(field, f"is {kind(value)}, not an object; {example}")
    return cast(Object, value)


def check_names(found: Object, field: str, names: tuple[str, ...]) -> None:
    """Refuse an object that does not have just these names."""
    if tuple(found) == names:  # nearly always
        return
    for name in names:
        if name not in found:
            raise Refused(f"{field}.{name}", "is missing")
    for extra in (name for name in found if name not in names):
        raise Refused(f"{field}.{shown(extra)}", f"would not be used: only {listed(names)} {'is' if len(names) == 1 else 'are'}; drop it")


def text(value: object, field: str) -> str:
    """A string that says something and can be stored."""
    if not isinstance(value, str):
        raise Refused(field, f"is {kind(value)}; it must be a string")
    if not value or value.isspace():
        raise Refused(field, "is empty; drop the row, or write something there")
    return storable(value, field)


def storable(value: str, field: str) -> str:
    """A string that every reader of a stored row can take."""
    if "\0" in value:
        raise Refused(field, f"has a NUL character at position {value.index(chr(0)) + 1}; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(value[error.start]):04x}"
        raise Refused(field, f"has half a character, {surrogate}, at position {error.start + 1}; write both halves of the pair") from error
    return value


def finite(value: Number, field: str) -> Number:
    """A number that every reader of a stored row can take."""
    if len(value.literal) > MAX_NUMBER_CHARS:
        raise Refused(field, f"is a number of {len(value.literal):,} characters; at most {MAX_NUMBER_CHARS}, or write it as a string")
    if math.isinf(float(value.literal)):
        raise Refused(field, f"is {value.literal}, which is too large for a number; write it as a string")
    return value


def kind(value: object) -> str:
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


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), names[-1]])


def shown(word: str) -> str:
    """A caller's own word, short and printable whatever it holds."""
    return ascii(word if len(word) <= SHOWN_CHARS else word[:SHOWN_CHARS] + "...")
