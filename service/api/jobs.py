"""`/jobs`: list, show, download, delete, control, clone, export, events and logs."""

from collections.abc import AsyncIterator
from typing import Annotated

import anyio
import orjson
from fastapi import APIRouter, Body, Header, Path, Query, Request, Response
from pydantic import ValidationError
from sse_starlette.sse import EventSourceResponse
from starlette.responses import StreamingResponse

from schema.base import Id
from schema.job import Job, Status
from schema.requests import CloneRequest, ExportRequest, ReexportRequest, ResumeRequest, RetryRequest, TrainRequest
from schema.types import SECRET_PATTERN
from service.api import log_stream, stream
from service.api.dependencies import IdempotencyHeader, PrincipalDep, ServicesDep
from service.api.job_list import JobList, JobQueryDep, job_row
from service.api.responses import (
    CheckpointList,
    DeleteJobResponse,
    DownloadResponse,
    EventList,
    FileLink,
    JobDetail,
    LogView,
    TrainResponse,
    checkpoint_list,
    event_row,
    job_detail,
)
from service.api.route import MAINTENANCE_TIMEOUT_S, LimitedRoute, limits
from service.api.validation_errors import BodyError
from service.bootstrap import Services
from service.core.errors import InvalidRequest
from service.core.jobs.queries import LINK_TTL_S

router = APIRouter(route_class=LimitedRoute, prefix="/jobs", tags=["jobs"])

# 2**53 is the largest integer that every JSON parser keeps exact, far beyond any real cursor.
MAX_EVENT_ID = 2**53
AfterEvent = Annotated[int, Query(ge=0, le=MAX_EVENT_ID)]
LogOffset = Annotated[int | None, Query(ge=0, le=log_stream.MAX_OFFSET, description="Where to begin, in bytes. Default: 0.")]
LogTail = Annotated[int | None, Query(ge=0, le=100_000, description="Begin this many lines before the end instead.")]
STREAM_GRACE_S = 1.0  # less than the server waits for requests when it stops
WEIGHT_SUFFIXES = (".gguf", "model.safetensors", ".safetensors")


@router.get("", response_model=JobList)
def list_jobs(
    services: ServicesDep,
    principal: PrincipalDep,
    query: JobQueryDep,
    counts: Annotated[bool, Query(description="Also count the jobs of each status, among those that match the other filters.")] = False,
) -> Response:
    """Jobs, newest first."""
    page = services.jobs.queries.list_jobs(principal, query)
    now = services.jobs.repository.clock()
    answer: dict[str, object] = {"jobs": [job_row(row, now) for row in page.rows], "next_cursor": page.next_cursor}
    if counts:
        found = services.jobs.queries.count_jobs_by_status(principal, query)
        answer["counts"] = None if found is None else {str(status): found.get(status, 0) for status in Status}
    return _json_response(answer)


@router.get("/download/{job_id}")
@limits(can_conflict=True, audited=True)  # an unfinished job has no files
def get_download_links(
    job_id: Id,
    services: ServicesDep,
    principal: PrincipalDep,
    artifact: Annotated[
        str | None, Query(max_length=100, description="Name of the artifact. Default: GGUF, else merged, else adapter.")
    ] = None,
) -> DownloadResponse:
    """Short-lived links to the files of an artifact."""
    chosen, links = services.jobs.queries.create_download_links(principal, job_id, artifact)
    base = services.settings.url.rstrip("/")  # not from the request, whose header Host anybody can choose
    files = [
        FileLink(
            path=file.path or chosen.key.rpartition("/")[2],
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            url=base + url if url.startswith("/") else url,
        )
        for file, url in links
    ]
    main_file = next((file for suffix in WEIGHT_SUFFIXES for file in files if file.path.endswith(suffix)), files[0])
    return DownloadResponse(
        download_url=main_file.url, artifact=chosen.name, is_folder=chosen.key.endswith("/"), expires_in_s=LINK_TTL_S, files=files
    )


@router.get("/{job_id}")
def get_job(job_id: Id, services: ServicesDep, principal: PrincipalDep) -> JobDetail:
    """Everything about a job: its status, metrics, attempts and artifacts."""
    return job_detail(services.jobs.queries.get_refreshed(principal, job_id))


@router.delete("/{job_id}")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S)
def delete_job(
    job_id: Id,
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    delete_hub: Annotated[bool, Query(description="Also delete the Hub repositories that hold only what this job pushed.")] = False,
    hub_token: Annotated[
        str | None, Header(alias="X-HF-Token", max_length=1000, pattern=SECRET_PATTERN, description="Needed with delete_hub.")
    ] = None,
) -> DeleteJobResponse:
    """Cancel the job, then delete it with all its files. 202: the job is still being canceled; repeat the call."""
    deleted = services.jobs.deletion.delete(principal, job_id, delete_hub=delete_hub, hub_token=hub_token)
    if deleted is None:
        response.status_code = 202
        return DeleteJobResponse(job_id=job_id, deleted=False, message="The job is being canceled; repeat the call.", deleted_resources=[])
    if deleted.failures:
        response.status_code = 503
        message = f"Not everything could be deleted; repeat the call. {'; '.join(deleted.failures)}"
        return DeleteJobResponse(job_id=job_id, deleted=False, message=message, deleted_resources=deleted.resources)
    message = "Job and all associated files deleted successfully."
    return DeleteJobResponse(job_id=job_id, deleted=True, message=message, deleted_resources=deleted.resources)


@router.post("/{job_id}/cancel", status_code=202)
def cancel_job(job_id: Id, services: ServicesDep, principal: PrincipalDep) -> JobDetail:
    """Cancel the job; its checkpoints are kept. Can be repeated."""
    return _job_response(services, services.jobs.control.cancel(principal, job_id))


@router.post("/{job_id}/pause", status_code=202)
def pause_job(job_id: Id, services: ServicesDep, principal: PrincipalDep) -> JobDetail:
    """Save a checkpoint and free the compute. Can be repeated."""
    return _job_response(services, services.jobs.control.pause(principal, job_id))


@router.post("/{job_id}/resume", status_code=202)
def resume_job(
    job_id: Id, services: ServicesDep, principal: PrincipalDep, body: Annotated[ResumeRequest | None, Body()] = None
) -> JobDetail:
    """Continue exactly where the job paused, on other hardware or for longer if the body asks for it. Can be repeated."""
    return _job_response(services, services.jobs.control.resume(principal, job_id, body or ResumeRequest.model_validate({})))


@router.post("/{job_id}/retry", status_code=202)
def retry_job(job_id: Id, services: ServicesDep, principal: PrincipalDep, body: Annotated[RetryRequest | None, Body()] = None) -> JobDetail:
    """Continue a failed or cancelled job from its last good checkpoint, or from the start. Can be repeated."""
    return _job_response(services, services.jobs.control.retry(principal, job_id, body or RetryRequest.model_validate({})))


@router.post("/{job_id}/clone", status_code=201)
def clone_job(
    job_id: Id,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[CloneRequest | None, Body()] = None,
    idempotency_key: IdempotencyHeader = None,
) -> TrainResponse:
    """Create a new job from the job's request, with the changes in the body."""
    try:
        job = services.jobs.submission.clone(principal, job_id, body or CloneRequest.model_validate({}), idempotency_key)
    except ValidationError as error:
        raise BodyError(error, TrainRequest) from error
    return TrainResponse(job_id=job.job_id)


@router.post("/{job_id}/export", status_code=201)
def export_job(
    job_id: Id,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[ReexportRequest | None, Body()] = None,
    idempotency_key: IdempotencyHeader = None,
) -> TrainResponse:
    """Create a job that exports the trained model again, in other formats or to another destination, without training."""
    request = body or ReexportRequest.model_validate({})
    return TrainResponse(job_id=services.jobs.exports.reexport(principal, job_id, request, idempotency_key).job_id)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job_id: Id, services: ServicesDep, principal: PrincipalDep) -> CheckpointList:
    """The job's stored checkpoints. The first is the one that the next attempt tries first."""
    return checkpoint_list(services.jobs.queries.list_checkpoints(principal, job_id))


@router.post("/{job_id}/checkpoints/{step}/export", status_code=201)
def export_checkpoint(
    job_id: Id,
    step: Annotated[int, Path(ge=0, le=10_000_000)],
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[ExportRequest | None, Body()] = None,
    idempotency_key: IdempotencyHeader = None,
) -> TrainResponse:
    """Create a job that exports one checkpoint without training."""
    request = body or ExportRequest.model_validate({})
    return TrainResponse(job_id=services.jobs.exports.export(principal, job_id, step, request, idempotency_key).job_id)


@router.get("/{job_id}/events", response_model=EventList)
async def list_job_events(
    job_id: Id,
    request: Request,
    services: ServicesDep,
    principal: PrincipalDep,
    after: AfterEvent = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", max_length=20)] = None,
) -> Response:
    """The job's events, oldest first; with `Accept: text/event-stream`, a stream of them as they happen."""
    if "text/event-stream" not in accept:
        rows = await stream.run_in_thread(services.jobs.queries.list_events, principal, job_id, after, limit)
        return _json_response({"events": [event_row(row) for row in rows], "next_after": rows[-1].cursor if rows else after})
    cursor = _parse_event_id(last_event_id) if last_event_id else after
    newest = await stream.run_in_thread(services.jobs.queries.find_last_cursor, principal, job_id)  # raises for a job that is not theirs
    feeds: stream.Feeds = request.app.state.feeds
    feeds.check_room(principal, job_id)
    return _event_stream(feeds.follow(principal, job_id, cursor, newest))


@router.get("/{job_id}/logs", response_model=LogView)
async def read_job_logs(
    job_id: Id,
    request: Request,
    services: ServicesDep,
    principal: PrincipalDep,
    attempt: Annotated[int | None, Query(ge=1, le=log_stream.MAX_ATTEMPT)] = None,
    offset: LogOffset = None,
    tail: LogTail = None,
    limit: Annotated[int, Query(ge=1, le=1 << 20, description="The maximum number of bytes to return.")] = 1 << 16,
    follow: bool = False,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", max_length=30)] = None,
) -> Response:
    """An attempt's output; with `follow`, streamed as plain text until the job ends, with `Accept: text/event-stream` as events."""
    queries, as_events = services.jobs.queries, "text/event-stream" in accept
    if tail is not None and offset is not None:
        raise InvalidRequest("tail and offset both say where to begin; send one of them", param="tail")
    begin, number = offset or 0, attempt
    if as_events and last_event_id:
        number, begin = log_stream.parse_log_position(last_event_id)
    elif tail is not None:
        number, begin = await stream.run_in_thread(queries.find_log_tail, principal, job_id, attempt, tail)
    number, page = await stream.run_in_thread(queries.read_log, principal, job_id, number, begin, limit)  # raises for a foreign job
    if not follow and not as_events:
        return _json_response({"attempt": number, "text": page.text, "next_offset": page.next_offset})
    feeds: stream.Feeds = request.app.state.feeds
    feeds.check_room(principal, job_id)
    follower = log_stream.LogFollower(feeds, services.jobs, principal, job_id, attempt, number, begin)
    if as_events:
        return _event_stream(follower.follow_as_events())
    return StreamingResponse(follower.follow_as_text(), media_type="text/plain; charset=utf-8")


def _job_response(services: Services, job: Job) -> JobDetail:
    return job_detail(services.jobs.queries.describe(job))


def _event_stream(events: AsyncIterator[bytes]) -> Response:
    """A stream that ends in order when the service stops: its generator, which `Feeds.stop` wakes, has time to return."""
    return EventSourceResponse(events, ping=15, shutdown_event=anyio.Event(), shutdown_grace_period=STREAM_GRACE_S)


def _parse_event_id(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise InvalidRequest(f"Last-Event-ID must be the id of an event, a number; not {text!r}", param="Last-Event-ID")
    if int(text) > MAX_EVENT_ID:
        raise InvalidRequest(f"no event has the id {text}", param="Last-Event-ID")
    return int(text)


def _json_response(body: dict[str, object]) -> Response:
    """Render without a second validation by pydantic: these lists are long and requested often."""
    return Response(orjson.dumps(body), media_type="application/json")
