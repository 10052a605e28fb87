"""The records of datasets over a folder and memory, with the ingestion in this process."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from jobs.ingest.pipeline import ingest
from schema.ingestion import IngestLimits, IngestOutcome, IngestTask, TokenLengthsOutcome, TokenLengthsTask
from service.adapters.jobstores.memory import MemoryJobStore
from service.adapters.links import ServiceUrlSigner
from service.core.datasets.assembly import DatasetServices, build_dataset_services
from service.core.ports import Buckets
from service.core.quotas import QuotaChecks, Quotas
from service.core.tokens import TokenSigner
from storage.file import LocalStore
from tests.factories import START


class InProcessIngester:
    """The ingestion without a process of its own."""

    def ingest(self, task: IngestTask, *, timeout_s: float | None = None) -> IngestOutcome:
        return ingest(task)

    def count_tokens(self, task: TokenLengthsTask, *, timeout_s: float | None = None) -> TokenLengthsOutcome:
        raise NotImplementedError


def make_datasets(folder: Path, quotas: Quotas | None = None, **changes: Any) -> DatasetServices:
    """The parts; `changes` replace their ports and limits."""
    store, objects = MemoryJobStore(), LocalStore((folder / "objects").as_uri())
    ports: dict[str, Any] = {
        "store": store,
        "buckets": Buckets(configs=objects, datasets=objects, models=objects),
        "limits": IngestLimits(),
        "ingester": InProcessIngester(),
        "jobs": None,
        "upload_signer": ServiceUrlSigner(TokenSigner(b"k" * 32, lambda: START)),
        "clock": lambda: START,
        "random_suffix": make_counter(),
        "scratch": folder / "scratch",
        "tokenizer_cache": folder / "tokenizers",
        "max_incoming_bytes": 1 << 20,
        "max_upload_bytes": 1 << 20,
        "quotas": QuotaChecks(store, quotas or Quotas.model_validate({}), lambda: START),
    }
    return build_dataset_services(**ports | changes)


def make_counter() -> Callable[[int], str]:
    """Numbers instead of random text."""
    numbers = count(1)
    return lambda _: str(next(numbers))
