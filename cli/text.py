"""Text from a service, made safe for a terminal.

Names, messages and logs come from callers, models and libraries. A terminal would obey the control sequences in them: move the cursor,
change the title, or write into the clipboard.
"""

import re
from typing import TypeVar, cast

Value = TypeVar("Value")

# C0 and C1 controls except tab and newline, DEL, and the marks that reorder text.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean_text(text: str) -> str:
    """The text with each control character as a visible sign, `␛` for escape. A carriage return ends a line."""
    return UNSAFE.sub(_make_visible, text.replace("\r\n", "\n").replace("\r", "\n"))


def clean_strings(value: Value) -> Value:
    """A JSON value with every string in it cleaned, names of fields included."""
    match value:
        case str():
            return cast(Value, clean_text(value)) if UNSAFE.search(value) else value
        case dict():
            items = cast(dict[str, object], value).items()
            return cast(Value, {clean_text(name): clean_strings(inner) for name, inner in items})
        case list():
            return cast(Value, [clean_strings(inner) for inner in cast(list[object], value)])
        case _:
            return value


def _make_visible(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
