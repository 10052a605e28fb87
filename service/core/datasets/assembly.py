"""Puts the parts of this folder together, each with the ports it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from schema.ingestion import IngestLimits
from service.core.datasets.incoming import IncomingFiles
from service.core.datasets.ingestion import DatasetIngestion, IngestionStarter
from service.core.datasets.ports import Ingester
from service.core.datasets.records import Datasets
from service.core.datasets.token_lengths import TokenCounts
from service.core.datasets.tokenizers import Tokenizers
from service.core.links import UrlSigner
from service.core.ports import Buckets, JobStore
from service.core.quotas import QuotaChecks


@dataclass(frozen=True)
class DatasetServices:
    """What can be done with datasets, and with files that become datasets."""

    records: Datasets
    ingestion: DatasetIngestion
    incoming: IncomingFiles
    token_counts: TokenCounts


def build_dataset_services(
    *,
    store: JobStore,
    buckets: Buckets,
    limits: IngestLimits,
    ingester: Ingester,
    jobs: IngestionStarter | None,
    upload_signer: UrlSigner,
    clock: Callable[[], datetime],
    random_suffix: Callable[[int], str],
    scratch: Path,
    tokenizer_cache: Path,
    quotas: QuotaChecks,
    max_incoming_bytes: int,
    max_upload_bytes: int,
    incoming_by_tenant: bool = False,
    wait_s: float = 60.0,
    max_request_bytes: int = 64 << 20,
) -> DatasetServices:
    """Build the parts. `random_suffix` returns that many random bytes as text; `jobs` makes datasets that no request waits for."""
    incoming = IncomingFiles(
        buckets.datasets,
        signer=upload_signer,
        quotas=quotas,
        clock=clock,
        random_suffix=lambda: random_suffix(16),
        max_bytes=max_incoming_bytes,
        max_upload_bytes=max_upload_bytes,
        by_tenant=incoming_by_tenant,
    )
    tokenizers = Tokenizers(buckets.models, tokenizer_cache)
    records = Datasets(store=store, objects=buckets.datasets)
    return DatasetServices(
        records=records,
        ingestion=DatasetIngestion(
            store=store,
            objects=buckets.datasets,
            incoming=incoming,
            tokenizers=tokenizers,
            limits=limits,
            ingester=ingester,
            jobs=jobs,
            clock=clock,
            random_suffix=lambda: random_suffix(6),
            scratch=scratch,
            quotas=quotas,
            wait_s=wait_s,
            max_request_bytes=max_request_bytes,
        ),
        incoming=incoming,
        token_counts=TokenCounts(
            records=records,
            objects=buckets.datasets,
            tokenizers=tokenizers,
            ingester=ingester,
            limits=limits,
            scratch=scratch,
            wait_s=wait_s,
        ),
    )
