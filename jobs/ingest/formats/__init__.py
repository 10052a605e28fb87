"""The formats of files: how each is recognized and read. One module for each format, and a line in `FORMATS`.

A reader yields records as they come, and a RowProblem for what cannot be read; it never keeps a whole file in memory, except of a
spreadsheet, whose size is limited for that. What records mean does not belong here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Final, Literal

from jobs.ingest.formats.containers import Container, open_container
from jobs.ingest.formats.parts import Meter, Part
from jobs.ingest.formats.reader import Reader
from jobs.ingest.formats.recognition import check_format, recognize, refuse_format
from jobs.ingest.formats.saved_datasets import arrange_parts
from jobs.ingest.records import InvalidInput, Record
from schema.ingestion import IngestLimits, IngestOptions, InputFile, RowProblem

# Of each format a function `(parts, options, limits) -> Reader`. Its module imports what it needs inside functions.
FORMATS: Final = {
    "jsonl": "jobs.ingest.formats.lines:open_lines",
    "json": "jobs.ingest.formats.json_values:open_json",
    "csv": "jobs.ingest.formats.delimited:open_delimited",
    "parquet": "jobs.ingest.formats.parquet:open_parquet",
    "arrow": "jobs.ingest.formats.arrow:open_arrow",
    "xlsx": "jobs.ingest.formats.spreadsheet:open_spreadsheets",
    "text": "jobs.ingest.formats.text:open_texts",
}
# The options that only some formats have, and which formats.
OPTIONS: Final = {"delimiter": ("csv",), "sheet": ("xlsx",), "encoding": ("jsonl", "json", "csv", "text")}


@dataclass(frozen=True)
class OpenedInput:
    """The files of an ingestion, recognized as one format."""

    format: str
    files: Sequence[InputFile]
    container: Container | None
    parts: tuple[Part, ...]  # the files with records, in the order in which they are read
    reader: Reader
    meter: Meter
    note: str = ""  # what a person should know about how the files are read

    def iter_records(self) -> Iterator[Record | RowProblem]:
        """All records, from the first; each call begins again."""
        self.meter.start()
        for part in self.parts:
            yield from self.reader.read(part)

    @property
    def unit(self) -> Literal["line", "row"]:
        """What the numbers of records count."""
        return self.reader.unit

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a table; empty where each record has its own."""
        return self.reader.columns

    @property
    def encoding(self) -> str | None:
        """Of text files."""
        return self.reader.encoding

    @property
    def delimiter(self) -> str | None:
        """Of CSV files."""
        return self.reader.delimiter

    @property
    def sheet(self) -> str | None:
        """Of a spreadsheet."""
        return self.reader.sheet

    @property
    def total_bytes(self) -> int:
        """The size of the files as they are."""
        return sum(Path(file.path).stat().st_size for file in self.files)

    @property
    def bytes_read(self) -> int:
        """How many of them were read since `iter_records` was called."""
        return min(self.meter.bytes_read, self.total_bytes)


def open_input(files: Sequence[InputFile], options: IngestOptions, limits: IngestLimits) -> OpenedInput:
    """Recognize the format of the files. Raises InvalidInput."""
    if options.format is not None and options.format not in FORMATS:
        raise refuse_format(options.format, tuple(FORMATS))
    meter = Meter(limits)
    contents = open_container(files, limits, meter)
    arrangement = arrange_parts(contents.parts)
    name = _find_format(arrangement.parts, options)
    _check_options(name, options)
    reader: Reader = resolve_name(FORMATS[name])(arrangement.parts, options, limits)
    return OpenedInput(name, files, contents.container, arrangement.parts, reader, meter, arrangement.note)


def _find_format(parts: Sequence[Part], options: IngestOptions) -> str:
    """The format of all parts. Raises InvalidInput."""
    if options.format is not None:
        for part in parts:
            check_format(part, options.format)
        return options.format
    examples: dict[str, str] = {}  # of each format that was found
    for part in parts:
        examples.setdefault(recognize(part, options), part.name)
    if len(examples) > 1:
        found = ", ".join(f"{name} ({file})" for name, file in examples.items())
        raise InvalidInput(f"the files have several formats: {found}", "send files of one format, or one dataset for each", "file")
    return next(iter(examples))


def _check_options(name: str, options: IngestOptions) -> None:
    """Raise InvalidInput for an option that a format does not have."""
    for option, formats in OPTIONS.items():
        if getattr(options, option) is not None and name not in formats:
            raise InvalidInput(f"{option} is not an option of {name} files", f"leave it out; {', '.join(formats)} files have it", option)
