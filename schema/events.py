"""What a job reports while it runs. Events are append-only, numbered within their attempt, and may be lost."""

from typing import Annotated, Literal

from pydantic import Field

from schema.base import ForwardCompatible, Timestamp
from schema.checkpoint import CheckpointReason
from schema.job import Artifact, EvalMetrics, Failure, Gate, Progress, Sample, Status
from schema.types import Phase

MAX_SEQ = 2**53  # the largest integer that every JSON parser keeps exact


class StatusChanged(ForwardCompatible):
    """The job's status changed. Only the service writes it."""

    type: Literal["status"] = "status"
    status: Status
    attempt: int
    reason: str = ""
    failure: Failure | None = None


class PhaseChanged(ForwardCompatible):
    """The attempt entered a phase."""

    type: Literal["phase"] = "phase"
    phase: Phase


class MetricsLogged(ForwardCompatible):
    """Metrics at one step. Null is a value that could not be computed; `notes` gives the reason, by name."""

    type: Literal["metrics"] = "metrics"
    step: int = Field(ge=0)
    epoch: float | None = None
    values: dict[str, float | None]  # loss (nats/token), learning_rate, grad_norm, tokens_per_second, rss_bytes, gpu_memory_bytes, ...
    notes: dict[str, str] = Field(default={})
    progress: Progress | None = None


class EvaluationCompleted(ForwardCompatible):
    """A model was evaluated on the held-out rows."""

    type: Literal["evaluation"] = "evaluation"
    when: Literal["before", "during", "after"]
    step: int = Field(ge=0)
    metrics: EvalMetrics


class SamplesGenerated(ForwardCompatible):
    """A model's answers to a fixed sample of held-out prompts."""

    type: Literal["samples"] = "samples"
    when: Literal["before", "during", "after"]
    step: int = Field(ge=0)
    samples: tuple[Sample, ...]


class GateEvaluated(ForwardCompatible):
    """The promotion gate checked the trained model."""

    type: Literal["gate"] = "gate"
    gate: Gate


class DecisionMade(ForwardCompatible):
    """A setting that the attempt chose, and why."""

    type: Literal["decision"] = "decision"
    setting: str
    value: str
    reason: str


class WarningRaised(ForwardCompatible):
    """A warning for the user; the job goes on."""

    type: Literal["warning"] = "warning"
    code: str
    message: str


class TrackerStarted(ForwardCompatible):
    """A tracker mirrors this job: on a page, or in a folder of the model store."""

    type: Literal["tracker"] = "tracker"
    tracker: str
    url: str | None = None

    @property
    def page(self) -> str | None:
        """The address of the run's page on the web, if it has one."""
        return self.url if self.url and self.url.startswith(("http://", "https://")) else None


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
    save_s: float  # how long training waited
    upload_s: float  # how long the upload took afterwards, while training went on


class CheckpointSkipped(ForwardCompatible):
    """A checkpoint is damaged or incomplete; an older one is used."""

    type: Literal["checkpoint_skipped"] = "checkpoint_skipped"
    attempt: int  # the attempt that wrote it
    step: int
    reason: str


class CheckpointRestored(ForwardCompatible):
    """The attempt continues from a checkpoint."""

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
    """An event with its time by the attempt's clock."""

    at: Timestamp
    event: Event


class EventBatch(ForwardCompatible):
    """Consecutive events of one attempt: the first is number `first_seq`. An empty batch is a heartbeat."""

    first_seq: int = Field(ge=0, le=MAX_SEQ)
    events: list[ReportedEvent] = Field(default=[], max_length=1000)
    phase: Phase | None = None  # the current phase
    progress: Progress | None = None


Directive = Literal["continue", "pause", "cancel"]


class EventBatchResponse(ForwardCompatible):
    """The answer to a batch: what the attempt must do, and the next `seq` that the service has not seen."""

    directive: Directive
    next_seq: int
    token: str | None = None  # to use from now on: the one in use expires soon
