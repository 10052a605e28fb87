"""Datasets: upload, check, list, show with any of their rows, count tokens, delete."""

from typing import Annotated

from fastapi import APIRouter, Form, Path, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from pydantic import Field

from schema.base import Id, Strict
from schema.dataset import Dataset
from schema.ingestion import TokenLengths
from schema.types import BaseModelId
from service.api.dataset_forms import CheckForm, DatasetForm
from service.api.dataset_responses import (
    CheckResponse,
    DatasetDetail,
    DatasetList,
    DatasetView,
    DeleteDatasetResponse,
    RowPageResponse,
    StoredUploadResponse,
    UploadResponse,
    check_response,
    dataset_detail,
    dataset_view,
)
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.ingestion import IngestionSlots
from service.api.route import LimitedRoute, limits
from service.bootstrap import Services
from service.core.errors import NotFound, TooLarge
from service.core.jobs.ingestions import read_problems
from service.core.jobs.queries import JobView
from service.core.principals import Principal
from storage.file import LocalStore

router = APIRouter(route_class=LimitedRoute, prefix="/datasets", tags=["datasets"])

UPLOAD_HINT = "POST /datasets/uploads returns a link to which a larger file can be sent; or compress it (.gz, .zst)"
WRITE_BYTES = 1 << 20  # of one write to disk, in a thread
MAX_SPLIT_NAME = 64


class UploadRequest(Strict):
    """A file that will be sent to a link."""

    filename: str = Field(min_length=1, max_length=300, description="Its suffix says how to read it.", examples=["chats.jsonl.gz"])
    size_bytes: int = Field(ge=1, le=1 << 50)


class TokenLengthsRequest(Strict):
    """Whose tokenizer counts the tokens of a dataset."""

    base_model_id: BaseModelId
    max_seq_length: int | None = Field(None, ge=8, le=1_048_576, description="Count the rows that are longer, in tokens.")


@router.post("", status_code=201, responses={202: {"model": DatasetView, "description": "A job makes the dataset."}})
@limits(timeout_s=None, body_bytes=None, body_hint=UPLOAD_HINT, can_conflict=False)
async def upload_dataset(
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    form: Annotated[DatasetForm, Form(media_type="multipart/form-data")],
) -> DatasetView:
    """Check every row and store the dataset. An invalid row is answered with a 400 that names its line.

    A file that is large, takes long or is elsewhere is left to a job: the answer is a 202 with a dataset in status `processing`, and
    `GET /datasets/{id}` says when it is `ready`.
    """
    upload = form.make_upload()
    slots: IngestionSlots = request.app.state.ingestion_slots
    dataset = await slots.run(lambda: services.datasets.ingestion.ingest(principal, upload))
    response.status_code = 201 if dataset.status == "ready" else 202
    request.state.created_resource = dataset.processed_dataset_id  # for the audit log: the answer may name a job too
    return dataset_view(dataset)


@router.post("/check")
@limits(timeout_s=None, body_bytes=None, body_hint=UPLOAD_HINT, can_conflict=False)
async def check_dataset(
    request: Request, services: ServicesDep, principal: PrincipalDep, form: Annotated[CheckForm, Form(media_type="multipart/form-data")]
) -> CheckResponse:
    """Find every row that is not valid, and what a dataset of the others would be. Nothing is kept."""
    upload = form.make_upload()
    slots: IngestionSlots = request.app.state.ingestion_slots
    return check_response(await slots.run(lambda: services.datasets.ingestion.check(principal, upload)))


@router.post("/uploads", status_code=201)
@limits(can_conflict=False)
def create_upload(body: UploadRequest, services: ServicesDep, principal: PrincipalDep) -> UploadResponse:
    """A link to which a large file is sent with PUT. Then `POST /datasets` with its `incoming` makes a dataset of it."""
    ticket = services.datasets.incoming.create_upload(principal, body.filename, body.size_bytes)
    return UploadResponse(incoming=ticket.key, url=ticket.upload.url, headers=dict(ticket.upload.headers), expires_at=ticket.expires_at)


@router.put(
    "/uploads/{token}",
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    },
)
@limits(timeout_s=None, body_bytes=None, needs_token=True, access="public", can_conflict=False)
async def receive_upload(request: Request, token: Annotated[str, Path(max_length=4096)], services: ServicesDep) -> StoredUploadResponse:
    """Take the file of a link that `POST /datasets/uploads` returned, where the object store has no links of its own."""
    key, max_bytes = services.tokens.read_upload_token(token)
    store = services.buckets.datasets
    if not isinstance(store, LocalStore):
        raise NotFound("this deployment's object store takes uploads itself", hint="POST /datasets/uploads returns a link to it")
    size_bytes, buffer = 0, bytearray()
    async with contextmanager_in_threadpool(store.open_write(key)) as stream:
        async for chunk in request.stream():
            size_bytes += len(chunk)
            if size_bytes > max_bytes:
                raise TooLarge(f"the file has more than the {max_bytes} bytes that were announced", hint="ask for another link")
            buffer += chunk
            if len(buffer) >= WRITE_BYTES:
                await run_in_threadpool(stream.write, bytes(buffer))
                buffer.clear()
        await run_in_threadpool(stream.write, bytes(buffer))
    return StoredUploadResponse(incoming=key, size_bytes=size_bytes)


@router.get("")
def list_datasets(
    services: ServicesDep,
    principal: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=500)] = None,
) -> DatasetList:
    """Datasets, newest first."""
    page = services.datasets.records.list_datasets(principal, limit, cursor)
    return DatasetList(datasets=[dataset_view(dataset) for dataset in page.rows], next_cursor=page.next_cursor)


@router.get("/{processed_dataset_id}")
def get_dataset(processed_dataset_id: Id, services: ServicesDep, principal: PrincipalDep) -> DatasetDetail:
    """A dataset, its report and the first rows of each split; of one that is being processed, how far that is."""
    dataset = services.datasets.records.find(principal, processed_dataset_id)
    preview = services.datasets.records.preview(principal, processed_dataset_id)
    view = _find_job(services, principal, dataset)
    problems = read_problems(view.job, services.buckets.datasets) if view else ()
    return dataset_detail(dataset, view, preview, problems)


@router.get("/{processed_dataset_id}/rows")
def list_rows(
    processed_dataset_id: Id,
    services: ServicesDep,
    principal: PrincipalDep,
    split: Annotated[str, Query(max_length=MAX_SPLIT_NAME, description="`train` or `eval`.")] = "train",
    offset: Annotated[int, Query(ge=0, le=1 << 40, description="Number of the first row.")] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
) -> RowPageResponse:
    """Any page of a dataset's rows."""
    stored, page = services.datasets.records.read_page(principal, processed_dataset_id, split, offset, limit)
    return RowPageResponse(split=split, offset=offset, rows=page.rows, total_rows=stored.rows, next_offset=page.next_offset)


@router.post("/{processed_dataset_id}/token_lengths")
@limits(timeout_s=None)
async def count_token_lengths(
    request: Request, processed_dataset_id: Id, body: TokenLengthsRequest, services: ServicesDep, principal: PrincipalDep
) -> TokenLengths:
    """How many tokens the rows have by the tokenizer of a base model in the model store. They are counted once, and then kept."""
    slots: IngestionSlots = request.app.state.ingestion_slots
    count = services.datasets.token_counts.count
    return await slots.run(lambda: count(principal, processed_dataset_id, body.base_model_id, body.max_seq_length))


@router.delete("/{processed_dataset_id}")
@limits(timeout_s=None)
def delete_dataset(processed_dataset_id: Id, services: ServicesDep, principal: PrincipalDep) -> DeleteDatasetResponse:
    """Delete a dataset that no unfinished job uses."""
    deleted = services.datasets.records.delete(principal, processed_dataset_id)
    return DeleteDatasetResponse(processed_dataset_id=processed_dataset_id, deleted=True, deleted_resources=deleted)


def _find_job(services: Services, principal: Principal, dataset: Dataset) -> JobView | None:
    """The job of a dataset that is not ready."""
    if dataset.status == "ready" or dataset.job_id is None:
        return None
    job = services.jobs.repository.find_or_none(principal, dataset.job_id)
    return services.jobs.queries.describe(job) if job else None
