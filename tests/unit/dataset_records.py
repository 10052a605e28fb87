"""The records of datasets over a folder and memory, with the ingestion in this process."""

from pathlib import Path

from jobs.ingest.pipeline import ingest
from schema.ingestion import IngestLimits, IngestOutcome, IngestTask
from service.adapters.jobstores.memory import MemoryJobStore
from service.core.datasets.records import Datasets
from service.core.quotas import QuotaChecks, Quotas
from storage.file import LocalStore
from tests.factories import START


class InProcessIngester:
    """The ingestion without a process of its own."""

    def ingest(self, task: IngestTask, *, timeout_s: float | None = None) -> IngestOutcome:
        return ingest(task)


def make_datasets(folder: Path, quotas: Quotas | None = None) -> Datasets:
    store = MemoryJobStore()
    return Datasets(
        store=store,
        objects=LocalStore((folder / "objects").as_uri()),
        limits=IngestLimits(),
        ingester=InProcessIngester(),
        clock=lambda: START,
        random_suffix=lambda: "1",
        scratch=folder / "scratch",
        max_incoming_bytes=1 << 20,
        quotas=QuotaChecks(store, quotas or Quotas.model_validate({}), lambda: START),
    )
