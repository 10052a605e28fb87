"""Compressed files and archives: what is in them, and what is refused before it does harm."""

import gzip
import io
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from jobs.ingest.formats import parts
from schema.ingestion import IngestLimits, RowProblem
from tests.ingest.dataset_harness import to_jsonl
from tests.ingest.formats_harness import (
    get_refusal,
    make_gzip,
    make_zip,
    make_zstd,
    open_files,
    read_problems_and_rows,
    read_rows,
    simplify,
)

pytest.importorskip("zstandard")

ROWS = [{"text": f"row {number}"} for number in range(50)]
LINES = to_jsonl(ROWS)
COMPRESS = {"gzip": make_gzip, "zstd": make_zstd}


@pytest.mark.parametrize(
    ("name", "container"), [("rows.jsonl.gz", "gzip"), ("rows.jsonl.zst", "zstd"), ("rows.zip", "zip"), ("rows.txt", "gzip")]
)
def test_compressed_file_is_read_by_its_content(name: str, container: str, tmp_path: Path) -> None:
    content = make_zip({"rows.jsonl": LINES}) if container == "zip" else COMPRESS[container](LINES)
    assert read_rows(name, content) == ROWS
    opened = open_files(tmp_path, {name: content})
    assert (opened.container, opened.format, len(opened.parts), opened.total_bytes) == (container, "jsonl", 1, len(content))


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
def test_several_frames_are_read(compress: Any) -> None:
    assert read_rows("rows.jsonl", compress(LINES) + compress(b"") + compress(LINES)) == ROWS * 2


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
@pytest.mark.parametrize("damage", ["cut off", "changed", "more"])
def test_broken_compressed_file_is_refused(compress: Any, damage: str) -> None:
    content = compress(LINES * 500)
    middle = len(content) // 2
    broken = {"cut off": content[:middle], "changed": content[:middle] + bytes(9) + content[middle + 9 :], "more": content + b"more"}
    if damage == "changed" and compress is make_zstd:
        broken["changed"] = content[:4] + bytes([content[4] ^ 0x08]) + content[5:]  # a reserved bit of the header
    problem = get_refusal({"rows.jsonl.x": broken[damage]})
    assert problem.message.startswith("rows.jsonl.x is broken")
    assert problem.hint


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
def test_bomb_is_refused_long_before_its_end(compress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "RATIO_FREE_BYTES", 1 << 20)
    content = compress(b'{"text": "a"}\n' + b"\n" * (32 << 20))
    assert "times as long" in get_refusal({"rows.jsonl.gz": content}).message


@pytest.mark.parametrize("compress", [*COMPRESS.values(), lambda content: make_zip({"rows.jsonl": content})], ids=[*COMPRESS, "zip"])
def test_bytes_are_counted_after_decompression(compress: Any) -> None:
    content = compress(LINES * 100)
    assert "bytes after decompression" in get_refusal({"rows.jsonl": content}, IngestLimits(max_total_bytes=50_000)).message


# --- archives --------------------------------------------------------------------------------------------------------


def test_files_of_an_archive_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    members = {
        "b.jsonl": to_jsonl(ROWS[2:3]),
        "a/z.jsonl": to_jsonl(ROWS[:2]),
        "README.md": b"# About",
        "__MACOSX/._b.jsonl": b"\0",
        ".DS_Store": b"\0",
    }
    opened = open_files(tmp_path, {"rows.zip": make_zip(members)})
    assert [(record.part, simplify(record)) for record in opened.iter_records()] == [
        ("a/z.jsonl", (1, ROWS[0])),
        ("a/z.jsonl", (2, ROWS[1])),
        ("b.jsonl", (1, ROWS[2])),
    ]


def test_problem_names_its_file() -> None:
    content = make_zip({"a.csv": b"x,y\n1,2\n", "b.csv": b"y,x\n1\n"})
    found = read_problems_and_rows("rows.zip", content)
    assert isinstance(found[1], RowProblem)
    assert found[1].place == "b.csv row 2"


def test_several_files_are_read_as_a_folder(tmp_path: Path) -> None:
    opened = open_files(tmp_path, {"a.jsonl.gz": make_gzip(to_jsonl(ROWS[:1])), "b.jsonl": to_jsonl(ROWS[1:2])})
    assert opened.container == "folder"
    assert [simplify(record) for record in opened.iter_records()] == [(1, ROWS[0]), (1, ROWS[1])]


def make_member(name: str, mode: int = 0, **attributes: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", attributes.get("compression", zipfile.ZIP_DEFLATED)) as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        info.compress_type = attributes.get("compression", zipfile.ZIP_DEFLATED)
        archive.writestr(info, LINES)
    return out.getvalue()


def make_encrypted() -> bytes:
    content = bytearray(make_zip({"rows.jsonl": LINES}))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def make_longer_than_declared() -> bytes:
    """An archive whose directory says that its file has 10 bytes."""
    content = bytearray(make_zip({"rows.jsonl": LINES}))
    content[22:26] = content[(at := content.index(b"PK\x01\x02")) + 24 : at + 28] = struct.pack("<I", 10)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_member("../rows.jsonl"), "has a path outside the archive"),
        (make_member("/etc/rows.jsonl"), "has a path outside the archive"),
        (make_member("a\\..\\..\\rows.jsonl"), "has a path outside the archive"),
        (make_member("C:\\rows.jsonl"), "has a path outside the archive"),
        (make_member("rows.jsonl", stat.S_IFLNK | 0o777), "is a link or a device"),
        (make_member("rows.jsonl", stat.S_IFIFO), "is a link or a device"),
        (make_member("rows.jsonl", compression=zipfile.ZIP_LZMA), "is compressed by method 14"),
        (make_encrypted(), "is encrypted"),
        (make_longer_than_declared(), "is broken"),
        (make_zip({}), "has no files in it"),
        (make_zip({".hidden": b"x"}), "has no files in it"),
        (make_zip({"rows.jsonl": LINES})[:-30], "is a broken .zip file"),
        (make_zip({"inner.zip": make_zip({"rows.jsonl": LINES})}), "is an archive in an archive"),
        (make_zip({"rows.jsonl.gz": make_gzip(LINES)}), "is compressed once more"),
        (make_gzip(make_gzip(LINES)), "is compressed once more"),
        (make_gzip(make_zip({"rows.jsonl": LINES})), "is an archive in an archive"),
        (make_zip({"a.jsonl": LINES, "b.csv": b"a,b\n1,2\n"}), "the files have several formats: jsonl (a.jsonl), csv (b.csv)"),
        (make_zip({"a.jsonl": LINES, "b.jsonl": b""}), "b.jsonl is empty"),
    ],
)
def test_archive_that_is_not_read_is_refused_with_a_reason(content: bytes, message: str) -> None:
    problem = get_refusal({"rows.zip": content})
    assert message in problem.message
    assert problem.hint


def test_archive_with_too_many_files_is_refused() -> None:
    problem = get_refusal({"rows.zip": make_zip({f"{n}.jsonl": LINES for n in range(6)})}, IngestLimits(max_parts=5))
    assert problem.message == "rows.zip has 6 files; at most 5 are read"


def test_archive_whose_file_becomes_far_longer_is_refused_unread() -> None:
    content = make_zip({"rows.jsonl": b"\n" * (65 << 20)})
    assert "times as long" in get_refusal({"rows.zip": content}).message


def test_archive_beside_other_files_is_refused() -> None:
    problem = get_refusal({"a.zip": make_zip({"rows.jsonl": LINES}), "b.jsonl": LINES})
    assert problem.message == "a.zip is an archive beside other files"


def test_gzip_keeps_every_byte_of_a_line() -> None:
    text = "  \u2028\x0b\t é"
    assert read_rows("notes.txt.gz", gzip.compress(f"{text}\n\n{text}".encode())) == [{"text": text}] * 2
