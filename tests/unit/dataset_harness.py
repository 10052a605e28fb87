"""Rows of every dataset type, and functions that read, store and reject them."""

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from service.adapters.jobstores.memory import MemoryJobStore
from service.core.datasets.records import Datasets
from service.core.datasets.rows import IngestResult, InvalidRow, RowLimits, ingest, read_rows
from service.core.quotas import QuotaChecks, Quotas
from storage.file import LocalStore
from tests.factories import START

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Why?"}
CHOSEN_ANSWER = {"role": "assistant", "content": "So."}
REJECTED_ANSWER = {"role": "assistant", "content": "Dunno."}
TEXT = {"type": "text", "text": "What is this?"}
PREFERENCE = {"prompt": "Why?", "chosen": "So.", "rejected": "Dunno."}
LABELED_ROWS = [{"prompt": "Why?", "completion": "So.", "label": True}, {"prompt": "Why?", "completion": "Dunno.", "label": False}]


def to_jsonl(rows: Iterable[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read_bytes(content: bytes, limits: RowLimits | None = None) -> list[bytes]:
    return [row.canonical for row in read_rows(io.BytesIO(content), limits or RowLimits())]


def store_rows(*rows: object) -> list[Any]:
    return [json.loads(line) for line in read_bytes(to_jsonl(rows))]


def get_row_error(*rows: object, limits: RowLimits | None = None) -> InvalidRow:
    return get_bytes_error(to_jsonl(rows), limits)


def get_bytes_error(content: bytes, limits: RowLimits | None = None) -> InvalidRow:
    with pytest.raises(InvalidRow) as excinfo:
        read_bytes(content, limits)
    return excinfo.value


def upload(*rows: object, eval_fraction: float = 0.0) -> tuple[IngestResult, list[Any], list[Any]]:
    train, held_out = io.BytesIO(), io.BytesIO()
    ingested = ingest(io.BytesIO(to_jsonl(rows)), RowLimits(), eval_fraction, 0, train, held_out, io.BytesIO())
    train_rows, held_out_rows = ([json.loads(line) for line in out.getvalue().splitlines()] for out in (train, held_out))
    return ingested, train_rows, held_out_rows


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


def make_datasets(folder: Path, quotas: Quotas | None = None) -> Datasets:
    store = MemoryJobStore()
    return Datasets(
        store=store,
        objects=LocalStore((folder / "objects").as_uri()),
        limits=RowLimits(),
        clock=lambda: START,
        random_suffix=lambda: "1",
        scratch=folder / "scratch",
        max_incoming_bytes=1 << 20,
        quotas=QuotaChecks(store, quotas or Quotas.model_validate({}), lambda: START),
    )
