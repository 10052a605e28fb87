"""Spreadsheets of Excel and LibreOffice: .xlsx, .xlsm, .xlsb, .xls and .ods. One sheet is read; its first row with a value is the header.

Rows have the numbers that the spreadsheet shows. Numbers and truth values stay what they are, dates and times become ISO 8601 strings,
formulas have the values that were saved with them, and every row of a merged cell has its value. An error such as #N/A is an empty cell.
"""

import datetime
import zipfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, cast

from jobs.ingest.formats.header import Header, check_same_columns, make_header
from jobs.ingest.formats.parts import MAX_RATIO, RATIO_FREE_BYTES, Part, refuse_bomb
from jobs.ingest.formats.reader import Reader
from jobs.ingest.records import Record
from jobs.ingest.rows.values import Number, preview
from schema.ingestion import IngestLimits, IngestOptions, RowProblem

# A workbook is read as a whole, which takes about four times its size when it is unpacked.
MAX_UNPACKED_BYTES = 512 << 20
MAX_EXACT_INTEGER = 1 << 53  # cells of numbers are floats

Cell = int | float | str | bool | datetime.date | datetime.time | datetime.timedelta
Range = tuple[tuple[int, int], tuple[int, int]]


class _Sheet(NamedTuple):
    name: str
    rows: Iterator[list[Cell]]
    merged: Sequence[Range]


def open_spreadsheets(parts: Sequence[Part], options: IngestOptions, limits: IngestLimits) -> Reader:
    """The reader of spreadsheets with the same columns. Raises InvalidInput."""
    first = parts[0]
    with first.open_seekable() as stream:
        sheet = _open_sheet(first, stream, options.sheet)
        columns = _read_header(first, sheet, limits)[1].names

    def read(part: Part) -> Iterator[Record | RowProblem]:
        with part.open_seekable() as stream:
            sheet = _open_sheet(part, stream, options.sheet)
            number, header = _read_header(part, sheet, limits)
            check_same_columns(part, header.names, columns, first.name)
            yield from _iter_rows(part, sheet, number, header)

    return Reader(read, "row", columns, sheet=sheet.name)


def _open_sheet(part: Part, stream: BinaryIO, wanted: str | None) -> _Sheet:
    """The sheet that is asked for, or the only visible one with rows. Raises InvalidInput."""
    from python_calamine import CalamineError, CalamineWorkbook, PasswordError, SheetVisibleEnum

    _check_size(part, stream)
    try:
        workbook = CalamineWorkbook.from_filelike(stream)
        hidden = {sheet.name for sheet in workbook.sheets_metadata if sheet.visible != SheetVisibleEnum.Visible}
        names = workbook.sheet_names
        if wanted is not None and wanted not in names:
            raise part.refuse(f"has no sheet {preview(wanted)}", f"it has {_join(names)}", "sheet")
        candidates = [wanted] if wanted is not None else [name for name in names if name not in hidden]
        sheets = [sheet for name in candidates if (sheet := workbook.get_sheet_by_name(name)).height]
        if not sheets:
            hint = f"hidden sheets are read only if they are named: {_join(sorted(hidden))}" if hidden and wanted is None else "fill one in"
            raise part.refuse("has no sheet with rows" if wanted is None else f"has no rows in the sheet {preview(wanted)}", hint, "sheet")
        if len(sheets) > 1:
            found = _join([sheet.name for sheet in sheets])
            raise part.refuse(f"has {len(sheets)} sheets with rows: {found}", f"choose one: sheet={sheets[0].name}", "sheet")
        sheet = sheets[0]
        return _Sheet(sheet.name, cast(Iterator[list[Cell]], sheet.iter_rows()), sheet.merged_cell_ranges or ())
    except PasswordError as error:
        raise part.refuse("has a password", "save it without one") from error
    except CalamineError as error:
        hint = "open it and save it again as .xlsx or .csv; a .doc or another old file of Office is not read"
        raise part.refuse(f"cannot be read as a spreadsheet: {str(error)[:200]}", hint) from error


def _check_size(part: Part, stream: BinaryIO) -> None:
    """Raise InvalidInput for a workbook that would not fit into memory."""
    if not zipfile.is_zipfile(stream):  # .xls is not compressed
        size = stream.seek(0, 2)
    else:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
        size = sum(member.file_size for member in members)
        if size > RATIO_FREE_BYTES and size > MAX_RATIO * sum(member.compress_size for member in members):
            raise refuse_bomb(part.label or part.name)
    stream.seek(0)
    if size > MAX_UNPACKED_BYTES:
        raise part.refuse(f"is a spreadsheet of {size:,} bytes; at most {MAX_UNPACKED_BYTES:,} are read", "save the sheet as CSV")


def _read_header(part: Part, sheet: _Sheet, limits: IngestLimits) -> tuple[int, Header]:
    """The header and the number of its row, the first one that has a value. Raises InvalidInput."""
    for number, cells in enumerate(sheet.rows, 1):
        if any(cell != "" for cell in cells):
            return number, make_header(part, [_write(_convert(cell)) for cell in cells], number, limits)
    raise part.refuse("has no rows", param="sheet")


def _iter_rows(part: Part, sheet: _Sheet, header_row: int, header: Header) -> Iterator[Record | RowProblem]:
    """The rows under the header."""
    merged = _Merged(sheet.merged)
    for number, cells in enumerate(sheet.rows, header_row + 1):
        values = [_convert(cell) for cell in merged.fill(number, cells)]
        if all(value is None for value in values):
            continue
        if misfit := header.find_misfit(values):
            yield part.problem(number, misfit, "ragged", is_row=True)
        else:
            yield Record(number, dict(zip(header.names, values, strict=False)), part.label)


class _Merged:
    """Gives each row of a merged cell the value of its first one, when rows are given in order."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._starts: dict[int, list[Range]] = {}
        for one in ranges:
            self._starts.setdefault(one[0][0] + 1, []).append(one)
        self._open: list[tuple[Range, Cell]] = []

    def fill(self, number: int, cells: list[Cell]) -> list[Cell]:
        """The cells of the row of that number, with the values of merged cells that began above."""
        self._open = [(one, value) for one, value in self._open if one[1][0] + 1 >= number]
        for (_, column), value in ((one[0], value) for one, value in self._open):
            if column < len(cells):
                cells[column] = value
        self._open += [(one, cells[one[0][1]]) for one in self._starts.get(number, ()) if one[0][1] < len(cells)]
        return cells


def _convert(cell: Cell) -> object:
    match cell:
        case "":
            return None
        case bool() | str():
            return cell
        case int():
            return Number(str(cell))
        case float():
            return Number(str(int(cell)) if cell.is_integer() and abs(cell) <= MAX_EXACT_INTEGER else repr(cell))
        case datetime.timedelta():
            return str(cell)
        case datetime.datetime() if cell.time() == datetime.time():
            return cell.date().isoformat()
        case _:
            return cell.isoformat()


def _write(value: object) -> str:
    """A cell of the header, as text."""
    return value.literal if isinstance(value, Number) else "" if value is None else str(value)


def _join(names: Sequence[str]) -> str:
    shown = ", ".join(preview(name) for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown
