"""The result of an attempt: `result.json`, written once, just before the process ends."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from schema.base import ForwardCompatible, Id, Timestamp
from schema.job import Artifact, EvalMetrics, Failure, Gate


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
