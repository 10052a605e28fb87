"""Rows of every dataset type, and functions that read, store and reject them."""

import base64
import hashlib
import io
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.ingest.formats.jsonl import read_jsonl
from jobs.ingest.mapping import RowMapper
from jobs.ingest.pipeline import ingest
from jobs.ingest.reading import PlacedRow, RowReader
from jobs.ingest.rows.row import Row
from schema.ingestion import IngestedRows, IngestLimits, IngestOptions, IngestOutcome, IngestTask, InputFile

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Why?"}
CHOSEN_ANSWER = {"role": "assistant", "content": "So."}
REJECTED_ANSWER = {"role": "assistant", "content": "Dunno."}
TEXT = {"type": "text", "text": "What is this?"}
PREFERENCE = {"prompt": "Why?", "chosen": "So.", "rejected": "Dunno."}
LABELED_ROWS = [{"prompt": "Why?", "completion": "So.", "label": True}, {"prompt": "Why?", "completion": "Dunno.", "label": False}]


def to_jsonl(rows: Iterable[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class InvalidRow(Exception):
    """What is wrong with the first invalid row, or with the file, which then is line 1."""

    def __init__(self, line: int, field: str, reason: str) -> None:
        self.line = line
        self.field = field
        self.reason = reason
        super().__init__(f"line {line}: {field}: {reason}")


@dataclass(frozen=True)
class IngestResult:
    """An outcome that kept rows, and the lines that were written."""

    outcome: IngestOutcome
    rows: IngestedRows
    train: list[bytes]
    held_out: list[bytes]


def ingest_bytes(
    content: bytes,
    *,
    limits: IngestLimits | None = None,
    eval_fraction: float = 0.0,
    seed: int = 0,
    filename: str = "rows.jsonl",
    **options: Any,
) -> IngestResult:
    """Ingest a file of that content. Raises InvalidRow unless every row is valid."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, filename), Path(folder, "output")
        source.write_bytes(content)
        output.mkdir()
        task = IngestTask(
            files=(InputFile(path=str(source), name=filename),),
            options=IngestOptions(eval_fraction=eval_fraction, **options),
            limits=limits or IngestLimits(),
            seed=seed,
            output=str(output),
        )
        outcome = ingest(task)
        if outcome.refused:
            raise InvalidRow(1, outcome.refused.param, f"{outcome.refused.message}; {outcome.refused.hint}")
        if outcome.rows is None:
            assert not list(output.iterdir())
            raise InvalidRow(outcome.problems[0].line, outcome.problems[0].field, outcome.problems[0].reason)
        lines = {name: _read_split(output, outcome.rows, name) for name in ("train", "eval")}
    return IngestResult(outcome, outcome.rows, lines["train"], lines["eval"])


def _read_split(folder: Path, rows: IngestedRows, name: str) -> list[bytes]:
    if name not in rows.splits:
        return []
    split = rows.splits[name]
    content = (folder / split.file).read_bytes()
    assert (split.size_bytes, split.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert split.rows == content.count(b"\n")
    return content.split(b"\n")[:-1]


def parse_rows(content: bytes, limits: IngestLimits | None = None) -> list[Row]:
    """The rows of JSON lines, duplicates included. Raises InvalidRow unless every row is valid."""
    ingest_bytes(content, limits=limits)
    limits = limits or IngestLimits()
    reader = RowReader(RowMapper("native", "text"), limits)
    results = [reader.read(record) for record in read_jsonl(io.BytesIO(content), limits)]
    return [result.row for result in results if isinstance(result, PlacedRow)]


def read_bytes(content: bytes, limits: IngestLimits | None = None) -> list[bytes]:
    return [row.canonical for row in parse_rows(content, limits)]


def store_rows(*rows: object) -> list[Any]:
    return [json.loads(line) for line in read_bytes(to_jsonl(rows))]


def get_row_error(*rows: object, limits: IngestLimits | None = None) -> InvalidRow:
    return get_bytes_error(to_jsonl(rows), limits)


def get_bytes_error(content: bytes, limits: IngestLimits | None = None) -> InvalidRow:
    with pytest.raises(InvalidRow) as excinfo:
        read_bytes(content, limits)
    return excinfo.value


def upload(*rows: object, eval_fraction: float = 0.0) -> tuple[IngestedRows, list[Any], list[Any]]:
    result = ingest_bytes(to_jsonl(rows), eval_fraction=eval_fraction)
    train_rows, held_out_rows = ([json.loads(line) for line in lines] for lines in (result.train, result.held_out))
    return result.rows, train_rows, held_out_rows


def make_image_bytes(
    file_format: str = "PNG", size: tuple[int, int] = (8, 6), mode: str = "RGB", color: str = "red", **options: Any
) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(out, file_format, **options)
    return out.getvalue()


def make_data_uri(content: bytes | None = None, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(make_image_bytes() if content is None else content).decode()}"


def make_image_part(content: bytes | None = None, media_type: str = "image/png") -> dict[str, object]:
    return {"type": "image", "image": make_data_uri(content, media_type)}


def make_vision_row(*parts: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, CHOSEN_ANSWER]}
