"""Text files: units are kept byte for byte."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.ingestion import IngestLimits
from tests.ingest.formats_harness import get_refusal, read_only_problem, read_problems_and_rows, read_rows

CONTENT = b"\xef\xbb\xbf# Title\r\n  indented\r\n\r\n \t\r\nNext\n\tline \x0b\xe2\x80\xa8\n\n\nlast"


@pytest.mark.parametrize(
    ("unit", "rows"),
    [
        ("file", [(1, "# Title\r\n  indented\r\n\r\n \t\r\nNext\n\tline \x0b\u2028\n\n\nlast")]),
        ("paragraph", [(1, "# Title\r\n  indented"), (5, "Next\n\tline \x0b\u2028"), (9, "last")]),
        ("line", [(1, "# Title"), (2, "  indented"), (5, "Next"), (6, "\tline \x0b\u2028"), (9, "last")]),
    ],
)
@pytest.mark.parametrize("name", ["notes.txt", "notes.md"])
def test_units_keep_line_breaks_and_indentation(name: str, unit: str, rows: list[tuple[int, str]]) -> None:
    assert read_problems_and_rows(name, CONTENT, text_unit=unit) == [(line, {"text": text}) for line, text in rows]


@pytest.mark.parametrize("unit", ["paragraph", "line", "file"])
def test_unit_that_is_too_long_is_named(unit: str) -> None:
    content = b"\n\n" + b"x" * 300 + b"\n\nshort"
    problem = read_only_problem("notes.txt", content, IngestLimits(max_row_bytes=100), text_unit=unit)
    assert (problem.place, problem.code) == ("line 3", "too_long")


def test_length_is_counted_in_bytes() -> None:
    limits = IngestLimits(max_row_bytes=100)
    assert read_rows("notes.txt", ("é" * 50).encode(), limits) == [{"text": "é" * 50}]
    assert read_only_problem("notes.txt", ("é" * 51).encode(), limits).code == "too_long"


def test_text_in_another_encoding_is_read_when_it_is_named() -> None:
    content = "Grüße aus München, schöne Äpfel".encode("cp1252")
    assert "send encoding=cp1252" in get_refusal({"notes.txt": content}).hint
    assert read_rows("notes.txt", content, encoding="cp1252") == [{"text": "Grüße aus München, schöne Äpfel"}]


@settings(max_examples=80, deadline=None, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.sampled_from(["paragraph", "line"]))
def test_units_together_have_every_character_but_line_breaks(text: str, unit: str) -> None:
    if text.startswith("\ufeff"):
        text = "x" + text
    rows = read_rows("notes.txt", text.encode(), text_unit=unit, format="text")
    joined = "".join(row["text"] for row in rows)
    assert "".join(joined.split()) == "".join(text.split())
    assert all(row["text"] in text for row in rows)
