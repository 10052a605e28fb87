"""Files in the buckets whose job has no record: an attempt wrote them after its job was deleted, or a deletion failed half-way."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from schema.training import TRAINER_TYPES
from service.core.ports import JobStore
from storage import ObjectStore, delete_prefix

# Where the files of jobs are stored, and which part of a key is the job's id. A job's record is written before any of its files.
ARTIFACT_FOLDERS = sorted({folder for config in TRAINER_TYPES.values() for folder in config.artifact_folders()})
JOB_FOLDERS = (*ARTIFACT_FOLDERS, "trackers", "runs")
MODEL_PREFIXES = (*(f"{folder}/" for folder in JOB_FOLDERS), "checkpoints/", "results/")
CONFIG_PREFIXES = ("configs/", "results/")
JOB_KEY_PATTERN = re.compile(
    rf"^(?:(?:{'|'.join(JOB_FOLDERS)}|results)/(?P<folder>[^/]+)/"
    r"|checkpoints/(?:projects/[^/]+/jobs/|test-jobs/job_)(?P<checkpoint>[^/]+)/"
    r"|configs/(?P<spec>[^/]+)\.json$)"
)


@dataclass(frozen=True)
class Orphan:
    """Files of one job without a record, below one prefix."""

    job_id: str
    url: str
    prefix: str  # a folder, which ends in "/", or one key
    objects: int
    size_bytes: int


@dataclass(frozen=True)
class OrphanScan:
    """The orphans found, and whether the scan finished within its timeout."""

    orphans: list[Orphan]
    complete: bool


def find_orphans(jobs: JobStore, *, configs: ObjectStore, models: ObjectStore, timeout_s: float) -> OrphanScan:
    """Scan the buckets for files of jobs that have no record. Raises StorageError, Unavailable."""
    deadline_s = time.monotonic() + timeout_s
    has_record: dict[str, bool] = {}
    orphans: dict[tuple[str, str], Orphan] = {}
    for store, owner, prefix, size_bytes in _iter_job_objects(configs, models):
        if time.monotonic() > deadline_s:
            return OrphanScan(list(orphans.values()), complete=False)
        if owner not in has_record:
            has_record[owner] = jobs.find_job_entry(owner) is not None
        if not has_record[owner]:
            before = orphans.get((store.url, prefix), Orphan(owner, store.url, prefix, 0, 0))
            orphans[store.url, prefix] = Orphan(owner, store.url, prefix, before.objects + 1, before.size_bytes + size_bytes)
    return OrphanScan(list(orphans.values()), complete=True)


def delete_orphan(orphan: Orphan, *, configs: ObjectStore, models: ObjectStore) -> None:
    """Delete the files. Can be repeated. Raises StorageError."""
    store = configs if orphan.url == configs.url else models
    if orphan.prefix.endswith("/"):
        delete_prefix(store, orphan.prefix)
    else:
        store.delete(orphan.prefix)


def _iter_job_objects(configs: ObjectStore, models: ObjectStore) -> Iterator[tuple[ObjectStore, str, str, int]]:
    """Every file of a job: its store, the job's id, the prefix to delete it with, its size in bytes."""
    one_store = configs.url == models.url
    prefixes = [(models, folder) for folder in MODEL_PREFIXES] + [
        (configs, folder) for folder in CONFIG_PREFIXES if not one_store or folder not in MODEL_PREFIXES
    ]
    for store, folder in prefixes:
        for stored in store.iter_objects(folder):
            match = JOB_KEY_PATTERN.match(stored.key)
            if match is not None:
                owner = next(part for part in match.groups() if part is not None)
                yield store, owner, match.group(0), stored.size_bytes
