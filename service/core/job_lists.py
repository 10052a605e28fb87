"""Lists of jobs: which jobs a query selects, and what a list shows of each without reading its record.

A store keeps the summary of a job as JSON beside its record, and writes both in one transaction.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from unicodedata import normalize

from pydantic import Field

from schema.base import ForwardCompatible
from schema.job import Job, Status
from service.core.accrual import JobCost, summarize_cost
from service.core.event_store import Heartbeat

MIN_ID_ENDING = 4  # shorter endings of ids are shared by too many jobs
ELLIPSIS = ("…", "...")  # before the end of an id, as the CLI prints it


class JobSummary(ForwardCompatible):
    """What a list shows of a job's record. A field with a default may be missing where an earlier version wrote the summary."""

    job_id: str
    job_name: str
    base_model_id: str
    status: Status
    modality: str
    trainer_type: str
    method: str | None = None
    project_id: str | None = None
    processed_dataset_id: str | None = None  # of several datasets the first
    hardware: str | None = None  # the profile of the current attempt, or the one that the job prefers
    launcher: str | None = None  # likewise
    metadata: dict[str, str] = Field(default={})
    created_by: str | None = None
    attempts: int = 0
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    eval_loss: float | None = None  # of the trained model
    base_eval_loss: float | None = None  # of the model before training, on the same rows
    cost: JobCost = Field(default=JobCost())


@dataclass(frozen=True)
class JobEntry:
    """What is indexed beside a job's record, and known when the record cannot be read."""

    tenant_id: str
    summary: JobSummary


@dataclass(frozen=True)
class ListedJob:
    """A job in a list."""

    summary: JobSummary
    heartbeat: Heartbeat | None  # of its newest attempt

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.summary.job_id


@dataclass(frozen=True)
class JobQuery:
    """Which jobs, newest first. A filter that is None or empty matches every job; a job must match all filters."""

    tenant_id: str
    limit: int = 50
    after: str | None = None  # a cursor from an earlier page
    statuses: tuple[Status, ...] = ()  # any of them
    project_id: str | None = None
    modality: str | None = None
    trainer_type: str | None = None
    created_by: str | None = None  # a subject
    search: str | None = None  # a part of the name, or the end of the id
    metadata: tuple[tuple[str, str], ...] = ()
    created_from: datetime | None = None  # at this moment or later
    created_before: datetime | None = None


def summarize_job(job: Job) -> JobSummary:
    """The fields of a job that a list shows."""
    config = job.training_config.summarize()
    placement = job.shown_placement
    return JobSummary(
        job_id=job.job_id,
        job_name=job.job_name,
        base_model_id=config.base_model_id,
        status=job.status,
        modality=config.modality,
        trainer_type=job.training_config.trainer_type,
        method=config.method,
        project_id=job.project_id,
        processed_dataset_id=job.processed_dataset_id,
        hardware=placement.profile,
        launcher=placement.launcher,
        metadata=job.metadata,
        created_by=job.created_by,
        attempts=job.attempt.number if job.attempt else 0,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        eval_loss=job.metrics.eval_loss if job.metrics else None,
        base_eval_loss=job.base_metrics.eval_loss if job.base_metrics else None,
        cost=summarize_cost(job),
    )


def make_entry(job: Job) -> JobEntry:
    """What is indexed beside a job's record."""
    return JobEntry(job.tenant_id, summarize_job(job))


def make_listed_job(summary: JobSummary, heartbeat: Heartbeat | None) -> ListedJob:
    """A job with its last heartbeat, unless that is one of an earlier attempt."""
    is_current = heartbeat is not None and heartbeat.attempt == summary.attempts
    return ListedJob(summary, heartbeat if is_current else None)


def matches_query(query: JobQuery, summary: JobSummary) -> bool:
    """Whether a job of the query's tenant passes every filter."""
    exact = ("project_id", "modality", "trainer_type", "created_by")
    return (
        all(getattr(query, name) in (None, getattr(summary, name)) for name in exact)
        and (not query.statuses or summary.status in query.statuses)
        and (query.created_from is None or summary.created_at >= query.created_from)
        and (query.created_before is None or summary.created_at < query.created_before)
        and all(summary.metadata.get(key) == value for key, value in query.metadata)
        and (query.search is None or _is_found(query.search, summary))
    )


def fold_text(text: str) -> str:
    """Text for comparisons that ignore case and the form of accented letters."""
    return normalize("NFC", normalize("NFC", text).casefold())


def split_search(search: str) -> tuple[str | None, str | None]:
    """What a folded name must contain, and how a folded id may end instead; None: nothing is found that way."""
    folded = fold_text(search)
    marked = next((folded.removeprefix(mark) for mark in ELLIPSIS if folded.startswith(mark)), None)
    ending = folded if marked is None else marked
    return (folded if marked is None else None), (ending if len(ending) >= MIN_ID_ENDING else None)


def iter_exact_terms(metadata: Mapping[str, str], created_by: str | None) -> Iterator[str]:
    """Texts that a store finds a job by: its pairs, and who created it. No pair's key contains a space."""
    yield from (pair_term(key, value) for key, value in metadata.items())
    if created_by is not None:
        yield creator_term(created_by)


def pair_term(key: str, value: str) -> str:
    """The term of a pair of metadata."""
    return f"{key}={value}"


def creator_term(subject: str) -> str:
    """The term of a subject."""
    return f"created by {subject}"


def _is_found(search: str, summary: JobSummary) -> bool:
    part, ending = split_search(search)
    in_name = part is not None and part in fold_text(summary.job_name)
    return in_name or (ending is not None and fold_text(summary.job_id).endswith(ending))
