"""Carries out a mapping: from the columns of a record to those of a row, and back from a field of the row to what the file calls it."""

import re
from collections.abc import Sequence
from typing import NamedTuple, cast

from jobs.ingest.mapping.conversations import EMPTY, ROLE_SYNONYMS, MessageReader, parse_json, read_tools
from jobs.ingest.mapping.labels import read_choice, read_label
from jobs.ingest.mapping.templates import Template, parse_template, shorten, to_text, unknown_column
from jobs.ingest.records import InvalidInput
from jobs.ingest.rows.forms import COLUMN_NAME
from jobs.ingest.rows.values import InvalidValue, JsonObject, describe_type, join_names
from schema.ingestion import RowMapping

TEMPLATE_FIELDS = ("prompt", "completion", "text", "chosen", "rejected", "system")
COLUMN_FIELDS = ("label", "messages", "tools", "history", "preferred")
MAX_UNUSED_COLUMNS = 1000  # that are named; a file may have a different one in each record
DEFAULT_KEYS = ("role", "content")
_FIELD_PATH = re.compile(r"(?P<name>[a-z]+)(?:\[(?P<index>\d+)\])?(?P<rest>.*)", re.DOTALL)

Messages = list[JsonObject]


class Source(NamedTuple):
    """Where some messages of a row come from."""

    field: str  # of the mapping
    start: int  # the first of them in the value of that column, if it is a list
    messages: int
    is_list: bool


class RowConverter:
    """Turns records into rows as a mapping says."""

    def __init__(self, mapping: RowMapping, columns: Sequence[str]) -> None:
        """Raises InvalidInput if the mapping names a column that the file does not have."""
        self.unused: dict[str, None] = {}
        self._mapping = mapping
        self._dataset_type = mapping.dataset_type
        self._templates = {
            field: parse_template(source, field, columns)
            for field in TEMPLATE_FIELDS
            if (source := cast(str | None, getattr(mapping, field)))
        }
        self._keys = (mapping.role_key or DEFAULT_KEYS[0], mapping.content_key or DEFAULT_KEYS[1])
        self._roles = (ROLE_SYNONYMS if mapping.role_key else {}) | mapping.roles
        self._has_messages = any((mapping.messages, mapping.system, mapping.tools, mapping.history, mapping.role_key))
        self._known = {column for template in self._templates.values() for column in template.columns}
        for field, name in self._iter_named_columns():
            if name not in columns:
                raise unknown_column(name, field, columns)
            self._known.add(name)
        _check_mapping(mapping, self._templates)
        self._readers: dict[str, MessageReader] = {}
        self._sources: dict[str, tuple[Source, ...]] = {}  # of the last record, by the field of its row
        self._swapped = False  # in the last record the answer called rejected was the better one
        for column in columns:
            self._note_unused(column)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that become part of rows."""
        templates = (column for template in self._templates.values() for column in template.columns)
        return tuple(dict.fromkeys((*templates, *(name for _, name in self._iter_named_columns()))))

    def convert(self, record: JsonObject) -> JsonObject:
        """The columns of a row. Raises InvalidValue, whose field is one of the row."""
        self._sources, self._swapped = {}, False
        if not self._known.issuperset(record):
            for name in record:
                self._note_unused(name)
        row = self._make_row(record)
        if self._mapping.tools and (tools := read_tools(record.get(self._mapping.tools), "tools")):
            row["tools"] = tools
        return row

    def describe_field(self, field: str) -> str:
        """What the file calls a field of the row that was made last."""
        match = _FIELD_PATH.fullmatch(field)
        if match is None:
            return field
        name, index, rest = match["name"], match["index"], match["rest"]
        if self._swapped and name in ("chosen", "rejected"):
            name = "rejected" if name == "chosen" else "chosen"
        if name in self._sources and index is not None:
            position = int(index)
            for source in self._sources[name]:
                if position < source.messages:
                    return self._describe_message(source, position, rest)
                position -= source.messages
        column = self._name_column(name) or next((self._name_column(source.field) for source in self._sources.get(name, ())), None)
        return field if column is None else column + (f"[{index}]" if index is not None else "") + self._rename_key(rest)

    # --- rows --------------------------------------------------------------------------------------------------------

    def _make_row(self, record: JsonObject) -> JsonObject:
        mapping = self._mapping
        if mapping.messages:
            return self._make_conversation_row(record, mapping.messages)
        if mapping.text:
            return {"text": self._read_text("text", record)}
        if self._dataset_type == "preference":
            return self._make_preference(record)
        row: JsonObject = {"prompt": self._read("prompt", record)}
        if mapping.completion:
            row["completion"] = self._read("completion", record)
        self._write_messages(row, record)
        if mapping.label:
            row["label"] = read_label(record.get(mapping.label), "label")
        for name in mapping.keep:
            if name not in record:
                raise InvalidValue(name, "is missing", "missing_field")
            row[name] = record[name]
        return row

    def _make_conversation_row(self, record: JsonObject, column: str) -> JsonObject:
        if column not in record:
            raise InvalidValue("messages", "is missing", "missing_field")
        messages = self._read_messages(record[column], "messages")
        before, sources = self._read_system(record, messages)
        row = self._split_conversation(record, messages, before, sources)
        if isinstance(wrapper := record[column], dict) and "messages" in wrapper:
            return row | self._read_wrapper(cast(JsonObject, wrapper), column)
        return row

    def _read_wrapper(self, wrapper: JsonObject, column: str) -> JsonObject:
        """The tools in an object that has messages, such as the input of OpenAI's pairs."""
        for key in wrapper:
            if key not in ("messages", "tools"):
                self._note_unused(f"{column}.{key}")
        tools = read_tools(wrapper.get("tools"), "tools")
        return {"tools": tools} if tools else {}

    def _split_conversation(self, record: JsonObject, messages: Messages, before: Messages, sources: list[Source]) -> JsonObject:
        """The row of a conversation, and where its messages come from."""
        mapping = self._mapping
        if self._dataset_type == "messages":
            self._sources = {"messages": (*sources, Source("messages", 0, len(messages), is_list=True))}
            return {"messages": [*before, *messages]}
        if mapping.chosen:
            answers = self._read_answers(record)
            self._sources |= {"prompt": (*sources, Source("messages", 0, len(messages), is_list=True))}
            return {"prompt": [*before, *messages], **{name: self._as_answer(name, answer) for name, answer in answers.items()}}
        last = len(messages) - 1
        self._sources["prompt"] = (*sources, Source("messages", 0, last, is_list=True))
        answer = "completion" if mapping.label else "chosen"
        self._sources[answer] = (Source("messages", last, 1, is_list=True),)
        row: JsonObject = {"prompt": [*before, *messages[:last]], answer: messages[last:]}
        if mapping.label:
            return row | {"label": read_label(record.get(mapping.label), "label")}
        return row | {"rejected": self._as_answer("rejected", self._read("rejected", record))}

    def _make_preference(self, record: JsonObject) -> JsonObject:
        answers = self._read_answers(record)
        if "prompt" not in self._templates:
            for name, answer in answers.items():
                if isinstance(answer, str):
                    reason = "is text, and no prompt is mapped; map a prompt, or send whole conversations, two lists of messages"
                    raise InvalidValue(name, reason, "wrong_type")
            return self._add_system(record, answers)
        prompt = self._read("prompt", record)
        if isinstance(prompt, str) and any(isinstance(answer, list) and len(answer) > 1 for answer in answers.values()):
            for name, answer in answers.items():
                if isinstance(answer, list) and not any(message.get("content") == prompt for message in answer):
                    reason = f"is not one of the messages of {name}; whole conversations begin with their prompt"
                    raise InvalidValue("prompt", reason, "different_prompts")
            return self._add_system(record, answers)
        row: JsonObject = {"prompt": prompt, **answers}
        self._write_messages(row, record)
        return row

    def _add_system(self, record: JsonObject, answers: dict[str, str | Messages]) -> JsonObject:
        """Two whole conversations."""
        row: JsonObject = {}
        for name, answer in answers.items():
            messages = self._as_answer(name, answer)
            before, sources = self._read_system(record, messages)
            row[name] = [*before, *messages]
            self._sources[name] = (*sources, *self._sources[name])
        return row

    def _write_messages(self, row: JsonObject, record: JsonObject) -> None:
        """Make messages of prompt and answers if one of them is, or if the mapping needs them."""
        if not self._has_messages and not any(isinstance(value, list) for value in row.values()):
            return
        prompt = row["prompt"]
        turns = cast(Messages, prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        history = self._read_history(record)
        before, sources = self._read_system(record, turns)
        self._sources["prompt"] = (
            *sources,
            *((Source("history", 0, len(history), is_list=True),) if history else ()),
            Source("prompt", 0, len(turns), is_list=isinstance(prompt, list)),
        )
        row["prompt"] = [*before, *history, *turns]
        for name in ("completion", "chosen", "rejected"):
            if name in row:
                row[name] = self._as_answer(name, cast(str | Messages, row[name]))

    # --- values ------------------------------------------------------------------------------------------------------

    def _read_answers(self, record: JsonObject) -> dict[str, str | Messages]:
        """The chosen and the rejected answer."""
        mapping, chosen = self._mapping, self._templates["chosen"]
        if mapping.chosen == mapping.rejected:
            value = chosen.read(record, "chosen")
            pair = cast(list[object], value) if isinstance(value, list) else []
            if len(pair) != 2:
                kind = f"has {len(pair)} items" if isinstance(value, list) else f"is {describe_type(value)}"
                raise InvalidValue("chosen", f"{kind}; it must be a list of two answers, the better one first", "wrong_type")
            return {name: self._read_value(name, answer) for name, answer in zip(("chosen", "rejected"), pair, strict=True)}
        answers = {name: self._read(name, record) for name in ("chosen", "rejected")}
        if mapping.preferred:
            names = (cast(str, mapping.chosen), cast(str, mapping.rejected))
            self._swapped = read_choice(record.get(mapping.preferred), *names, "preferred") == 1
            if self._swapped:
                return {"chosen": answers["rejected"], "rejected": answers["chosen"]}
        return answers

    def _read(self, field: str, record: JsonObject) -> str | Messages:
        """A text that is not empty, or messages. Raises InvalidValue."""
        return self._read_value(field, self._templates[field].read(record, field))

    def _read_value(self, field: str, value: object) -> str | Messages:
        if isinstance(value, list | dict) or (self._mapping.role_key and _looks_like_json(value)):
            return self._read_messages(value, field)
        return _check_filled(to_text(value, field, self._mapping_source(field)), field)

    def _read_text(self, field: str, record: JsonObject) -> str:
        template = self._templates[field]
        return _check_filled(to_text(template.read(record, field), field, self._mapping_source(field)), field)

    def _read_messages(self, value: object, field: str) -> Messages:
        reader = self._readers.get(field)
        if reader is None:
            column = self._mapping_source(field)
            reader = MessageReader(*self._keys, self._roles, lambda key: self._note_unused(f"{column}[].{key}"))
            self._readers[field] = reader
        return reader.read(value, field)

    def _read_system(self, record: JsonObject, messages: Messages) -> tuple[Messages, list[Source]]:
        """The system message of a record, if it has one, and its source."""
        template = self._templates.get("system")
        text = template.render(record, "system") if template else ""
        if not text or text.isspace():
            return [], []
        if messages and messages[0].get("role") in ("system", "developer"):
            if messages[0].get("content") == text:
                return [], []
            raise InvalidValue(
                "system", "differs from the system message that the conversation begins with; keep one of them", "role_order"
            )
        return [{"role": "system", "content": text}], [Source("system", 0, 1, is_list=False)]

    def _read_history(self, record: JsonObject) -> Messages:
        """The messages of earlier turns."""
        value = record.get(self._mapping.history) if self._mapping.history else None
        if isinstance(value, str):
            value = parse_json(value, "history", "a list of pairs of texts") if value.strip() else None
        messages: Messages = []
        for index, pair in enumerate(_as_list(value, "history")):
            turns = _as_list(pair, f"history[{index}]")
            if len(turns) != 2:
                raise InvalidValue(
                    f"history[{index}]", f"has {len(turns)} items; a turn is a pair of a prompt and an answer", "wrong_value"
                )
            for role, turn in zip(("user", "assistant"), turns, strict=True):
                field = f"history[{index}][{int(role == 'assistant')}]"
                messages.append({"role": role, "content": to_text(turn, field, self._mapping.history or "")})
        return messages

    def _as_answer(self, field: str, answer: str | Messages) -> Messages:
        messages = [cast(JsonObject, {"role": "assistant", "content": answer})] if isinstance(answer, str) else answer
        self._sources[field] = (Source(field, 0, len(messages), is_list=not isinstance(answer, str)),)
        return messages

    # --- names -------------------------------------------------------------------------------------------------------

    def _iter_named_columns(self) -> list[tuple[str, str]]:
        """The columns that the mapping names outside of templates, each with the field that does."""
        named = [(field, cast(str | None, getattr(self._mapping, field))) for field in COLUMN_FIELDS]
        return [*((field, name) for field, name in named if name), *(("keep", name) for name in self._mapping.keep)]

    def _note_unused(self, name: str) -> None:
        if name not in self._known and len(self.unused) < MAX_UNUSED_COLUMNS:
            self.unused[name] = None

    def _mapping_source(self, field: str) -> str:
        """The column or the template of a field of the mapping."""
        return str(getattr(self._mapping, field, None) or field)

    def _name_column(self, field: str) -> str | None:
        """The columns of a field of the mapping, for people; None if it has none."""
        if field in self._templates:
            names = self._templates[field].columns
            return join_names([shorten(name) for name in names]) if names else None
        column = cast(str | None, getattr(self._mapping, field)) if field in COLUMN_FIELDS else None
        return shorten(column) if column else None

    def _describe_message(self, source: Source, position: int, rest: str) -> str:
        column = self._name_column(source.field) or source.field
        if not source.is_list:
            return column
        if source.field == "history":
            return f"{column}[{position // 2}][{position % 2}]"
        return f"{column}[{source.start + position}]{self._rename_key(rest)}"

    def _rename_key(self, rest: str) -> str:
        """The path within a message, with the keys that the file has."""
        role_key, content_key = self._keys
        if rest == ".role":
            return f".{role_key}"
        if rest.startswith(".tool_calls") and role_key != DEFAULT_KEYS[0]:
            return f".{content_key}"
        return f".{content_key}{rest.removeprefix('.content')}" if rest.startswith(".content") else rest


def _check_mapping(mapping: RowMapping, templates: dict[str, Template]) -> None:
    """Raise InvalidInput for what a mapping alone cannot tell."""
    for name in mapping.keep:
        if not COLUMN_NAME.fullmatch(name):
            raise InvalidInput(
                f"keep names the column {shorten(name)}, which graders cannot read",
                "rename it: letters, digits and _, 64 at most, and no digit first",
                "mapping.keep",
            )
    for field in ("chosen", "rejected") if mapping.preferred or mapping.chosen == mapping.rejected else ():
        template = templates.get(field)
        if template and template.only_column is None:
            raise InvalidInput(f"{field} is a template", "with lists of two answers, or with preferred, name a column", f"mapping.{field}")


def _check_filled(text: str, field: str) -> str:
    if not text or text.isspace():
        raise InvalidValue(field, EMPTY, "empty")
    return text


def _as_list(value: object, field: str) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidValue(field, f"is {describe_type(value)}; it must be a list of pairs of a prompt and an answer", "wrong_type")
    return cast(list[object], value)


def _looks_like_json(value: object) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] in ("[", "{")
