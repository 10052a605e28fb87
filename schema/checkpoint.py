"""A checkpoint: everything an attempt needs to continue a training exactly."""

import json
from collections.abc import Collection, Mapping
from datetime import datetime
from hashlib import sha256
from typing import ClassVar, Literal, Self, cast

from pydantic import Field, JsonValue

from schema.base import Id
from schema.job import ArtifactFile
from schema.migrations import Document, Migration, VersionedRecord
from schema.training import TrainingConfig

MANIFEST = "manifest.json"

# Why it was written: save_strategy or the safety interval, a pause, the end of a time slice, a preemption, or the end of the training
# (so that an interrupted export does not train again).
CheckpointReason = Literal["interval", "pause", "time_slice", "preempted", "end"]

BATCH_FIELDS = ("batch_size", "gradient_accumulation_steps")


def move_batch_to_details(document: Document) -> Document:
    """From version 1 of `manifest.json` and `tunesmith.json`, when every trainer had batches, to `details`."""
    kept = {name: value for name, value in document.items() if name not in BATCH_FIELDS}
    return kept | {"details": {name: document[name] for name in BATCH_FIELDS if name in document}}


class Checkpoint(VersionedRecord):
    """`manifest.json`, written last. A checkpoint without it, or with a file that differs from it, is not used."""

    migrations: ClassVar[Mapping[int, Migration]] = {1: move_batch_to_details}

    schema_version: int = 2
    job_id: Id
    attempt: int  # which attempt wrote it
    step: int  # steps done, in the family's unit of progress
    total_steps: int
    epoch: float
    reason: CheckpointReason = "interval"
    eval_loss: float | None = None  # on the held-out rows, if measured at this step
    details: dict[str, JsonValue] = Field(default={})  # the family's own, such as the batch size that fitted into memory
    tracker_run_ids: dict[str, str] = Field(default={})  # tracker → the run that the next attempt continues
    training_config: TrainingConfig  # with every default and without secrets
    files: tuple[ArtifactFile, ...]
    created_at: datetime
    checksum: str = ""  # SHA-256 of the other fields

    def with_checksum(self) -> bytes:
        """The manifest's bytes, including the checksum."""
        content: dict[str, object] = json.loads(self.model_dump_json(exclude={"checksum"}))
        return json.dumps(content | {"checksum": _compute_checksum(content)}, indent=1).encode()

    @classmethod
    def from_verified_bytes(cls, content: bytes) -> Self:
        """Read a manifest of any version. Raises ValueError when it is not JSON, its checksum is wrong, or its content is not valid."""
        parsed: object = json.loads(content)
        manifest = cast(dict[str, object], parsed) if isinstance(parsed, dict) else {}
        if manifest.get("checksum") != _compute_checksum({name: value for name, value in manifest.items() if name != "checksum"}):
            raise ValueError("the manifest's checksum is wrong")
        return cls.load(content)

    def without_files(self, paths: Collection[str]) -> Self:
        """The same checkpoint without some files, for a job that will not be continued: its manifest must be stored before they go."""
        return self.model_copy(update={"files": tuple(file for file in self.files if file.path not in paths)})

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)


def _compute_checksum(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoints_prefix(job_id: str, project_id: str | None) -> str:
    """The folder of a job's checkpoints in the model bucket."""
    return f"checkpoints/projects/{project_id}/jobs/{job_id}/" if project_id else f"checkpoints/test-jobs/job_{job_id}/"


def checkpoint_key(prefix: str, attempt: int, step: int) -> str:
    """The folder of one checkpoint. Each attempt writes in a folder of its own, so none can damage another's."""
    return f"{prefix}attempt-{attempt}/step-{step:08d}/"
