"""Request bodies of the public API."""

from dataclasses import fields
from typing import Annotated, Self

from pydantic import ConfigDict, Field, JsonValue, StringConstraints, model_validator

from schema.base import Id, Label, Strict, field_error
from schema.dataset import DatasetShare
from schema.json_limits import JsonObject
from schema.placement import Hardware
from schema.training import DEFAULT_EXPORT_CONFIG, TRAINER_TYPES, AnyExportConfig, TrainingConfig
from schema.training.base import LENGTH_UNITS, TrainingSummary
from schema.types import SecretText

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


MaxGpuSeconds = Annotated[
    float | None,
    Field(
        gt=0,
        le=1e9,
        description="The job is paused, with a checkpoint, before its attempts have used more: seconds × GPUs. Without a GPU: 0.",
    ),
]
MaxCostUsd = Annotated[
    float | None,
    Field(
        gt=0,
        le=1e6,
        description="Likewise in US dollars of compute, by the prices of `GET /capabilities`. Every requested profile needs a price.",
    ),
]
SecretName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,95}$")]
MetadataKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
MetadataValue = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{0,512}$")]
Metadata = Annotated[
    dict[MetadataKey, MetadataValue],
    Field(
        max_length=16,
        description='Up to 16 pairs of strings of your own, such as `{"team": "search"}`: names have up to 64 characters, values 512. '
        "`GET /jobs?metadata=team=search` finds the jobs.",
    ),
]


MAX_MIXED_DATASETS = 16


class DatasetInMix(Strict):
    """One of several datasets to train on."""

    processed_dataset_id: Id = Field(description="The id that `POST /datasets` returned.")
    weight: float = Field(
        gt=0, le=1e6, description="Relative to the other weights: 7 and 3 train seven rows of the first for each three of the second."
    )


DatasetMix = Annotated[
    list[DatasetInMix],
    Field(
        min_length=2,
        max_length=MAX_MIXED_DATASETS,
        description="Several datasets of one type instead of `processed_dataset_id`. An epoch has as many rows as all of them together "
        "and takes from each in proportion to its weight: whole passes over its rows, and for the rest a sample without repetition, drawn "
        "by `seed`. Held-out rows are those of all datasets, without weights.",
    ),
]


def check_datasets(processed_dataset_id: str | None, datasets: list[DatasetInMix] | None) -> None:
    """Raise the error for a request that names both one dataset and several, or one of several twice."""
    if processed_dataset_id is not None and datasets is not None:
        raise field_error("datasets", "send either processed_dataset_id or datasets, not both")
    ids = [each.processed_dataset_id for each in datasets or []]
    for index, dataset_id in enumerate(ids):
        if dataset_id in ids[:index]:
            reason = f"{dataset_id} is named twice; name each dataset once, with the weight of both"
            raise field_error(f"datasets.{index}.processed_dataset_id", reason)


class TrainRequest(Strict):
    """`POST /train`: train one model on one dataset, or on a mix of several."""

    model_config = ConfigDict(json_schema_extra={"examples": [TRAIN_REQUEST_EXAMPLE]})

    processed_dataset_id: Id | None = Field(None, description="The id that `POST /datasets` returned. To mix several, send `datasets`.")
    datasets: DatasetMix | None = None
    hf_token: SecretText | None = Field(
        None, description="A Hugging Face token, for gated or private base models. Kept in the secret store and given to the attempt once."
    )
    job_name: Label = "unnamed job"
    project_id: Id | None = Field(None, description="Groups jobs, and their checkpoints, under a project.")
    metadata: Metadata = Field({})
    hardware: Hardware | None = Field(
        None,
        description="A hardware profile of this deployment, such as `l4`, or `cloud-run/l4` where several launchers have one of that name; "
        "or a list of them: the first that has room takes the job. `auto`: those where the job fits, the cheapest first. "
        "`GET /capabilities` lists them. Default: the deployment's first.",
    )
    max_gpu_seconds: MaxGpuSeconds = None
    max_cost_usd: MaxCostUsd = None
    training_config: TrainingConfig

    @model_validator(mode="after")
    def _check_datasets(self) -> Self:
        check_datasets(self.processed_dataset_id, self.datasets)
        if self.processed_dataset_id is None and self.datasets is None:
            raise field_error("processed_dataset_id", "is missing; send the id that POST /datasets returned, or datasets to mix several")
        return self

    @model_validator(mode="after")
    def _reject_unused_fields(self) -> Self:
        self.training_config.reject_unused_fields()
        return self

    @property
    def shares(self) -> tuple[DatasetShare, ...]:
        """The datasets to train on. A single one has weight 1."""
        if self.datasets is not None:
            return tuple(DatasetShare(processed_dataset_id=each.processed_dataset_id, weight=each.weight) for each in self.datasets)
        assert self.processed_dataset_id is not None  # the validator requires one of the two
        return (DatasetShare(processed_dataset_id=self.processed_dataset_id, weight=1.0),)


HYPERPARAMETER_FIELDS = set[str]().union(*(config.hyperparameter_names() for config in TRAINER_TYPES.values()))
# Fields that must not change between two attempts.
IMMUTABLE_FIELDS = (
    "training_config",
    *(field.name for field in fields(TrainingSummary)),
    *sorted(HYPERPARAMETER_FIELDS.difference(LENGTH_UNITS)),
)


class ContinuationOptions(Strict):
    """What may change between two attempts of a job: hardware, length and caps. What determined the finished steps may not."""

    hardware: Hardware | None = Field(None, description="Continue on other hardware, also of another launcher; a profile or a list.")
    epochs: int | None = Field(
        None, ge=1, le=1000, description="More passes over the rows than before. The learning rate schedule then covers the new total."
    )
    max_steps: int | None = Field(None, ge=1, le=10_000_000, description="More optimizer steps than before, for a job that sets max_steps.")
    max_gpu_seconds: MaxGpuSeconds = None
    max_cost_usd: MaxCostUsd = None
    hf_token: SecretText | None = Field(None, description="Needed again if the job had one and has ended, which deletes its secrets.")
    wandb_api_key: SecretText | None = Field(None, description="Needed again in the same case.")
    secrets: dict[SecretName, SecretText] = Field(
        {},
        max_length=64,
        description="Likewise, by name: `mlflow_token`, and `judge_api_key` of the grader called `judge`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _reject_immutable_fields(cls, body: object) -> object:
        for name in IMMUTABLE_FIELDS:
            if isinstance(body, dict) and name in body:
                raise field_error(name, f"{name} cannot change because the finished steps used it; start a new job")
        return body  # pyright: ignore[reportUnknownVariableType]  # any JSON value


class ResumeRequest(ContinuationOptions):
    """`POST /jobs/{job_id}/resume`: continue a paused job. The body is optional."""


class RetryRequest(ContinuationOptions):
    """`POST /jobs/{job_id}/retry`: continue a failed or cancelled job from its last good checkpoint. The body is optional."""

    from_start: bool = Field(False, description="Start from the beginning; earlier checkpoints are then no longer used.")


class ExportRequest(Strict):
    """`POST /jobs/{job_id}/checkpoints/{step}/export`: a job that trains nothing and exports a checkpoint."""

    export_config: AnyExportConfig = DEFAULT_EXPORT_CONFIG
    attempt: int | None = Field(
        None, ge=1, description="The attempt that wrote the checkpoint, if several have one of that step. Default: the newest."
    )
    job_name: Label | None = None
    metadata: Metadata | None = Field(None, description="Default: that of the job whose model is exported.")
    hardware: Hardware | None = None
    max_gpu_seconds: MaxGpuSeconds = None
    max_cost_usd: MaxCostUsd = None
    hf_token: SecretText | None = None


class ReexportRequest(ExportRequest):
    """`POST /jobs/{job_id}/export`: export a job again, in other formats. The body is optional."""

    step: int | None = Field(
        None, ge=0, le=10_000_000, description="The step of the checkpoint. Default: the published one, else the newest."
    )


class CloneRequest(Strict):
    """`POST /jobs/{job_id}/clone`: create a job like another one, with changes. The body is optional."""

    job_name: Label | None = None
    metadata: Metadata | None = Field(None, description="Replaces that of the job. Default: the same.")
    processed_dataset_id: Id | None = None
    datasets: DatasetMix | None = None
    hardware: Hardware | None = None
    max_gpu_seconds: MaxGpuSeconds = None
    max_cost_usd: MaxCostUsd = None
    hf_token: SecretText | None = Field(None, description="Needed again if the job had one; null creates the clone without it.")
    secrets: dict[SecretName, SecretText | None] = Field(
        {},
        max_length=64,
        description="Likewise, by name: `wandb_api_key`, `mlflow_token`, and `judge_api_key` of the grader `judge`.",
    )
    training_config: JsonObject = Field(
        {}, description="A JSON merge patch (RFC 7386) for the job's config: objects are merged, null removes, everything else replaces."
    )

    @model_validator(mode="after")
    def _check_datasets(self) -> Self:
        check_datasets(self.processed_dataset_id, self.datasets)
        return self
