"""Datasets: upload, list, show with a preview, delete."""

from contextlib import nullcontext
from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, File, Form, Query, Request, UploadFile

from schema.base import Id, Label
from schema.dataset import Dataset
from schema.ingestion import IngestOptions
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.ingestion import IngestionSlots
from service.api.responses import DatasetDetail, DatasetList, DatasetView, DeleteDatasetResponse, dataset_view
from service.api.route import LimitedRoute, limits
from service.core.datasets.records import Upload
from service.core.errors import InvalidRequest

router = APIRouter(route_class=LimitedRoute, prefix="/datasets", tags=["datasets"])


UPLOAD_HINT = "put the file below incoming/ of the dataset store, and send its key as `incoming`"


@router.post("", status_code=201)
@limits(timeout_s=None, body_bytes=None, body_hint=UPLOAD_HINT, can_conflict=False)
async def upload_dataset(
    request: Request,
    services: ServicesDep,
    principal: PrincipalDep,
    file: Annotated[
        UploadFile | None,
        File(
            description="JSONL, all rows in one format: `messages`, `prompt` and `completion`, `text`, preferences, or prompts for "
            "graders. Rows with messages may have `tools` and calls in OpenAI's form."
        ),
    ] = None,
    incoming: Annotated[
        str | None, Form(max_length=900, description="Instead of `file`: the key of such a file below `incoming/` of the dataset store.")
    ] = None,
    name: Annotated[Label | None, Form(description="Default: the file's name.")] = None,
    project_id: Annotated[Id | None, Form()] = None,
    eval_fraction: Annotated[
        float, Form(ge=0, le=0.5, allow_inf_nan=False, description="Share of the rows held out for evaluation.")
    ] = 0.1,
) -> DatasetView:
    """Check every row and store the dataset. An invalid row is answered with a 400 that names its line."""
    if (file is None) == (incoming is None):
        raise InvalidRequest("send either the rows as `file` or their key as `incoming`, not both", param="file")
    label = name or _sanitize_filename(file.filename if file else incoming)

    def ingest() -> Dataset:
        with nullcontext(file.file) if file else services.datasets.open_incoming(principal, incoming or "") as stream:
            options = IngestOptions(eval_fraction=eval_fraction)  # type: ignore[call-arg]  # pyright: every field has a default
            filename = (file.filename if file else PurePath(incoming or "").name) or label
            upload = Upload(stream=stream, filename=filename, name=label, project_id=project_id, options=options)
            return services.datasets.ingest(principal, upload)

    slots: IngestionSlots = request.app.state.ingestion_slots
    return dataset_view(await slots.run(ingest))


@router.get("")
def list_datasets(
    services: ServicesDep,
    principal: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=500)] = None,
) -> DatasetList:
    """Datasets, newest first."""
    page = services.datasets.list_datasets(principal, limit, cursor)
    return DatasetList(datasets=[dataset_view(dataset) for dataset in page.rows], next_cursor=page.next_cursor)


@router.get("/{processed_dataset_id}")
def get_dataset(processed_dataset_id: Id, services: ServicesDep, principal: PrincipalDep) -> DatasetDetail:
    """A dataset and the first rows of each split."""
    dataset = services.datasets.find(principal, processed_dataset_id)
    return DatasetDetail(**dataset_view(dataset).model_dump(), preview=services.datasets.preview(principal, processed_dataset_id))


@router.delete("/{processed_dataset_id}")
@limits(timeout_s=None)
def delete_dataset(processed_dataset_id: Id, services: ServicesDep, principal: PrincipalDep) -> DeleteDatasetResponse:
    """Delete a dataset that no unfinished job uses."""
    deleted = services.datasets.delete(principal, processed_dataset_id)
    return DeleteDatasetResponse(processed_dataset_id=processed_dataset_id, deleted=True, deleted_resources=deleted)


def _sanitize_filename(filename: str | None) -> str:
    """A label from a file's name, which a caller chose: printable characters only."""
    readable = "".join(c for c in PurePath(filename or "").name if c.isprintable())
    return readable[:128] or "unnamed dataset"
