"""Experiment trackers that mirror a job's metrics. A job may use several; none of them can fail a training."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from schema.base import Label, Strict, field_error
from schema.types import SecretText

# A job uses a tracker if its training config has `{name}_config`.
TRACKERS = ("wandb", "mlflow", "tensorboard", "trackio")


class WandbConfig(Strict):
    """Weights & Biases."""

    api_key: SecretText | None = Field(None, description="Needed unless mode is `offline`. Kept in the secret store only.")
    project: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\s]+$")] = "gemma-fine-tuning"
    log_model: Annotated[Literal["false", "checkpoint", "end"], BeforeValidator(lambda v: "false" if v is False else v)] = Field(
        "false", description="Also upload checkpoints, or the final model."
    )
    mode: Literal["online", "offline"] = Field("online", description="`offline` writes the run into the job's folder, for `wandb sync`.")

    @model_validator(mode="after")
    def _check_api_key(self) -> Self:
        if self.mode == "online" and self.api_key is None:
            raise field_error("api_key", "wandb_config needs api_key, or mode 'offline'")
        return self


class MlflowConfig(Strict):
    """MLflow."""

    tracking_uri: Annotated[str, StringConstraints(max_length=2048, pattern=r"^https?://[^\s/@]+(/\S*)?$")] = Field(
        description="The tracking server, such as https://mlflow.example.com. Credentials belong in `token`."
    )
    experiment_name: Label = "gemma-fine-tuning"
    token: SecretText | None = Field(None, description="A bearer token for the server. Kept in the secret store only.")


class TensorboardConfig(Strict):
    """TensorBoard event files in the job's folder of the model store. `tensorboard_config: {}` enables them."""


class TrackioConfig(Strict):
    """Trackio: a dashboard in a Hugging Face Space, or a database in the model store."""

    project: Label = "gemma-fine-tuning"
    space_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}$")] | None = Field(
        None,
        description="The Space that shows the metrics, `owner/name`; needs hf_token. Default: a database in the model store.",
    )
