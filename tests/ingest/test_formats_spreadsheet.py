"""Spreadsheets: one sheet, with the row numbers that a person sees."""

import zipfile
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from schema.ingestion import IngestLimits, RowProblem
from tests.ingest.formats_harness import get_refusal, make_gzip, make_zip, open_files, read_problems_and_rows, read_rows
from tests.ingest.spreadsheet_files import Formula, make_ods, make_xlsx

pytest.importorskip("python_calamine")

TABLE = [["prompt", "completion"], ["  Why?\n\tNow?", "So."], ["Who?", "Me."]]
ROWS = [{"prompt": "  Why?\n\tNow?", "completion": "So."}, {"prompt": "Who?", "completion": "Me."}]


@pytest.mark.parametrize("wrap", [bytes, make_gzip, lambda content: make_zip({"rows.xlsx": content})], ids=["plain", "gzip", "zip"])
def test_workbook_is_read(wrap: Any) -> None:
    assert read_rows("rows.xlsx", wrap(make_xlsx({"Sheet1": TABLE}))) == ROWS


def test_opendocument_is_read() -> None:
    table = [["prompt", "completion"], ["Why?", "So."]]
    assert read_rows("rows.ods", make_ods(table)) == [{"prompt": "Why?", "completion": "So."}]


def test_values_keep_their_kind() -> None:
    table = [
        ["n", "big", "share", "yes", "day", "sum", "error", "empty"],
        [3, 1234567890123, 0.1, True, date(2024, 2, 29), Formula("1+1=2"), "#N/A", None],
    ]
    assert read_rows("rows.xlsx", make_xlsx({"A": table})) == [
        {"n": "#3", "big": "#1234567890123", "share": "#0.1", "yes": True, "day": "2024-02-29", "sum": "2", "error": None, "empty": None}
    ]


def test_rows_have_the_numbers_that_the_spreadsheet_shows() -> None:
    table = [["a", "b"], ["1", "2"], [None, None], ["3", None], ["4", "5", "6"]]
    found = read_problems_and_rows("rows.xlsx", make_xlsx({"A": table}, first_row=3))
    assert found[:2] == [(4, {"a": "1", "b": "2"}), (6, {"a": "3", "b": None})]
    assert isinstance(found[2], RowProblem)
    assert (found[2].place, found[2].code) == ("row 7", "ragged")


def test_every_row_of_a_merged_cell_has_its_value() -> None:
    table = [["a", "b"], ["x", "1"], [None, "2"], [None, "3"], [None, "4"]]
    assert [row["a"] for row in read_rows("rows.xlsx", make_xlsx({"A": table}, merged=["A2:A4"]))] == ["x", "x", "x", None]


def test_several_sheets_need_a_choice(tmp_path: Path) -> None:
    content = make_xlsx({"Notes": [["x"]], "Rows": TABLE, "Empty": [], "Secret": [["y"], ["1"]]}, hidden=["Secret"])
    problem = get_refusal({"rows.xlsx": content})
    assert problem.message == "rows.xlsx has 2 sheets with rows: 'Notes', 'Rows'"
    assert (problem.param, problem.hint) == ("sheet", "choose one: sheet=Notes")
    assert read_rows("rows.xlsx", content, sheet="Rows") == ROWS
    assert read_rows("rows.xlsx", content, sheet="Secret") == [{"y": "1"}]
    assert open_files(tmp_path, {"rows.xlsx": content}, sheet="Rows").sheet == "Rows"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (make_xlsx({"A": TABLE}), {"sheet": "B"}, "has no sheet 'B'"),
        (make_xlsx({"A": TABLE, "B": []}), {"sheet": "B"}, "has no rows in the sheet 'B'"),
        (make_xlsx({"A": []}), {}, "has no sheet with rows"),
        (make_xlsx({"A": TABLE}, hidden=["A"]), {}, "has no sheet with rows"),
        (make_xlsx({"A": [["a", "a"]]}), {}, "has the column 'a' 2 times in its header, row 1"),
        (make_xlsx({"A": [["a", None, "b"]]}), {}, "has no name for column 2 in its header, row 1"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), {}, "cannot be read as a spreadsheet"),
    ],
)
def test_workbook_that_has_no_table_is_refused(content: bytes, options: dict[str, Any], message: str) -> None:
    problem = get_refusal({"rows.xlsx": content}, **options)
    assert message in problem.message
    assert problem.hint


def test_workbook_with_too_many_columns_is_refused() -> None:
    content = make_xlsx({"A": [[f"c{n}" for n in range(11)]]})
    assert "has 11 columns" in get_refusal({"rows.xlsx": content}, IngestLimits(max_columns=10)).message


def test_workbook_that_becomes_far_longer_is_refused_before_it_is_read() -> None:
    out = BytesIO(make_xlsx({"A": TABLE}))
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/sharedStrings.xml", bytes(65 << 20))
    assert "times as long" in get_refusal({"rows.xlsx": out.getvalue()}).message
