"""A place in a JSON text of any size: one value after another is cut out, without parsing it and without keeping what lies before."""

import re
from typing import NamedTuple, TextIO

from jobs.ingest.rows.values import preview

CHUNK_CHARACTERS = 1 << 16
# What opens or closes a list or an object; or a string, whose group is empty if it is cut off. Possessive: nothing is scanned twice.
TOKEN = re.compile(r'[\[\]{}]|"(?:[^"\\]++|\\.)*+(?:(")|\\?\Z)', re.DOTALL)
WHITESPACE = re.compile(r"[ \t\r\n]*+")
SCALAR = re.compile(r"[^\s,:\[\]{}\"]++")


class EndOfText(Exception):
    """The text ends where a value, or its rest, must follow."""


class NotJson(Exception):
    """The text has something else than what must follow. The message continues the name of the file."""


class Value(NamedTuple):
    """One value, as text, and the line of the file in which it begins."""

    text: str
    line: int


class JsonCursor:
    """Reads a text in chunks; what lies before the place is forgotten."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._buffer = ""
        self._position = 0
        self._counted = 0  # up to which `_line` counts lines
        self._line = 1

    @property
    def line(self) -> int:
        """The number of the line that the place is in."""
        self._line += self._buffer.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def peek(self) -> str:
        """The next character after whitespace, before which the place then is; empty at the end."""
        while True:
            match = WHITESPACE.match(self._buffer, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read_more():
                return ""

    def take(self, expected: str) -> str:
        """Go past the next character after whitespace, which must be one of these. Raises NotJson and EndOfText."""
        found = self.peek()
        if not found:
            raise EndOfText
        if found not in expected:
            raise NotJson(f"has {preview(found)} in line {self.line:,}, where {' or '.join(map(repr, expected))} must be")
        self._position += 1
        return found

    def take_value(self, max_characters: int) -> Value | None:
        """Go past the next value; None, and the place stays, if it is longer. Raises NotJson and EndOfText."""
        first = self.peek()
        if not first:
            raise EndOfText
        line = self.line
        end = self._find_scalar_end(max_characters) if first not in '{["' else self._find_end(max_characters)
        if end is None:
            return None
        text = self._buffer[self._position : end]
        self._position = end
        return Value(text, line)

    def skip_value(self, depth: int = 0) -> None:
        """Go past the next value; or, with a depth, past the end of as many lists and objects. Raises NotJson and EndOfText."""
        if not depth and (first := self.peek()) not in ("{", "[", '"'):
            if not first:
                raise EndOfText
            self._position = self._find_scalar_end(None) or self._position
            return
        while True:
            match = TOKEN.search(self._buffer, self._position)
            if match and (match[0][0] != '"' or match[1]):
                self._position = match.end()
                depth += _count_depth(match[0])
                if depth <= 0:
                    return
                continue
            if match:  # a string that is not read to its end: only how it begins matters, and whether the next character is escaped
                backslashes = len(match[0]) - len(match[0].rstrip("\\"))
                self._position = len(self._buffer)
                self._forget()
                self._buffer = '"\\' if backslashes % 2 else '"'
            else:
                self._position = len(self._buffer)
            if not self._read_more():
                raise EndOfText

    def _find_scalar_end(self, max_characters: int | None) -> int | None:
        while True:
            match = SCALAR.match(self._buffer, self._position)
            if not match:
                raise NotJson(f"has {preview(self._buffer[self._position])} in line {self.line:,}, where a value must be")
            if max_characters is not None and len(match[0]) > max_characters:
                return None
            if match.end() < len(self._buffer) or not self._read_more():
                return self._position + len(match[0])

    def _find_end(self, max_characters: int) -> int | None:
        """Where the string, list or object at the place ends; None if it is longer. Brackets are counted, and strings passed over."""
        depth, scanned = 0, 0  # counted from the place, which moves in the buffer when more is read
        while True:
            match = TOKEN.search(self._buffer, self._position + scanned)
            if match and (match[0][0] != '"' or match[1]):
                scanned = match.end() - self._position
                depth += _count_depth(match[0])
                if depth == 0:
                    return match.end() if scanned <= max_characters else None
                continue
            scanned = (match.start() if match else len(self._buffer)) - self._position
            if len(self._buffer) - self._position > max_characters:
                return None
            if not self._read_more():
                raise EndOfText

    def _read_more(self) -> bool:
        """Read another chunk after the buffer, as long as what is kept of it: so a long value is not scanned again and again."""
        chunk = self._text.read(max(CHUNK_CHARACTERS, len(self._buffer) - self._position))
        if not chunk:
            return False
        self._forget()
        self._buffer += chunk
        return True

    def _forget(self) -> None:
        """Drop what lies before the place."""
        self._line = self.line
        self._buffer = self._buffer[self._position :]
        self._position = self._counted = 0


def _count_depth(token: str) -> int:
    return 1 if token in "{[" else -1 if token in "}]" else 0
