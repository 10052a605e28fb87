"""Datasets as the core keeps them: what a record says, and what a preview shows."""

import io
from pathlib import Path
from typing import Any

import pytest

from schema.dataset import Dataset
from schema.ingestion import IngestOptions
from service.core.datasets.assembly import DatasetServices
from service.core.datasets.ingestion import Upload
from service.core.principals import LOCAL_PRINCIPAL
from tests.ingest.dataset_harness import CHOSEN_ANSWER, QUESTION, TEXT, make_image_bytes, make_image_part, make_vision_row, to_jsonl
from tests.unit.dataset_records import make_datasets


@pytest.fixture
def datasets(tmp_path: Path) -> DatasetServices:
    return make_datasets(tmp_path)


def keep(datasets: DatasetServices, *rows: object) -> Dataset:
    options = IngestOptions(eval_fraction=0)  # type: ignore[call-arg]
    return datasets.ingestion.ingest(LOCAL_PRINCIPAL, Upload("rows.jsonl", "rows", stream=io.BytesIO(to_jsonl(rows)), options=options))


def preview(datasets: DatasetServices, dataset: Dataset) -> dict[str, list[object]]:
    return datasets.records.preview(LOCAL_PRINCIPAL, dataset.processed_dataset_id)


def test_prompt_dataset_records_columns(datasets: DatasetServices) -> None:
    row = {"prompt": "2 + 2 =", "level": 1, "answer": 10**39}
    dataset = keep(datasets, row)
    assert (dataset.dataset_type, dataset.columns, dataset.images) == ("prompt", ("answer", "level"), 0)
    assert preview(datasets, dataset) == {"train": [row]}


def test_dataset_counts_images_and_preview_shows_only_size(datasets: DatasetServices) -> None:
    content = make_image_bytes(size=(700, 700), file_format="WEBP", lossless=True)
    rows = [make_vision_row(TEXT, make_image_part(content, "image/webp")), {"messages": [QUESTION, CHOSEN_ANSWER]}]
    dataset = keep(datasets, *rows)
    assert (dataset.images, dataset.columns) == (1, ())
    preview_part = {"type": "image", "image": f"data:image/webp;base64,… ({len(content)} bytes)"}
    assert preview(datasets, dataset) == {"train": [make_vision_row(TEXT, preview_part), rows[1]]}


def test_preview_shows_arguments_as_they_are(datasets: DatasetServices) -> None:
    call: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "draw", "arguments": {"type": "image", "image": "a, b"}}}
    row = {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert preview(datasets, keep(datasets, row)) == {"train": [row]}


def test_record_from_before_has_no_tools_and_unknown_form(datasets: DatasetServices) -> None:
    record = keep(datasets, {"text": "a"}).model_dump(mode="json")
    for field in ("prompt_form", "has_tools", "has_weights"):
        del record[field]
    dataset = Dataset.model_validate(record)
    assert (dataset.prompt_form, dataset.has_tools, dataset.has_weights) == (None, False, False)
