"""The result of an attempt: `result.json`, written once, just before the process ends."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from schema.base import ForwardCompatible, Id, Timestamp
from schema.ingestion import IngestOutcome
from schema.job import Artifact, EvalMetrics, Failure, Gate


class Ingested(ForwardCompatible):
    """The rows that an ingestion's attempt kept, as files below its own prefix of the dataset bucket."""

    outcome: IngestOutcome
    source: str  # what was read, without credentials; of a repository with the commit


class Result(ForwardCompatible):
    """How an attempt ended. `reconcile` reads it when an attempt has become silent."""

    schema_version: int = 1
    job_id: Id
    attempt: int
    claimant: str = ""
    outcome: Literal["completed", "failed", "cancelled", "paused", "yielded"]
    yield_reason: Literal["time_slice", "preempted"] | None = None
    last_checkpoint_step: int | None = None  # the step of the newest checkpoint that this attempt saved
    resumed_step: int | None = None  # the step of the checkpoint that it continued from
    failure: Failure | None = None
    metrics: EvalMetrics | None = None
    base_metrics: EvalMetrics | None = None
    gate: Gate | None = None
    published_step: int | None = None
    wandb_url: str | None = None
    tracker_urls: dict[str, str] = Field(default={})
    artifacts: tuple[Artifact, ...] = ()
    ingested: Ingested | None = None  # of a completed ingestion
    train_rows: int | None = None
    train_tokens: int | None = None
    train_runtime_s: float | None = None
    started_at: Timestamp
    finished_at: Timestamp


class PublishManifest(ForwardCompatible):
    """`manifest.json`: the published files of a job, for readers of the bucket."""

    job_id: Id
    attempt: int
    artifacts: tuple[Artifact, ...]
    created_at: datetime
