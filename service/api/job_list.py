"""`GET /jobs`: its filters, and the rows of its answer."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from fastapi import Depends, Query
from pydantic import BaseModel, StringConstraints

from schema.base import Id, Timestamp
from schema.job import Progress, Status
from schema.training import JOB_TYPES
from schema.types import Phase
from service.api.dependencies import PrincipalDep
from service.core.errors import InvalidRequest
from service.core.job_lists import MIN_ID_ENDING, JobQuery, ListedJob, split_search
from service.core.problems import Problems
from service.core.suggestions import did_you_mean

MAX_PAIRS = 16  # as many as a job can have
MAX_PAIR_CHARS = 600
ME = "me"  # in created_by: the caller

_PAIR = re.compile(r"(?P<key>[A-Za-z0-9][A-Za-z0-9_.-]{0,63})=(?P<value>.*)", re.DOTALL)
_SEARCH = (
    "A part of the job's name in any case, or the end of its id: "
    f"at least {MIN_ID_ENDING} characters of it, with or without a `…` before them. "
    "On Firestore the longest word of a search must begin a word of the name."
)


class JobRow(BaseModel):
    """A job in a list."""

    job_id: str
    job_name: str
    base_model_id: str
    status: Status
    modality: str
    trainer_type: str
    method: str | None  # null: the deployment's earlier version created the job, and it has not changed since
    hardware: str | None  # the profile of the current attempt, or the one that the job prefers; null: likewise
    launcher: str | None  # likewise
    metadata: dict[str, str]
    project_id: str | None
    processed_dataset_id: str | None  # of several datasets the first
    created_by: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    last_seen_at: datetime | None  # when its newest attempt reported; null: it has not
    phase: Phase | None  # of an active job
    progress: Progress | None  # of its newest attempt, with the loss of the latest step
    eval_loss: float | None  # of the trained model
    base_eval_loss: float | None  # of the model before training, on the same rows
    cost_usd: float | None  # what its compute has cost until now; null: no price is known


class JobList(BaseModel):
    """A page of jobs, newest first. `next_cursor` continues, also after a page that is not full; null when there are no more."""

    jobs: list[JobRow]
    next_cursor: str | None
    # With counts=true: how many jobs each status has, among those that match all filters but `status`. null: too many to count.
    counts: dict[Status, int] | None = None


async def parse_job_query(
    principal: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=200, description="Rows on the page.")] = 50,
    cursor: Annotated[str | None, Query(max_length=500, description="Where the page starts: the `next_cursor` of the page before.")] = None,
    status: Annotated[list[Status], Query(max_length=len(Status), description="Repeat it for jobs of any of several statuses.")] = [],  # noqa: B006  # FastAPI copies it
    search: Annotated[str | None, Query(min_length=1, max_length=200, description=_SEARCH)] = None,
    metadata: Annotated[
        list[Annotated[str, StringConstraints(max_length=MAX_PAIR_CHARS)]],
        Query(max_length=MAX_PAIRS, description="A pair `key=value` of the job's metadata. Repeat it for jobs that have several."),
    ] = [],  # noqa: B006
    created_by: Annotated[
        str | None, Query(min_length=1, max_length=200, description="The subject that created the job; `me` is the caller.")
    ] = None,
    created_after: Annotated[
        Timestamp | None, Query(description="Created at this time or later (ISO 8601; UTC without an offset).")
    ] = None,
    created_before: Annotated[Timestamp | None, Query(description="Created before this time.")] = None,
    project_id: Id | None = None,
    modality: Annotated[str | None, Query(max_length=40)] = None,
    trainer_type: Annotated[str | None, Query(max_length=40)] = None,
) -> JobQuery:
    """The filters of a request; a job must match all of them. Raises InvalidRequest."""
    problems = Problems()
    text, pairs = None, ()
    with problems.collect():
        text = _parse_search(search)
    with problems.collect():
        pairs = _parse_pairs(metadata)
    if created_after and created_before and created_after >= created_before:
        message = (
            f"created_after ({created_after.isoformat()}) is not before created_before ({created_before.isoformat()}): no job can match"
        )
        problems.add(InvalidRequest(message, hint="exchange the two, or leave one out", param="created_after"))
    if trainer_type is not None and trainer_type not in JOB_TYPES:
        known = f"known: {', '.join(JOB_TYPES)}"
        hint = did_you_mean(trainer_type, JOB_TYPES, known)
        problems.add(InvalidRequest(f"there is no trainer_type {trainer_type!r}", hint=hint, param="trainer_type"))
    problems.raise_found()
    return JobQuery(
        principal.tenant_id,
        limit,
        cursor,
        statuses=tuple(dict.fromkeys(status)),
        project_id=project_id,
        modality=modality,
        trainer_type=trainer_type,
        created_by=principal.subject if created_by == ME else created_by,
        search=text,
        metadata=pairs,
        created_from=created_after,
        created_before=created_before,
    )


JobQueryDep = Annotated[JobQuery, Depends(parse_job_query)]


def job_row(listed: ListedJob, now: datetime) -> dict[str, object]:
    """A JobRow, as plain values."""
    summary, heartbeat = listed.summary, listed.heartbeat
    usd = summary.cost.until(now).usd
    return {
        "job_id": summary.job_id,
        "job_name": summary.job_name,
        "base_model_id": summary.base_model_id,
        "status": summary.status,
        "modality": summary.modality,
        "trainer_type": summary.trainer_type,
        "method": summary.method,
        "hardware": summary.hardware,
        "launcher": summary.launcher,
        "metadata": summary.metadata,
        "project_id": summary.project_id,
        "processed_dataset_id": summary.processed_dataset_id,
        "created_by": summary.created_by,
        "created_at": summary.created_at,
        "started_at": summary.started_at,
        "finished_at": summary.finished_at,
        "last_seen_at": heartbeat.received_at if heartbeat else None,
        "phase": heartbeat.phase if heartbeat and summary.status.is_active else None,
        "progress": heartbeat.progress.model_dump() if heartbeat and heartbeat.progress else None,
        "eval_loss": summary.eval_loss,
        "base_eval_loss": summary.base_eval_loss,
        "cost_usd": None if usd is None else round(usd, 4),
    }


def _parse_search(search: str | None) -> str | None:
    if search is None:
        return None
    text = search.strip()
    if not text:
        raise InvalidRequest("search is blank; give a part of a job's name, or the end of its id", param="search")
    if split_search(text) == (None, None):
        raise InvalidRequest(
            f"search {text!r} is too short for the end of an id",
            hint=f"give at least {MIN_ID_ENDING} characters after the dots, or leave the dots out to search in names",
            param="search",
        )
    return text


def _parse_pairs(pairs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    problems = Problems()
    parsed: list[tuple[str, str]] = []
    for pair in dict.fromkeys(pairs):
        if found := _PAIR.fullmatch(pair):
            parsed.append((found["key"], found["value"]))
        else:
            hint = "write key=value, such as metadata=team=search"
            problems.add(InvalidRequest(f"metadata {pair!r} is not a pair", hint=hint, param="metadata"))
    problems.raise_found()
    return tuple(parsed)
