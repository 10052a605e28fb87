"""Dataset records: find, list, show rows of, delete."""

from schema.dataset import Dataset, Split
from service.core.datasets.rows import RowPage, read_rows
from service.core.errors import Conflict, InvalidRequest, NotFound, RecordTooNew, UnreadableRecord
from service.core.ports import JobStore, Page
from service.core.principals import Principal, Scope
from service.core.suggestions import did_you_mean
from storage import ObjectStore, delete_prefix

PREVIEW_ROWS = 5


class Datasets:
    """What can be done with datasets that exist. Holds no state of its own."""

    def __init__(self, *, store: JobStore, objects: ObjectStore) -> None:
        self._store = store
        self._objects = objects

    def find(self, principal: Principal, dataset_id: str) -> Dataset:
        """A dataset of the principal's tenant. Raises NotFound, also for a dataset of another tenant."""
        principal.require(Scope.DATASETS_READ)
        try:
            dataset = self._store.find_dataset(dataset_id)
        except (UnreadableRecord, RecordTooNew):
            if self._store.find_dataset_tenant(dataset_id) != principal.tenant_id:
                raise _no_dataset(dataset_id) from None
            raise
        if dataset is None or dataset.tenant_id != principal.tenant_id:
            raise _no_dataset(dataset_id)
        return dataset

    def find_ready(self, principal: Principal, dataset_id: str) -> Dataset:
        """A dataset that has rows. Raises NotFound, and Conflict for one that is being made or failed."""
        dataset = self.find(principal, dataset_id)
        if dataset.status != "ready":
            state = "is being processed" if dataset.status == "processing" else "failed, and has no rows"
            raise Conflict(f"{dataset_id} {state}", hint=f"GET /datasets/{dataset_id} shows its state", param="processed_dataset_id")
        return dataset

    def list_datasets(self, principal: Principal, limit: int, after: str | None) -> Page[Dataset]:
        """A page of a tenant's datasets, newest first. Raises InvalidRequest for a malformed cursor."""
        principal.require(Scope.DATASETS_READ)
        return self._store.list_datasets(principal.tenant_id, limit, after)

    def preview(self, principal: Principal, dataset_id: str) -> dict[str, list[object]]:
        """The first rows of each split, without reading the rest. Images are replaced by their type and size.

        Raises NotFound, StorageError.
        """
        splits = self.find(principal, dataset_id).splits
        return {name: read_rows(self._objects, split, 0, PREVIEW_ROWS).rows for name, split in splits.items()}

    def read_page(self, principal: Principal, dataset_id: str, split: str, offset: int, limit: int) -> tuple[Split, RowPage]:
        """A page of a split's rows, as the preview shows them. Raises NotFound, Conflict, InvalidRequest, StorageError."""
        splits = self.find_ready(principal, dataset_id).splits
        if split not in splits:
            hint = did_you_mean(split, splits, f"it has {' and '.join(sorted(splits))}")
            raise InvalidRequest(f"{dataset_id} has no split {split!r}", hint=hint, param="split")
        return splits[split], read_rows(self._objects, splits[split], offset, limit)

    def delete(self, principal: Principal, dataset_id: str) -> list[str]:
        """Delete the rows and the record; returns what was deleted. Raises Conflict while a job needs the dataset, NotFound."""
        principal.require(Scope.DATASETS_WRITE)
        if self._store.find_dataset_tenant(dataset_id) != principal.tenant_id:  # the record itself may be unreadable
            raise _no_dataset(dataset_id)
        job_ids = self._store.list_jobs_using_dataset(dataset_id)
        if job_ids:
            raise Conflict(f"{dataset_id} is used by {', '.join(job_ids[:3])}", hint="cancel or delete those jobs first")
        keys = delete_prefix(self._objects, dataset_prefix(dataset_id))
        self._store.delete_dataset(dataset_id)
        return [f"{self._objects.url}/{key}" for key in keys]


def dataset_prefix(dataset_id: str) -> str:
    """The folder of a dataset in the dataset store."""
    return f"datasets/{dataset_id}/"


def split_key(dataset_id: str, name: str) -> str:
    """Where the rows of a split lie that was made inside a request."""
    return f"{dataset_prefix(dataset_id)}{name}.jsonl"


def _no_dataset(dataset_id: str) -> NotFound:
    return NotFound(f"no dataset {dataset_id!r}", hint="GET /datasets lists them", param="processed_dataset_id")
