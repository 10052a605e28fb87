"""Reading stored records of any version."""

import json
from collections.abc import Mapping
from typing import ClassVar

import pytest
from pydantic import ValidationError

from schema.checkpoint import Checkpoint
from schema.dataset import Dataset
from schema.job import Job
from schema.migrations import Migration, NewerRecord, VersionedRecord


class Toy(VersionedRecord):
    """A record in its third version."""

    migrations: ClassVar[Mapping[int, Migration]] = {
        1: lambda document: {"size": document["length"]},
        2: lambda document: {"size_bytes": document["size"]},
    }

    schema_version: int = 3
    size_bytes: int


@pytest.mark.parametrize(
    "text",
    [
        '{"schema_version":3,"size_bytes":5}',
        '{\n "schema_version": 3, "size_bytes": 5}',
        '{"size_bytes":5,"schema_version":3,"unknown":1}',
        '{"schema_version":2,"size":5}',
        '{"schema_version":1,"length":5}',
        '{"length":5}',
    ],
    ids=["current", "indented", "other order", "one migration", "two migrations", "no version"],
)
@pytest.mark.parametrize("encode", [str, str.encode], ids=["text", "bytes"])
def test_record_of_any_known_version_is_read(text: str, encode: type) -> None:
    assert Toy.load(encode(text)) == Toy(size_bytes=5)


def test_newer_record_is_refused() -> None:
    with pytest.raises(NewerRecord, match=r"newer version of Tunesmith wrote this Toy record \(schema 4; this version reads up to 3\)"):
        Toy.load('{"schema_version":4,"size_bytes":5}')


@pytest.mark.parametrize("text", ["", "nothing", "[]", '{"schema_version":"x"}', '{"schema_version":3}', "[" * 100_000])
def test_damaged_record_is_a_validation_error(text: str) -> None:
    with pytest.raises(ValidationError):
        Toy.load(text)


def test_missing_migration_is_named() -> None:
    with pytest.raises(ValueError, match="no migration from 0"):
        Toy.load('{"schema_version":0}')


@pytest.mark.parametrize("model", [Job, Dataset, Checkpoint])
def test_every_earlier_version_has_a_migration(model: type[VersionedRecord]) -> None:
    assert next(iter(model.model_fields)) == "schema_version"
    assert set(model.migrations) == set(range(1, model.model_fields["schema_version"].default))


def test_current_record_starts_with_its_version() -> None:
    text = Toy(size_bytes=5).model_dump_json()
    assert text.startswith('{"schema_version":3,')
    assert json.loads(text) == {"schema_version": 3, "size_bytes": 5}


JOB_OF_VERSION_1 = {
    "job_id": "training_1",
    "tenant_id": "local",
    "job_name": "mine",
    "processed_dataset_id": "dataset_1",
    "training_config": {"base_model_id": "google/gemma-3-270m", "trainer_type": "sft"},
    "status": "training",
    "created_at": "2026-01-01T00:00:00Z",
    "updated_at": "2026-01-01T00:00:00Z",
    "status_changed_at": "2026-01-01T00:00:00Z",
}
ATTEMPT_OF_VERSION_1 = {"number": 1, "launcher": "cloud-run", "created_at": "2026-01-01T00:00:00Z", "launch_started_at": None}


@pytest.mark.parametrize(
    ("changes", "placement"),
    [
        ({"hardware": "l4", "attempts": [ATTEMPT_OF_VERSION_1]}, "cloud-run/l4"),
        ({"hardware": None, "attempts": [ATTEMPT_OF_VERSION_1]}, "cloud-run/l4"),
        ({"hardware": "cpu", "attempts": []}, "cloud-run/cpu"),
        ({"hardware": "local", "attempts": []}, "local/local"),
        ({}, "local/local"),
    ],
)
def test_job_of_version_1_is_placed_where_it_ran(changes: dict[str, object], placement: str) -> None:
    job = Job.load(json.dumps({"schema_version": 1} | JOB_OF_VERSION_1 | changes))
    assert [each.hardware for each in job.placements] == [placement]
    assert job.placements[0].environment == "llm"
    for attempt in job.attempts:
        assert (attempt.placement, attempt.launch_started_at) == (job.placements[0], attempt.created_at)
