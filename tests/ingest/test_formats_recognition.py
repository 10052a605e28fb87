"""What a file is taken for: its content first, its suffix where texts look alike."""

import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import pytest

from jobs.ingest.formats import FORMATS, OPTIONS
from schema.ingestion import IngestOptions
from tests.ingest.dataset_harness import make_image_bytes
from tests.ingest.formats_harness import get_refusal, make_zip, open_files, read_rows

LINES = b'{"text": "a, b"}\n{"text": "c, d"}\n'
LIST = b'[{"text": "a, b"}, {"text": "c, d"}]'
TABLE = b"prompt,completion\na,b\nc,d\n"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_its_function(name: str) -> None:
    if name in ("parquet", "arrow", "xlsx"):
        assert find_spec("pyarrow") is None or callable(resolve_name(FORMATS[name]))
    assert callable(resolve_name(FORMATS[name]))


def test_options_of_formats_exist() -> None:
    assert set(OPTIONS) <= set(IngestOptions.model_fields)
    assert {name for names in OPTIONS.values() for name in names} <= set(FORMATS)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        *((name, LINES, "jsonl") for name in ("rows.jsonl", "rows.json", "rows.txt", "rows.csv", "rows", "rows.dat", "ROWS.JSONL")),
        *((name, LIST, "json") for name in ("rows.json", "rows.jsonl", "rows.txt", "rows", "rows.csv")),
        *((name, TABLE, "csv") for name in ("rows.csv", "rows", "rows.dat", "rows.tsv")),
        ("rows.txt", TABLE, "text"),
        ("rows.md", b"[link](x)\n", "text"),
        ("rows.txt", b"{not json}\n", "text"),
        ("rows.md", b"<html> is a tag\n", "text"),
        ("rows.jsonl", b"no json\n", "jsonl"),
        ("rows.jsonl", b'{"text": "cut\n{"text": "b"}\n', "jsonl"),
        ("rows.jsonl", b'{"text": "' + b"x" * 100_000 + b'"}\n', "jsonl"),
        ("rows.json", b'{"data": [{"text": "a"}]}', "json"),
        ("rows", b'{\n "data": [{"text": "a"}]}', "json"),
        ("rows.csv", b"{x},y\n1,2\n", "csv"),
        ("rows.csv", b"[x],y\n1,2\n", "csv"),
    ],
)
def test_format_is_recognized(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    assert open_files(tmp_path, {name: content}).format == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"%PDF-1.7\n", "is a PDF document"),
        (b"{\\rtf1 text}", "is an RTF document"),
        (make_image_bytes(), "is an image"),
        (make_image_bytes("JPEG"), "is an image"),
        (make_zip({"[Content_Types].xml": b"<Types/>", "word/document.xml": b"<w/>"}), "is a Word document"),
        (make_zip({"[Content_Types].xml": b"<Types/>", "ppt/slides.xml": b"<p/>"}), "is a presentation"),
        (make_zip({"mimetype": b"application/vnd.oasis.opendocument.text", "content.xml": b"<o/>"}), "without a spreadsheet"),
        (pickle.dumps({"text": "a"}), "is a pickle"),
        (b"<!DOCTYPE html><html></html>", "is an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        (b"SQLite format 3\0" + bytes(99), "is a database"),
        (b"BZh91AY", "is compressed by bzip2"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
        (bytes(257) + b"ustar\0", "is a tar archive"),
        (bytes(99), "is no text, and no known format"),
        (b"", "there are no rows: upload is empty"),
        (b" \n\n", "has nothing but blank lines"),
        (b"hello\nworld\n", "it cannot be told of which kind"),
    ],
)
def test_file_of_no_format_is_refused_with_what_would_work(content: bytes, message: str) -> None:
    problem = get_refusal({"upload": content})
    assert message in problem.message
    assert problem.hint


@pytest.mark.parametrize(
    ("name", "hint"), [("tsv", "send format=csv"), ("xls", "send format=xlsx"), ("md", "send format=text"), ("yaml", "known: jsonl, json")]
)
def test_unknown_format_is_refused(name: str, hint: str) -> None:
    problem = get_refusal({"rows": LINES}, format=name)
    assert (problem.param, hint in problem.hint) == ("format", True)


@pytest.mark.parametrize("name", ["parquet", "arrow", "xlsx"])
def test_format_that_the_bytes_contradict_is_refused(name: str) -> None:
    assert get_refusal({"rows": LINES}, format=name).param == "format"


def test_format_option_wins_over_suffix_and_look() -> None:
    assert read_rows("rows.csv", LINES, format="text", text_unit="line") == [{"text": line} for line in LINES.decode().splitlines()]
    assert read_rows("rows", b"text\nhello\n", format="csv") == [{"text": "hello"}]


@pytest.mark.parametrize(("option", "value"), [("delimiter", ";"), ("sheet", "A")])
def test_option_that_the_format_does_not_have_is_refused(option: str, value: str) -> None:
    problem = get_refusal({"rows.jsonl": LINES}, **{option: value})
    assert (problem.param, problem.message) == (option, f"{option} is not an option of jsonl files")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_json_lines_in_a_named_encoding_are_recoded(encoding: str) -> None:
    rows = [{"text": "café\u00a0x"}, {"text": "é" * 30_000}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding)
    assert read_rows("rows.jsonl", content, encoding=encoding) == rows


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no files"):
        open_files(tmp_path, {})
