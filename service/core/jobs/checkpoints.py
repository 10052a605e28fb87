"""The checkpoints of a job as they are stored in the model bucket: read from their manifests, never from the record."""

import logging
from dataclasses import dataclass

from schema.checkpoint import MANIFEST, Checkpoint, checkpoints_prefix
from schema.job import Job
from storage import NoSuchObject, ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint whose manifest is stored. Whether its files match the manifest is checked by the attempt that loads it."""

    checkpoint: Checkpoint
    key: str  # of its folder in the model bucket; ends in "/"
    uri: str


def list_checkpoints(models: ObjectStore, job: Job, min_attempt: int | None = None) -> list[StoredCheckpoint]:
    """The checkpoints that the job's next attempt can resume from, in the order in which it tries them. Raises StorageError.

    `min_attempt`, if given, replaces `job.resume_from_attempt` as the first attempt whose checkpoints count.
    """
    first = job.resume_from_attempt if min_attempt is None else min_attempt
    prefix = checkpoints_prefix(job.job_id, job.project_id)
    manifests = [stored.key for stored in models.iter_objects(prefix) if stored.key.endswith(f"/{MANIFEST}")]
    readable = [stored for key in manifests if (stored := _load_manifest(models, key)) and stored.checkpoint.attempt >= first]
    return sorted(readable, key=lambda stored: (stored.checkpoint.attempt, stored.checkpoint.step), reverse=True)


def find_last_checkpoint_step(models: ObjectStore, job: Job, attempt: int) -> int | None:
    """The newest stored checkpoint of one attempt, which may have been killed before it reported it. Raises StorageError."""
    stored = list_checkpoints(models, job, min_attempt=attempt)
    return max((each.checkpoint.step for each in stored if each.checkpoint.attempt == attempt), default=None)


def describe_deletion(job: Job) -> str:
    """When checkpoints of the job were deleted, as the end of a sentence; nothing if none were."""
    if job.checkpoints_deleted is None:
        return ""
    others = "others" if job.checkpoints_deleted.kept_step is not None else "checkpoints"
    return f"; its {others} were deleted on {job.checkpoints_deleted.at:%Y-%m-%d}"


def _load_manifest(models: ObjectStore, key: str) -> StoredCheckpoint | None:
    folder = key.removesuffix(MANIFEST)
    try:
        return StoredCheckpoint(Checkpoint.from_verified_bytes(models.read(key)), folder, f"{models.url}/{folder}")
    except NoSuchObject:  # it was pruned a moment ago
        return None
    except (ValueError, RecursionError):
        log.warning("manifest of a checkpoint is not readable", extra={"key": key})
        return None
