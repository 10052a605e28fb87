"""A job, its attempts and what they left behind: the record as the JobStore keeps it."""

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import Field

from schema.base import ForwardCompatible, Id, Label
from schema.migrations import VersionedRecord
from schema.training import TrainingConfig


class Status(StrEnum):
    """Where a job stands, in public words. Never a phase, never a reason."""

    QUEUED = "queued"
    PREPARING = "preparing"
    TRAINING = "training"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Nothing happens to the job any more, unless someone retries it."""
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)

    @property
    def is_active(self) -> bool:
        """An attempt holds, or may hold, compute."""
        return self in (Status.PREPARING, Status.TRAINING, Status.PAUSING, Status.CANCELLING)


Phase = Literal["downloading", "tokenizing", "training", "evaluating", "merging", "converting", "verifying", "uploading"]

FailureCode = Literal[
    "invalid_data",
    "invalid_config",
    "out_of_memory",
    "preempted",
    "timeout",
    "lost",
    "export_failed",
    "upload_failed",
    "auth",
    "launch_failed",
    "internal",
]


class Failure(ForwardCompatible):
    """Why an attempt or a job failed, for a person."""

    code: FailureCode
    message: str  # one line: what happened
    hint: str = ""  # what would help
    attempt: int | None = None


class Progress(ForwardCompatible):
    """How far the training is. Steps are optimizer steps."""

    step: int
    total_steps: int
    epoch: float
    total_epochs: float
    eta_s: float | None = None


class EvalMetrics(ForwardCompatible):
    """What was measured on the held-out rows. A number that could not be had is null, and `notes` says why, by name."""

    eval_loss: float | None = None  # what the trainer makes smaller: of sft nats per labelled token, of grpo minus the mean reward
    perplexity: float | None = None  # exp(eval_loss)
    accuracy: float | None = None  # share of labelled tokens predicted right, 0..1
    eval_runtime: float | None = None  # seconds
    eval_rows: int | None = None
    eval_tokens: int | None = None  # labelled tokens
    values: dict[str, float | None] = Field(default={})  # of the trainer type or the task: rewards/accuracies, exact_match, rouge_l, ...
    notes: dict[str, str] = Field(default={})


class ArtifactFile(ForwardCompatible):
    """One file of an artifact. `path` is relative to the artifact's uri, and empty when the uri is the file itself."""

    path: str
    size_bytes: int
    sha256: str


class Sample(ForwardCompatible):
    """What a model answered to a held-out prompt."""

    prompt: str
    reference: str | None = None  # the row's own answer
    text: str


class GateCheck(ForwardCompatible):
    """One threshold of the promotion gate, and what it found."""

    metric: str
    value: float | None = None
    at_most: float | None = None  # the bound itself, where it was relative to the base
    at_least: float | None = None
    base: float | None = None  # what the base reached
    passed: bool
    reason: str = ""  # why it did not


class Gate(ForwardCompatible):
    """The promotion gate: a model that does not pass is reported and not published."""

    passed: bool
    checks: tuple[GateCheck, ...]


class HubPush(ForwardCompatible):
    """Where an artifact went on the Hugging Face Hub."""

    repo_id: str
    revision: str  # the commit that has it
    url: str


class Fidelity(ForwardCompatible):
    """How an exported file speaks, compared with the model that was trained, over held-out prompts."""

    compared_tokens: int
    argmax_agreement: float  # share of positions where both prefer the same next token, 0..1
    mean_kl_to_merged: float  # nats; how far the file is from the trained model
    mean_kl_to_base: float | None = None  # nats; how far the file is from the model before training
    sample_prompt: str = ""
    sample_text: str = ""  # what the file generated for it
    closer_to_base: bool = False  # closer to the base than to the trained model
    labeled_tokens: int = 0  # of the compared ones, those that a held-out row wants to be said
    perplexity: float | None = None  # of the file, on these
    perplexity_merged: float | None = None  # of the trained model, on the same tokens
    perplexity_base: float | None = None
    imatrix: bool = False  # quantized with an importance matrix of the training rows
    advice: str = ""  # what would help, where something is amiss


ArtifactKind = Literal["adapter", "merged", "gguf", "lora_gguf", "onnx"]


class Artifact(ForwardCompatible):
    """A named file or folder that the job produced, at a stable uri."""

    name: str  # unique within the job: "adapter", "merged", "gguf-q8_0"
    kind: ArtifactKind
    uri: str
    key: str  # the same place, below the model bucket; ends in "/" for a folder
    size_bytes: int
    files: list[ArtifactFile]
    fidelity: Fidelity | None = None
    hub: HubPush | None = None  # with destination hfhub

    @property
    def sha256(self) -> str | None:
        """The digest of a single file; None for a folder."""
        return self.files[0].sha256 if len(self.files) == 1 and not self.key.endswith("/") else None


AttemptOutcome = Literal["completed", "failed", "cancelled", "paused", "yielded", "preempted", "lost", "launch_failed"]


class Attempt(ForwardCompatible):
    """One launch of a job on some compute."""

    number: int  # from 1
    launcher: str
    created_at: datetime
    launch_started_at: datetime | None = None  # the latest try to hand it to the compute; whoever wrote this is the one to send it
    pending_reason: str | None = None  # why it is not launched yet
    handle: str | None = None  # the compute's own name for it; None until the launch answered
    launched_at: datetime | None = None
    claimed_by: str | None = None  # the process that owns the attempt
    claimed_at: datetime | None = None
    resumed_step: int | None = None  # the step of the checkpoint it went on from
    last_checkpoint_step: int | None = None  # the newest step whose checkpoint it made durable
    suspected_at: datetime | None = None  # when it was first found silent although its compute is there
    ended_at: datetime | None = None
    outcome: AttemptOutcome | None = None
    failure: Failure | None = None


class CheckpointRef(ForwardCompatible):
    """The newest checkpoint of a job, as far as the service was told."""

    step: int
    attempt: int
    at: datetime


class ExportSource(ForwardCompatible):
    """The checkpoint that a job exports instead of training: whose it is, and where it lies in the model bucket."""

    job_id: Id
    attempt: int
    step: int
    key: str  # of the checkpoint's folder; ends in "/"


class Job(VersionedRecord):
    """One request to train one model, and all that is known of it. Holds no secret."""

    job_id: Id
    tenant_id: Id
    project_id: Id | None = None
    job_name: Label
    processed_dataset_id: Id
    training_config: TrainingConfig  # with every secret taken out
    secret_names: tuple[str, ...] = ()  # which secrets the secret store holds for the job
    hardware: str | None = None  # a profile of the launcher
    export_of: ExportSource | None = None  # nothing is trained: this checkpoint is exported
    cloned_from: Id | None = None  # the job whose request this one repeats, perhaps with changes
    status: Status
    revision: int = 0  # goes up by one at every change; the store compares it
    attempts: tuple[Attempt, ...] = ()
    resume_from_attempt: int = 1  # checkpoints of earlier attempts do not count: a retry from the start sets this
    retry_budget_from_attempt: int = 1  # attempts without progress are counted from this one: a person's resume or retry sets this
    retried_at: datetime | None = None  # the latest retry
    checkpoint: CheckpointRef | None = None
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None = None  # when the first attempt was claimed
    finished_at: datetime | None = None
    status_changed_at: datetime  # a cancel that is not obeyed is judged by this
    failure: Failure | None = None
    metrics: EvalMetrics | None = None  # of the trained model
    base_metrics: EvalMetrics | None = None  # of the model before training, on the same rows
    gate: Gate | None = None  # None: nothing was asked
    published_step: int | None = None  # the optimizer step whose weights were exported, or would have been if they had passed the gate
    wandb_url: str | None = None
    tracker_urls: dict[str, str] = Field(default={})  # where each tracker shows the curves, by name
    artifacts: tuple[Artifact, ...] = ()
    deletion_started_at: datetime | None = None  # its files are going, or have partly gone
    manifest_written: bool = False  # the published files are listed in the bucket as well

    @property
    def attempt(self) -> Attempt | None:
        """The current attempt: the last one."""
        return self.attempts[-1] if self.attempts else None
