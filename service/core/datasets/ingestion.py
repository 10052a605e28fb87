"""From what a caller sends to a dataset: inside the request if that is soon done, else in a job."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from schema.dataset import UNKNOWN_TYPE, Dataset, Split
from schema.ingestion import (
    MAX_REPORTED_PROBLEMS,
    IngestedRows,
    IngestLimits,
    IngestOptions,
    IngestOutcome,
    IngestTask,
    InputFile,
    RowProblem,
)
from schema.job import Job
from schema.placement import Hardware
from service.core.datasets.incoming import IncomingFiles
from service.core.datasets.ports import Ingester, IngestTimeout
from service.core.datasets.records import split_key
from service.core.datasets.tokenizers import Tokenizers
from service.core.errors import InvalidDataset, InvalidRequest, TooLarge, Unsupported
from service.core.ports import JobStore
from service.core.principals import Principal, Scope
from service.core.quotas import QuotaChecks
from storage import ObjectStore

NO_OPTIONS = IngestOptions()  # type: ignore[call-arg]  # pyright: every field has a default
MAX_TOLD_PROBLEMS = 100  # of an upload that is refused, and in a record; POST /datasets/check tells more


@dataclass(frozen=True)
class Upload:
    """What a caller sent to become a dataset: exactly one of a stream, a key below incoming/ and a source elsewhere."""

    filename: str  # with its suffix, which says how to read it
    name: str
    stream: BinaryIO | None = None
    incoming: str | None = None
    source: str | None = None
    project_id: str | None = None
    options: IngestOptions = NO_OPTIONS
    secrets: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)  # for reading the source
    hardware: Hardware | None = None  # of the job, if there is one
    wait: bool = True  # inside the request, if that is soon done


class IngestionStarter(Protocol):
    """Creates the job that makes a dataset."""

    def start(
        self,
        principal: Principal,
        dataset: Dataset,
        *,
        source: str,
        options: IngestOptions,
        limits: IngestLimits,
        secrets: Mapping[str, str],
        hardware: Hardware | None = None,
    ) -> Job:
        """Store the record of the dataset and its job. Raises InvalidRequest, QuotaExceeded, Unavailable."""
        ...


class DatasetIngestion:
    """Makes datasets, and checks files. Holds no state of its own."""

    def __init__(
        self,
        *,
        store: JobStore,
        objects: ObjectStore,
        incoming: IncomingFiles,
        tokenizers: Tokenizers,
        limits: IngestLimits,
        ingester: Ingester,
        jobs: IngestionStarter | None,
        clock: Callable[[], datetime],
        random_suffix: Callable[[], str],
        scratch: Path,
        quotas: QuotaChecks,
        wait_s: float,
        max_request_bytes: int,
    ) -> None:
        """`wait_s` limits how long a request waits for its file, `max_request_bytes` the file below incoming/ that it waits for."""
        self._store = store
        self._objects = objects
        self._incoming = incoming
        self._tokenizers = tokenizers
        self._limits = limits
        self._ingester = ingester
        self._jobs = jobs
        self._clock = clock
        self._random_suffix = random_suffix
        self._scratch = scratch
        self._quotas = quotas
        self._wait_s = wait_s
        self._max_request_bytes = max_request_bytes

    def ingest(self, principal: Principal, upload: Upload) -> Dataset:
        """Check every row, split the rows, store them, then write the record. A dataset in state `processing` is left to a job.

        Raises InvalidDataset that names the invalid rows, InvalidRequest, QuotaExceeded, StorageError, Unavailable.
        """
        principal.require(Scope.DATASETS_WRITE)
        self._quotas.check_upload(principal.tenant_id)
        dataset = self._new_dataset(principal, upload)
        elsewhere = upload.source or self._find_large(principal, upload)
        if elsewhere:
            return self._start_job(principal, upload, dataset, elsewhere)
        with self._open_folder() as folder:
            path = self._fetch(principal, upload, folder)
            if not upload.wait:
                return self._leave_to_job(principal, upload, dataset, path)
            try:
                outcome = self._run(upload, path, folder / "output", check_only=False)
            except IngestTimeout:
                return self._leave_to_job(principal, upload, dataset, path)
            rows = _require_rows(outcome)
            self._quotas.check_upload(principal.tenant_id, sum(split.size_bytes for split in rows.splits.values()))
            splits = self._store_splits(rows, folder / "output", dataset.processed_dataset_id)
        dataset = complete_dataset(dataset, outcome, rows, splits)
        self._store.create_dataset(dataset)
        if upload.incoming:
            self._incoming.discard(principal, upload.incoming)
        return dataset

    def check(self, principal: Principal, upload: Upload) -> IngestOutcome:
        """What an ingestion would find; nothing is kept. Raises InvalidDataset for a file that cannot be read, TooLarge, Unavailable."""
        principal.require(Scope.DATASETS_WRITE)
        with self._open_folder() as folder:
            path = self._fetch(principal, upload, folder)
            try:
                outcome = self._run(upload, path, folder / "output", check_only=True)
            except IngestTimeout:
                message = f"checking {upload.filename} takes longer than {self._wait_s:g} seconds"
                hint = 'check a part of it, or let POST /datasets read it with on_invalid "drop": its report says what was dropped'
                raise TooLarge(message, hint=hint, param="incoming" if upload.incoming else "file") from None
        if outcome.refused and not outcome.rows_read:
            raise describe_refusal(outcome)
        return outcome

    def _new_dataset(self, principal: Principal, upload: Upload) -> Dataset:
        return Dataset(
            processed_dataset_id=f"dataset_{self._random_suffix()}",
            tenant_id=principal.tenant_id,
            project_id=upload.project_id,
            name=upload.name,
            dataset_type=UNKNOWN_TYPE,
            splits={},
            digest="",
            rows_uploaded=0,
            status="processing",
            source=upload.source or upload.incoming or upload.filename,
            created_at=self._clock(),
        )

    def _find_large(self, principal: Principal, upload: Upload) -> str | None:
        """The key of a file below incoming/ that no request waits for."""
        if upload.incoming is None:
            return None
        size_bytes = self._incoming.find(principal, upload.incoming).size_bytes
        return upload.incoming if size_bytes > self._max_request_bytes or not upload.wait else None

    def _leave_to_job(self, principal: Principal, upload: Upload, dataset: Dataset, path: Path) -> Dataset:
        """Let a job read a file that is on this machine: it is stored below incoming/ unless it came from there."""
        if self._jobs is None:
            raise _no_jobs()
        return self._start_job(principal, upload, dataset, upload.incoming or self._incoming.store(principal, path, upload.filename))

    def _start_job(self, principal: Principal, upload: Upload, dataset: Dataset, source: str) -> Dataset:
        if self._jobs is None:
            raise _no_jobs()
        if upload.options.base_model_id:
            self._tokenizers.require(upload.options.base_model_id)
        job = self._jobs.start(
            principal,
            dataset,
            source=source,
            options=upload.options,
            limits=self._limits,
            secrets=upload.secrets,
            hardware=upload.hardware,
        )
        return dataset.model_copy(update={"job_id": job.job_id})

    @contextmanager
    def _open_folder(self) -> Generator[Path]:
        """A folder of its own for one ingestion, which is deleted at the end."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            yield Path(name)

    def _fetch(self, principal: Principal, upload: Upload, folder: Path) -> Path:
        if upload.incoming is not None:
            return self._incoming.fetch(principal, upload.incoming, folder)
        if upload.stream is None:
            raise InvalidRequest("a source elsewhere cannot be checked in a request", hint="POST /datasets reads it", param="source")
        source = folder / "source"
        with source.open("wb") as file:
            shutil.copyfileobj(upload.stream, file, 1 << 20)
        return source

    def _run(self, upload: Upload, path: Path, output: Path, *, check_only: bool) -> IngestOutcome:
        tokenizer = self._tokenizers.fetch(upload.options.base_model_id) if upload.options.base_model_id else None
        output.mkdir()
        task = IngestTask(
            files=(InputFile(path=str(path), name=upload.filename),),
            options=upload.options,
            limits=self._limits,
            check_only=check_only,
            output=str(output),
            tokenizer_folder=None if tokenizer is None else str(tokenizer),
        )
        return self._ingester.ingest(task, timeout_s=self._wait_s)

    def _store_splits(self, rows: IngestedRows, folder: Path, dataset_id: str) -> dict[str, Split]:
        splits: dict[str, Split] = {}
        for name, split in rows.splits.items():
            key, index_key = split_key(dataset_id, name), None
            self._objects.upload(folder / split.file, key, sha256=split.sha256)
            if split.index_file is not None:
                index_key = f"{key}.index"
                self._objects.upload(folder / split.index_file, index_key)
            splits[name] = Split(rows=split.rows, size_bytes=split.size_bytes, sha256=split.sha256, key=key, index_key=index_key)
        return splits


def complete_dataset(dataset: Dataset, outcome: IngestOutcome, rows: IngestedRows, splits: dict[str, Split]) -> Dataset:
    """The record of a dataset whose rows are stored. Of the rows that were dropped it names the first ones."""
    report = outcome.report and outcome.report.model_copy(update={"problems": outcome.report.problems[:MAX_TOLD_PROBLEMS]})
    facts = {
        "dataset_type": rows.dataset_type,
        "splits": splits,
        "digest": _digest(splits),
        "rows_uploaded": outcome.rows_read,
        "duplicates_dropped": rows.duplicates_dropped,
        "images": rows.images,
        "columns": rows.columns,
        "prompt_form": rows.prompt_form,
        "has_tools": rows.has_tools,
        "has_weights": rows.has_weights,
        "detected": outcome.detected,
        "report": report,
        "status": "ready",
    }
    return dataset.model_copy(update=facts)


def _require_rows(outcome: IngestOutcome) -> IngestedRows:
    """The rows that were kept. Raises InvalidDataset with what is wrong with the file, or with each of its first invalid rows."""
    if outcome.rows is None:
        raise describe_refusal(outcome)
    return outcome.rows


def describe_refusal(outcome: IngestOutcome) -> InvalidDataset:
    """The error for a file that is not kept: what is wrong with it as a whole, then each of the first invalid rows."""
    problems = [_invalid_row(problem) for problem in outcome.problems[:MAX_TOLD_PROBLEMS]]
    if outcome.refused:
        refused = outcome.refused
        problems = [InvalidDataset(refused.message, hint=refused.hint, param=refused.param), *problems]
    else:
        problems[0].hint = _describe_check(outcome)
    problems[0].others = tuple(problems[1:])
    return problems[0]


def _describe_check(outcome: IngestOutcome) -> str:
    """How to learn of all invalid rows, and what else to do with them."""
    count = f"{outcome.problem_count:,}{' or more' if outcome.stopped_early else ''}"
    if outcome.problem_count == 1:
        return 'correct it, or send on_invalid "drop" to keep the other rows'
    listed = "all" if outcome.problem_count <= MAX_REPORTED_PROBLEMS else f"the first {MAX_REPORTED_PROBLEMS:,} of"
    return f'POST /datasets/check with the same fields lists {listed} {count} rows that are not valid; on_invalid "drop" keeps the others'


def _invalid_row(problem: RowProblem) -> InvalidDataset:
    field_name = f"{problem.field} " if problem.field else ""
    return InvalidDataset(f"{problem.place}: {field_name}{problem.reason}", param=problem.field or "file")


def _no_jobs() -> Unsupported:
    return Unsupported("this deployment reads files inside requests only", hint="send a smaller file as `file`", param="file")


def _digest(splits: dict[str, Split]) -> str:
    lines = "\n".join(f"{name} {split.sha256}" for name, split in sorted(splits.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
