"""The seed's job endpoints, with events, logs, checkpoints and the controls beside them."""

from typing import Annotated

import orjson
from fastapi import APIRouter, Body, Header, Path, Query, Request, Response
from pydantic import ValidationError
from sse_starlette.sse import EventSourceResponse
from starlette.responses import StreamingResponse

from schema.base import Id
from schema.job import Job, Status
from schema.requests import CloneRequest, ExportAgainRequest, ExportRequest, ResumeRequest, RetryRequest
from service.api import stream
from service.api.deps import ForTenant, IdempotencyHeader, UsesParts
from service.api.errors import malformed
from service.api.views import (
    CheckpointList,
    DeleteAnswer,
    DownloadAnswer,
    EventList,
    FileLink,
    JobDetail,
    JobList,
    LogView,
    TrainAnswer,
    checkpoint_list,
    event_row,
    job_detail,
    job_row,
)
from service.bootstrap import Parts
from service.core.errors import InvalidRequest
from service.core.ports import JobQuery

router = APIRouter(prefix="/jobs", tags=["jobs"])

Limit = Annotated[int, Query(ge=1, le=200, description="Rows on the page.")]
# SQLite's and JSON's largest exact integer is far beyond any real cursor.
Place = Annotated[int, Query(ge=0, le=2**53)]
WEIGHTS = (".gguf", "model.safetensors", ".safetensors")


@router.get("", response_model=JobList)
def jobs(
    parts: UsesParts,
    tenant_id: ForTenant,
    limit: Limit = 50,
    cursor: Annotated[str | None, Query(max_length=500)] = None,
    status: Status | None = None,
    project_id: Id | None = None,
    modality: Annotated[str | None, Query(max_length=40)] = None,
    trainer_type: Annotated[str | None, Query(max_length=40)] = None,
) -> Response:
    """Jobs, newest first."""
    query = JobQuery(tenant_id, limit, cursor, status, project_id, modality, trainer_type)
    page = parts.jobs.page(query)
    return _json({"jobs": [job_row(row) for row in page.rows], "next_cursor": page.next_cursor})


@router.get("/download/{job_id}")
def download(
    job_id: Id,
    request: Request,
    parts: UsesParts,
    tenant_id: ForTenant,
    artifact: Annotated[str | None, Query(max_length=100, description="Which one; left out: GGUF, else merged, else adapter.")] = None,
) -> DownloadAnswer:
    """Short-lived links to what the job made."""
    found, links = parts.jobs.download(job_id, tenant_id, artifact)
    base = str(parts.settings.public_url or request.base_url).rstrip("/")
    files = [
        FileLink(
            path=file.path or found.key.rpartition("/")[2],
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            url=base + url if url.startswith("/") else url,
        )
        for file, url in links
    ]
    main = next((file for ending in WEIGHTS for file in files if file.path.endswith(ending)), files[0])
    return DownloadAnswer(
        download_url=main.url, artifact=found.name, is_folder=found.key.endswith("/"), expires_in_s=parts.jobs.link_life_s, files=files
    )


@router.get("/{job_id}")
def job(job_id: Id, parts: UsesParts, tenant_id: ForTenant) -> JobDetail:
    """Everything about a job: where it is, how it went, what it made."""
    return job_detail(*parts.jobs.look_at(job_id, tenant_id))


@router.delete("/{job_id}")
def delete(
    job_id: Id,
    response: Response,
    parts: UsesParts,
    tenant_id: ForTenant,
    delete_hub: Annotated[bool, Query(description="Also delete the Hub repositories that hold nothing but what this job pushed.")] = False,
    hub_token: Annotated[str | None, Header(alias="X-HF-Token", max_length=1000, description="Needed with delete_hub.")] = None,
) -> DeleteAnswer:
    """Stop the job and remove it with all its files. 202: it is still stopping, repeat the call."""
    deleted = parts.jobs.delete(job_id, tenant_id, with_hub=delete_hub, hub_token=hub_token)
    if deleted is None:
        response.status_code = 202
        return DeleteAnswer(job_id=job_id, deleted=False, message="The job is being stopped; repeat the call.", deleted_resources=[])
    if deleted.failures:
        response.status_code = 503
        message = f"Not everything could be deleted; repeat the call. {'; '.join(deleted.failures)}"
        return DeleteAnswer(job_id=job_id, deleted=False, message=message, deleted_resources=deleted.resources)
    message = "Job and all associated files deleted successfully."
    return DeleteAnswer(job_id=job_id, deleted=True, message=message, deleted_resources=deleted.resources)


@router.post("/{job_id}/cancel", status_code=202)
def cancel(job_id: Id, parts: UsesParts, tenant_id: ForTenant) -> JobDetail:
    """Stop the job; what it saved stays. Can be repeated."""
    return _shown(parts, parts.jobs.cancel(job_id, tenant_id))


@router.post("/{job_id}/pause", status_code=202)
def pause(job_id: Id, parts: UsesParts, tenant_id: ForTenant) -> JobDetail:
    """Save a checkpoint, free the compute, keep the place. Can be repeated."""
    return _shown(parts, parts.jobs.pause(job_id, tenant_id))


@router.post("/{job_id}/resume", status_code=202)
def resume(job_id: Id, parts: UsesParts, tenant_id: ForTenant, body: Annotated[ResumeRequest | None, Body()] = None) -> JobDetail:
    """Go on where the pause was, exactly; on other hardware or for longer, if the body says so. Can be repeated."""
    return _shown(parts, parts.jobs.resume(job_id, tenant_id, body or ResumeRequest.model_validate({})))


@router.post("/{job_id}/retry", status_code=202)
def retry(job_id: Id, parts: UsesParts, tenant_id: ForTenant, body: Annotated[RetryRequest | None, Body()] = None) -> JobDetail:
    """Continue a failed or cancelled job from its last good checkpoint, or from the start. Can be repeated."""
    return _shown(parts, parts.jobs.retry(job_id, tenant_id, body or RetryRequest.model_validate({})))


@router.post("/{job_id}/clone", status_code=201)
def clone(
    job_id: Id,
    parts: UsesParts,
    tenant_id: ForTenant,
    body: Annotated[CloneRequest | None, Body()] = None,
    idempotency_key: IdempotencyHeader = None,
) -> TrainAnswer:
    """Run the job's request again, as a job of its own; the body says what is to be different."""
    try:
        made = parts.jobs.clone(job_id, tenant_id, body or CloneRequest.model_validate({}), idempotency_key)
    except ValidationError as error:
        raise malformed(error) from error
    return TrainAnswer(job_id=made.job_id)


@router.post("/{job_id}/export", status_code=201)
def export_again(
    job_id: Id,
    parts: UsesParts,
    tenant_id: ForTenant,
    body: Annotated[ExportAgainRequest | None, Body()] = None,
    idempotency_key: IdempotencyHeader = None,
) -> TrainAnswer:
    """Export what the job has trained once more, in other forms or to another place, without training: a job of its own."""
    request = body or ExportAgainRequest.model_validate({})
    return TrainAnswer(job_id=parts.jobs.export_again(job_id, tenant_id, request, idempotency_key).job_id)


@router.get("/{job_id}/checkpoints")
def checkpoints(job_id: Id, parts: UsesParts, tenant_id: ForTenant) -> CheckpointList:
    """What the job can go on from, and be exported at; the one that the next attempt tries first comes first."""
    return checkpoint_list(parts.jobs.checkpoints(job_id, tenant_id))


@router.post("/{job_id}/checkpoints/{step}/export", status_code=201)
def export(
    job_id: Id,
    step: Annotated[int, Path(ge=0, le=10_000_000)],
    parts: UsesParts,
    tenant_id: ForTenant,
    body: Annotated[ExportRequest | None, Body()] = None,
    idempotency_key: IdempotencyHeader = None,
) -> TrainAnswer:
    """Export a checkpoint without training again: a job of its own, whose artifacts are downloaded like any other's."""
    request = body or ExportRequest.model_validate({})
    return TrainAnswer(job_id=parts.jobs.export(job_id, step, tenant_id, request, idempotency_key).job_id)


@router.get("/{job_id}/events", response_model=EventList)
async def events(
    job_id: Id,
    request: Request,
    parts: UsesParts,
    tenant_id: ForTenant,
    after: Place = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", max_length=20)] = None,
) -> Response:
    """What the job reported, oldest first; with `Accept: text/event-stream`, as it happens."""
    if "text/event-stream" not in accept:
        rows = await stream.in_thread(parts.jobs.events, job_id, tenant_id, after, limit)
        return _json({"events": [event_row(row) for row in rows], "next_after": rows[-1].cursor if rows else after})
    await stream.in_thread(parts.jobs.find, job_id, tenant_id)
    place = _event_id(last_event_id) if last_event_id else after
    feed: stream.Feeds = request.app.state.feeds
    return EventSourceResponse(feed.follow(job_id, tenant_id, place), ping=15)


@router.get("/{job_id}/logs", response_model=LogView)
async def logs(
    job_id: Id,
    parts: UsesParts,
    tenant_id: ForTenant,
    attempt: Annotated[int | None, Query(ge=1, le=10_000)] = None,
    offset: Place = 0,
    limit: Annotated[int, Query(ge=1, le=1 << 20, description="Most bytes to return.")] = 1 << 16,
    follow: bool = False,
) -> Response:
    """The attempt's output; with `follow`, as plain text until the job ends."""
    number, page = await stream.in_thread(parts.jobs.log_page, job_id, tenant_id, attempt, offset, limit)
    if not follow:
        return _json({"attempt": number, "text": page.text, "next_offset": page.next_offset})
    return StreamingResponse(stream.follow_log(parts.jobs, job_id, tenant_id, attempt, offset), media_type="text/plain; charset=utf-8")


def _shown(parts: Parts, job: Job) -> JobDetail:
    return job_detail(job, parts.jobs.liveness(job))


def _event_id(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise InvalidRequest(f"Last-Event-ID is the id of an event, a number; not {text!r}", param="Last-Event-ID")
    return int(text)


def _json(body: dict[str, object]) -> Response:
    """Already in shape: rendered without a second validation, because lists are long and asked for often."""
    return Response(orjson.dumps(body), media_type="application/json")
