"""The verbs of a dataset: ingest an upload, find, list, preview, delete."""

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
from service.core.errors import Conflict, InvalidDataset, InvalidRequest, NotFound, TooLarge
from service.core.ports import JobStore, Page
from storage import InvalidKey, ObjectStore, delete_prefix

INCOMING_PREFIX = "incoming/"  # where callers put files that are too large for a request
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
    ) -> None:
        self._store = store
        self._objects = objects
        self._limits = limits
        self._clock = clock
        self._random_suffix = random_suffix
        self._scratch = scratch
        self._max_incoming_bytes = max_incoming_bytes

    def ingest(self, upload: Upload, tenant_id: str) -> Dataset:
        """Check every row, split, store, and only then keep the record. Raises InvalidDataset naming the first bad line."""
        dataset_id = f"dataset_{self._random_suffix()}"
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            ingested = self._read(upload, Path(folder))
            splits = self._store_splits(ingested, Path(folder), dataset_id)
        dataset = Dataset(
            processed_dataset_id=dataset_id,
            tenant_id=tenant_id,
            project_id=upload.project_id,
            name=upload.name,
            dataset_type=ingested.dataset_type,
            splits=splits,
            digest=_digest(splits),
            rows_uploaded=ingested.rows_read,
            duplicates_dropped=ingested.duplicates_dropped,
            images=ingested.images,
            columns=ingested.columns,
            created_at=self._clock(),
        )
        self._store.create_dataset(dataset)
        return dataset

    @contextmanager
    def open_incoming(self, key: str) -> Generator[BinaryIO]:
        """A file that was put into the store beforehand, below incoming/. Raises InvalidRequest, NotFound, TooLarge."""
        if not key.startswith(INCOMING_PREFIX):
            raise InvalidRequest(
                f"{key!r} is not below {INCOMING_PREFIX} of {self._objects.url}", hint=f"put it at {INCOMING_PREFIX}", param="incoming"
            )
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

    def find(self, dataset_id: str, tenant_id: str) -> Dataset:
        """A tenant's dataset. Raises NotFound, also for somebody else's."""
        dataset = self._store.find_dataset(dataset_id)
        if dataset is None or dataset.tenant_id != tenant_id:
            raise NotFound(f"no dataset {dataset_id!r}", hint="GET /datasets lists them", param="processed_dataset_id")
        return dataset

    def list_datasets(self, tenant_id: str, limit: int, after: str | None) -> Page[Dataset]:
        """A page of a tenant's datasets, newest first."""
        return self._store.list_datasets(tenant_id, limit, after)

    def preview(self, dataset: Dataset) -> dict[str, list[object]]:
        """The first rows of each split, without reading the rest. Of an image, only its type and size are shown."""
        return {name: self._read_first_rows(split) for name, split in dataset.splits.items()}

    def delete(self, dataset_id: str, tenant_id: str) -> list[str]:
        """Remove the rows and the record; says what was removed. Raises Conflict while a job needs it."""
        self.find(dataset_id, tenant_id)
        users = self._store.list_jobs_using_dataset(dataset_id)
        if users:
            raise Conflict(f"{dataset_id} is used by {', '.join(users[:3])}", hint="cancel or delete those jobs first")
        prefix = f"datasets/{dataset_id}/"
        keys = delete_prefix(self._objects, prefix)
        self._store.delete_dataset(dataset_id)
        return [f"{self._objects.url}/{key}" for key in keys]

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
        found: dict[str, SplitStats | None] = {TRAIN_SPLIT: ingested.train, EVAL_SPLIT: ingested.eval}
        splits: dict[str, Split] = {}
        for name, facts in found.items():
            if facts is not None and facts.rows:
                key = f"datasets/{dataset_id}/{name}.jsonl"
                self._objects.upload(folder / name, key, sha256=facts.sha256)
                splits[name] = Split(rows=facts.rows, size_bytes=facts.size_bytes, sha256=facts.sha256, key=key)
        return splits

    def _read_first_rows(self, split: Split) -> list[object]:
        with self._objects.open_read(split.key) as stream:  # its rows were measured before they were stored
            return [_without_images(json.loads(stream.readline())) for _ in range(min(PREVIEW_ROWS, split.rows))]


def _without_images(value: object) -> object:
    """A value of a stored row, with the bytes of images left out."""
    match value:
        case {"type": "image", "image": str(uri)}:
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
    together = "\n".join(f"{name} {split.sha256}" for name, split in sorted(splits.items()))
    return f"sha256:{hashlib.sha256(together.encode()).hexdigest()}"
