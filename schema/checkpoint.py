"""A checkpoint: everything an attempt needs to go on with a training as if it had never been interrupted."""

import json
from datetime import datetime
from hashlib import sha256
from typing import Literal, Self, cast

from pydantic import Field

from schema.base import Id
from schema.job import ArtifactFile
from schema.migrations import VersionedRecord
from schema.training import TrainingConfig

MANIFEST = "manifest.json"

# Why it was written: the job's save_strategy or the safety interval, a pause, the end of a time slice, compute that is being taken
# away, or the end of the training (so that an export that is interrupted trains nothing again).
CheckpointReason = Literal["interval", "pause", "time_slice", "preempted", "end"]


class Checkpoint(VersionedRecord):
    """`manifest.json`, written last: a checkpoint without it, or with a file that differs from it, does not count."""

    job_id: Id
    attempt: int  # which attempt wrote it
    step: int  # optimizer steps done
    total_steps: int
    epoch: float
    reason: CheckpointReason = "interval"
    eval_loss: float | None = None  # nats per labelled token on the held-out rows at this step, if they were measured at it
    batch_size: int  # rows per forward pass; smaller than asked for after a lack of memory
    gradient_accumulation_steps: int
    tracker_run_ids: dict[str, str] = Field(default={})  # tracker → the run that the next attempt continues
    training_config: TrainingConfig  # every default spelled out, every secret taken out
    files: tuple[ArtifactFile, ...]
    created_at: datetime
    checksum: str = ""  # sha256 of all the rest

    def with_checksum(self) -> bytes:
        """The manifest's bytes, with the seal that shows a single wrong bit."""
        content: dict[str, object] = json.loads(self.model_dump_json(exclude={"checksum"}))
        return json.dumps(content | {"checksum": _compute_checksum(content)}, indent=1).encode()

    @classmethod
    def from_verified_bytes(cls, content: bytes) -> Self:
        """Read a manifest. Raises ValueError when it is not what was sealed."""
        found: object = json.loads(content)
        sealed = cast(dict[str, object], found) if isinstance(found, dict) else {}
        if sealed.get("checksum") != _compute_checksum({name: value for name, value in sealed.items() if name != "checksum"}):
            raise ValueError("the manifest is not what was sealed")
        return cls.load(content)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)


def _compute_checksum(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoints_prefix(job_id: str, project_id: str | None) -> str:
    """Where a job's checkpoints lie, in the model bucket."""
    return f"checkpoints/projects/{project_id}/jobs/{job_id}/" if project_id else f"checkpoints/test-jobs/job_{job_id}/"


def checkpoint_key(prefix: str, attempt: int, step: int) -> str:
    """The folder of one checkpoint. Each attempt writes below its own number, so none can spoil another's."""
    return f"{prefix}attempt-{attempt}/step-{step:08d}/"
