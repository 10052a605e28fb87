"""The values of a row: strict JSON parsing, and the checks on strings and numbers before they are stored.

What is true of rows of any format belongs here; the forms themselves are in `forms.py`. Each problem of a row has one of these codes, by
which reports count:

    not_utf8, not_json      the line cannot be decoded, or parsed
    not_object              it is JSON, but no object
    repeated_name           a key, a tool or the id of a call occurs twice
    nested_too_deeply       objects or lists inside each other
    too_long, too_many      over a limit, in bytes; in messages, parts, columns or pixels
    unknown_form            the columns are those of no form of row
    missing_field           something required is not there
    unused_field            something that no trainer would use is there
    wrong_type              a number where a string must be, and the like
    wrong_value             the type is right, but not the value
    wrong_name              a column, function or id whose name is not allowed
    empty                   a text without content, or a list of messages without messages
    invalid_text            a character that cannot be stored: NUL, half of a surrogate pair
    invalid_number          a number that others could not read
    unknown_role            a role that no message can have
    role_order              a message where another must come
    call_mismatch           a tool message without its call, a call without its tool
    nothing_to_learn        the row is valid and would teach nothing
    different_prompts       two answers of a preference that do not share their prompt
    invalid_image           an image that does not decode, or must not be fetched
    image_not_allowed       an image where only text may be
    images_and_tools        both in one dataset
    mixed_forms             the row differs in form from the first one
    ragged                  a row of a table that does not fit its header
    unreadable              of a table or archive: a record that its reader cannot decode
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, NoReturn, cast

import orjson

from jobs.ingest.rows.json_errors import describe_decode_error, describe_json_error

ProblemCode = Literal[
    "not_utf8",
    "not_json",
    "not_object",
    "repeated_name",
    "nested_too_deeply",
    "too_long",
    "too_many",
    "unknown_form",
    "missing_field",
    "unused_field",
    "wrong_type",
    "wrong_value",
    "wrong_name",
    "empty",
    "invalid_text",
    "invalid_number",
    "unknown_role",
    "role_order",
    "call_mismatch",
    "nothing_to_learn",
    "different_prompts",
    "invalid_image",
    "image_not_allowed",
    "images_and_tools",
    "mixed_forms",
    "ragged",
    "unreadable",
]
JsonObject = dict[str, object]

MAX_PREVIEW_CHARS = 40  # of a caller's text in an error
MAX_PLACE_CHARS = 200  # of the place of a nested value in an error
MAX_SUGGESTION_CHARS = 64  # of a name, for which a similar one is looked for
MAX_NUMBER_CHARS = 40  # more digits than any float has, and than 128 bits need


class InvalidValue(ValueError):
    """A value is not valid; its line is not known yet.

    `field` is a path such as messages[2].content, or empty.
    """

    def __init__(self, field: str, reason: str, code: ProblemCode) -> None:
        self.field = field
        self.reason = reason
        self.code: ProblemCode = code
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as the upload has it: unlike an int it parses in linear time whatever its length, and unlike a float it is not rounded."""

    literal: str


def parse(line: bytes, expected: str) -> JsonObject:
    """Parse one line of an upload. Raises InvalidValue; `expected` describes a row for its message."""
    if (plain := parse_plain(line)) is not None:
        return plain
    return parse_strictly(line, expected)


def parse_plain(line: bytes) -> JsonObject | None:
    """What `parse_strictly` makes of a line without numbers and with a usual form, several times as fast; None for any other line.

    orjson is as strict, but for names that occur twice, of which it keeps the last. Every string has two quotation marks in the line, and
    one more for each escaped one: if the strings that were parsed account for all of them, no name was lost.
    """
    try:
        row: Any = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if type(row) is not dict:
        return None
    strings, escaped = len(row), 0
    for value in row.values():
        if type(value) is str:
            strings += 1
            escaped += value.count('"')
        elif type(value) is list:
            for message in value:
                if type(message) is not dict:
                    return None
                strings += 2 * len(message)
                for content in message.values():
                    if type(content) is not str:
                        return None
                    escaped += content.count('"')
        elif type(value) is not bool and value is not None:
            return None
    if line.count(b'"') != 2 * strings + escaped or (escaped and b"\\u0022" in line):  # a quotation mark without one in the line
        return None
    return row


def parse_strictly(line: bytes, expected: str) -> JsonObject:
    """`parse`, for any line."""
    try:
        text = line.decode("utf-8")
        value: object = DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise InvalidValue("", describe_decode_error(line, error), "not_utf8") from error
    except json.JSONDecodeError as error:
        raise InvalidValue("", describe_json_error(error), "not_json") from error
    except RecursionError as error:
        raise InvalidValue("", f"nested too deeply; {expected}", "nested_too_deeply") from error
    if not isinstance(value, dict):
        advice = "; write each row on a line of its own, without the list" if isinstance(value, list) else ""
        raise InvalidValue("", f"is {describe_type(value)}, not an object{advice}; {expected}", "not_object")
    return cast(JsonObject, value)


def parse_object(text: str, field: str, example: str) -> JsonObject:
    """Parse a string of JSON that a row contains. Raises InvalidValue; `example` shows an object in its message."""
    try:
        value: object = DECODER.decode(text)
    except InvalidValue as error:  # its place is one within the string
        raise InvalidValue(field, f"{error.field} {error.reason}".strip(), error.code) from error
    except json.JSONDecodeError as error:
        raise InvalidValue(field, f"is not JSON at character {error.pos + 1}: {error.msg}; {example}", "not_json") from error
    except RecursionError as error:
        raise InvalidValue(field, f"is nested too deeply; {example}", "nested_too_deeply") from error
    return as_object(value, field, example)


def _reject_duplicate_keys(pairs: list[tuple[str, object]]) -> JsonObject:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise InvalidValue(preview(counts.most_common(1)[0][0]), "appears twice in the same object; keep one", "repeated_name")
    return columns


def _reject_constant(name: str) -> NoReturn:
    raise InvalidValue("", f"{name} is not JSON; write a number, or drop the row", "not_json")


DECODER = json.JSONDecoder(object_pairs_hook=_reject_duplicate_keys, parse_constant=_reject_constant, parse_int=Number, parse_float=Number)


def as_object(value: object, field: str, example: str) -> JsonObject:
    """The value, which must be an object. Raises InvalidValue; `example` shows one in its message."""
    if not isinstance(value, dict):
        raise InvalidValue(field, f"is {describe_type(value)}, not an object; {example}", "wrong_type")
    return cast(JsonObject, value)


def check_keys(value: JsonObject, field: str, names: tuple[str, ...]) -> None:
    """Raise InvalidValue unless the object has exactly these keys."""
    if tuple(value) == names:  # the fast path, for nearly every row
        return
    for name in names:
        if name not in value:
            meant = suggest(name, [key for key in value if key not in names])
            raise InvalidValue(f"{field}.{name}", f"is missing{meant}", "missing_field")
    for extra in (name for name in value if name not in names):
        reason = f"would not be used: only {join_names(names)} {'is' if len(names) == 1 else 'are'}; drop it"
        raise InvalidValue(f"{field}.{preview(extra)}", reason, "unused_field")


def check_text(value: object, field: str) -> str:
    """The value, which must be a string that is not blank and can be stored. Raises InvalidValue."""
    if not isinstance(value, str):
        raise InvalidValue(field, f"is {describe_type(value)}; it must be a string", "wrong_type")
    if not value or value.isspace():
        raise InvalidValue(field, "is empty; drop the row, or fill it in", "empty")
    return json_safe(value, field)


def is_json_safe(value: str) -> bool:
    """Whether every reader of a stored row can decode a string."""
    if "\0" in value:
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_safe(value: str, field: str) -> str:
    """The string, if every reader of a stored row can decode it. Raises InvalidValue."""
    if is_json_safe(value):
        return value
    if "\0" in value:
        raise InvalidValue(field, f"has a NUL character at position {value.index(chr(0)) + 1}; remove it", "invalid_text")
    position = next(index for index, character in enumerate(value) if "\ud800" <= character <= "\udfff")
    surrogate = f"\\u{ord(value[position]):04x}"
    reason = f"has an unpaired surrogate, {surrogate}, at position {position + 1}; write both halves of the pair"
    raise InvalidValue(field, reason, "invalid_text")


def check_finite(value: Number, field: str) -> Number:
    """The number, if every reader of a stored row can parse it. Raises InvalidValue."""
    if len(value.literal) > MAX_NUMBER_CHARS:
        reason = f"is a number of {len(value.literal):,} characters; at most {MAX_NUMBER_CHARS}, or write it as a string"
        raise InvalidValue(field, reason, "invalid_number")
    if math.isinf(float(value.literal)):
        raise InvalidValue(field, f"is {value.literal}, which is too large for a number; write it as a string", "invalid_number")
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
            raise InvalidValue(field, "is nested too deeply; write its inner part as a string of JSON", "nested_too_deeply")
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


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message that asks for the one of the known names that was probably meant; empty where none is similar."""
    by_lower = {other.lower(): other for other in known if len(other) <= MAX_SUGGESTION_CHARS}
    matches = get_close_matches(name.strip().lower(), by_lower, n=1, cutoff=0.75) if len(name) <= MAX_SUGGESTION_CHARS else []
    return f"; did you mean {preview(by_lower[matches[0]])}?" if matches else ""
