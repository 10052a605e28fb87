"""What is wrong with a line that is not JSON, and what would work: the mistakes that people and their scripts make."""

import json
import re

MAX_SHOWN_CHARS = 40  # of the caller's line
PYTHON_CONSTANTS = re.compile(r"(?:True|False|None|undefined)\b")
LINE_RULE = "; each line is one JSON object"
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")


def describe_decode_error(line: bytes, error: UnicodeDecodeError) -> str:
    """Why bytes are not UTF-8."""
    if line.startswith(BYTE_ORDER_MARKS) or b"\0" in line:
        return f"not UTF-8 at byte {error.start + 1}: it looks like UTF-16; save the file as UTF-8"
    return f"not UTF-8 at byte {error.start + 1}, which is 0x{line[error.start]:02X}; save the file as UTF-8"


def describe_json_error(error: json.JSONDecodeError) -> str:
    """Why a line is not JSON."""
    return f"not JSON at column {error.colno}: {describe_mistake(error.doc, error.pos, error.msg)}"


def describe_mistake(text: str, position: int, message: str) -> str:
    """The mistake that the parser's message is about."""
    before, found = text[:position].rstrip(), text[position : position + 1]
    if "\0" in (found, text[position + 1 : position + 2]):
        return "the file looks like UTF-16; save it as UTF-8"
    if message == "Extra data":
        return _describe_rest(text[position:])
    if message.startswith("Invalid control character"):
        return f"{message[:25]} {ascii(found)[1:-1]} in a string; write a line break as \\n, a tab as \\t"
    if message.startswith("Invalid \\"):
        return f"{message.split(':')[0]}; write a backslash itself as \\\\"
    if message.startswith("Unterminated string"):
        return "a string begins here that does not end in this line; write a line break within it as \\n, or the file was cut off"
    if not found:
        return "the line ends before its object does; each row is one object on one line, or the file was cut off"
    if before.endswith((",", "[", "{")) and found in "}],":
        return f"there is nothing between {before[-1]!r} and {found!r}; remove the comma"
    if text.startswith("//", position) or found == "#":
        return "JSON has no comments; remove it"
    if found in "'\u2018\u2019\u201c\u201d\xab":
        return f"strings and names are in double quotes, not in {found!a}; in Python, json.dumps(row) writes them so"
    if constant := PYTHON_CONSTANTS.match(text, position):
        return f"{constant[0]} is not JSON; write true, false or null, as json.dumps(row) does in Python"
    if position == 0:
        return f"the line begins {text[:MAX_SHOWN_CHARS]!a}; each line is one JSON object, {{...}}; a table is sent with format=csv"
    if "property name" in message:
        return f"a name in double quotes must come here, not {text[position : position + MAX_SHOWN_CHARS]!a}"
    return f"{message}, but it goes on {text[position : position + MAX_SHOWN_CHARS]!a}{LINE_RULE}"


def _describe_rest(rest: str) -> str:
    """What is wrong with that which follows a value."""
    if rest.strip() == ",":
        return "a comma follows the object; each line is one object without it"
    if rest.lstrip(", ").startswith(("{", "[")):
        return "another value begins in the same line; write each row on a line of its own"
    if rest[0] in "}]":
        return f"there is a {rest[0]!r} too many; remove it"
    return f"something follows the value, {rest[:MAX_SHOWN_CHARS]!a}; each line is one JSON object and nothing else"
