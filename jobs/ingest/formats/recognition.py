"""Which format a part has: its first bytes decide; its suffix decides between texts that look alike.

What no format can be is named, with what would work.
"""

import json
import re
import zipfile
from typing import Final

from jobs.ingest.formats.delimited import choose_delimiter, count_columns
from jobs.ingest.formats.encodings import choose_encoding
from jobs.ingest.formats.parts import Part
from jobs.ingest.records import InvalidInput
from schema.ingestion import IngestOptions

FORMAT_BY_SUFFIX: Final = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
    ".xlsb": "xlsx",
    ".xls": "xlsx",
    ".ods": "xlsx",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
}
FORMAT_BY_MAGIC: Final = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),  # a stream
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "xlsx"),  # .xls; a .doc begins in the same way, and is refused when it is read
)
AS_TEXT = "save its text as .txt, or its rows as JSON lines"
AS_TABLE = "save its rows as JSON lines, CSV or Parquet"
UNPACK = "unpack it and send its files, or pack them into one .zip"
# What people send that no format is: the first bytes, what it is, and what would work.
FOREIGN_MAGIC: Final = (
    (b"%PDF", "a PDF document", AS_TEXT),
    (b"{\\rtf", "an RTF document", AS_TEXT),
    (b"\x89PNG", "an image", 'images stand in rows: {"type": "image", "image": "data:image/png;base64,..."}'),
    (b"\xff\xd8\xff", "an image", 'images stand in rows: {"type": "image", "image": "data:image/jpeg;base64,..."}'),
    (b"GIF8", "an image", 'images stand in rows, as PNG: {"type": "image", "image": "data:image/png;base64,..."}'),
    (b"RIFF", "a recording or an image", AS_TABLE),
    (b"ID3", "a recording", AS_TABLE),
    (b"OggS", "a recording", AS_TABLE),
    (b"PARE", "an encrypted Parquet file", "save it without encryption"),
    (b"ORC", "an ORC file", AS_TABLE),
    (b"Obj\x01", "an Avro file", AS_TABLE),
    (b"FEA1", "a file of Feather's first version", "save it again with pyarrow.feather.write_feather"),
    (b"SQLite format 3", "a database", AS_TABLE),
    (b"\x89HDF", "an HDF5 file", AS_TABLE),
    (b"\x93NUMPY", "an array of NumPy", AS_TABLE),
    (b"GGUF", "a model", "a dataset has rows of text"),
    (b"\x7fELF", "a program", AS_TABLE),
    (b"MZ\x90", "a program", AS_TABLE),
    (b"\x1f\x8b", "compressed once more", "send it compressed once"),
    (b"\x28\xb5\x2f\xfd", "compressed once more", "send it compressed once"),
    (b"BZh", "compressed by bzip2", "send it as it is, or as .gz, .zst or in a .zip"),
    (b"\xfd7zXZ", "compressed by xz", "send it as it is, or as .gz, .zst or in a .zip"),
    (b"7z\xbc\xaf", "a 7z archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "run `git lfs pull` and send the file"),
)
OFFICE_KINDS: Final = (("word/", "a Word document", AS_TEXT), ("ppt/", "a presentation", AS_TEXT))
PICKLE = re.compile(rb"\x80[\x02-\x05].*\.$", re.DOTALL)
HTML = re.compile(r"<(!doctype|html|head|body|\?xml)\b", re.IGNORECASE)
TAR_MAGIC_OFFSET = 257
FIRST_LINES = 50


def recognize(part: Part, options: IngestOptions) -> str:
    """The name of the part's format. Raises InvalidInput."""
    sample = part.read_sample()
    if not sample:
        raise _refuse_empty(part)
    if found := _recognize_binary(part, sample):
        return found
    codec = choose_encoding(sample, options)
    if codec == "utf-8-sig" and b"\0" in sample[:1024] and not options.encoding:
        hint = "if it is text, save it as UTF-8, or name its encoding, for example encoding=utf-16-le"
        raise part.refuse(f"is no text, and no known format; {_describe_known()}", hint, "format")
    return _recognize_text(part, sample.decode(codec, "replace"))  # the reader says where it cannot be decoded


def check_format(part: Part, name: str) -> None:
    """Raise InvalidInput if the request says that a part has a format, and its bytes say that it cannot have."""
    sample = part.read_sample()
    if not sample:
        raise _refuse_empty(part)
    found = _recognize_binary(part, sample)
    if found and found != name:
        raise part.refuse(f"is {found}, not {name}", f"send format={found}, or leave it out", "format")
    if not found and name in ("parquet", "arrow", "xlsx"):
        raise part.refuse(f"is no file of format {name}", "leave out format, and it is recognized", "format")


def _recognize_binary(part: Part, sample: bytes) -> str | None:
    """The format by the first bytes; None if they may be text. Raises InvalidInput for what is neither."""
    for magic, name in FORMAT_BY_MAGIC:
        if sample.startswith(magic):
            return name
    for magic, kind, hint in FOREIGN_MAGIC:
        if sample.startswith(magic):
            raise part.refuse(f"is {kind}", hint)
    if sample.startswith(b"PK\x03\x04"):
        return _recognize_document(part)
    if sample[TAR_MAGIC_OFFSET : TAR_MAGIC_OFFSET + 5] == b"ustar":
        raise part.refuse("is a tar archive", UNPACK)
    if PICKLE.match(sample) or (sample[:1] == b"\x80" and sample[1:2] in b"\x02\x03\x04\x05" and part.suffix in (".pkl", ".pickle", ".pt")):
        raise part.refuse("is a pickle, which could run code when it is read", AS_TABLE)
    return None


def _recognize_document(part: Part) -> str:
    """What a .zip file is that was not taken for an archive: a spreadsheet, or something else."""
    try:
        with part.open_seekable() as stream, zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
            kind = archive.read("mimetype")[:100] if "mimetype" in names else b""
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
        raise part.refuse(f"is a broken .zip file: {error}", "it may have been cut off; send it again") from error
    if any(name.startswith("xl/") for name in names) or kind.startswith(b"application/vnd.oasis.opendocument.spreadsheet"):
        return "xlsx"
    for prefix, description, hint in OFFICE_KINDS:
        if any(name.startswith(prefix) for name in names):
            raise part.refuse(f"is {description}", hint)
    if kind:
        raise part.refuse("is an OpenDocument file without a spreadsheet, or an e-book", AS_TEXT)
    raise part.refuse("is an archive in an archive", UNPACK)


def _recognize_text(part: Part, text: str) -> str:
    start = text.lstrip()
    by_suffix = FORMAT_BY_SUFFIX.get(part.suffix)
    if HTML.match(start) and by_suffix != "text":
        raise part.refuse("is an HTML or XML page", "if it was downloaded, check the address; otherwise save its text as .txt")
    if not start and by_suffix is None:
        raise part.refuse("has nothing but blank lines", "send a file with rows")
    if start.startswith("{") and (by_suffix not in ("csv", "text") or _is_object(_first_line(start))):
        return _recognize_objects(start, by_suffix)
    if start.startswith("[") and (by_suffix == "json" or start[1:].lstrip()[:1] in ("{", "]")) and _first_line(start) != "[]":
        return "json"
    if by_suffix in ("jsonl", "json", "csv", "text"):
        return by_suffix
    lines = text.splitlines(keepends=True)[:FIRST_LINES]
    if len(lines) > 1 and count_columns(lines, choose_delimiter(lines, part.suffix)) > 1:
        return "csv"
    hint = "send format=jsonl, json, csv or text, or name the file with its suffix"
    raise part.refuse(f"is text, but it cannot be told of which kind; {_describe_known()}", hint, "format")


def _recognize_objects(start: str, by_suffix: str | None) -> str:
    """JSON lines, or one object in several lines or with a list of rows."""
    first, _, rest = start.partition("\n")
    if not _is_object(first):
        # A line that is broken, or longer than the sample, is one of JSON lines if the file says so.
        return "jsonl" if by_suffix == "jsonl" and first.strip() != "{" else "json" if rest or by_suffix == "json" else "jsonl"
    return "json" if by_suffix == "json" and not rest.strip() else "jsonl"


def _first_line(text: str) -> str:
    return text.partition("\n")[0].strip()


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_empty(part: Part) -> InvalidInput:
    return InvalidInput(f"there are no rows: {part.label or part.name} is empty", "send a file with rows")


def _describe_known() -> str:
    return "known are JSON lines, JSON, CSV, Parquet, Arrow, spreadsheets and text"


def refuse_format(name: str, known: tuple[str, ...]) -> InvalidInput:
    """The error for a format that does not exist."""
    similar = FORMAT_BY_SUFFIX.get(f".{name}")
    hint = f"send format={similar}" if similar else f"known: {', '.join(known)}"
    return InvalidInput(f"no format {name!r}", hint, "format")
