"""Templates: text with names of columns in braces. Names only, so that a template can read nothing but the columns of its row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from jobs.ingest.mapping.headings import normalize_heading
from jobs.ingest.records import InvalidInput
from jobs.ingest.rows.values import InvalidValue, JsonObject, Number, describe_type, join_names, preview

MAX_LISTED_COLUMNS = 20
_PIECES = re.compile(r"(?P<open>\{\{)|(?P<close>\}\})|\{(?P<name>[^{}]+)\}|(?P<stray>[{}])|(?P<text>[^{}]+)")
_BRACES = {"{{": "{", "}}": "}"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Literal text, or a column."""

    text: str  # the name of a column, or the text
    is_column: bool
    is_alone: bool = False  # a column that has its lines to itself


@dataclass(frozen=True)
class Template:
    """A parsed template, or the name of one column, whose values stay what they are."""

    pieces: tuple[Piece, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, each once."""
        return tuple(dict.fromkeys(piece.text for piece in self.pieces if piece.is_column))

    @property
    def only_column(self) -> str | None:
        """The column whose value is the result, byte for byte; None if there is other text."""
        return self.pieces[0].text if len(self.pieces) == 1 and self.pieces[0].is_column else None

    def read(self, record: JsonObject, field: str) -> object:
        """The value of the only column, or the rendered text. Raises InvalidValue for `field`."""
        if len(self.pieces) == 1 and self.pieces[0].is_column:
            name = self.pieces[0].text
            if name not in record:
                raise InvalidValue(field, "is missing", "missing_field")
            return record[name]
        return self.render(record, field)

    def render(self, record: JsonObject, field: str) -> str:
        """The text, with the columns of a record; one that has no value is empty. Raises InvalidValue for `field`."""
        out: list[str] = []
        at_start = True  # all columns so far were left out with their line breaks
        for piece in self.pieces:
            if not piece.is_column:
                out.append(piece.text.lstrip() if at_start and out else piece.text)
                at_start = at_start and not out[-1]
                continue
            value = record.get(piece.text)
            text = value if isinstance(value, str) else to_text(value, field, piece.text)
            if piece.is_alone and (not text or text.isspace()):
                if out:
                    out[-1] = out[-1].rstrip()
                out.append("")
                at_start = not any(out)
                continue
            out.append(text)
            at_start = False
        return "".join(out)


def to_text(value: object, field: str, column: str) -> str:
    """The text of a value of a table or of JSON. Raises InvalidValue for a list or an object."""
    match value:
        case str():
            return value
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case Number():
            return value.literal
        case _:
            raise InvalidValue(field, f"needs text, but the column {preview(column)} is {describe_type(value)} here", "wrong_type")


def parse_template(source: str, field: str, columns: Sequence[str]) -> Template:
    """Parse the name of a column, or a template. Raises InvalidInput if it names a column that the file does not have."""
    if source in columns:
        return Template((Piece(source, is_column=True),))
    if "{" not in source and "}" not in source:
        if field == "system" and len(source.split()) > 1 and not _suggest(source, columns):
            return Template((Piece(source, is_column=False),))
        raise unknown_column(source, field, columns)
    pieces: list[Piece] = []
    for match in _PIECES.finditer(source):
        name = match["name"]
        if match["stray"]:
            raise InvalidInput(
                f"{field} has a single '{match[0]}' at character {match.start() + 1}",
                "write {{ and }} for braces, and {name} for a column",
                f"mapping.{field}",
            )
        if name is not None and name not in columns:
            raise unknown_column(name, field, columns)
        text = name if name is not None else _BRACES.get(match[0], match[0])
        if name is None and pieces and not pieces[-1].is_column:
            pieces[-1] = Piece(pieces[-1].text + text, is_column=False)
        else:
            pieces.append(Piece(text, is_column=name is not None))
    return Template(tuple(_mark_alone(pieces)))


def unknown_column(name: str, field: str, columns: Sequence[str]) -> InvalidInput:
    """The error for a name that is no column of the file."""
    suggestion = _suggest(name, columns)
    known = f"the file has {list_columns(columns)}"
    hint = f"did you mean {suggestion!r}? {known}" if suggestion else known
    return InvalidInput(f"{field} names the column {preview(name)}, which the file does not have", hint, f"mapping.{field}")


def list_columns(columns: Sequence[str]) -> str:
    """The names of columns in a sentence: the first ones, and how many more there are."""
    if not columns:
        return "no columns"
    names = [shorten(name) for name in columns[:MAX_LISTED_COLUMNS]]
    more = len(columns) - len(names)
    listed = f"{', '.join(names)} and {more:,} more" if more else join_names(names)
    return f"the column{'s' if len(columns) > 1 else ''} {listed}"


def shorten(name: str) -> str:
    """A name of a column for a message: as it is, in any language, if it can be shown and is short."""
    return name if name.isprintable() and 0 < len(name) <= 60 and name == name.strip() else preview(name)


def _suggest(name: str, columns: Sequence[str]) -> str | None:
    """The column that was probably meant: the same name but for case and spaces, or a close one."""
    heading = normalize_heading(name)
    for column in columns:
        if normalize_heading(column) == heading:
            return column
    by_heading = {normalize_heading(column): column for column in columns if len(column) <= 200}
    matches = get_close_matches(heading[:200], by_heading, n=1, cutoff=0.75)
    return by_heading[matches[0]] if matches else None


def _mark_alone(pieces: list[Piece]) -> list[Piece]:
    """The pieces, of which columns that have their lines to themselves are marked. A template of one column is never changed."""
    if len(pieces) == 1:
        return pieces
    marked: list[Piece] = []
    for index, piece in enumerate(pieces):
        before = "\n" if index == 0 else "" if pieces[index - 1].is_column else pieces[index - 1].text.rstrip(" \t")
        after = "\n" if index == len(pieces) - 1 else "" if pieces[index + 1].is_column else pieces[index + 1].text.lstrip(" \t\r")
        is_alone = piece.is_column and before.endswith("\n") and after.startswith("\n")
        marked.append(Piece(piece.text, piece.is_column, is_alone))
    return marked
