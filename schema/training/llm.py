"""Training configurations of the LLM family, one class per trainer type.

A class declares the hyperparameters with their bounds, the rules between fields, the OpenAPI descriptions and the function in
`jobs/llm/trainers/` that runs it.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from schema.base import field_error
from schema.training.auto import AUTO
from schema.training.base import ArtifactKindInfo, BaseTrainingConfig, TrainingSummary
from schema.training.llm_evaluation import EvalConfig
from schema.training.llm_export import ExportConfig, ExportFormat
from schema.training.llm_graders import Grader
from schema.training.llm_hyperparameters import (
    DpoHyperparameters,
    GrpoHyperparameters,
    Hyperparameters,
    KtoHyperparameters,
    OrpoHyperparameters,
    RewardHyperparameters,
    SftHyperparameters,
)
from schema.training.llm_optimization import check_final_rate, is_base_factor_init
from schema.types import JOB_PREFIX, BaseModelId, DatasetType, Phase

Provider = Literal["huggingface", "unsloth"]
Method = Literal["Full", "LoRA", "QLoRA"]
Modality = Literal["text", "vision"]
PromptFormat = Literal["chat", "raw"]


class LlmTrainingConfig(BaseTrainingConfig):
    """What every trainer type of the LLM family has."""

    family: ClassVar[str] = "llm"
    environment: ClassVar[str] = "llm"
    check_export: ClassVar[str] = "jobs.llm.exporters:check_exportable"
    export: ClassVar[str] = "jobs.llm.exporters:export_all"
    probe: ClassVar[str] = "jobs.llm.probe:probe"
    artifact_kinds: ClassVar[tuple[ArtifactKindInfo, ...]] = (
        ArtifactKindInfo("gguf", "gguf_models"),
        ArtifactKindInfo("merged", "merged_models"),
        ArtifactKindInfo("adapter", "trained_adapters"),
        ArtifactKindInfo("onnx", "onnx_models"),
        ArtifactKindInfo("lora_gguf", "gguf_models"),
    )
    resume_only_files: ClassVar[tuple[str, ...]] = ("optimizer.pt",)  # of a Full training twice the size of the weights
    out_of_memory_hint: ClassVar[str] = (
        "lower batch_size or max_seq_length (raise gradient_accumulation_steps to keep the effective batch), "
        "or use LoRA where the method is Full"
    )
    phases: ClassVar[tuple[Phase, ...]] = (
        "downloading",
        "tokenizing",
        "training",
        "evaluating",
        "merging",
        "converting",
        "verifying",
        "uploading",
    )
    modalities: ClassVar[tuple[str, ...]] = ("text",)
    providers: ClassVar[tuple[Provider, ...]] = ("huggingface",)
    # By method: LoRA's weights start at zero and take a rate ten times that of full fine-tuning.
    learning_rates: ClassVar[dict[Method, float]]

    base_model_id: BaseModelId
    provider: Provider = "huggingface"
    method: Method = "LoRA"
    modality: Modality = "text"
    prompt_format: PromptFormat | None = Field(
        None,
        description="`chat`: a prompt and its completion, as strings too, are turns of the user and the assistant, and the model is "
        "exported with its chat template. `raw`: strings are joined as they are, and the exported model continues texts without a "
        "template. Default: `chat`; for rows of `text`, `raw` unless they are conversations as the base's chat template renders them.",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        max_length=262_144,
        description="A Jinja chat template to train and export with instead of the base model's. Default: the base model's own, else one "
        "that its tokenizer has the tokens for.",
    )
    hyperparameters: Hyperparameters = Hyperparameters()  # type: ignore[call-arg]  # pyright: every field has a default
    export_config: ExportConfig = ExportConfig()  # type: ignore[call-arg]
    eval_config: EvalConfig = EvalConfig()  # type: ignore[call-arg]

    @classmethod
    def recommends_artifact(cls, name: str, fidelity: Mapping[str, JsonValue] | None) -> bool:
        """Neither a file from which quantization erased the training, nor what is only a part beside the model's file."""
        return name not in ("gguf-mmproj", "gguf-usage") and not (fidelity or {}).get("closer_to_base")

    @model_validator(mode="after")
    def _check_compatibility(self) -> Self:
        if self.modality not in self.modalities:
            supported = " or ".join(self.modalities)
            raise field_error("modality", f"this trainer type trains {supported}, not {self.modality}; for images use trainer_type 'sft'")
        if self.provider not in self.providers or (self.provider == "unsloth" and self.modality == "vision"):
            raise field_error("provider", "provider 'unsloth' is for trainer_type 'sft' on text; use 'huggingface'")
        if self.export_config.include_lora_gguf and self.hyperparameters.use_dora:
            raise field_error("export_config.include_lora_gguf", "llama.cpp's adapter files do not support DoRA; use include_gguf")
        if self.modality == "vision" and "onnx" in self.export_config.formats:
            raise field_error("export_config.format", "export format onnx is only for text generation models")
        if is_base_factor_init(self.hyperparameters.lora_init) and self.method == "QLoRA":
            lora_init = self.hyperparameters.lora_init
            raise field_error("hyperparameters.lora_init", f"lora_init {lora_init!r} needs weights that are not quantized; use method LoRA")
        if self.hyperparameters.lora_init == "eva" and (self.trainer_type_name() != "sft" or self.modality != "text"):
            raise field_error("hyperparameters.lora_init", "lora_init 'eva' is for trainer_type 'sft' on text; use 'default'")
        if self.hyperparameters.lora_init != "default" and self.provider == "unsloth":
            raise field_error("hyperparameters.lora_init", "provider 'unsloth' supports only lora_init 'default'; use 'huggingface'")
        if self.modality == "vision" and self.hyperparameters.packing:
            raise field_error("hyperparameters.packing", "rows with images cannot be packed; set packing to false")
        return self

    @model_validator(mode="after")
    def _check_prompt_format(self) -> Self:
        if self.prompt_format == "raw" and self.modality == "vision":
            raise field_error("prompt_format", "rows with images are conversations, which need a template; use 'chat' or leave it out")
        if self.prompt_format == "raw" and self.chat_template is not None:
            raise field_error("chat_template", "chat_template is not used with prompt_format 'raw', which trains and exports without one")
        if self.chat_template is not None and self.modality == "vision":
            raise field_error("chat_template", "with modality 'vision' the base model's own template places the images; leave it out")
        return self

    @model_validator(mode="after")
    def _set_default_learning_rate(self) -> Self:
        if self.hyperparameters.learning_rate is None:
            rate = self.learning_rates[self.method]
            # object.__setattr__: the model is frozen.
            object.__setattr__(self, "hyperparameters", self.hyperparameters.model_copy(update={"learning_rate": rate}))
        hyperparameters = self.hyperparameters
        check_final_rate(hyperparameters.lr_scheduler_type, hyperparameters.lr_scheduler_kwargs, hyperparameters.learning_rate or 0.0)
        return self

    def reject_unused_fields(self) -> None:
        self.hyperparameters.reject_unused_fields(self.method)
        self._reject_unused_export("training_config.export_config")

    def reject_unused_export(self) -> None:
        self._reject_unused_export("export_config")

    def _reject_unused_export(self, path: str) -> None:
        if self.method != "Full":
            return
        if "adapter" in self.export_config.formats and "format" in self.export_config.model_fields_set:
            raise field_error(f"{path}.format", "format 'adapter' needs method LoRA or QLoRA; with method Full use 'merged'")
        if self.export_config.include_lora_gguf:
            raise field_error(f"{path}.include_lora_gguf", "include_lora_gguf needs method LoRA or QLoRA, not Full")

    def summarize(self) -> TrainingSummary:
        return TrainingSummary(base_model_id=self.base_model_id, modality=self.modality, method=self.method)

    def computed_defaults(self) -> Mapping[str, JsonValue]:
        return {"hyperparameters": {"learning_rate": self.learning_rates[self.method]}}

    @property
    def length_unit(self) -> str | None:
        return "max_steps" if self.hyperparameters.max_steps > 0 else "epochs"

    @property
    def hub_model_id(self) -> str:
        return self.base_model_id

    @property
    def earlier_job_id(self) -> str | None:
        return self.base_model_id.removeprefix(JOB_PREFIX) if self.base_model_id.startswith(JOB_PREFIX) else None

    @property
    def export_formats(self) -> list[ExportFormat]:
        """The formats of the published model. Method Full has no adapter, so `adapter` means `merged`."""
        if self.method != "Full":
            return self.export_config.formats
        return list(dict.fromkeys("merged" if name == "adapter" else name for name in self.export_config.formats))


class SftConfig(LlmTrainingConfig):
    """Supervised fine-tuning: continue a text, or answer the way the dataset answers."""

    train: ClassVar[str] = "jobs.llm.trainers.sft:train"
    dataset_types: ClassVar[tuple[DatasetType, ...]] = ("messages", "prompt_completion", "text")
    modalities: ClassVar[tuple[str, ...]] = ("text", "vision")
    providers: ClassVar[tuple[Provider, ...]] = ("huggingface", "unsloth")
    learning_rates: ClassVar[dict[Method, float]] = {"LoRA": 2e-4, "QLoRA": 2e-4, "Full": 2e-5}

    trainer_type: Literal["sft"] = "sft"
    train_on_inputs: bool = Field(False, description="Learn to generate every message of a conversation, not only the assistant's.")
    last_turn_only: bool = Field(False, description="Learn only the last message of a conversation.")
    hyperparameters: SftHyperparameters = SftHyperparameters()  # type: ignore[call-arg]

    def computed_defaults(self) -> Mapping[str, JsonValue]:
        fields, hyperparameters = type(self.hyperparameters).model_fields, self.hyperparameters
        repeated = any(getattr(hyperparameters, name) != fields[name].default for name in ("batch_size", "packing"))  # by a clone
        computed: JsonValue = "fixed" if repeated else "auto"
        return {"hyperparameters": {"learning_rate": self.learning_rates[self.method], "micro_batches": computed}}

    @model_validator(mode="after")
    def _check_learned_messages(self) -> Self:
        if self.train_on_inputs and self.last_turn_only:
            raise field_error("last_turn_only", "train_on_inputs learns every message, last_turn_only the last one; set one of them")
        for field, is_set in (("train_on_inputs", self.train_on_inputs), ("last_turn_only", self.last_turn_only)):
            if is_set and self.prompt_format == "raw":
                raise field_error(field, f"{field} chooses between messages, and prompt_format 'raw' has none; leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_vision_fields(self) -> Self:
        if self.hyperparameters.train_vision_tower and self.modality != "vision":
            raise field_error("hyperparameters.train_vision_tower", "train_vision_tower needs modality 'vision'")
        return self


class DpoConfig(LlmTrainingConfig):
    """Direct preference optimization: learn which of two answers is preferred."""

    train: ClassVar[str] = "jobs.llm.trainers.dpo:train"
    dataset_types: ClassVar[tuple[DatasetType, ...]] = ("preference",)
    learning_rates: ClassVar[dict[Method, float]] = {"LoRA": 1e-5, "QLoRA": 1e-5, "Full": 1e-6}

    trainer_type: Literal["dpo"]
    hyperparameters: DpoHyperparameters = DpoHyperparameters()  # type: ignore[call-arg]


class OrpoConfig(LlmTrainingConfig):
    """Odds ratio preference optimization: supervised fine-tuning and preference learning in one loss."""

    train: ClassVar[str] = "jobs.llm.trainers.orpo:train"
    dataset_types: ClassVar[tuple[DatasetType, ...]] = ("preference",)
    learning_rates: ClassVar[dict[Method, float]] = {"LoRA": 5e-5, "QLoRA": 5e-5, "Full": 8e-6}

    trainer_type: Literal["orpo"]
    hyperparameters: OrpoHyperparameters = OrpoHyperparameters()  # type: ignore[call-arg]


class KtoConfig(LlmTrainingConfig):
    """Kahneman-Tversky optimization: learn from answers that are each labeled good or bad."""

    train: ClassVar[str] = "jobs.llm.trainers.kto:train"
    dataset_types: ClassVar[tuple[DatasetType, ...]] = ("unpaired_preference", "preference")
    learning_rates: ClassVar[dict[Method, float]] = {"LoRA": 1e-5, "QLoRA": 1e-5, "Full": 1e-6}

    trainer_type: Literal["kto"]
    hyperparameters: KtoHyperparameters = KtoHyperparameters()  # type: ignore[call-arg]


class GrpoConfig(LlmTrainingConfig):
    """Group relative policy optimization: learn from the grades of the model's own answers."""

    train: ClassVar[str] = "jobs.llm.trainers.grpo:train"
    dataset_types: ClassVar[tuple[DatasetType, ...]] = ("prompt", "prompt_completion")
    learning_rates: ClassVar[dict[Method, float]] = {"LoRA": 1e-5, "QLoRA": 1e-5, "Full": 1e-6}

    trainer_type: Literal["grpo"]
    hyperparameters: GrpoHyperparameters = GrpoHyperparameters()  # type: ignore[call-arg]
    reward_config: list[Grader] = Field(
        min_length=1, max_length=32, description="The graders. The reward is the weighted sum of their grades."
    )

    @model_validator(mode="after")
    def _check_completion_length(self) -> Self:
        completion, sequence = self.hyperparameters.max_completion_length, self.hyperparameters.max_seq_length
        if completion >= sequence != AUTO:
            reason = f"max_completion_length {completion} leaves no room for a prompt in max_seq_length {sequence}"
            raise field_error("hyperparameters.max_completion_length", reason)
        return self

    @model_validator(mode="after")
    def _check_eval_steps(self) -> Self:
        iterations, eval_config = self.hyperparameters.num_iterations, self.eval_config
        if eval_config.eval_strategy == "steps" and eval_config.eval_steps % iterations:
            reason = f"eval_steps is {eval_config.eval_steps}, which is not a multiple of num_iterations ({iterations})"
            raise field_error("eval_config.eval_steps", reason)
        return self

    @model_validator(mode="after")
    def _check_unique_grader_names(self) -> Self:
        names = [grader.name for grader in self.reward_config]
        duplicate = next((name for name in names if names.count(name) > 1), None)
        if duplicate:
            raise field_error("reward_config", f"two graders are called {duplicate!r}; metrics need unique names")
        return self


class RewardConfig(LlmTrainingConfig):
    """A reward model: it scores an answer, and learns from which of two answers is preferred."""

    train: ClassVar[str] = "jobs.llm.trainers.reward:train"
    dataset_types: ClassVar[tuple[DatasetType, ...]] = ("preference",)
    learning_rates: ClassVar[dict[Method, float]] = {"LoRA": 1e-4, "QLoRA": 1e-4, "Full": 1e-5}

    trainer_type: Literal["reward"]
    hyperparameters: RewardHyperparameters = RewardHyperparameters()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _check_exports(self) -> Self:
        export = self.export_config
        if "onnx" in export.formats:
            raise field_error("export_config.format", "export format onnx is only for text generation models")
        if export.include_gguf or export.include_lora_gguf:
            raise field_error(
                "export_config.include_gguf", "a reward model outputs scores, not text: llama.cpp cannot run it; use 'merged'"
            )
        return self
