"""The job spec: what an attempt must do, as a JSON file in the config bucket, without secrets; and what an attempt says to claim itself."""

import hashlib
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from schema.base import ForwardCompatible, Id
from schema.dataset import Dataset, WeightedDataset
from schema.job import Attempt, EarlierModel, ExportSource
from schema.training import SpecConfig


class StoreUrls(ForwardCompatible):
    """URLs of the object stores, such as file:///home/me/.tunesmith/objects or gs://bucket."""

    datasets: str
    models: str
    configs: str


class JobSpec(ForwardCompatible):
    """Everything that an attempt needs except secrets. Stored at configs/{job_id}.json."""

    job_id: Id
    job_name: str
    tenant_id: Id
    project_id: Id | None = None
    training_config: SpecConfig
    dataset: Dataset  # of several the first
    mixed_datasets: tuple[WeightedDataset, ...] = ()  # all of them, where the job mixes several
    stores: StoreUrls
    checkpoints_prefix: str  # the folder of the job's checkpoints in the model bucket; ends in "/"
    resume_from_attempt: int = 1  # checkpoints of earlier attempts are not used
    export_of: ExportSource | None = None  # if set, train nothing and export this checkpoint
    earlier_model: EarlierModel | None = None  # if set, start from it; the config's base is its original base

    @property
    def datasets(self) -> tuple[WeightedDataset, ...]:
        """The datasets to train on, with their weights."""
        return self.mixed_datasets or (WeightedDataset(dataset=self.dataset),)


def spec_key(job_id: str) -> str:
    """The key of a job's spec in the config bucket."""
    return f"configs/{job_id}.json"


def result_key(job_id: str, attempt: int) -> str:
    """The key of an attempt's result in the config bucket."""
    return f"results/{job_id}/{attempt}.json"


def result_prefix(job_id: str) -> str:
    """The folder of a job's results in the config bucket."""
    return f"results/{job_id}/"


def manifest_key(job_id: str) -> str:
    """The key of the list of published files in the model bucket, which the service writes when the job has completed."""
    return f"results/{job_id}/manifest.json"


def attempt_name(job_id: str, attempt: Attempt | int) -> str:
    """The name under which an attempt is launched, and can be found again."""
    return f"{job_id}.{attempt if isinstance(attempt, int) else attempt.number}"


def artifact_key(folder: str, job_id: str, attempt: int, name: str = "") -> str:
    """The key an attempt uploads an artifact to, below its kind's folder: a folder, or a file of that name. Each attempt has its own."""
    return f"{folder}/{job_id}/attempt-{attempt}/{name}"


def ingestion_prefix(dataset_id: str, attempt: int) -> str:
    """The folder of the dataset bucket that an ingestion's attempt writes to. Each attempt has its own."""
    return f"datasets/{dataset_id}/attempt-{attempt}/"


def problems_key(dataset_id: str, attempt: int) -> str:
    """The key of the `IngestOutcome` of an attempt that kept nothing, with the problems of the source."""
    return f"{ingestion_prefix(dataset_id, attempt)}problems.json"


CLAIMANT_HEADER = "X-Claimant"  # in every call of an attempt after its claim: the secret of the process that claimed it

ClaimantSecret = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$")]


def claimant_id(secret: str) -> str:
    """What records and results call the process with that secret: a digest, so that reading either gives nobody the secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


class ClaimRequest(ForwardCompatible):
    """A process asks to own an attempt. `claimant` is a random secret of the process, which it sends with every later call."""

    claimant: ClaimantSecret


class ClaimResponse(ForwardCompatible):
    """The claim is granted: the job's secrets, returned once, to be kept in memory, and the token for the later calls."""

    secrets: dict[str, str]
    directive: str
    token: str


class TokenResponse(ForwardCompatible):
    """A new token for the process that owns the attempt."""

    token: str


class AttemptCredentials(ForwardCompatible):
    """What an attempt uses to reach the object stores.

    none     a folder on its own machine
    ambient  the credentials of its machine or service account
    google   an access token that reaches only what the job needs, until it expires
    """

    kind: Literal["none", "ambient", "google"]
    token: str | None = Field(default=None, repr=False)
    expires_at: datetime | None = None
