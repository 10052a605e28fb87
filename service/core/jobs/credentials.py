"""What an attempt may read and write in the object stores: its own folders, its datasets and base models, and of other
jobs only what it exports or starts from."""

from collections.abc import Sequence

from schema.checkpoint import checkpoints_prefix
from schema.dataset import Dataset
from schema.job import Job
from schema.sources import BucketSource, IncomingSource, parse_source
from schema.spec import AttemptCredentials, ingestion_prefix, result_prefix, spec_key
from schema.training import IngestConfig
from service.core.jobs.orphans import JOB_FOLDERS
from service.core.ports import Buckets
from service.core.store_credentials import StoreAccess

BASE_MODELS_PREFIX = "pretrained_weights/"


class DeploymentCredentials:
    """The CredentialIssuer where attempts use what their machine has: a folder on it, or the credentials of its service account."""

    def issue(self, accesses: Sequence[StoreAccess]) -> AttemptCredentials:
        is_local = all(access.url.startswith("file://") for access in accesses)
        return AttemptCredentials(kind="none" if is_local else "ambient", token=None)


def find_attempt_access(job: Job, datasets: Sequence[Dataset], buckets: Buckets) -> tuple[StoreAccess, ...]:
    """What an attempt of the job needs, one value for each store."""
    if isinstance(job.training_config, IngestConfig):
        return _merge_by_store(_find_ingestion_access(job, job.training_config, buckets))
    splits = tuple(split.key for dataset in datasets for split in dataset.splits.values())
    token_caches = tuple(dict.fromkeys(f"{key.rpartition('/')[0]}/tokens/" for key in splits))
    source = tuple(source.key for source in (job.export_of, job.earlier_model) if source is not None)
    own = (*(f"{folder}/{job.job_id}/" for folder in JOB_FOLDERS), checkpoints_prefix(job.job_id, job.project_id))
    accesses = (
        StoreAccess(buckets.configs.url, readable=(spec_key(job.job_id),), writable=(result_prefix(job.job_id),)),
        StoreAccess(buckets.datasets.url, readable=splits, writable=token_caches),
        StoreAccess(buckets.models.url, readable=(BASE_MODELS_PREFIX, *source), writable=own),
    )
    return _merge_by_store(accesses)


def _find_ingestion_access(job: Job, config: IngestConfig, buckets: Buckets) -> Sequence[StoreAccess]:
    """An ingestion reads its source and a tokenizer, and writes below the prefix of its current attempt only."""
    source = parse_source(config.source)
    incoming = (source.key,) if isinstance(source, IncomingSource) else ()
    written = (ingestion_prefix(job.processed_dataset_id, len(job.attempts)),)
    accesses = [
        StoreAccess(buckets.configs.url, readable=(spec_key(job.job_id),), writable=(result_prefix(job.job_id),)),
        StoreAccess(buckets.datasets.url, readable=incoming, writable=written),
        StoreAccess(buckets.models.url, readable=(BASE_MODELS_PREFIX,), writable=()),
    ]
    if isinstance(source, BucketSource) and source.scheme == "gs" and config.rights == "deployment":  # only gs:// has narrow tokens
        readable = source.pattern if source.is_single else source.folder
        accesses.append(StoreAccess(f"gs://{source.bucket}", readable=(readable,), writable=()))
    return accesses


def _merge_by_store(accesses: Sequence[StoreAccess]) -> tuple[StoreAccess, ...]:
    return tuple(_merge([access for access in accesses if access.url == url]) for url in dict.fromkeys(access.url for access in accesses))


def _merge(accesses: Sequence[StoreAccess]) -> StoreAccess:
    readable = tuple(prefix for access in accesses for prefix in access.readable)
    return StoreAccess(accesses[0].url, readable, tuple(prefix for access in accesses for prefix in access.writable))
