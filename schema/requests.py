"""What a caller sends to the public API."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, JsonValue, SecretStr, StringConstraints, model_validator

from schema.base import Id, Label, Strict, field_error
from schema.training import TrainingConfig
from schema.training.export import ExportConfig
from schema.training.llm_hyperparameters import (
    DpoHyperparameters,
    GrpoHyperparameters,
    KtoHyperparameters,
    OrpoHyperparameters,
    RewardHyperparameters,
    SftHyperparameters,
)

TRAIN_REQUEST_EXAMPLE: dict[str, JsonValue] = {
    "processed_dataset_id": "dataset_abc123",
    "hf_token": "hf_...",
    "job_name": "my-job-name",
    "training_config": {
        "base_model_id": "google/gemma-3-270m",
        "provider": "huggingface",
        "method": "LoRA",
        "trainer_type": "sft",
        "modality": "text",
        "hyperparameters": {
            "learning_rate": 0.0001,
            "batch_size": 4,
            "gradient_accumulation_steps": 4,
            "epochs": 3,
            "max_steps": -1,
            "packing": False,
            "use_fa2": False,
            "max_seq_length": 2048,
            "lr_scheduler_type": "linear",
            "save_strategy": "epoch",
            "logging_steps": 10,
            "lora_rank": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
        },
        "export_config": {
            "format": "merged",
            "destination": "gcs",
            "hf_repo_id": None,
            "include_gguf": True,
            "gguf_quantization": "q8_0",
        },
        "eval_config": {
            "eval_strategy": "epoch",
            "eval_steps": 50,
            "compute_eval_metrics": True,
            "batch_eval_metrics": False,
        },
        "wandb_config": None,
    },
}


SecretName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,95}$")]


class TrainRequest(Strict):
    """`POST /train`: train one model on one dataset."""

    model_config = ConfigDict(json_schema_extra={"examples": [TRAIN_REQUEST_EXAMPLE]})

    processed_dataset_id: Id = Field(description="As `POST /datasets` answered it.")
    hf_token: SecretStr | None = Field(
        None, description="A Hugging Face token, for gated or private bases. Kept in the secret store only, and handed to the attempt once."
    )
    job_name: Label = "unnamed job"
    project_id: Id | None = Field(None, description="Groups jobs, and their checkpoints, under a project.")
    hardware: Id | None = Field(
        None,
        description="What to train on: a profile of this deployment, such as `l4`. `GET /capabilities` lists them; left out, the first.",
    )
    training_config: TrainingConfig

    @model_validator(mode="after")
    def _reject_unused_fields(self) -> Self:
        self.training_config.reject_unused_fields()
        return self


# What a caller may want to change between two attempts, and may not.
HYPERPARAMETER_FIELDS = set[str]().union(
    SftHyperparameters.model_fields,
    DpoHyperparameters.model_fields,
    OrpoHyperparameters.model_fields,
    KtoHyperparameters.model_fields,
    GrpoHyperparameters.model_fields,
    RewardHyperparameters.model_fields,
)
IMMUTABLE_FIELDS = ("training_config", "base_model_id", "method", *sorted(HYPERPARAMETER_FIELDS - {"epochs", "max_steps"}))


class ContinuationOptions(Strict):
    """What may change between two attempts of a job: where it runs, and how long. What shaped the steps already made may not."""

    hardware: Id | None = Field(None, description="Go on with another profile of this deployment.")
    epochs: int | None = Field(
        None, ge=1, le=1000, description="More passes over the rows than before; the learning rate then follows the longer plan."
    )
    max_steps: int | None = Field(None, ge=1, le=10_000_000, description="More optimizer steps, where the job is counted in them.")
    hf_token: SecretStr | None = Field(None, description="Needed again where the job had one and has ended: secrets end with the job.")
    wandb_api_key: SecretStr | None = Field(None, description="Likewise.")
    secrets: dict[SecretName, SecretStr] = Field(
        {}, max_length=64, description="Likewise, by name: `mlflow_token`, and `judge_api_key` of the grader called `judge`."
    )

    @model_validator(mode="before")
    @classmethod
    def _reject_immutable_fields(cls, body: object) -> object:
        for name in IMMUTABLE_FIELDS:
            if isinstance(body, dict) and name in body:
                raise field_error(name, f"{name} cannot change: the steps already made were made with it; start a new job")
        return body  # pyright: ignore[reportUnknownVariableType]  # whatever was sent


class ResumeRequest(ContinuationOptions):
    """`POST /jobs/{job_id}/resume`: go on where the pause was. The body may be left out."""


class RetryRequest(ContinuationOptions):
    """`POST /jobs/{job_id}/retry`: continue a failed or cancelled job from its last good checkpoint. The body may be left out."""

    from_start: bool = Field(False, description="Begin again instead; earlier checkpoints then no longer count.")


class ExportRequest(Strict):
    """`POST /jobs/{job_id}/checkpoints/{step}/export`: a job that trains nothing and exports a checkpoint."""

    export_config: ExportConfig = ExportConfig()  # type: ignore[call-arg]  # pyright: every field has a default
    attempt: int | None = Field(
        None, ge=1, description="Whose checkpoint, where several attempts have one of that step; the newest by default."
    )
    job_name: Label | None = None
    hardware: Id | None = None
    hf_token: SecretStr | None = None


class ReexportRequest(ExportRequest):
    """`POST /jobs/{job_id}/export`: export a job once more, in other forms. The body may be left out."""

    step: int | None = Field(
        None, ge=0, le=10_000_000, description="Which checkpoint; left out, the one that was published, else the newest."
    )


class CloneRequest(Strict):
    """`POST /jobs/{job_id}/clone`: the same job again, with changes. The body may be left out."""

    job_name: Label | None = None
    processed_dataset_id: Id | None = None
    hardware: Id | None = None
    hf_token: SecretStr | None = Field(None, description="Needed again where the job had one; null makes the clone without it.")
    secrets: dict[SecretName, SecretStr | None] = Field(
        {}, max_length=64, description="Likewise, by name: `wandb_api_key`, `mlflow_token`, and `judge_api_key` of the grader `judge`."
    )
    training_config: dict[str, JsonValue] = Field(
        {}, description="A JSON merge patch (RFC 7386) on the job's own: objects are merged, null removes, everything else replaces."
    )
