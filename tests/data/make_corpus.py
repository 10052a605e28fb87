"""`python -m tests.data.make_corpus FOLDER`: make the files of the corpus that are too large, hostile or secret to be kept."""

import base64
import gzip
import hashlib
import io
import json
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
MIB = 1 << 20
ROW = '{"prompt": "Who wrote Hamlet?", "completion": "Shakespeare."}\n'
WORDS = "the committee met on a tuesday to read what nobody had written about "


def make_gzip_bomb(path: Path) -> None:
    """A gigabyte of spaces in 1 MB: 64 members of 16 MiB, one after the other."""
    path.write_bytes(gzip.compress(ROW.encode(), mtime=0) + gzip.compress(b" " * (16 * MIB), mtime=0) * 64)


def make_zip_bomb(path: Path) -> None:
    """A member of 64 MiB in 64 kB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", ROW.encode() + b" " * (64 * MIB))


def make_zip_of_many_files(path: Path) -> None:
    """More files than an archive may have."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(10_001):
            archive.writestr(f"{number}.jsonl", ROW)


def make_zip_with_false_size(path: Path) -> None:
    """The directory says that the member has 61 bytes; it has 32 MiB."""
    content = ROW.encode() + b" " * (32 * MIB)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", content)
    true_size, false_size = len(content).to_bytes(4, "little"), len(ROW).to_bytes(4, "little")
    path.write_bytes(buffer.getvalue().replace(true_size, false_size))


def make_spreadsheet_bomb(path: Path) -> None:
    """A sheet of 96 MiB of cells in 300 kB, and with it a sheet as it should be."""
    cells = b'<row><c t="inlineStr"><is><t>a</t></is></c></row>' * 1000
    sheet = b'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
    with zipfile.ZipFile(CORPUS / "two_sheets.xlsx") as real, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in real.namelist():
            content = real.read(name)
            if name == "xl/worksheets/sheet2.xml":
                content = sheet + cells * (96 * MIB // len(cells)) + b"</sheetData></worksheet>"
            archive.writestr(name, content)


def make_parquet_bomb(path: Path) -> None:
    """A text of 1 MB, once in the file and in each of 100,000 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = WORDS * (1_000_000 // len(WORDS))
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd")


def make_long_row(path: Path) -> None:
    """A row of about 200,000 tokens, which is within the limits, among short ones."""
    text = " ".join(f"{zlib.crc32(str(number).encode()) % 1000}" for number in range(200_000))
    path.write_text(ROW + json.dumps({"prompt": "Read the numbers.", "completion": text}) + "\n" + ROW.replace("Hamlet", "Macbeth"))


def make_too_long_row(path: Path) -> None:
    """A row of 4 MiB among short ones."""
    path.write_text(ROW + json.dumps({"prompt": "Read.", "completion": "a" * (4 * MIB)}) + "\n" + ROW.replace("Hamlet", "Macbeth"))


def make_endless_line(path: Path) -> None:
    """32 MiB without a line feed."""
    path.write_bytes(b'{"prompt": "' + b"a" * (32 * MIB))


def make_endless_quote(path: Path) -> None:
    """A table whose quote is never closed, of 32 MiB."""
    path.write_bytes(b'question,answer\nWho?,"' + b"abcdefg,\n" * (32 * MIB // 9))


def make_wide_table(path: Path) -> None:
    """2,000 columns."""
    path.write_text(",".join(f"column_{number}" for number in range(2000)) + "\n" + ",".join("1" for _ in range(2000)) + "\n")


def make_deep_array(path: Path) -> None:
    """600,000 lists inside each other."""
    path.write_text("[" * 600_000 + "]" * 600_000)


def make_long_number(path: Path) -> None:
    """A number of 900,000 digits, which takes a plain parser seconds."""
    path.write_text(ROW + '{"prompt": "How many?", "answer": ' + "9" * 900_000 + "}\n")


def make_secrets(path: Path) -> None:
    """Secrets and personal data that look real, so that no file of the repository has any."""
    digest = hashlib.sha512(b"tunesmith").digest()
    letters = base64.b32encode(digest).decode()
    rows = [
        f"My key is AKIA{letters[:16]}, why does it fail?",
        "-----BEGIN PRIVATE " + f"KEY-----\n{base64.b64encode(digest).decode()}\n-----END PRIVATE KEY-----\nIs this valid?",
        "Write to m.okafor@harbor-clinic.org or call +44 20 7946 1234.",
        "My card 4539 5787 6362 1486 was declined.",
        *(f"How much is {number} times {number}?" for number in range(60)),
    ]
    path.write_text("".join(json.dumps({"prompt": row, "completion": f"Answer {number}."}) + "\n" for number, row in enumerate(rows)))


FILES: dict[str, Callable[[Path], None]] = {
    "bomb.jsonl.gz": make_gzip_bomb,
    "bomb.zip": make_zip_bomb,
    "many_files.zip": make_zip_of_many_files,
    "false_size.zip": make_zip_with_false_size,
    "bomb.xlsx": make_spreadsheet_bomb,
    "bomb.parquet": make_parquet_bomb,
    "long_row.jsonl": make_long_row,
    "too_long_row.jsonl": make_too_long_row,
    "endless_line.jsonl": make_endless_line,
    "endless_quote.csv": make_endless_quote,
    "two_thousand_columns.csv": make_wide_table,
    "deep_array.json": make_deep_array,
    "long_number.jsonl": make_long_number,
    "secrets.jsonl": make_secrets,
}


def main(folder: str) -> None:
    """Make all of them."""
    for name, make in FILES.items():
        make(Path(folder) / name)


if __name__ == "__main__":
    main(sys.argv[1])
