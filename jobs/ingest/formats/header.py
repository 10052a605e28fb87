"""The header of a table: names of columns in its first row. And the rows under it, which must fit."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jobs.ingest.formats.parts import Part
from jobs.ingest.rows.values import preview
from schema.ingestion import IngestLimits

MAX_NAME_CHARACTERS = 200  # as schema.ingestion.ColumnName


class Header(NamedTuple):
    """The columns of a table. Empty cells at the end of the header are no columns."""

    names: tuple[str, ...]

    def find_misfit(self, cells: Sequence[object]) -> str | None:
        """Why a row does not fit the header, or None. Cells that are empty have None."""
        columns = len(self.names)
        if len(cells) < columns:
            return f"has {_count(len(cells))}, but the header has {_count(columns)}; put quotes around cells with line breaks or delimiters"
        if len(cells) > columns and any(cell is not None for cell in cells[columns:]):
            return (
                f"has {_count(len(cells))}, but the header has {_count(columns)}; put quotes around cells that have the delimiter in them"
            )
        return None


def make_header(part: Part, cells: Sequence[str], row: int, limits: IngestLimits) -> Header:
    """The header that these cells are. Raises InvalidInput."""
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise part.refuse(f"has no header: row {row} is empty", "write the names of the columns into the first row")
    if len(names) > limits.max_columns:
        raise part.refuse(
            f"has {len(names):,} columns; at most {limits.max_columns:,} are read", "keep the columns that become part of rows"
        )
    for number, name in enumerate(names, 1):
        if not name:
            hint = "name it, or delete the column; pandas writes one without a name unless it is told index=False"
            raise part.refuse(f"has no name for column {number} in its header, row {row}", hint)
        if len(name) > MAX_NAME_CHARACTERS:
            message = f"has a name of {len(name):,} characters for column {number} in row {row}, which must be the header"
            raise part.refuse(message, "write the names of the columns into the first row")
    name, uses = Counter(names).most_common(1)[0]
    if uses > 1:
        raise part.refuse(f"has the column {preview(name)} {uses} times in its header, row {row}", "rename one of them, or delete it")
    return Header(tuple(names))


def check_same_columns(part: Part, names: Sequence[str], expected: Sequence[str], first: str) -> None:
    """Raise InvalidInput unless a part has the columns of the first part, in any order."""
    if set(names) != set(expected):
        odd = sorted(set(names) ^ set(expected))[0]
        having = "has" if odd in names else "lacks"
        raise part.refuse(
            f"{having} the column {preview(odd)}, unlike {first}", "send files with the same columns, or one dataset for each"
        )


def _count(cells: int) -> str:
    return "1 cell" if cells == 1 else f"{cells:,} cells"
