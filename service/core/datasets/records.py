"""Dataset records: ingest an upload, find, list, preview, delete."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, cast

from schema.dataset import Dataset, Split
from schema.ingestion import IngestedRows, IngestLimits, IngestOptions, IngestOutcome, IngestTask, InputFile, RowProblem
from service.core.errors import Conflict, InvalidDataset, InvalidRequest, NotFound, RecordTooNew, TooLarge, UnreadableRecord
from service.core.ports import Ingester, JobStore, Page
from service.core.principals import LOCAL_TENANT, Principal, Scope
from service.core.quotas import QuotaChecks
from storage import InvalidKey, ObjectStore, delete_prefix

INCOMING_PREFIX = "incoming/"  # of the dataset store: callers put files there that are too large for a request
SPLIT_SEED = 42
PREVIEW_ROWS = 5
NO_OPTIONS = IngestOptions()  # type: ignore[call-arg]  # pyright: every field has a default
MAX_TOLD_PROBLEMS = 100  # of an upload that is refused; POST /datasets/check tells more


@dataclass(frozen=True)
class Upload:
    """What a caller sent to become a dataset."""

    stream: BinaryIO
    filename: str  # with its suffix
    name: str
    project_id: str | None = None
    options: IngestOptions = NO_OPTIONS


class Datasets:
    """Everything that can be done with datasets. Holds no state of its own."""

    def __init__(
        self,
        *,
        store: JobStore,
        objects: ObjectStore,
        limits: IngestLimits,
        ingester: Ingester,
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
        self._ingester = ingester
        self._clock = clock
        self._random_suffix = random_suffix
        self._scratch = scratch
        self._max_incoming_bytes = max_incoming_bytes
        self._quotas = quotas
        self._incoming_by_tenant = incoming_by_tenant

    def ingest(self, principal: Principal, upload: Upload) -> Dataset:
        """Check every row, split the rows, store them, then write the record.

        Raises InvalidDataset that names the invalid rows, QuotaExceeded, StorageError, Unavailable.
        """
        principal.require(Scope.DATASETS_WRITE)
        self._quotas.check_upload(principal.tenant_id)
        dataset_id = f"dataset_{self._random_suffix()}"
        with self._run(upload, check_only=False) as (outcome, folder):
            rows = _require_rows(outcome)
            self._quotas.check_upload(principal.tenant_id, sum(split.size_bytes for split in rows.splits.values()))
            splits = self._store_splits(rows, folder, dataset_id)
        dataset = Dataset(
            processed_dataset_id=dataset_id,
            tenant_id=principal.tenant_id,
            project_id=upload.project_id,
            name=upload.name,
            dataset_type=rows.dataset_type,
            splits=splits,
            digest=_digest(splits),
            rows_uploaded=outcome.rows_read,
            duplicates_dropped=rows.duplicates_dropped,
            images=rows.images,
            columns=rows.columns,
            prompt_form=rows.prompt_form,
            has_tools=rows.has_tools,
            has_weights=rows.has_weights,
            created_at=self._clock(),
        )
        self._store.create_dataset(dataset)
        return dataset

    def check(self, principal: Principal, upload: Upload) -> IngestOutcome:
        """What an ingestion would find; nothing is kept. Raises Unavailable."""
        principal.require(Scope.DATASETS_WRITE)
        with self._run(upload, check_only=True) as (outcome, _):
            return outcome

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

    @contextmanager
    def _run(self, upload: Upload, *, check_only: bool) -> Generator[tuple[IngestOutcome, Path]]:
        """Ingest in a folder of its own, which is deleted at the end."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            folder = Path(name)
            source = folder / "source"
            with source.open("wb") as file:
                shutil.copyfileobj(upload.stream, file, 1 << 20)
            output = folder / "output"
            output.mkdir()
            task = IngestTask(
                files=(InputFile(path=str(source), name=upload.filename),),
                options=upload.options,
                limits=self._limits,
                seed=SPLIT_SEED,
                check_only=check_only,
                output=str(output),
            )
            yield self._ingester.ingest(task), output

    def _store_splits(self, rows: IngestedRows, folder: Path, dataset_id: str) -> dict[str, Split]:
        splits: dict[str, Split] = {}
        for name, split in rows.splits.items():
            key = f"datasets/{dataset_id}/{name}.jsonl"
            self._objects.upload(folder / split.file, key, sha256=split.sha256)
            splits[name] = Split(rows=split.rows, size_bytes=split.size_bytes, sha256=split.sha256, key=key)
        return splits

    def _read_first_rows(self, split: Split) -> list[object]:
        with self._objects.open_read(split.key) as stream:  # the ingestion has limited the length of every row
            return [_without_images(json.loads(stream.readline())) for _ in range(min(PREVIEW_ROWS, split.rows))]


def _require_rows(outcome: IngestOutcome) -> IngestedRows:
    """The rows that were kept. Raises InvalidDataset with what is wrong with the file, or with each of its first invalid rows."""
    if outcome.refused:
        raise InvalidDataset(outcome.refused.message, hint=outcome.refused.hint, param=outcome.refused.param)
    if outcome.rows is None:
        first, *others = [_invalid_row(problem) for problem in outcome.problems[:MAX_TOLD_PROBLEMS]]
        first.others = tuple(others)
        raise first
    return outcome.rows


def _invalid_row(problem: RowProblem) -> InvalidDataset:
    field = f"{problem.field} " if problem.field else ""
    return InvalidDataset(f"{problem.place}: {field}{problem.reason}", param=problem.field or "file")


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
