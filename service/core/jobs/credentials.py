"""What an attempt may read and write in the object stores: its own folders, its datasets and base models, and of other
jobs only what it exports or starts from."""

from collections.abc import Sequence

from schema.checkpoint import checkpoints_prefix
from schema.dataset import Dataset
from schema.job import Job
from schema.spec import AttemptCredentials, result_prefix, spec_key
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
    splits = tuple(split.key for dataset in datasets for split in dataset.splits.values())
    token_caches = tuple(dict.fromkeys(f"{key.rpartition('/')[0]}/tokens/" for key in splits))
    source = tuple(source.key for source in (job.export_of, job.earlier_model) if source is not None)
    own = (*(f"{folder}/{job.job_id}/" for folder in JOB_FOLDERS), checkpoints_prefix(job.job_id, job.project_id))
    accesses = (
        StoreAccess(buckets.configs.url, readable=(spec_key(job.job_id),), writable=(result_prefix(job.job_id),)),
        StoreAccess(buckets.datasets.url, readable=splits, writable=token_caches),
        StoreAccess(buckets.models.url, readable=(BASE_MODELS_PREFIX, *source), writable=own),
    )
    return tuple(_merge([access for access in accesses if access.url == url]) for url in dict.fromkeys(access.url for access in accesses))


def _merge(accesses: Sequence[StoreAccess]) -> StoreAccess:
    readable = tuple(prefix for access in accesses for prefix in access.readable)
    return StoreAccess(accesses[0].url, readable, tuple(prefix for access in accesses for prefix in access.writable))
