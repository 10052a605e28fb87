"""Files in the buckets that belong to no job: what an attempt wrote after its job was deleted, or a deletion left behind."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from service.core.ports import JobStore
from storage import ObjectStore, delete_below

# Where a job's files can lie, and which part of the key is its id. A job's record is written before any of its files.
BY_JOB = ("trained_adapters", "merged_models", "gguf_models", "onnx_models", "trackers", "runs")
IN_MODELS = (*(f"{folder}/" for folder in BY_JOB), "checkpoints/", "results/")
IN_CONFIGS = ("configs/", "results/")
OWNED = re.compile(
    rf"^(?:(?:{'|'.join(BY_JOB)}|results)/(?P<folder>[^/]+)/"
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
class Orphans:
    """What was found, and whether everything could be looked at in the time there was."""

    found: list[Orphan]
    complete: bool


def find_orphans(jobs: JobStore, *, configs: ObjectStore, models: ObjectStore, within_s: float) -> Orphans:
    """Look through the buckets for files of jobs that have no record. Raises StorageError, Unavailable."""
    until = time.monotonic() + within_s
    known: dict[str, bool] = {}
    found: dict[tuple[str, str], Orphan] = {}
    for store, owner, prefix, size_bytes in _owned(configs, models):
        if time.monotonic() > until:
            return Orphans(list(found.values()), complete=False)
        if owner not in known:
            known[owner] = jobs.find_job(owner) is not None
        if not known[owner]:
            before = found.get((store.url, prefix), Orphan(owner, store.url, prefix, 0, 0))
            found[store.url, prefix] = Orphan(owner, store.url, prefix, before.objects + 1, before.size_bytes + size_bytes)
    return Orphans(list(found.values()), complete=True)


def delete_orphan(orphan: Orphan, *, configs: ObjectStore, models: ObjectStore) -> None:
    """Remove the files. Can be repeated. Raises StorageError."""
    store = configs if orphan.url == configs.url else models
    if orphan.prefix.endswith("/"):
        delete_below(store, orphan.prefix)
    else:
        store.delete(orphan.prefix)


def _owned(configs: ObjectStore, models: ObjectStore) -> Iterator[tuple[ObjectStore, str, str, int]]:
    """Every file that belongs, or should belong, to a job: its store, the job, the prefix it is removed with, its size."""
    one_store = configs.url == models.url
    places = [(models, folder) for folder in IN_MODELS] + [
        (configs, folder) for folder in IN_CONFIGS if not one_store or folder not in IN_MODELS
    ]
    for store, folder in places:
        for stored in store.walk(folder):
            owned = OWNED.match(stored.key)
            if owned is not None:
                owner = next(part for part in owned.groups() if part is not None)
                yield store, owner, owned.group(0), stored.size_bytes
