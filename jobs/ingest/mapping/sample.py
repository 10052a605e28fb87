"""The first records of a file, as recognizers look at them, and what a recognizer answers."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

from jobs.ingest.mapping.headings import normalize_heading
from jobs.ingest.rows.values import DECODER, JsonObject, Number, is_json_safe, preview
from schema.ingestion import RowMapping
from schema.types import TextDatasetType

MAX_NAME_CHARS = 200  # longer names of columns cannot be part of a mapping
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
PRINTED_LIST = "[{'"  # how Python prints a list of messages
PRINTED_KEYS = (("role", "content"), ("from", "value"))


class Ambiguous(Exception):
    """The records may mean several things. `mappings` are examples, each of which is one of them; `columns` are those in question."""

    def __init__(self, columns: Sequence[str], mappings: Sequence[RowMapping]) -> None:
        self.columns = tuple(columns)
        self.mappings = tuple(mappings)
        super().__init__(f"{len(self.mappings)} meanings")


@dataclass(frozen=True)
class Reading:
    """What records were recognized as."""

    shape: str
    dataset_type: TextDatasetType
    columns: tuple[str, ...]  # that become part of rows
    mapping: RowMapping | None = None  # None: the records are rows as they are
    # "certain" ends the search; "fallback" is taken if nothing else is recognized, or too much
    certainty: Literal["certain", "likely", "fallback"] = "likely"
    note: str = ""  # more for people, beside what the mapping says


@dataclass(frozen=True)
class MessageKeys:
    """The keys of the role and of the content in messages."""

    role: str
    content: str


class Sample:
    """The first records, and the columns that they have."""

    def __init__(self, records: Sequence[JsonObject], columns: Sequence[str] = ()) -> None:
        self.records = records
        self.columns = tuple(columns) or tuple(dict.fromkeys(name for record in records for name in record))
        self._message_keys: dict[str, MessageKeys | None] = {}

    @cached_property
    def headings(self) -> Mapping[str, tuple[str, ...]]:
        """The columns by their names as they are compared."""
        found: dict[str, tuple[str, ...]] = {}
        for column in self.columns:
            if can_be_mapped(column):
                heading = normalize_heading(column)
                found[heading] = (*found.get(heading, ()), column)
        return found

    def find(self, headings: Collection[str]) -> tuple[str, ...]:
        """The columns with one of these names, in the order of the file."""
        named = {column for heading, columns in self.headings.items() if heading in headings for column in columns}
        return tuple(column for column in self.columns if column in named)

    def find_texts(self, headings: Collection[str]) -> tuple[str, ...]:
        """The columns of text with one of these names."""
        return tuple(column for column in self.find(headings) if self.is_text(column))

    def values(self, column: str) -> list[object]:
        """The values of a column that are not empty."""
        return [value for record in self.records if (value := record.get(column)) is not None and value != ""]

    def is_text(self, column: str) -> bool:
        """Whether the column can be written as text in all records. Texts of JSON messages are no text."""
        values = self.values(column)
        return all(isinstance(value, str | bool | Number) for value in values) and not self.find_message_keys(column)

    def find_message_keys(self, column: str) -> MessageKeys | None:
        """The keys of the messages in a column of lists of messages, or of their JSON texts; None if it is no such column."""
        if column not in self._message_keys:
            self._message_keys[column] = self._look_for_message_keys(column)
        return self._message_keys[column]

    def _look_for_message_keys(self, column: str) -> MessageKeys | None:
        found: MessageKeys | None = None
        for value in self.values(column):
            messages = as_messages(value)
            keys = _find_keys(messages[0]) if messages else _find_printed_keys(value)
            if keys is None or (found and keys != found):
                return None
            found = keys
        return found

    def has_json_text(self, columns: Iterable[str]) -> bool:
        """Whether messages in these columns are written as JSON text."""
        return any(isinstance(value, str) and bool(as_messages(value)) for column in columns for value in self.values(column))

    def find_roles(self, column: str, keys: MessageKeys) -> set[str]:
        """The roles that the messages of a column have."""
        messages = (message for value in self.values(column) for message in as_messages(value))
        return {role for message in messages if isinstance(role := message.get(keys.role), str)}

    def repeats(self, column: str, used: Iterable[str]) -> bool:
        """Whether the values of a column say what other columns say, in all records: a prompt beside messages that begin with it,
        or a text that was made of the others."""
        others = tuple(used)
        return bool(self.records) and all(_is_repeated(record, column, others) for record in self.records)


def can_be_mapped(column: str) -> bool:
    """Whether a mapping can name the column."""
    return 0 < len(column) <= MAX_NAME_CHARS and make_printable(column) == column


def make_printable(name: str) -> str:
    """The name, or its escaped form if others could not read it."""
    return name if is_json_safe(name) else preview(name)


def as_messages(value: object) -> list[JsonObject]:
    """The messages of a list, of an object that has such a list as `messages`, of one message, or of the JSON text of any of them.

    Empty if the value is something else.
    """
    if isinstance(value, str):
        if not value.lstrip().startswith(("[{", "[ {", "[\n", '{"', "[\r")):
            return []
        try:
            value = cast(object, DECODER.decode(value))
        except (ValueError, RecursionError):
            return []
    if isinstance(value, dict):
        wrapped = cast(JsonObject, value).get("messages")
        value = wrapped if isinstance(wrapped, list) else [cast(JsonObject, value)]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in cast(list[object], value)):
        return []
    return cast(list[JsonObject], value)


def _find_keys(message: JsonObject) -> MessageKeys | None:
    role = next((key for key in ROLE_KEYS if isinstance(message.get(key), str)), None)
    content = next((key for key in CONTENT_KEYS if key in message), "content" if "tool_calls" in message else None)
    return MessageKeys(role, content) if role and content else None


def _find_printed_keys(value: object) -> MessageKeys | None:
    """The keys of messages as Python prints them, which is no JSON: recognized so that each row says what to do about it."""
    if not isinstance(value, str) or not value.startswith(PRINTED_LIST):
        return None
    return next(
        (MessageKeys(role, content) for role, content in PRINTED_KEYS if f"'{role}': " in value and f"'{content}': " in value), None
    )


def _is_repeated(record: JsonObject, column: str, used: Sequence[str]) -> bool:
    texts = _texts(record.get(column))
    if not texts:
        return True
    others = [text for name in used for text in _texts(record.get(name))]
    joined = "\0".join(others)
    return all(text in joined for text in texts) or (len(texts) == 1 and bool(others) and all(text in texts[0] for text in others))


def _texts(value: object) -> list[str]:
    """All contents in a value that are not empty; of messages without their roles."""
    match value:
        case str():
            messages = as_messages(value)
            return _texts(messages) if messages else [value.strip()] if value.strip() else []
        case Number():
            return [value.literal]
        case list():
            return [text for inner in cast(list[object], value) for text in _texts(inner)]
        case dict():
            inner_values = cast(JsonObject, value).items()
            return [text for key, inner in inner_values if key not in ROLE_KEYS for text in _texts(inner)]
        case _:
            return []
