"""Dataset records: ingest an upload, find, list, preview, delete."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, cast

from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT, Dataset, Split
from service.core.datasets.rows import IngestResult, InvalidRow, RowLimits, SplitStats, ingest
from service.core.errors import Conflict, InvalidDataset, InvalidRequest, NotFound, RecordTooNew, TooLarge, UnreadableRecord
from service.core.ports import JobStore, Page
from service.core.principals import LOCAL_TENANT, Principal, Scope
from service.core.quotas import QuotaChecks
from storage import InvalidKey, ObjectStore, delete_prefix

INCOMING_PREFIX = "incoming/"  # of the dataset store: callers put files there that are too large for a request
SPLIT_SEED = 42
PREVIEW_ROWS = 5


@dataclass(frozen=True)
class Upload:
    """What a caller sent to become a dataset."""

    stream: BinaryIO
    name: str
    project_id: str | None
    eval_fraction: float


class Datasets:
    """Everything that can be done with datasets. Holds no state of its own."""

    def __init__(
        self,
        *,
        store: JobStore,
        objects: ObjectStore,
        limits: RowLimits,
        clock: Callable[[], datetime],
        random_suffix: Callable[[], str],
        scratch: Path,
        max_incoming_bytes: int,
        quotas: QuotaChecks,
        incoming_by_tenant: bool = False,
    ) -> None:
        self._store = store
        self._objects = objects
        self._limits = limits
        self._clock = clock
        self._random_suffix = random_suffix
        self._scratch = scratch
        self._max_incoming_bytes = max_incoming_bytes
        self._quotas = quotas
        self._incoming_by_tenant = incoming_by_tenant

    def ingest(self, principal: Principal, upload: Upload) -> Dataset:
        """Check every row, split the rows, store them, then write the record.

        Raises InvalidDataset that names the first invalid line, QuotaExceeded, StorageError, Unavailable.
        """
        principal.require(Scope.DATASETS_WRITE)
        self._quotas.check_upload(principal.tenant_id)
        dataset_id = f"dataset_{self._random_suffix()}"
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            ingested = self._read(upload, Path(folder))
            stats = [each for each in (ingested.train, ingested.eval) if each is not None]
            self._quotas.check_upload(principal.tenant_id, sum(each.size_bytes for each in stats))
            splits = self._store_splits(ingested, Path(folder), dataset_id)
        dataset = Dataset(
            processed_dataset_id=dataset_id,
            tenant_id=principal.tenant_id,
            project_id=upload.project_id,
            name=upload.name,
            dataset_type=ingested.dataset_type,
            splits=splits,
            digest=_digest(splits),
            rows_uploaded=ingested.rows_read,
            duplicates_dropped=ingested.duplicates_dropped,
            images=ingested.images,
            columns=ingested.columns,
            prompt_form=ingested.prompt_form,
            has_tools=ingested.has_tools,
            has_weights=ingested.has_weights,
            created_at=self._clock(),
        )
        self._store.create_dataset(dataset)
        return dataset

    @contextmanager
    def open_incoming(self, principal: Principal, key: str) -> Generator[BinaryIO]:
        """Open a file that a caller put below incoming/ of the store, or below incoming/<tenant>/ where there are several tenants.

        Raises InvalidRequest, NotFound, TooLarge.
        """
        principal.require(Scope.DATASETS_WRITE)
        prefix = f"{INCOMING_PREFIX}{principal.tenant_id}/" if self._incoming_by_tenant else INCOMING_PREFIX
        is_at_the_top = principal.tenant_id == LOCAL_TENANT and key.startswith(INCOMING_PREFIX) and key.count("/") == 1
        if not (key.startswith(prefix) or is_at_the_top):
            raise InvalidRequest(f"{key!r} is not below {prefix} of {self._objects.url}", hint=f"put it at {prefix}", param="incoming")
        try:
            stored = self._objects.stat(key)
        except InvalidKey as error:
            raise InvalidRequest(str(error), param="incoming") from error
        if stored is None:
            raise NotFound(f"there is no object {key!r} in {self._objects.url}", hint="put the file there first", param="incoming")
        if stored.size_bytes > self._max_incoming_bytes:
            raise TooLarge(
                f"{key} has {stored.size_bytes} bytes; this deployment reads at most {self._max_incoming_bytes}", param="incoming"
            )
        with self._objects.open_read(key) as stream:
            yield stream

    def find(self, principal: Principal, dataset_id: str) -> Dataset:
        """A dataset of the principal's tenant. Raises NotFound, also for a dataset of another tenant."""
        principal.require(Scope.DATASETS_READ)
        return self._find_own(principal, dataset_id)

    def list_datasets(self, principal: Principal, limit: int, after: str | None) -> Page[Dataset]:
        """A page of a tenant's datasets, newest first. Raises InvalidRequest for a malformed cursor."""
        principal.require(Scope.DATASETS_READ)
        return self._store.list_datasets(principal.tenant_id, limit, after)

    def preview(self, principal: Principal, dataset_id: str) -> dict[str, list[object]]:
        """The first rows of each split, without reading the rest. Images are replaced by their type and size.

        Raises NotFound, StorageError.
        """
        return {name: self._read_first_rows(split) for name, split in self.find(principal, dataset_id).splits.items()}

    def delete(self, principal: Principal, dataset_id: str) -> list[str]:
        """Delete the rows and the record; returns what was deleted. Raises Conflict while a job needs the dataset, NotFound."""
        principal.require(Scope.DATASETS_WRITE)
        if self._store.find_dataset_tenant(dataset_id) != principal.tenant_id:  # the record itself may be unreadable
            raise _no_dataset(dataset_id)
        job_ids = self._store.list_jobs_using_dataset(dataset_id)
        if job_ids:
            raise Conflict(f"{dataset_id} is used by {', '.join(job_ids[:3])}", hint="cancel or delete those jobs first")
        prefix = f"datasets/{dataset_id}/"
        keys = delete_prefix(self._objects, prefix)
        self._store.delete_dataset(dataset_id)
        return [f"{self._objects.url}/{key}" for key in keys]

    def _find_own(self, principal: Principal, dataset_id: str) -> Dataset:
        try:
            dataset = self._store.find_dataset(dataset_id)
        except (UnreadableRecord, RecordTooNew):
            if self._store.find_dataset_tenant(dataset_id) != principal.tenant_id:
                raise _no_dataset(dataset_id) from None
            raise
        if dataset is None or dataset.tenant_id != principal.tenant_id:
            raise _no_dataset(dataset_id)
        return dataset

    def _read(self, upload: Upload, folder: Path) -> IngestResult:
        with (
            (folder / TRAIN_SPLIT).open("w+b") as train,
            (folder / EVAL_SPLIT).open("w+b") as held_out,
            (folder / "scratch").open("w+b") as scratch,
        ):
            try:
                return ingest(upload.stream, self._limits, upload.eval_fraction, SPLIT_SEED, train, held_out, scratch)
            except InvalidRow as error:
                raise InvalidDataset(f"line {error.line}: {error.reason}", param=error.field or "file") from error

    def _store_splits(self, ingested: IngestResult, folder: Path, dataset_id: str) -> dict[str, Split]:
        stats_by_name: dict[str, SplitStats | None] = {TRAIN_SPLIT: ingested.train, EVAL_SPLIT: ingested.eval}
        splits: dict[str, Split] = {}
        for name, stats in stats_by_name.items():
            if stats is not None and stats.rows:
                key = f"datasets/{dataset_id}/{name}.jsonl"
                self._objects.upload(folder / name, key, sha256=stats.sha256)
                splits[name] = Split(rows=stats.rows, size_bytes=stats.size_bytes, sha256=stats.sha256, key=key)
        return splits

    def _read_first_rows(self, split: Split) -> list[object]:
        with self._objects.open_read(split.key) as stream:  # the ingestion has limited the length of every row
            return [_without_images(json.loads(stream.readline())) for _ in range(min(PREVIEW_ROWS, split.rows))]


def _no_dataset(dataset_id: str) -> NotFound:
    return NotFound(f"no dataset {dataset_id!r}", hint="GET /datasets lists them", param="processed_dataset_id")


def _without_images(value: object) -> object:
    """A value of a stored row, without the bytes of images."""
    match value:
        case {"type": "image", "image": str(uri)} if uri.startswith("data:image/"):  # not arguments that look like one
            header, _, payload = uri.partition(",")
            size_bytes = len(payload) * 3 // 4 - payload[-2:].count("=")
            return {"type": "image", "image": f"{header},… ({size_bytes} bytes)"}
        case dict():
            return {name: _without_images(inner) for name, inner in cast(dict[str, object], value).items()}
        case list():
            return [_without_images(inner) for inner in cast(list[object], value)]
        case _:
            return value


def _digest(splits: dict[str, Split]) -> str:
    lines = "\n".join(f"{name} {split.sha256}" for name, split in sorted(splits.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
