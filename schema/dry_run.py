"""What `POST /train?dry_run=true` answers: what a job would do, need, take and cost, before anything starts.

Sizes are bytes, times seconds, money US dollars. Every time and price is a range, because other work on a machine and the network decide
a part of it; the upper end is meant to be kept nine times in ten.
"""

from typing import Any, Literal

from pydantic import Field

from schema.base import ForwardCompatible
from schema.training.resolved import ResolvedValue

Fit = Literal["fits", "fits_with_gradient_checkpointing", "fits_with_smaller_batch", "does_not_fit", "unknown"]


class Estimate(ForwardCompatible):
    """A range: from the least that is likely to the most."""

    low: float
    high: float


class PlannedBase(ForwardCompatible):
    """The base model that would be trained."""

    base_model_id: str  # the original base, where the request names an earlier job
    earlier_job_id: str | None = None  # whose model the training would start from
    parameters: int | None = None
    weights_bytes: int | None = None
    stored: bool  # in the deployment's model store, so that nothing is downloaded from the Hub
    size_from: Literal["model_store", "known_name", "unknown"]  # how its size is known


class PlannedSteps(ForwardCompatible):
    """The length of the training."""

    rows: int  # training rows of an epoch
    examples: int  # what an epoch passes through the model: rows, or with packing blocks, or completions
    examples_per_step: int
    steps_per_epoch: int
    total_steps: int
    epochs: float
    exact: bool  # the numbers of steps; packed blocks are estimated


class PlannedTokens(ForwardCompatible):
    """The tokens of the training, without padding."""

    per_epoch: int
    total: int  # in all steps
    longest: int | None = None  # of a row before it is cut to max_seq_length; None: not counted
    truncated_rows: int | None = None  # of an epoch; None: not counted
    exact: bool  # counted with the base's tokenizer, or estimated
    note: str  # where the numbers are from, and what would make them exact


class MemoryNeed(ForwardCompatible):
    """The memory of the device at the peak of a training step, and of the export."""

    parts: dict[str, int]  # weights, optimizer, gradients, activations, loss head, backward pass, process
    peak_bytes: int  # of a training step
    evaluation_bytes: int  # to compute the loss on held-out rows; where memory runs out, it goes on with fewer rows at a time; 0: none
    available_bytes: int | None  # that a training may be planned to take; None: the device's memory is not known
    export_bytes: int  # of the device, at the least
    export_host_bytes: int  # of main memory beside it
    batch_size: int  # of a forward pass
    gradient_accumulation_steps: int
    gradient_checkpointing: bool


class PhaseTime(ForwardCompatible):
    """How long one part of the job takes."""

    phase: str
    seconds: Estimate


class HardwareEstimate(ForwardCompatible):
    """What the job would need and take on one kind of hardware."""

    hardware: str  # "launcher/profile" of this deployment, or the name of an accelerator
    device: str
    gpus: int = 0  # of the profile
    environment: str | None = None  # None: this deployment does not offer it
    supported: bool = True  # the job can run there; memory aside
    fit: Fit
    reason: str  # in words, with what would help where it does not fit
    memory: MemoryNeed | None = None  # None: the size of the base is not known
    seconds: Estimate | None = None  # of the whole job
    phases: tuple[PhaseTime, ...] = ()
    usd_per_hour: float | None = None  # None: the price is not known
    usd: Estimate | None = None
    time_slices: Estimate | None = None  # attempts that the time limit of the profile makes necessary; None: it has none


class PlannedArtifactSize(ForwardCompatible):
    """A file or folder that the job would publish."""

    name: str
    kind: str
    size_bytes: int


class PlannedDisk(ForwardCompatible):
    """What the attempt's disk and the object store would hold."""

    attempt_bytes: int  # of the attempt at once: base, tokens, checkpoints, exported files
    export_bytes: int  # of these, the exported files
    checkpoint_bytes: int  # of one checkpoint
    checkpoints: int  # that are saved; save_total_limit of them are kept, and the best
    artifacts_bytes: int  # published


class BudgetShare(ForwardCompatible):
    """How much of a cap of the request the job would use, by the upper end of the estimate."""

    max_cost_usd: float | None = None
    cost_share: float | None = None  # 1.0: all of it; None: no such cap, or no price
    max_gpu_seconds: float | None = None
    gpu_seconds_share: float | None = None


class DryRunWarning(ForwardCompatible):
    """Something that is likely wrong, and does not stop the job."""

    param: str  # the field of the request, or of the dataset
    message: str
    hint: str  # what would work


class DryRunResponse(ForwardCompatible):
    """What the job would do. Nothing was stored, launched or charged."""

    # Any: the configuration with every default filled in, every "auto" resolved and every secret removed.
    training_config: dict[str, Any]
    resolved: tuple[ResolvedValue, ...] = ()  # what was chosen where the request said "auto"
    placements: tuple[str, ...]  # where the job would run, in order: "launcher/profile"
    base: PlannedBase
    steps: PlannedSteps
    tokens: PlannedTokens
    profiles: tuple[HardwareEstimate, ...]  # of this deployment, ranked: the requested ones that fit come first, then by price and time
    accelerators: tuple[HardwareEstimate, ...]  # that are widely used, of whatever deployment
    cheapest: str | None = None  # the profile that fits for the lowest price, or in the least time where no price is known
    artifacts: tuple[PlannedArtifactSize, ...] = ()
    disk: PlannedDisk | None = None
    budget: BudgetShare = Field(default=BudgetShare())
    warnings: tuple[DryRunWarning, ...] = ()
