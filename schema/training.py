"""`training_config` of the request: what to train, how, and what to hand back.

One class per trainer type. The class carries the knobs, their bounds, the rules between them, the OpenAPI
text and the name of the code in `jobs/trainers/` that obeys it.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, StringConstraints, model_validator

from schema.base import Strict, refusal

Provider = Literal["huggingface", "unsloth"]
Method = Literal["Full", "LoRA", "QLoRA"]
Modality = Literal["text", "vision"]
ExportFormat = Literal["adapter", "merged"]
# The names llama.cpp gives its file types, plus the seed's "none": the merged model's own precision.
GgufQuantization = Literal[
    "none", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k"
]
DatasetType = Literal["messages", "prompt_completion", "text"]

HubId = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"),
    Field(description="A model's name as the Hugging Face Hub writes it: `owner/name`.", examples=["google/gemma-3-270m"]),
]


class Hyperparameters(Strict):
    """Knobs shared by every gradient trainer. Defaults suit LoRA on Gemma."""

    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate. Advice: 5e-5 Full, 2e-4 LoRA.")
    batch_size: int = Field(2, ge=1, le=1024, description="Sequences per device and forward pass.")
    gradient_accumulation_steps: int = Field(4, ge=1, le=4096, description="Forward passes per optimizer step.")
    epochs: int = Field(3, ge=1, le=1000, description="Passes over the training rows; unused when max_steps is set.")
    max_steps: int = Field(-1, ge=-1, le=10_000_000, description="Optimizer steps; -1 means: as `epochs` says.")
    packing: bool = Field(False, description="Pack several rows into one sequence (best fit, no leak between rows).")
    use_fa2: bool = Field(False, description="FlashAttention 2; needs an Ampere or newer GPU.")
    max_seq_length: int = Field(1024, ge=8, le=131_072, description="Tokens per sequence; longer rows are cut and counted.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        "linear", description="How the learning rate moves after warm-up."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps spent warming up.")
    weight_decay: float = Field(0.01, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0, le=1000, description="Gradients are clipped to this norm.")
    seed: int = Field(3407, ge=0, le=2**31 - 1, description="Seeds weights, shuffling and dropout.")
    save_strategy: Literal["no", "steps", "epoch"] = Field(
        "epoch",
        description="When checkpoints are written. Unless it is `no`, a long interval is broken by a checkpoint every five minutes; "
        "a pause, the end of a time slice and the end of the training always write one.",
    )
    save_steps: int = Field(50, ge=1, le=1_000_000, description="Optimizer steps between checkpoints, with save_strategy `steps`.")
    save_total_limit: int = Field(2, ge=1, le=100, description="Checkpoints kept: the newest this many, and the best.")
    logging_steps: int = Field(10, ge=1, le=100_000, description="Optimizer steps between metric points.")
    lora_rank: int = Field(16, ge=1, le=1024)
    lora_alpha: int = Field(16, ge=1, le=4096)
    lora_dropout: float = Field(0.05, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        if self.max_steps == 0:
            raise refusal("max_steps", "max_steps is 0, which trains nothing; use -1 for whole epochs or a number from 1")
        return self


class ExportConfig(Strict):
    """What the job hands back, and where."""

    format: ExportFormat = Field(
        "adapter", description="`adapter`: the LoRA weights alone. `merged`: a model of its own. Method Full always gives a whole model."
    )
    destination: Literal["gcs", "hfhub"] = Field("gcs", description="`gcs` is this deployment's own object store, whatever it is.")
    hf_repo_id: HubId | None = Field(None, description="Where to push with destination `hfhub`.")
    include_gguf: bool = Field(False, description="Also write GGUF files for llama.cpp and Ollama.")
    gguf_quantization: GgufQuantization | list[GgufQuantization] | None = Field(
        None, description="One or several; `none` keeps the merged model's precision; left out with include_gguf it is q8_0."
    )

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        if self.destination == "hfhub" and self.hf_repo_id is None:
            raise refusal("hf_repo_id", "destination 'hfhub' needs hf_repo_id, the repository to push to")
        if self.destination != "hfhub" and self.hf_repo_id is not None:
            raise refusal("hf_repo_id", "hf_repo_id is only used with destination 'hfhub'; drop it or change the destination")
        if self.gguf_quantization is not None and not self.include_gguf:
            raise refusal("gguf_quantization", "gguf_quantization needs include_gguf: true")
        if self.gguf_quantization == []:
            raise refusal("gguf_quantization", "gguf_quantization is an empty list; name at least one, or leave it out for q8_0")
        if len(set(self.gguf_quantizations)) != len(self.gguf_quantizations):
            raise refusal("gguf_quantization", "gguf_quantization names the same quantization twice")
        return self

    @property
    def gguf_quantizations(self) -> list[GgufQuantization]:
        """The GGUF files to write, in the order asked for; empty without include_gguf."""
        match self.gguf_quantization:
            case _ if not self.include_gguf:
                return []
            case None:
                return ["q8_0"]
            case list() as several:
                return several
            case one:
                return [one]


class EvalConfig(Strict):
    """When to evaluate on the held-out rows while training. Before and after training it happens whenever there are any."""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: int = Field(50, ge=1, le=1_000_000, description="Optimizer steps between evaluations, with eval_strategy `steps`.")
    compute_eval_metrics: bool = Field(False, description="Also measure token accuracy.")
    batch_eval_metrics: bool = Field(False, description="Count accuracy batch by batch: less memory, the same number.")

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        if self.batch_eval_metrics and not self.compute_eval_metrics:
            raise refusal("batch_eval_metrics", "batch_eval_metrics needs compute_eval_metrics: true")
        return self


class WandbConfig(Strict):
    """Where Weights & Biases mirrors the metrics."""

    api_key: SecretStr | None = Field(None, description="Needed unless mode is `offline`. Kept in the secret store only.")
    project: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\s]+$")] = "gemma-fine-tuning"
    log_model: Annotated[Literal["false", "checkpoint", "end"], BeforeValidator(lambda v: "false" if v is False else v)] = Field(
        "false", description="Also upload checkpoints, or the final model."
    )
    mode: Literal["online", "offline"] = Field("online", description="`offline` writes the run into the job's folder, for `wandb sync`.")

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        if self.mode == "online" and self.api_key is None:
            raise refusal("api_key", "wandb_config needs api_key, or mode 'offline'")
        return self


class _TrainingConfig(Strict):
    """What every trainer type has in common."""

    base_model_id: HubId
    provider: Provider = "huggingface"
    method: Method = "LoRA"
    modality: Modality = "text"
    export_config: ExportConfig = ExportConfig()  # type: ignore[call-arg]  # pyright: every field has a default
    eval_config: EvalConfig = EvalConfig()  # type: ignore[call-arg]
    wandb_config: WandbConfig | None = None


LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout")


class SftConfig(_TrainingConfig):
    """Supervised fine-tuning: learn to continue a text, or to answer as the data answers."""

    trainer: ClassVar[str] = "jobs.trainers.sft:train"
    dataset_types: ClassVar[tuple[DatasetType, ...]] = ("messages", "prompt_completion", "text")

    trainer_type: Literal["sft"] = "sft"
    hyperparameters: Hyperparameters = Hyperparameters()  # type: ignore[call-arg]

    def refuse_unused(self) -> None:
        """Raise when a field was sent that this configuration would not use.

        Asked of a request only: a stored configuration has every field spelled out.
        """
        sent = self.hyperparameters.model_fields_set
        if self.hyperparameters.save_strategy != "steps" and "save_steps" in sent:
            raise refusal("training_config.hyperparameters.save_steps", "save_steps is only used with save_strategy 'steps'")
        if self.method != "Full":
            return
        for name in LORA_FIELDS:
            if name in sent:
                raise refusal(f"training_config.hyperparameters.{name}", f"{name} is only used with method LoRA or QLoRA, not Full")
        if self.export_config.format == "adapter" and "format" in self.export_config.model_fields_set:
            raise refusal(
                "training_config.export_config.format", "format 'adapter' needs method LoRA or QLoRA; with method Full use 'merged'"
            )

    @property
    def export_format(self) -> ExportFormat:
        """The form of the published model: method Full has no adapter to give."""
        return "merged" if self.method == "Full" else self.export_config.format


# A second trainer type turns this into `Annotated[SftConfig | DpoConfig, Field(discriminator="trainer_type")]`.
TrainingConfig = SftConfig
TRAINER_TYPES: dict[str, type[TrainingConfig]] = {"sft": SftConfig}
