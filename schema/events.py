"""What a job reports while it runs. Events are append-only, numbered within their attempt, and may be lost."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from schema.base import ForwardCompatible
from schema.checkpoint import CheckpointReason
from schema.job import Artifact, EvalMetrics, Failure, Gate, Phase, Progress, Sample, Status


class StatusChanged(ForwardCompatible):
    """The job's status moved. Written by the service only."""

    type: Literal["status"] = "status"
    status: Status
    attempt: int
    reason: str = ""
    failure: Failure | None = None


class PhaseChanged(ForwardCompatible):
    """The attempt entered a phase of its work."""

    type: Literal["phase"] = "phase"
    phase: Phase


class MetricsLogged(ForwardCompatible):
    """One point of the curves. Null is a number that could not be had; `notes` says why, by name."""

    type: Literal["metrics"] = "metrics"
    step: int = Field(ge=0)
    epoch: float | None = None
    values: dict[str, float | None]  # loss (nats/token), learning_rate, grad_norm, tokens_per_second, rss_bytes, gpu_memory_bytes, ...
    notes: dict[str, str] = Field(default={})
    progress: Progress | None = None


class EvaluationCompleted(ForwardCompatible):
    """A model was measured on the held-out rows."""

    type: Literal["evaluation"] = "evaluation"
    when: Literal["before", "during", "after"]
    step: int = Field(ge=0)
    metrics: EvalMetrics


class SamplesGenerated(ForwardCompatible):
    """What a model answers to a fixed sample of held-out prompts."""

    type: Literal["samples"] = "samples"
    when: Literal["before", "during", "after"]
    step: int = Field(ge=0)
    samples: tuple[Sample, ...]


class GateEvaluated(ForwardCompatible):
    """The promotion gate has looked at the trained model."""

    type: Literal["gate"] = "gate"
    gate: Gate


class DecisionMade(ForwardCompatible):
    """Something the attempt chose by itself, and why."""

    type: Literal["decision"] = "decision"
    setting: str
    value: str
    reason: str


class WarningRaised(ForwardCompatible):
    """Something the user should know that does not stop the job."""

    type: Literal["warning"] = "warning"
    code: str
    message: str


class TrackerStarted(ForwardCompatible):
    """A tracker mirrors this job."""

    type: Literal["tracker"] = "tracker"
    tracker: str
    url: str | None = None


class ArtifactUploaded(ForwardCompatible):
    """An artifact is uploaded and verified; it becomes visible when the job completes."""

    type: Literal["artifact"] = "artifact"
    artifact: Artifact


class CheckpointSaved(ForwardCompatible):
    """A checkpoint is durable: every file uploaded and verified, its manifest written."""

    type: Literal["checkpoint_saved"] = "checkpoint_saved"
    step: int = Field(ge=0)
    epoch: float
    reason: CheckpointReason
    size_bytes: int
    save_s: float  # how long the training stood still for it
    upload_s: float  # how long it took from then until it was durable, beside the training


class CheckpointSkipped(ForwardCompatible):
    """A checkpoint is not what its manifest says, or incomplete; an older one is used."""

    type: Literal["checkpoint_skipped"] = "checkpoint_skipped"
    attempt: int  # which attempt had written it
    step: int
    reason: str


class CheckpointRestored(ForwardCompatible):
    """The attempt goes on from a checkpoint."""

    type: Literal["checkpoint_restored"] = "checkpoint_restored"
    step: int
    from_attempt: int


Event = Annotated[
    StatusChanged
    | PhaseChanged
    | MetricsLogged
    | EvaluationCompleted
    | SamplesGenerated
    | GateEvaluated
    | DecisionMade
    | WarningRaised
    | TrackerStarted
    | ArtifactUploaded
    | CheckpointSaved
    | CheckpointSkipped
    | CheckpointRestored,
    Field(discriminator="type"),
]


class ReportedEvent(ForwardCompatible):
    """An event with the attempt's own clock."""

    at: datetime
    event: Event


class EventBatch(ForwardCompatible):
    """Consecutive events of one attempt: the first is number `first_seq`. Empty is a heartbeat."""

    first_seq: int = Field(ge=0)
    events: list[ReportedEvent] = Field(default=[], max_length=1000)
    phase: Phase | None = None  # where the attempt is now
    progress: Progress | None = None


Directive = Literal["continue", "pause", "cancel"]


class EventBatchResponse(ForwardCompatible):
    """What the service says to a batch: what to do, and the next `seq` it has not seen."""

    directive: Directive
    next_seq: int
