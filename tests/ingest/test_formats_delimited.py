"""CSV and TSV: every cell as it is written, and rows that do not fit named as a spreadsheet counts them."""

import csv
import io
from encodings.aliases import aliases
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobs.ingest.records import InvalidInput
from schema.ingestion import IngestLimits
from tests.ingest.formats_harness import get_refusal, open_files, read_only_problem, read_problems_and_rows, read_rows

QUICK_SETTINGS = settings(max_examples=80, deadline=None, database=None)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiter_is_recognized(delimiter: str) -> None:
    rows = [{"prompt": "Why, oh why?", "completion": "So."}, {"prompt": "Who?", "completion": "Me; you."}]
    quoted = io.StringIO()
    writer = csv.writer(quoted, delimiter=delimiter)
    writer.writerows([["prompt", "completion"], *[list(row.values()) for row in rows]])
    assert read_rows("rows.csv", quoted.getvalue().encode()) == rows


def test_cells_are_kept_as_written(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfid,text,note\r\n007,"  two\r\n\tlines, and ""quotes""\n",\r\n1e5,caf\xc3\xa9\xe2\x80\xa8x,""\r\n'
    assert read_rows("rows.csv", content) == [
        {"id": "007", "text": '  two\r\n\tlines, and "quotes"\n', "note": None},
        {"id": "1e5", "text": "caf\u00e9\u2028x", "note": None},
    ]
    opened = open_files(tmp_path, {"rows.csv": content})
    assert (opened.format, opened.encoding, opened.delimiter, opened.columns, opened.unit) == (
        *("csv", "utf-8", ",", ("id", "text", "note"), "row"),
    )


def test_rows_are_counted_as_a_spreadsheet_shows_them() -> None:
    content = b'a,b\n"1\n2",x\n\n,\n3,y\n'
    assert read_problems_and_rows("rows.csv", content) == [(2, {"a": "1\n2", "b": "x"}), (5, {"a": "3", "b": "y"})]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_every_line_end_separates_rows(line_end: str) -> None:
    assert read_rows("rows.csv", line_end.join(["a,b", "1,2", "3,4"]).encode()) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


@pytest.mark.parametrize(
    ("row", "code", "reason"),
    [
        ("1,2", "ragged", "has 2 cells, but the header has 3 cells"),
        ("1,2,3,4", "ragged", "has 4 cells, but the header has 3 cells"),
        ('1,"2" x,3', "unreadable", 'write a quotation mark within a quoted cell twice: ""'),
    ],
)
def test_row_that_does_not_fit_is_named(row: str, code: str, reason: str) -> None:
    problem = read_only_problem("rows.csv", f"a,b,c\n1,2,3\n{row}\n4,5,6\n".encode())
    assert (problem.place, problem.code) == ("row 3", code)
    assert reason in problem.reason


def test_row_that_is_too_long_is_skipped_and_others_are_read() -> None:
    content = b"a,b\n1,2\n" + b"x" * 5000 + b",2\n3,4\n"
    limits = IngestLimits(max_row_bytes=1000, max_image_row_bytes=1000)
    problem, after = read_problems_and_rows("rows.csv", content, limits)[1:]
    assert (problem.line, problem.code) == (3, "too_long")  # type: ignore[union-attr]
    assert after == (4, {"a": "3", "b": "4"})


@pytest.mark.parametrize("rest", ["x\n" * 3, "x\n" * 5000])
def test_quotation_mark_that_never_ends_is_refused_with_its_row(rest: str) -> None:
    limits = IngestLimits(max_row_bytes=1000, max_image_row_bytes=1000)
    problem = get_refusal({"rows.csv": f'a,b\n1,2\n"3,4\n{rest}'.encode()}, limits)
    assert "row 3 has" in problem.message
    assert '"' in problem.message + problem.hint


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("a,b,a", "has the column 'a' 2 times in its header, row 1"),
        (",a,b", "has no name for column 1 in its header, row 1"),
        (",,", "has no header: row 1 is empty"),
        ("", "has no header: row 1 is empty"),
        ("a," + "b" * 300, "has a name of 300 characters for column 2 in row 1, which must be the header"),
        (",".join(f"c{n}" for n in range(11)), "has 11 columns; at most 10 are read"),
        ('"a" b,c', "its header, row 1, cannot be read"),
    ],
)
def test_header_that_names_no_columns_is_refused(header: str, message: str) -> None:
    problem = get_refusal({"rows.csv": f"{header}\n1,2,3\n".encode()}, IngestLimits(max_columns=10))
    assert message in problem.message
    assert problem.hint


def test_empty_columns_at_the_end_are_ignored_unless_they_have_values() -> None:
    found = read_problems_and_rows("rows.csv", b"a,b,,\n1,2,,\n3,4,x,\n5,6\n")
    assert [found[0], found[2]] == [(2, {"a": "1", "b": "2"}), (4, {"a": "5", "b": "6"})]
    assert found[1].reason.startswith("has 4 cells, but the header has 2 cells")  # type: ignore[union-attr]


def test_excel_directive_names_the_delimiter_and_is_no_row() -> None:
    assert read_problems_and_rows("rows.csv", b"\xef\xbb\xbfsep=;\r\na;b\r\n1,5;2\r\n") == [(2, {"a": "1,5", "b": "2"})]


def test_delimiter_option_wins() -> None:
    assert read_rows("rows.csv", b"a,b:c\n1,2:3\n", delimiter=":") == [{"a,b": "1,2", "c": "3"}]
    assert get_refusal({"rows.csv": b"a,b\n1,2\n"}, delimiter='"').param == "delimiter"


def test_table_with_one_column_keeps_commas_in_quotes() -> None:
    assert read_rows("rows.csv", b'text\n"Well, yes; no"\nplain\n') == [{"text": "Well, yes; no"}, {"text": "plain"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_byte_order_mark_tells_the_encoding(encoding: str) -> None:
    assert read_rows("rows.csv", "a,b\né,\U0001f600\n".encode(encoding)) == [{"a": "é", "b": "\U0001f600"}]


def test_other_encoding_is_suggested_and_read_when_it_is_named() -> None:
    content = "name,text\nÉlodie,Où étiez-vous? À l’hôtel près du café – c’était très agréable.\n".encode("cp1252")
    problem = get_refusal({"rows.csv": content})
    assert problem.param == "encoding"
    assert "is not UTF-8 at byte 11" in problem.message
    assert "send encoding=cp1252" in problem.hint
    assert read_rows("rows.csv", content, encoding="cp1252")[0]["name"] == "Élodie"


def test_missing_byte_order_mark_is_named() -> None:
    problem = get_refusal({"rows.csv": "a,b\n1,2\n".encode("utf-16-le")}, encoding="utf-16")
    assert (problem.param, problem.hint) == ("encoding", "name the order of its bytes: encoding=utf-16-le or utf-16-be")


def test_place_of_a_wrong_byte_far_into_the_file_is_exact() -> None:
    good = b"a,b\n" + "é,x\n".encode() * 100_000
    problem = get_refusal({"rows.csv": good + b"\xff,x\n"})
    assert f"at byte {len(good) + 1:,}" in problem.message


@pytest.mark.parametrize("encoding", sorted({*aliases.values(), "idna", "punycode", "undefined", "utf-8-sig", "unicode_escape", "utf-7"}))
def test_every_encoding_of_python_is_read_or_refused(encoding: str) -> None:
    try:
        found = read_problems_and_rows("rows.csv", "text\nplain\n".encode(encoding), encoding=encoding)
    except InvalidInput as error:
        assert error.problem.param == "encoding"
    except (LookupError, UnicodeError):
        assert get_refusal({"rows.csv": b"text\nplain\n"}, encoding=encoding).param == "encoding"
    else:
        assert found == [(2, {"text": "plain"})]


@pytest.mark.parametrize("encoding", ["hex", "nonsense", "undefined"])
def test_unknown_encoding_is_refused(encoding: str) -> None:
    assert get_refusal({"rows.csv": b"a,b\n1,2\n"}, encoding=encoding).param == "encoding"


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@QUICK_SETTINGS
@given(st.lists(st.tuples(CELLS, CELLS), max_size=6), st.sampled_from([",", ";", "\t", "|"]), st.booleans())
@example([("\ufeff", "\r")], ",", False)
@example([('"', "a\nb")], ";", True)
def test_what_the_csv_module_writes_is_read_back(pairs: list[tuple[str, str]], delimiter: str, quote_all: bool) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    writer.writerow(["one", "two"])
    writer.writerows(pairs)
    expected = [{"one": one or None, "two": two or None} for one, two in pairs if one or two]
    assert read_rows("rows.csv", out.getvalue().encode(), delimiter=delimiter, format="csv") == expected


@QUICK_SETTINGS
@given(st.binary(max_size=60))
def test_any_bytes_as_csv_give_rows_or_problems(content: bytes) -> None:
    try:
        read_problems_and_rows("rows.csv", b"a,b\n" + content, format="csv", encoding="latin-1")
    except AssertionError:
        raise
    except ValueError as error:
        assert str(error)
