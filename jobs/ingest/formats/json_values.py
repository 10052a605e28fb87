"""JSON: a list of objects; an object with exactly one list of objects, such as {"data": [...]}; or objects one after another.

Each object is cut out and parsed by itself, so a file may be of any size, and the parser is the strict one that reads JSON lines. Objects
are counted as rows, from 1.
"""

import json
from collections.abc import Iterator, Sequence
from typing import cast

from jobs.ingest.formats.encodings import choose_encoding, describe_encoding, open_text, refuse_encoding
from jobs.ingest.formats.json_cursor import EndOfText, JsonCursor, NotJson, Value
from jobs.ingest.formats.parts import Part
from jobs.ingest.formats.reader import Reader
from jobs.ingest.records import InvalidInput, Record
from jobs.ingest.rows.forms import EXPECTED_ROW
from jobs.ingest.rows.json_errors import LINE_RULE, describe_mistake
from jobs.ingest.rows.size import DATA_URI_PATTERN, describe_long_row
from jobs.ingest.rows.values import DECODER, InvalidValue, JsonObject, ProblemCode, describe_type, parse_plain, preview
from schema.ingestion import IngestLimits, IngestOptions, RowProblem

MAX_KEY_CHARACTERS = 1000
# Lists of objects under these names are part of a row, and not rows.
PARTS_OF_ROWS = {"messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "tools"}
EXPECTED_FILE = 'a JSON file is a list of objects, or one object with a list of them, such as {"data": [...]}'


def open_json(parts: Sequence[Part], options: IngestOptions, limits: IngestLimits) -> Reader:
    """The reader of JSON files. Raises InvalidInput."""

    def read(part: Part) -> Iterator[Record | RowProblem]:
        codec = choose_encoding(part.read_sample(), options)
        try:
            with open_text(part, codec, newline="") as text:
                yield from _Document(part, JsonCursor(text), limits).iter_rows()
        except UnicodeError as error:
            raise refuse_encoding(part, codec) from error

    return Reader(read, "row", encoding=describe_encoding(choose_encoding(parts[0].read_sample(), options)))


class _Document:
    """One JSON file."""

    def __init__(self, part: Part, cursor: JsonCursor, limits: IngestLimits) -> None:
        self._part = part
        self._cursor = cursor
        self._limits = limits
        self._number = 0  # of the last row

    def iter_rows(self) -> Iterator[Record | RowProblem]:
        """The records. Raises InvalidInput."""
        try:
            first = self._cursor.peek()
            if first == "[":
                self._cursor.take("[")
                yield from self._iter_list()
            elif first == "{":
                yield from self._iter_objects()
            else:
                message = f"begins with {preview(first)}" if first else "has nothing but blank lines"
                raise self._part.refuse(message, EXPECTED_FILE)
            if self._cursor.peek():
                message = f"has more text in line {self._cursor.line:,}, after the end of its list of rows"
                raise self._part.refuse(message, "join the lists into one; JSON lines are named .jsonl")
        except NotJson as error:
            raise self._part.refuse(str(error), EXPECTED_FILE) from error
        except EndOfText:
            yield self._problem(
                "the file ends before this row does: a bracket or quotation mark is missing, or it was cut off", "unreadable"
            )

    def _iter_list(self) -> Iterator[Record | RowProblem]:
        """The objects of a list whose opening bracket is read."""
        if self._cursor.peek() == "]":
            self._cursor.take("]")
            return
        while True:
            yield self._take_row()
            if self._cursor.take(",]") == "]":
                return

    def _take_row(self) -> Record | RowProblem:
        value = self._cursor.take_value(max(self._limits.max_row_bytes, self._limits.max_image_row_bytes))
        if value is None:
            self._cursor.skip_value()
            return self._problem(describe_long_row(self._limits, has_images=False), "too_long")
        return self._parse(value)

    def _parse(self, value: Value) -> Record | RowProblem:
        content = value.text.encode("utf-8", "surrogatepass")
        if len(content) > self._limits.max_row_bytes:
            image_bytes = sum(match.end() - match.start() for match in DATA_URI_PATTERN.finditer(content))
            if len(content) - image_bytes > self._limits.max_row_bytes:
                return self._problem(describe_long_row(self._limits, has_images=image_bytes > 0), "too_long")
        try:
            return self._make_record(parse_plain(content) or DECODER.decode(value.text))
        except json.JSONDecodeError as error:
            mistake = describe_mistake(error.doc, error.pos, error.msg).removesuffix(LINE_RULE)
            return self._problem(f"not JSON in line {value.line + error.lineno - 1:,} of the file: {mistake}", "not_json")
        except RecursionError:
            return self._problem(f"nested too deeply; {EXPECTED_ROW}", "nested_too_deeply")
        except InvalidValue as error:
            return self._problem(error.reason, error.code, error.field)

    def _make_record(self, value: object) -> Record:
        if not isinstance(value, dict):
            raise InvalidValue("", f"is {describe_type(value)}, not an object; {EXPECTED_ROW}", "not_object")
        row = cast(JsonObject, value)
        self._number += 1
        return Record(self._number, row, self._part.label)

    def _problem(self, reason: str, code: ProblemCode, field: str = "") -> RowProblem:
        self._number += 1
        return self._part.problem(self._number, reason, code, field=field, is_row=True)

    def _iter_objects(self) -> Iterator[Record | RowProblem]:
        """The rows of a file that begins with an object."""
        first = self._cursor.take_value(self._limits.max_row_bytes)
        if first is None:
            yield from self._iter_members()
            return
        parsed = self._parse(first)
        if (
            not self._cursor.peek()
            and isinstance(parsed, Record)
            and (rows := self._find_rows(cast(JsonObject, parsed.content))) is not None
        ):
            self._number = 0
            for row in rows:
                try:
                    yield self._make_record(row)
                except InvalidValue as error:
                    yield self._problem(error.reason, error.code, error.field)
            return
        yield parsed
        while self._cursor.peek() == "{":
            yield self._take_row()

    def _find_rows(self, content: JsonObject) -> list[object] | None:
        """The list of rows in a whole file that is one object; None if the object is a row. Raises InvalidInput."""
        lists = {
            name: cast(list[object], value)
            for name, value in content.items()
            if isinstance(value, list) and value and isinstance(value[0], dict)
        }
        if not lists or PARTS_OF_ROWS & lists.keys():
            return None
        if len(lists) > 1:
            raise self._refuse_two_lists(*list(lists)[:2])
        return next(iter(lists.values()))

    def _iter_members(self) -> Iterator[Record | RowProblem]:
        """The rows of an object that is longer than a row: those in its only list of objects."""
        self._cursor.take("{")
        found: str | None = None
        while True:
            name = self._take_name()
            if self._cursor.peek() != "[":
                self._cursor.skip_value()
            else:
                self._cursor.take("[")
                if self._cursor.peek() != "{":
                    self._cursor.skip_value(depth=1)
                elif name in PARTS_OF_ROWS:
                    raise self._part.refuse(f"is one row of more than {self._limits.max_row_bytes:,} bytes", EXPECTED_FILE)
                elif found is not None:
                    raise self._refuse_two_lists(found, name)
                else:
                    found = name
                    yield from self._iter_list()
            if self._cursor.take(",}") == "}":
                break
        if found is None:
            raise self._part.refuse("is an object without a list of objects", EXPECTED_FILE)

    def _take_name(self) -> str:
        """The name of the next member, and its colon."""
        if self._cursor.peek() not in ('"', ""):
            self._cursor.take('"')
        key = self._cursor.take_value(MAX_KEY_CHARACTERS)
        if key is None:
            raise NotJson(f"has a name of more than {MAX_KEY_CHARACTERS:,} characters in line {self._cursor.line:,}")
        self._cursor.take(":")
        try:
            return str(DECODER.decode(key.text))
        except json.JSONDecodeError as error:
            raise NotJson(f"is not JSON in line {key.line:,}: {error.msg}") from error

    def _refuse_two_lists(self, first: str, second: str) -> InvalidInput:
        return self._part.refuse(f"has two lists of objects, {preview(first)} and {preview(second)}", "keep one, or send each as a file")
