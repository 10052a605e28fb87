"""Functions that write files of any format and read their records back."""

import gzip
import io
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.ingest.formats import OpenedInput, open_input
from jobs.ingest.records import InvalidInput, Record
from jobs.ingest.rows.values import InvalidValue, Number, parse
from schema.ingestion import IngestLimits, IngestOptions, InputFile, InputProblem, RowProblem


def open_files(folder: Path, files: Mapping[str, bytes], limits: IngestLimits | None = None, **options: Any) -> OpenedInput:
    """The input of these files, which are written to the folder."""
    inputs: list[InputFile] = []
    for number, (name, content) in enumerate(files.items()):
        path = folder / f"source-{number}"
        path.write_bytes(content)
        inputs.append(InputFile(path=str(path), name=name))
    return open_input(inputs, IngestOptions(**options), limits or IngestLimits())


def read_problems_and_rows(
    name: str, content: bytes, limits: IngestLimits | None = None, **options: Any
) -> list[RowProblem | tuple[int, dict[str, Any]]]:
    """What one file has: its rows, each with its number, and its problems."""
    with tempfile.TemporaryDirectory() as folder:
        opened = open_files(Path(folder), {name: content}, limits, **options)
        first = [simplify(record) for record in opened.iter_records()]
        assert [simplify(record) for record in opened.iter_records()] == first  # it can be read again
        assert opened.bytes_read > 0
        assert [path.name for path in Path(folder).iterdir()] == ["source-0"]  # nothing is left behind
    return first


def read_rows(name: str, content: bytes, limits: IngestLimits | None = None, **options: Any) -> list[dict[str, Any]]:
    """The rows of a file without problems."""
    found = read_problems_and_rows(name, content, limits, **options)
    problems = [one for one in found if isinstance(one, RowProblem)]
    assert problems == []
    return [one[1] for one in found if not isinstance(one, RowProblem)]


def read_only_problem(name: str, content: bytes, limits: IngestLimits | None = None, **options: Any) -> RowProblem:
    """The problem of a file that has exactly one."""
    (problem,) = [one for one in read_problems_and_rows(name, content, limits, **options) if isinstance(one, RowProblem)]
    return problem


def get_refusal(files: Mapping[str, bytes], limits: IngestLimits | None = None, **options: Any) -> InputProblem:
    """Why files are refused, when they are opened or read."""
    with tempfile.TemporaryDirectory() as folder, pytest.raises(InvalidInput) as excinfo:
        list(open_files(Path(folder), files, limits, **options).iter_records())
    return excinfo.value.problem


def simplify(record: Record | RowProblem) -> RowProblem | tuple[int, dict[str, Any]]:
    """A record with plain values: a number is a string after `#`."""
    if isinstance(record, RowProblem):
        return record
    try:
        columns = record.content if isinstance(record.content, dict) else parse(record.content, "a row")
    except InvalidValue as error:
        return RowProblem(part=record.part, line=record.line, field=error.field, reason=error.reason, code=error.code)
    return record.line, {name: _simplify_value(value) for name, value in columns.items()}


def _simplify_value(value: object) -> object:
    match value:
        case Number():
            return f"#{value.literal}"
        case dict():
            return {name: _simplify_value(inner) for name, inner in value.items()}
        case list():
            return [_simplify_value(inner) for inner in value]
        case _:
            return value


def make_zip(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def make_gzip(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def make_zstd(content: bytes) -> bytes:
    import zstandard

    return zstandard.compress(content)
