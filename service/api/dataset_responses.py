"""The responses about datasets."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel

from schema.dataset import Dataset, DatasetStatus
from schema.ingestion import DatasetReport, Detected, IngestOutcome, InputProblem, RowProblem
from schema.job import Failure, Progress, Status
from schema.types import Phase
from service.core.jobs.queries import JobView


class DatasetView(BaseModel):
    """A dataset's record. While it is processed, and if that failed, it has no rows and its type is `unknown`."""

    processed_dataset_id: str
    name: str
    status: DatasetStatus
    job_id: str | None  # of the job that makes or made it; null: it was made inside the request
    source: str | None  # where the rows came from; null: of a dataset from before it was recorded
    dataset_type: str
    project_id: str | None
    rows: int
    splits: dict[str, int]
    size_bytes: int
    digest: str
    rows_uploaded: int
    duplicates_dropped: int
    dropped: dict[str, int]  # rows that were not kept, by reason; null reasons are not listed
    images: int
    columns: list[str]  # beside the prompt, in a dataset of prompts: graders can read them
    prompt_form: str | None  # strings or messages; null for datasets from before it was recorded
    has_tools: bool
    has_weights: bool  # some assistant message has weight 0
    detected: Detected | None  # what the file was taken for; null for datasets from before it was recorded
    warnings: list[str]  # what a person should look at, one line each
    created_at: datetime


class DatasetDetail(DatasetView):
    """A dataset with its report and its first rows; while it is processed, how far that is."""

    report: DatasetReport | None  # null for datasets from before it was recorded
    phase: Phase | None  # what its job is doing
    progress: Progress | None  # of its job: a step is a row
    failure: Failure | None  # why it failed
    problems: list[RowProblem]  # the rows for which its job has refused the source, the first 1,000
    preview: dict[str, list[Any]]


class DatasetList(BaseModel):
    """A page of datasets, newest first."""

    datasets: list[DatasetView]
    next_cursor: str | None


class RowPageResponse(BaseModel):
    """Some rows of a split, as they are stored, but for images: of those the type and size are shown."""

    split: str
    offset: int  # number of the first row; the first of the split is 0
    rows: list[Any]
    total_rows: int  # of the split
    next_offset: int | None  # null: these are the last rows. A page has fewer rows than asked for if they are long


class CheckResponse(BaseModel):
    """What is known of a file that was checked and not kept."""

    refused: InputProblem | None  # what is wrong with the rows together; null: nothing
    detected: Detected | None
    rows_read: int
    valid_rows: int
    problem_count: int  # rows that are not valid
    problem_counts: dict[str, int]  # the same by kind of problem
    problems: list[RowProblem]  # the first 1,000
    stopped_early: bool  # after 100,000 rows that are not valid; what follows was not read
    splits: dict[str, int]  # rows of each split that an upload would make
    samples: list[Any]  # the first rows as they would be stored
    report: DatasetReport | None


class UploadResponse(BaseModel):
    """Where to send a file, and the key by which it then becomes a dataset."""

    incoming: str  # to be sent to POST /datasets when the file has arrived
    url: str  # for one PUT request with the file as its body. A path is one of this service
    headers: dict[str, str]  # that the request must have
    expires_at: datetime  # until then the request must begin


class StoredUploadResponse(BaseModel):
    """A file that arrived."""

    incoming: str
    size_bytes: int


class DeleteDatasetResponse(BaseModel):
    """What was deleted."""

    processed_dataset_id: str
    deleted: bool
    deleted_resources: list[str]


def dataset_view(dataset: Dataset) -> DatasetView:
    """A dataset as the API shows it."""
    report = dataset.report
    return DatasetView(
        processed_dataset_id=dataset.processed_dataset_id,
        name=dataset.name,
        status=dataset.status,
        job_id=dataset.job_id,
        source=dataset.source,
        dataset_type=dataset.dataset_type,
        project_id=dataset.project_id,
        rows=dataset.rows,
        splits={name: split.rows for name, split in dataset.splits.items()},
        size_bytes=sum(split.size_bytes for split in dataset.splits.values()),
        digest=dataset.digest,
        rows_uploaded=dataset.rows_uploaded,
        duplicates_dropped=dataset.duplicates_dropped,
        dropped=report.dropped if report else {},
        images=dataset.images,
        columns=list(dataset.columns),
        prompt_form=dataset.prompt_form,
        has_tools=dataset.has_tools,
        has_weights=dataset.has_weights,
        detected=dataset.detected,
        warnings=list(report.warnings) if report else [],
        created_at=dataset.created_at,
    )


def dataset_detail(
    dataset: Dataset, job: JobView | None, preview: dict[str, list[object]], problems: Sequence[RowProblem] = ()
) -> DatasetDetail:
    """A dataset with its first rows. `job` makes or made it; None: there is none, or it was deleted."""
    view, heartbeat = dataset_view(dataset), job.heartbeat if job else None
    failure = job.job.failure if job else None
    if dataset.status == "processing" and (job is None or job.job.status.is_final) and not _is_completed(job):
        view = view.model_copy(update={"status": "failed"})
        failure = failure or _describe_end(job)
    is_running = view.status == "processing"
    return DatasetDetail(
        **view.model_dump(),
        report=dataset.report,
        phase=heartbeat.phase if heartbeat and is_running else None,
        progress=heartbeat.progress if heartbeat and is_running else None,
        failure=failure if view.status == "failed" else None,
        problems=list(problems) if view.status == "failed" else [],
        preview=preview,
    )


def check_response(outcome: IngestOutcome) -> CheckResponse:
    """What was found in a file, as the API shows it."""
    return CheckResponse(
        refused=outcome.refused,
        detected=outcome.detected,
        rows_read=outcome.rows_read,
        valid_rows=outcome.rows_read - outcome.problem_count,
        problem_count=outcome.problem_count,
        problem_counts=outcome.problem_counts,
        problems=list(outcome.problems),
        stopped_early=outcome.stopped_early,
        splits={name: split.rows for name, split in outcome.rows.splits.items()} if outcome.rows else {},
        samples=list(outcome.samples),
        report=outcome.report,
    )


def _is_completed(job: JobView | None) -> bool:
    return job is not None and job.job.status is Status.COMPLETED


def _describe_end(job: JobView | None) -> Failure:
    """Why a dataset is not finished whose job did not fail."""
    end = f"{job.job.job_id} was {job.job.status}" if job else "its job was deleted"
    return Failure(code="lost", message=f"the dataset was not finished: {end}", hint="send the file again")
