"""The responses of the public API."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel

from schema.checkpoint import CheckpointReason
from schema.dataset import DatasetShare
from schema.job import (
    Artifact,
    Attempt,
    AttemptOutcome,
    CheckpointRef,
    EarlierModel,
    EvalMetrics,
    ExportSource,
    Failure,
    Gate,
    PauseReason,
    Progress,
    Refusal,
    Status,
)
from schema.placement import Placement
from schema.training.resolved import ResolvedValue
from schema.types import Phase
from service.core.event_store import StoredEvent
from service.core.jobs.checkpoints import StoredCheckpoint
from service.core.jobs.queries import JobView


class TrainResponse(BaseModel):
    """The job that was created."""

    job_id: str


class AttemptView(BaseModel):
    """One launch of the job."""

    number: int
    launcher: str
    hardware: str  # the launcher's profile
    environment: str
    refusals: list[Refusal]  # placements that could not take it
    created_at: datetime
    pending_reason: str | None  # why it is not launched yet
    claimed_at: datetime | None
    ended_at: datetime | None
    outcome: AttemptOutcome | None
    resumed_step: int | None  # the checkpoint it resumed from
    last_checkpoint_step: int | None  # its newest durable checkpoint
    failure: Failure | None


class CostView(BaseModel):
    """What a job's compute has used until now, and the caps that pause it."""

    gpu_seconds: float  # of all attempts: seconds × GPUs
    usd: float | None  # of the attempts whose price is known; null: of none
    usd_per_hour: float | None  # of the current attempt, or of the hardware that the job prefers
    max_gpu_seconds: float | None
    max_cost_usd: float | None
    source: str  # of the price
    as_of: str  # the day on which the price was written down


class JobDetail(BaseModel):
    """Everything about a job."""

    job_id: str
    job_name: str
    status: Status
    modality: str
    wandb_url: str | None
    adapter_path: str | None
    base_model_id: str
    gguf_path: str | None
    metrics: EvalMetrics | None
    error: str | None
    base_metrics: EvalMetrics | None
    gate_passed: bool | None  # the promotion gate; null: there is none, or it was not evaluated yet
    gate: Gate | None
    published_step: int | None  # the optimizer step whose weights were exported
    failure: Failure | None
    phase: Phase | None
    progress: Progress | None
    hardware: str  # the profile of the current attempt, or the one that the job prefers
    launcher: str  # likewise
    placements: list[Placement]  # where its attempts may run, in order of preference
    pending_reason: str | None  # why it does not run yet, where that is known
    pause_reason: PauseReason | None  # of a job that is paused or about to be
    cost: CostView
    attempts: list[AttemptView]
    checkpoint: CheckpointRef | None  # the newest one
    export_of: ExportSource | None  # the checkpoint that this job exports instead of training
    earlier_model: EarlierModel | None  # the model of an earlier job that this one started from; base_model_id is its original base
    cloned_from: str | None
    artifacts: list[Artifact]
    tracker_urls: dict[str, str]  # where each tracker shows the metrics
    project_id: str | None
    metadata: dict[str, str]
    created_by: str | None  # null: the deployment's earlier version created the job
    processed_dataset_id: str  # of several datasets the first
    datasets: list[DatasetShare]  # all of them, with their weights
    trainer_type: str
    method: str
    # Any: the configuration as it was sent, with every default filled in and every secret removed.
    training_config: dict[str, Any]
    resolved: list[ResolvedValue]  # what was chosen where the request said "auto", and why
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    duration_s: float | None  # from started_at to finished_at, or until now; null: it has not started
    last_seen_at: datetime | None
    train_loss: float | None  # of the latest optimizer step, on the scale of the trainer's own loss


class EventRow(BaseModel):
    """One event of the job. `id` is the cursor after which a page or a stream continues."""

    id: int
    attempt: int
    seq: int
    at: datetime
    event: dict[str, Any]


class EventList(BaseModel):
    """A page of events, oldest first."""

    events: list[EventRow]
    next_after: int


class LogView(BaseModel):
    """A part of an attempt's output."""

    attempt: int
    text: str
    next_offset: int


class CheckpointRow(BaseModel):
    """A checkpoint that a job can resume from, or that can be exported."""

    attempt: int
    step: int
    total_steps: int
    epoch: float
    reason: CheckpointReason
    eval_loss: float | None
    is_best: bool  # has the lowest eval_loss of the stored checkpoints
    size_bytes: int
    created_at: datetime
    uri: str


class CheckpointList(BaseModel):
    """A job's checkpoints. The first is the one that the next attempt tries first."""

    checkpoints: list[CheckpointRow]


class FileLink(BaseModel):
    """A file of an artifact, and a link to it that needs no other credential and expires."""

    path: str  # relative to the artifact's folder, or the file's name
    size_bytes: int
    sha256: str
    url: str


class DownloadResponse(BaseModel):
    """A link to the artifact's file, or to its weights if it is a folder; `files` lists all files."""

    download_url: str
    artifact: str
    is_folder: bool
    expires_in_s: int
    files: list[FileLink]


class DeleteJobResponse(BaseModel):
    """What was deleted."""

    job_id: str
    deleted: bool
    message: str
    deleted_resources: list[str]


class HealthResponse(BaseModel):
    """Whether the service is live, and whether each part that it needs answers."""

    status: str
    live: bool
    ready: bool
    checks: dict[str, str]
    launchers: dict[str, str]  # of each one "ok", or why it can launch nothing now; the service takes jobs all the same
    version: str


def job_detail(view: JobView) -> JobDetail:
    """A job as the API shows it."""
    job, heartbeat = view.job, view.heartbeat
    config, summary = job.training_config, job.training_config.summarize()
    placement = job.shown_placement
    weights = [artifact for artifact in job.artifacts if artifact.kind in ("adapter", "merged")]
    ggufs = [artifact for artifact in job.artifacts if artifact.kind == "gguf"]
    return JobDetail(
        job_id=job.job_id,
        job_name=job.job_name,
        status=job.status,
        modality=summary.modality,
        wandb_url=job.wandb_url,
        adapter_path=weights[0].uri if weights else None,
        base_model_id=summary.base_model_id,
        gguf_path=ggufs[0].uri if ggufs else None,
        metrics=job.metrics,
        error=job.failure.message if job.failure else None,
        base_metrics=job.base_metrics,
        gate_passed=job.gate.passed if job.gate else None,
        gate=job.gate,
        published_step=job.published_step,
        failure=job.failure,
        phase=heartbeat.phase if heartbeat and job.status.is_active else None,
        progress=heartbeat.progress if heartbeat else None,
        hardware=placement.profile,
        launcher=placement.launcher,
        placements=list(job.placements),
        pending_reason=view.pending_reason,
        pause_reason=job.pause_reason if job.status in (Status.PAUSING, Status.PAUSED) else None,
        cost=_cost_view(view),
        attempts=[_attempt_view(attempt) for attempt in job.attempts],
        checkpoint=job.checkpoint,
        export_of=job.export_of,
        earlier_model=job.earlier_model,
        cloned_from=job.cloned_from,
        artifacts=list(job.artifacts),
        tracker_urls=job.tracker_urls,
        project_id=job.project_id,
        metadata=job.metadata,
        created_by=job.created_by,
        processed_dataset_id=job.processed_dataset_id,
        datasets=list(job.datasets) or [DatasetShare(processed_dataset_id=job.processed_dataset_id, weight=1.0)],
        trainer_type=config.trainer_type,
        method=summary.method,
        training_config=config.model_dump(mode="json"),
        resolved=list(job.resolved),
        created_at=job.created_at,
        updated_at=job.updated_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        duration_s=_duration_s(view),
        last_seen_at=heartbeat.received_at if heartbeat else None,
        train_loss=heartbeat.progress.loss if heartbeat and heartbeat.progress else None,
    )


def _duration_s(view: JobView) -> float | None:
    """Rounded to a tenth of a second, and never negative, although two clocks may differ."""
    if view.job.started_at is None:
        return None
    return round(max(0.0, ((view.job.finished_at or view.now) - view.job.started_at).total_seconds()), 1)


def _cost_view(view: JobView) -> CostView:
    """Rounded to what people read: a tenth of a second, a hundredth of a cent."""
    usd = view.spending.usd
    return CostView(
        gpu_seconds=round(view.spending.gpu_seconds, 1),
        usd=None if usd is None else round(usd, 4),
        usd_per_hour=view.rate.usd_per_hour,
        max_gpu_seconds=view.job.max_gpu_seconds,
        max_cost_usd=view.job.max_cost_usd,
        source=view.rate.source,
        as_of=view.rate.as_of,
    )


def checkpoint_list(stored: list[StoredCheckpoint]) -> CheckpointList:
    """A job's checkpoints as the API shows them."""
    losses = [each.checkpoint.eval_loss for each in stored if each.checkpoint.eval_loss is not None]
    best_loss = min(losses, default=None)
    fields = ("attempt", "step", "total_steps", "epoch", "reason", "eval_loss", "size_bytes", "created_at")
    rows = [
        CheckpointRow(
            **{name: getattr(each.checkpoint, name) for name in fields},
            is_best=best_loss is not None and each.checkpoint.eval_loss == best_loss,
            uri=each.uri,
        )
        for each in stored
    ]
    return CheckpointList(checkpoints=rows)


def event_row(stored: StoredEvent) -> dict[str, object]:
    """An EventRow, as plain values."""
    return {
        "id": stored.cursor,
        "attempt": stored.attempt,
        "seq": stored.seq,
        "at": stored.at.isoformat(),
        "event": stored.event.model_dump(mode="json"),
    }


def _attempt_view(attempt: Attempt) -> AttemptView:
    placement = attempt.placement
    shown = attempt.model_dump(include=set(AttemptView.model_fields))
    return AttemptView(launcher=placement.launcher, hardware=placement.profile, environment=placement.environment, **shown)
