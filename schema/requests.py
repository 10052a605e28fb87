"""What a caller sends to the public API."""

from typing import Self

from pydantic import ConfigDict, Field, JsonValue, SecretStr, model_validator

from schema.base import Id, Label, Strict
from schema.training import TrainingConfig

SEED_EXAMPLE: dict[str, JsonValue] = {
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


class TrainRequest(Strict):
    """`POST /train`: train one model on one dataset."""

    model_config = ConfigDict(json_schema_extra={"examples": [SEED_EXAMPLE]})

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
    def _nothing_is_ignored(self) -> Self:
        self.training_config.refuse_unused()
        return self
