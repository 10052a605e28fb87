"""The checkpoints of a job as they lie in the model bucket: read from their manifests, never from the record."""

import logging
from dataclasses import dataclass

from schema.checkpoint import MANIFEST, Checkpoint
from storage import NoSuchObject, ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint whose manifest is there. Whether its files are what the manifest says is found out by whoever loads it."""

    checkpoint: Checkpoint
    key: str  # of its folder in the model bucket; ends in "/"
    uri: str


def list_checkpoints(models: ObjectStore, prefix: str, min_attempt: int) -> list[StoredCheckpoint]:
    """The checkpoints of a job from an attempt on, in the order in which the next attempt tries them. Raises StorageError."""
    manifests = [stored.key for stored in models.iter_objects(prefix) if stored.key.endswith(f"/{MANIFEST}")]
    found = [loaded for key in manifests if (loaded := _load_manifest(models, key)) and loaded.checkpoint.attempt >= min_attempt]
    return sorted(found, key=lambda stored: (stored.checkpoint.attempt, stored.checkpoint.step), reverse=True)


def _load_manifest(models: ObjectStore, key: str) -> StoredCheckpoint | None:
    folder = key.removesuffix(MANIFEST)
    try:
        return StoredCheckpoint(Checkpoint.from_verified_bytes(models.read(key)), folder, f"{models.url}/{folder}")
    except NoSuchObject:  # pruned this very moment
        return None
    except (ValueError, RecursionError):
        log.warning("manifest of a checkpoint is not readable", extra={"key": key})
        return None
