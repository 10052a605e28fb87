"""Hyperparameters of the LLM family: those that every trainer type has, and those of each."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from schema.base import field_error
from schema.training.auto import AUTO, AcceptsAuto
from schema.training.base import BaseHyperparameters
from schema.training.llm_optimization import (
    LoraInit,
    Optimizer,
    Schedule,
    check_schedule,
    is_base_factor_init,
    reject_unused_adam_fields,
)

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,128}$")]

# Numbers that the service may choose. The bounds stand before the marker, because "auto" is none of the numbers.
BatchSize = Annotated[int, Field(ge=1, le=1024), AcceptsAuto()]
KtoBatchSize = Annotated[int, Field(ge=2, le=1024), AcceptsAuto()]
AccumulationSteps = Annotated[int, Field(ge=1, le=4096), AcceptsAuto()]
SequenceLength = Annotated[int, Field(ge=8, le=131_072), AcceptsAuto()]

LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_init", "use_dora", "use_rslora", "target_modules")


class Hyperparameters(BaseHyperparameters):
    """Hyperparameters of every trainer type. The defaults suit Gemma from 270M to 27B."""

    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak learning rate. Default: depends on the trainer type and method; the job shows it."
    )
    batch_size: BatchSize = Field(2, description="Sequences per device and forward pass. `auto`: as many as fit into memory.")
    gradient_accumulation_steps: AccumulationSteps = Field(
        4, description="Forward passes per optimizer step. `auto`: as many as make an optimizer step of 16 rows, or of fewer with few rows."
    )
    epochs: int = Field(3, ge=1, le=1000, description="Passes over the training rows; unused when max_steps is set.")
    max_steps: int = Field(-1, ge=-1, le=10_000_000, description="Optimizer steps; -1: train for `epochs`.")
    packing: bool = Field(
        False, description="Pack several rows into one sequence (best fit, no attention between rows). Only trainer type sft with text."
    )
    use_fa2: bool = Field(False, description="FlashAttention 2; needs an Ampere or newer GPU.")
    max_seq_length: SequenceLength = Field(
        1024,
        description="Tokens per sequence; longer rows are truncated and counted. `auto`: the smallest that truncates at most one row in a "
        "hundred.",
    )
    lr_scheduler_type: Schedule = Field("linear", description="The learning rate schedule after warm-up.")
    lr_scheduler_kwargs: dict[str, float] = Field(
        {},
        max_length=8,
        description="Numbers that shape the schedule, by transformers' names: `num_cycles` of the cosines, `min_lr` or `min_lr_rate` of "
        "`cosine_with_min_lr`, `lr_end` and `power` of `polynomial`, `timescale` of `inverse_sqrt`, `num_decay_steps` (required) and "
        "`min_lr_ratio` of `warmup_stable_decay`.",
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps used for warm-up.")
    optim: Optimizer = Field(
        "adamw_torch_fused",
        description="The optimizer, by transformers' name. Those with `8bit` or `paged` need an NVIDIA GPU: they keep their state in a "
        "quarter of the memory, or move it to main memory when the GPU's is full.",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean of the gradients, in Adam and Lion.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the mean of their squares in Adam; of the mean itself in Lion.")
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="Added to the denominator of Adam's update.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay, not of norms and biases.")
    max_grad_norm: float = Field(1.0, gt=0, le=1000, description="Gradients are clipped to this norm.")
    save_strategy: Literal["no", "steps", "epoch"] = Field(
        "epoch",
        description="When to write checkpoints. Unless `no`, there is also a checkpoint every five minutes; "
        "a pause, the end of a time slice and the end of the training always write one.",
    )
    save_steps: int = Field(50, ge=1, le=1_000_000, description="Optimizer steps between checkpoints, with save_strategy `steps`.")
    logging_steps: int = Field(10, ge=1, le=100_000, description="Optimizer steps between metric points.")
    lora_rank: int = Field(16, ge=1, le=1024)
    lora_alpha: int = Field(16, ge=1, le=4096)
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the adapters' inputs. It costs speed and memory.")
    lora_init: LoraInit = Field(
        "default",
        description="How the adapter starts. `default`, `gaussian` and `orthogonal` start at zero; so does `eva`, with the directions in "
        "which the layers' inputs vary most (sft on text). `pissa`, `pissa_niter_N` (N iterations "
        "of a fast approximation) and `olora` start as the leading part of each weight matrix, which is subtracted from the frozen "
        "weights, so that the model starts as the base.",
    )
    use_dora: bool = Field(False, description="Weight-decomposed LoRA: magnitude and direction train separately. Slower, often better.")
    use_rslora: bool = Field(False, description="Rank-stabilized LoRA: the update is scaled by alpha/sqrt(rank) instead of alpha/rank.")
    target_modules: list[ModuleName] | None = Field(
        None, min_length=1, max_length=64, description="The linear layers that LoRA adapts, such as `q_proj`. Default: all except the head."
    )
    gradient_checkpointing: bool | None = Field(
        None, description="Recompute activations to save memory. Default: depends on the available memory."
    )
    torch_compile: bool | None = Field(
        None, description="Compile the model first, which takes a minute or more. Default: if there are enough steps to gain from it."
    )
    dataloader_num_workers: int | None = Field(
        None, ge=0, le=64, description="Processes that prepare batches. Default: chosen for the machine."
    )

    @model_validator(mode="after")
    def _check_compatibility(self) -> Self:
        if self.max_steps == 0:
            raise field_error("max_steps", "max_steps is 0, which trains nothing; use -1 for whole epochs or a number from 1")
        if self.target_modules is not None and len(set(self.target_modules)) != len(self.target_modules):
            raise field_error("target_modules", "target_modules names the same layer twice")
        check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs)
        self._check_lora_init()
        return self

    def _check_lora_init(self) -> None:
        if self.lora_init == "orthogonal" and self.lora_rank % 2:
            raise field_error("lora_init", f"lora_init 'orthogonal' needs an even lora_rank, not {self.lora_rank}")
        if not is_base_factor_init(self.lora_init):
            return
        if self.use_dora:
            raise field_error("lora_init", f"lora_init {self.lora_init!r} cannot be combined with use_dora; use 'default'")
        if self.weight_decay:
            reason = f"with lora_init {self.lora_init!r} the adapter holds a part of the base, which weight_decay would shrink; set it to 0"
            raise field_error("weight_decay", reason)

    @property
    def accumulation_steps(self) -> int:
        """Forward passes per optimizer step; 1 while the attempt has not chosen them."""
        return self.gradient_accumulation_steps

    def reject_unused_fields(self, method: str) -> None:
        """Raise a PydanticCustomError for a hyperparameter of a request that the training would not use."""
        sent = self.model_fields_set
        path = "training_config.hyperparameters"
        if self.save_strategy != "steps" and "save_steps" in sent:
            raise field_error(f"{path}.save_steps", "save_steps is only used with save_strategy 'steps'")
        if method == "Full":
            for name in LORA_FIELDS:
                if name in sent:
                    raise field_error(f"{path}.{name}", f"{name} is only used with method LoRA or QLoRA, not Full")
        reject_unused_adam_fields(self.optim, sent)


class SftHyperparameters(Hyperparameters):
    """Supervised fine-tuning."""

    train_vision_tower: bool = Field(False, description="With modality `vision`: also adapt the layers of the image encoder.")
    micro_batches: Literal["auto", "fixed"] | None = Field(
        None,
        description="Rows of a forward pass. `fixed`: batch_size. `auto`: on a GPU, for text, as many as fit into its memory, without "
        "padding; an optimizer step keeps batch_size × gradient_accumulation_steps rows. Default: `fixed` if batch_size or packing is "
        "sent, else `auto`.",
    )
    neftune_noise_alpha: float | None = Field(
        None, gt=0, le=100, description="Noise that is added to the embeddings in training (NEFTune, arXiv 2310.05914); 5 is common."
    )

    @model_validator(mode="after")
    def _set_default_micro_batches(self) -> Self:
        if self.micro_batches is None:
            sent = "packing" in self.model_fields_set or ("batch_size" in self.model_fields_set and self.batch_size != AUTO)
            value = "fixed" if sent else "auto"
            object.__setattr__(self, "micro_batches", value)  # the model is frozen
        if self.micro_batches == "auto" and self.packing:
            raise field_error("micro_batches", "micro_batches 'auto' is for rows that are not packed; use 'fixed', or set packing to false")
        return self


class DpoHyperparameters(Hyperparameters):
    """Direct preference optimization (arXiv 2305.18290)."""

    batch_size: BatchSize = Field(1, description="Pairs per device and forward pass: each is two sequences.")
    gradient_accumulation_steps: AccumulationSteps = Field(8, description="Forward passes per optimizer step.")
    epochs: int = Field(1, ge=1, le=1000, description="Passes over the pairs; unused when max_steps is set.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps used for warm-up.")
    beta: float = Field(0.1, gt=0, le=10, description="How strongly the loss keeps the model close to the base model; higher is closer.")
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"] = Field("sigmoid", description="As TRL names them.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="The expected share of pairs with swapped labels.")

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> Self:
        if self.label_smoothing and self.loss_type != "robust":
            raise field_error("label_smoothing", f"label_smoothing is only used with loss_type 'robust', not '{self.loss_type}'")
        return self


class OrpoHyperparameters(Hyperparameters):
    """Odds ratio preference optimization (arXiv 2403.07691): no reference model."""

    batch_size: BatchSize = Field(1, description="Pairs per device and forward pass: each is two sequences.")
    gradient_accumulation_steps: AccumulationSteps = Field(8, description="Forward passes per optimizer step.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps used for warm-up.")
    beta: float = Field(0.1, gt=0, le=10, description="Weight of the odds ratio term relative to the likelihood (lambda in the paper).")


class KtoHyperparameters(Hyperparameters):
    """Kahneman-Tversky optimization (arXiv 2402.01306): thumbs up or down, no pairs."""

    batch_size: KtoBatchSize = Field(
        4, description="Rows per device and forward pass; at least 2, because each row is compared with another."
    )
    epochs: int = Field(1, ge=1, le=1000, description="Passes over the rows; unused when max_steps is set.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps used for warm-up.")
    beta: float = Field(0.1, gt=0, le=10, description="How strongly the loss keeps the model close to the base model; higher is closer.")
    desirable_weight: float = Field(1.0, gt=0, le=100, description="Weight of good rows; raise it when there are fewer of them.")
    undesirable_weight: float = Field(1.0, gt=0, le=100, description="Weight of bad rows; raise it when there are fewer of them.")


class GrpoHyperparameters(Hyperparameters):
    """Group relative policy optimization (arXiv 2402.03300)."""

    batch_size: BatchSize = Field(8, description="Completions per device and forward pass.")
    gradient_accumulation_steps: AccumulationSteps | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]  # nothing assigns
        None,
        description="Forward passes per optimizer step. Default: on a GPU as many as 8 prompts need, elsewhere as few as possible.",
    )
    epochs: int = Field(1, ge=1, le=1000, description="Passes over the prompts; unused when max_steps is set.")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Share of the steps used for warm-up.")
    num_generations: int = Field(8, ge=2, le=128, description="Completions per prompt, which are compared with each other.")
    max_completion_length: int = Field(256, ge=1, le=32_768, description="The maximum number of generated tokens.")
    temperature: float = Field(1.0, gt=0, le=2, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    top_k: int = Field(0, ge=0, le=100_000, description="Top-k sampling; 0 samples from all tokens.")
    beta: float = Field(0.0, ge=0, le=10, description="Weight of the KL divergence from the base model; 0 needs no reference model.")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = Field("dapo", description="As TRL names them.")
    scale_rewards: Literal["group", "batch", "none"] = Field("group", description="The standard deviation that divides the advantage.")
    mask_truncated_completions: bool = Field(False, description="Exclude truncated completions from the loss.")
    num_iterations: int = Field(1, ge=1, le=64, description="Optimizer steps on the same completions.")
    epsilon: float = Field(
        0.2, gt=0, lt=1, description="With num_iterations: how far a token's probability may move from its old one before it is clipped."
    )
    epsilon_high: float | None = Field(None, gt=0, le=10, description="The same upward. Default: epsilon; DAPO recommends 0.28.")

    @property
    def accumulation_steps(self) -> int:
        return self.gradient_accumulation_steps or 1

    @model_validator(mode="after")
    def _check_iterations(self) -> Self:
        if self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            raise field_error("epsilon_high", f"epsilon_high {self.epsilon_high:g} is below epsilon {self.epsilon:g}")
        for name in ("max_steps", "save_steps"):
            steps = self.max_steps if name == "max_steps" else self.save_steps
            is_used = steps > 0 and (name == "max_steps" or self.save_strategy == "steps")
            if is_used and steps % self.num_iterations:
                reason = f"{name} is {steps}, which is not a multiple of num_iterations ({self.num_iterations})"
                raise field_error(name, reason)
        return self

    def reject_unused_fields(self, method: str) -> None:
        super().reject_unused_fields(method)
        for name in ("epsilon", "epsilon_high"):
            if self.num_iterations == 1 and name in self.model_fields_set:
                reason = f"{name} is only used with num_iterations from 2: in the first step on a completion nothing has moved"
                raise field_error(f"training_config.hyperparameters.{name}", reason)

    @model_validator(mode="after")
    def _check_num_generations(self) -> Self:
        if self.gradient_accumulation_steps is None:
            return self
        rows = self.batch_size * self.gradient_accumulation_steps
        if rows % self.num_generations:
            reason = (
                f"batch_size × gradient_accumulation_steps is {rows}, which is not a multiple of num_generations ({self.num_generations})"
            )
            raise field_error("num_generations", reason)
        return self


class RewardHyperparameters(Hyperparameters):
    """A reward model: predicts which of two answers is preferred (Bradley-Terry)."""

    epochs: int = Field(1, ge=1, le=1000, description="Passes over the pairs; unused when max_steps is set.")
    center_rewards_coefficient: float | None = Field(
        None, gt=0, le=1, description="Pulls the rewards toward a mean of zero (arXiv 2312.09244); 0.01 is common."
    )
