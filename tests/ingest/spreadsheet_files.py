"""Spreadsheets for tests, written part by part: no library that writes them is among the dependencies."""

from collections.abc import Mapping, Sequence
from datetime import date
from xml.sax.saxutils import escape, quoteattr

from tests.ingest.formats_harness import make_zip

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
ODF = "urn:oasis:names:tc:opendocument:xmlns"
DATE_STYLE = (
    f'<styleSheet xmlns="{MAIN}"><fonts count="1"><font/></fonts><fills count="1"><fill/></fills><borders count="1"><border/></borders>'
    '<cellStyleXfs count="1"><xf/></cellStyleXfs><cellXfs count="2"><xf/><xf numFmtId="14" applyNumberFormat="1"/></cellXfs></styleSheet>'
)

Cell = str | int | float | bool | date | None
Rows = Sequence[Sequence[Cell]]


class Formula(str):
    """A formula; its cached value is the text after the last `=`."""


def make_xlsx(sheets: Mapping[str, Rows], *, hidden: Sequence[str] = (), merged: Sequence[str] = (), first_row: int = 1) -> bytes:
    """A workbook. `merged`: ranges such as A2:A4, of every sheet; `first_row`: in which its rows begin."""
    office = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    numbers = range(1, len(sheets) + 1)
    parts = [
        ("/xl/workbook.xml", f"{office}.sheet.main+xml"),
        *((f"/xl/worksheets/sheet{n}.xml", f"{office}.worksheet+xml") for n in numbers),
    ]
    types = [
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>',
        '<Default Extension="xml" ContentType="application/xml"/>',
        *(f'<Override PartName="{name}" ContentType="{kind}"/>' for name, kind in parts),
    ]
    listed = [
        f'<sheet name={quoteattr(name)} sheetId="{n}" r:id="s{n}" state="{"hidden" if name in hidden else "visible"}"/>'
        for n, name in zip(numbers, sheets, strict=True)
    ]
    targets = {f"s{n}": ("worksheet", f"worksheets/sheet{n}.xml") for n in numbers} | {"styles": ("styles", "styles.xml")}
    merges = "".join(f'<mergeCell ref="{place}"/>' for place in merged)
    merge_cells = f'<mergeCells count="{len(merged)}">{merges}</mergeCells>' if merged else ""
    members = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">{"".join(types)}</Types>',
        "_rels/.rels": _write_relations({"workbook": ("officeDocument", "xl/workbook.xml")}),
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{RELATIONS}"><sheets>{"".join(listed)}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": _write_relations(targets),
        "xl/styles.xml": DATE_STYLE,
    }
    for n, rows in zip(numbers, sheets.values(), strict=True):
        body = "".join(_write_row(first_row + index, row) for index, row in enumerate(rows))
        members[f"xl/worksheets/sheet{n}.xml"] = f'<worksheet xmlns="{MAIN}"><sheetData>{body}</sheetData>{merge_cells}</worksheet>'
    return make_zip({name: text.encode() for name, text in members.items()})


def _write_relations(targets: Mapping[str, tuple[str, str]]) -> str:
    listed = (f'<Relationship Id="{id}" Type="{RELATIONS}/{kind}" Target="{target}"/>' for id, (kind, target) in targets.items())
    return f'<Relationships xmlns="{PACKAGE}/relationships">{"".join(listed)}</Relationships>'


def _write_row(number: int, row: Sequence[Cell]) -> str:
    cells = "".join(_write_cell(f"{chr(65 + column)}{number}", value) for column, value in enumerate(row) if value is not None)
    return f'<row r="{number}">{cells}</row>'


def _write_cell(place: str, value: Cell) -> str:
    match value:
        case bool():
            return f'<c r="{place}" t="b"><v>{int(value)}</v></c>'
        case Formula():
            formula, _, cached = value.rpartition("=")
            return f'<c r="{place}" t="str"><f>{escape(formula)}</f><v>{escape(cached)}</v></c>'
        case str() if value.startswith("#"):
            return f'<c r="{place}" t="e"><v>{value}</v></c>'
        case str():
            return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{escape(value)}</t></is></c>'
        case date():
            return f'<c r="{place}" s="1"><v>{(value - date(1899, 12, 30)).days}</v></c>'
        case _:
            return f'<c r="{place}"><v>{value}</v></c>'


def make_ods(rows: Rows, name: str = "Sheet1") -> bytes:
    """An OpenDocument spreadsheet with one sheet of strings."""
    kind = "application/vnd.oasis.opendocument.spreadsheet"
    cell = '<table:table-cell office:value-type="string"><text:p>{}</text:p></table:table-cell>'
    lines = ("".join(cell.format(escape(str(value))) for value in row) for row in rows)
    body = "".join(f"<table:table-row>{line}</table:table-row>" for line in lines)
    names = " ".join(f'xmlns:{short}="{ODF}:{short}:1.0"' for short in ("office", "table", "text"))
    table = f"<table:table table:name={quoteattr(name)}>{body}</table:table>"
    content = f"<office:body><office:spreadsheet>{table}</office:spreadsheet></office:body>"
    files = (("/", kind), ("content.xml", "text/xml"))
    entries = "".join(f'<manifest:file-entry manifest:full-path="{path}" manifest:media-type="{media}"/>' for path, media in files)
    members = {
        "mimetype": kind,
        "content.xml": f"<office:document-content {names}>{content}</office:document-content>",
        "META-INF/manifest.xml": f'<manifest:manifest xmlns:manifest="{ODF}:manifest:1.0">{entries}</manifest:manifest>',
    }
    return make_zip({name: text.encode() for name, text in members.items()})
