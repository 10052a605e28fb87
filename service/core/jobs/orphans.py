"""Files in the buckets that belong to no job: what an attempt wrote after its job was deleted, or a deletion left behind."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from service.core.ports import JobStore
from storage import ObjectStore, delete_prefix

# Where a job's files can lie, and which part of the key is its id. A job's record is written before any of its files.
JOB_FOLDERS = ("trained_adapters", "merged_models", "gguf_models", "onnx_models", "trackers", "runs")
MODEL_PREFIXES = (*(f"{folder}/" for folder in JOB_FOLDERS), "checkpoints/", "results/")
CONFIG_PREFIXES = ("configs/", "results/")
JOB_KEY_PATTERN = re.compile(
    rf"^(?:(?:{'|'.join(JOB_FOLDERS)}|results)/(?P<folder>[^/]+)/"
    r"|checkpoints/(?:projects/[^/]+/jobs/|test-jobs/job_)(?P<checkpoint>[^/]+)/"
    r"|configs/(?P<spec>[^/]+)\.json$)"
)


@dataclass(frozen=True)
class Orphan:
    """Files of a job that there is not, below one prefix."""

    job_id: str
    url: str
    prefix: str  # a folder, or one key
    objects: int
    size_bytes: int


@dataclass(frozen=True)
class OrphanScan:
    """What was found, and whether everything could be looked at in the time there was."""

    orphans: list[Orphan]
    complete: bool


def find_orphans(jobs: JobStore, *, configs: ObjectStore, models: ObjectStore, timeout_s: float) -> OrphanScan:
    """Look through the buckets for files of jobs that have no record. Raises StorageError, Unavailable."""
    until = time.monotonic() + timeout_s
    known: dict[str, bool] = {}
    found: dict[tuple[str, str], Orphan] = {}
    for store, owner, prefix, size_bytes in _iter_job_objects(configs, models):
        if time.monotonic() > until:
            return OrphanScan(list(found.values()), complete=False)
        if owner not in known:
            known[owner] = jobs.find_job(owner) is not None
        if not known[owner]:
            before = found.get((store.url, prefix), Orphan(owner, store.url, prefix, 0, 0))
            found[store.url, prefix] = Orphan(owner, store.url, prefix, before.objects + 1, before.size_bytes + size_bytes)
    return OrphanScan(list(found.values()), complete=True)


def delete_orphan(orphan: Orphan, *, configs: ObjectStore, models: ObjectStore) -> None:
    """Remove the files. Can be repeated. Raises StorageError."""
    store = configs if orphan.url == configs.url else models
    if orphan.prefix.endswith("/"):
        delete_prefix(store, orphan.prefix)
    else:
        store.delete(orphan.prefix)


def _iter_job_objects(configs: ObjectStore, models: ObjectStore) -> Iterator[tuple[ObjectStore, str, str, int]]:
    """Every file that belongs, or should belong, to a job: its store, the job, the prefix it is removed with, its size."""
    one_store = configs.url == models.url
    places = [(models, folder) for folder in MODEL_PREFIXES] + [
        (configs, folder) for folder in CONFIG_PREFIXES if not one_store or folder not in MODEL_PREFIXES
    ]
    for store, folder in places:
        for stored in store.iter_objects(folder):
            owned = JOB_KEY_PATTERN.match(stored.key)
            if owned is not None:
                owner = next(part for part in owned.groups() if part is not None)
                yield store, owner, owned.group(0), stored.size_bytes
