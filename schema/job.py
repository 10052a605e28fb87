"""A job with its attempts and results, as job stores keep it."""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import ClassVar, Literal

from pydantic import Field

from schema.base import ForwardCompatible, Id, Label
from schema.dataset import DatasetShare
from schema.job_migrations import place_job
from schema.json_limits import JsonObject
from schema.migrations import Migration, VersionedRecord
from schema.placement import Placement
from schema.training import JobConfig
from schema.training.resolved import ResolvedValue
from schema.types import ArtifactKind


class Status(StrEnum):
    """A job's public status. Never a phase, never a reason."""

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
        """Nothing more happens to the job unless a caller retries it."""
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)

    @property
    def is_active(self) -> bool:
        """An attempt holds or may hold compute."""
        return self in (Status.PREPARING, Status.TRAINING, Status.PAUSING, Status.CANCELLING)


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
    """Why an attempt or a job failed, for people."""

    code: FailureCode
    message: str  # one line: what happened
    hint: str = ""  # how to fix it
    attempt: int | None = None


class Progress(ForwardCompatible):
    """Progress of the training. Steps are optimizer steps."""

    step: int
    total_steps: int
    epoch: float
    total_epochs: float
    eta_s: float | None = None  # until the last step
    remaining_s: float | None = None  # until the job ends, over all phases, as estimated by the attempt; None: not known
    loss: float | None = None  # of this step, on the scale of the trainer's own loss


class EvalMetrics(ForwardCompatible):
    """Metrics on the held-out rows. A value that could not be computed is null; `notes` gives the reason, by name."""

    eval_loss: float | None = None  # the trainer's own loss, on whose scale lower is better
    perplexity: float | None = None  # exp(eval_loss)
    content_perplexity: float | None = None  # the same without the labels that end a turn: end-of-turn tokens, EOS
    accuracy: float | None = None  # share of labeled tokens predicted correctly, 0..1
    eval_runtime: float | None = None  # seconds
    eval_rows: int | None = None
    eval_tokens: int | None = None  # labeled tokens, in a family that has tokens
    values: dict[str, float | None] = Field(default={})  # by trainer type or task: rewards/accuracies, exact_match, rouge_l, ...
    notes: dict[str, str] = Field(default={})


class ArtifactFile(ForwardCompatible):
    """One file of an artifact. `path` is relative to the artifact's uri, as in URLs: empty for the file that the uri names, and the name of
    a file beside it."""

    path: str
    size_bytes: int
    sha256: str


class Sample(ForwardCompatible):
    """A model's answer to a held-out prompt."""

    prompt: str
    reference: str | None = None  # the answer in the row
    text: str


class GateCheck(ForwardCompatible):
    """The result of one threshold of the promotion gate."""

    metric: str
    value: float | None = None
    at_most: float | None = None  # the absolute bound, also where the threshold was relative to the base
    at_least: float | None = None
    base: float | None = None  # the base model's value
    passed: bool
    reason: str = ""  # why it did not pass


class Gate(ForwardCompatible):
    """The result of the promotion gate. A model that does not pass is reported and not published."""

    passed: bool
    checks: tuple[GateCheck, ...]


class HubPush(ForwardCompatible):
    """An artifact's place on the Hugging Face Hub."""

    repo_id: str
    revision: str  # the commit
    url: str


class Artifact(ForwardCompatible):
    """A named file or folder that the job produced, at a stable URI."""

    name: str  # unique within the job: "adapter", "merged", "gguf-q8_0"
    kind: ArtifactKind
    uri: str
    key: str  # the same place as a key of the model bucket; ends in "/" for a folder
    size_bytes: int
    files: list[ArtifactFile]
    # What the family measured of the file. Names that begin with "sample_" show held-out rows, and are left out of run.json.
    fidelity: JsonObject | None = None
    hub: HubPush | None = None  # with destination hfhub

    @property
    def sha256(self) -> str | None:
        """The digest of the file that `uri` names; None for a folder."""
        return next((file.sha256 for file in self.files if not file.path), None)

    def file_key(self, file: ArtifactFile) -> str:
        """The key of one of the artifact's files in the model bucket: in the folder, or beside the artifact's own file."""
        return f"{self.key.rpartition('/')[0]}/{file.path}" if file.path else self.key


AttemptOutcome = Literal["completed", "failed", "cancelled", "paused", "yielded", "preempted", "lost", "launch_failed"]


class Refusal(ForwardCompatible):
    """A placement that could not take an attempt."""

    placement: Placement
    reason: str  # one line, with what would help
    permanent: bool  # a later try would be refused as well
    at: datetime


# Why a job is paused: a caller asked for it, the job reached a cap of its own, or its tenant a quota of the month.
PauseReason = Literal["requested", "cost_cap", "gpu_seconds_cap", "cost_quota", "gpu_hours_quota"]


class ComputeRate(ForwardCompatible):
    """What an attempt's compute counts as and costs, as known when it was launched: a later price does not change it."""

    gpus: int = 0
    usd_per_hour: float | None = None  # None: the price is not known
    billing_step_s: float = 0.0  # billed time is rounded up to a multiple of this
    min_billed_s: float = 0.0  # and is at least this long
    source: str = ""  # of the price
    as_of: str = ""  # ISO date on which the price was written down


class Attempt(ForwardCompatible):
    """One launch of a job on some compute."""

    number: int  # from 1
    placement: Placement  # where it runs; only this launcher knows its handle
    rate: ComputeRate | None = None  # None: launched by a version that counted no compute
    created_at: datetime
    launch_started_at: datetime | None = None  # when the latest launch began, by the process that wrote this value; None: not yet
    pending_reason: str | None = None  # why it does not run yet
    refusals: tuple[Refusal, ...] = ()  # the latest of each placement that was tried before
    handle: str | None = None  # the launcher's name for it; None until the launch is answered
    launched_at: datetime | None = None
    waited_for_machine: bool = False  # it was launched before any machine had taken it: its compute counts from the claim
    claimed_by: str | None = None  # the process that owns the attempt
    claimed_at: datetime | None = None
    resumed_step: int | None = None  # the step of the checkpoint that it continued from
    last_checkpoint_step: int | None = None  # the step of the newest checkpoint that it saved
    checkpoint_s: float | None = None  # how long its newest reported checkpoint took, including the upload
    suspected_at: datetime | None = None  # when it was first found silent although its compute is running
    ended_at: datetime | None = None
    outcome: AttemptOutcome | None = None
    failure: Failure | None = None


class CheckpointRef(ForwardCompatible):
    """The newest checkpoint of a job that was reported to the service."""

    step: int
    attempt: int
    at: datetime


class CheckpointDeletion(ForwardCompatible):
    """Checkpoints of a job were deleted although the job was not."""

    at: datetime
    kept_step: int | None = None  # the checkpoint that was kept; None: none


class ExportSource(ForwardCompatible):
    """The checkpoint that a job exports instead of training: its job and its place in the model bucket."""

    job_id: Id
    attempt: int
    step: int
    key: str  # of the checkpoint's folder; ends in "/"


class EarlierModel(ForwardCompatible):
    """The published model of an earlier job that a job starts from, of which the attempt needs nothing else."""

    job_id: Id
    trainer_type: str
    modality: str
    kind: ArtifactKind
    key: str  # of the artifact's folder in the model bucket; ends in "/"
    digest: str  # "sha256:…" over the digests of its files
    # A published adapter contains the earlier one as well, so that it applies to the original base.
    in_adapter: bool

    @property
    def needs_base(self) -> bool:
        """It is an adapter, which is merged into its base; another artifact is a whole model."""
        return self.kind == "adapter"


class Job(VersionedRecord):
    """One request to train one model, and everything known about it. Holds no secret."""

    migrations: ClassVar[Mapping[int, Migration]] = {1: place_job}

    schema_version: int = 2
    job_id: Id
    tenant_id: Id
    created_by: str | None = None  # the subject that created it; None: a version that did not record it
    project_id: Id | None = None
    job_name: Label
    metadata: dict[str, str] = Field(default={})  # the caller's own, for finding jobs
    processed_dataset_id: Id  # of several datasets the first
    datasets: tuple[DatasetShare, ...] = ()  # all of them, where the job mixes several
    training_config: JobConfig  # without secrets
    secret_names: tuple[str, ...] = ()  # the secrets that the secret store holds for the job
    placements: tuple[Placement, ...]  # where its attempts may run, in order of preference
    export_of: ExportSource | None = None  # if set, nothing is trained and this checkpoint is exported
    earlier_model: EarlierModel | None = None  # if set, the training starts from it, and the config's base is its original base
    cloned_from: Id | None = None  # the job whose request this one repeats, possibly with changes
    resolved: tuple[ResolvedValue, ...] = ()  # what was chosen where the request said "auto"
    max_gpu_seconds: float | None = None  # the job is paused before its attempts have used more
    max_cost_usd: float | None = None  # likewise
    pause_reason: PauseReason | None = None  # of the latest pause
    status: Status
    revision: int = 0  # increases by one with every change; the store compares it
    attempts: tuple[Attempt, ...] = ()
    resume_from_attempt: int = 1  # checkpoints of earlier attempts are not used; a retry from the start sets this
    retry_budget_from_attempt: int = 1  # attempts without progress are counted from this one; a resume or retry by a caller sets this
    retried_at: datetime | None = None  # the latest retry
    checkpoint: CheckpointRef | None = None
    checkpoints_deleted: CheckpointDeletion | None = None  # the latest time that a caller, or the deployment's retention, deleted some
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None = None  # when the first attempt was claimed
    finished_at: datetime | None = None
    status_changed_at: datetime  # the grace period of a cancel starts here
    failure: Failure | None = None
    metrics: EvalMetrics | None = None  # of the trained model
    base_metrics: EvalMetrics | None = None  # of the model before training, on the same rows
    gate: Gate | None = None  # None: no gate was requested
    published_step: int | None = None  # the optimizer step whose weights were exported, or would have been had they passed the gate
    wandb_url: str | None = None
    tracker_urls: dict[str, str] = Field(default={})  # the run's address in each tracker, by name
    artifacts: tuple[Artifact, ...] = ()
    deletion_started_at: datetime | None = None  # its files are being deleted
    traceparent: str | None = None  # the W3C trace context of the request that created it, which its attempts continue
    manifest_written: bool = False  # the bucket has the manifest of the published files

    @property
    def dataset_ids(self) -> tuple[str, ...]:
        """The datasets that the job trains on."""
        return tuple(share.processed_dataset_id for share in self.datasets) or (self.processed_dataset_id,)

    @property
    def attempt(self) -> Attempt | None:
        """The current attempt: the last one."""
        return self.attempts[-1] if self.attempts else None

    @property
    def shown_placement(self) -> Placement:
        """Where the current attempt runs, or where the job would run by preference."""
        return self.attempt.placement if self.attempt and self.status.is_active else self.placements[0]

    @property
    def launchers(self) -> tuple[str, ...]:
        """The launchers that have the next step: of a queued job those that may take it, of an active one the one that runs it."""
        if self.status is Status.QUEUED:
            return tuple(dict.fromkeys(placement.launcher for placement in self.placements))
        return (self.attempt.placement.launcher,) if self.attempt and self.status.is_active else ()
