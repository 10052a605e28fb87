"""Where a job's curves are mirrored: several places at once, none of which can fail a training."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, StringConstraints, model_validator

from schema.base import Label, Strict, field_error


class WandbConfig(Strict):
    """Where Weights & Biases mirrors the metrics."""

    api_key: SecretStr | None = Field(None, description="Needed unless mode is `offline`. Kept in the secret store only.")
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
    """Where MLflow mirrors the metrics."""

    tracking_uri: Annotated[str, StringConstraints(max_length=2048, pattern=r"^https?://[^\s/@]+(/\S*)?$")] = Field(
        description="The tracking server, such as https://mlflow.example.com. A credential goes into `token`, not in here."
    )
    experiment_name: Label = "gemma-fine-tuning"
    token: SecretStr | None = Field(None, description="A bearer token for the server. Kept in the secret store only.")


class TensorboardConfig(Strict):
    """TensorBoard's event files, in the job's folder of the model store; `tensorboard_config: {}` is enough."""


class TrackioConfig(Strict):
    """Where Trackio mirrors the metrics: a dashboard in a Hugging Face Space, or a database in the model store."""

    project: Label = "gemma-fine-tuning"
    space_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}$")] | None = Field(
        None,
        description="The Space that shows the curves, `owner/name`; needs hf_token. Left out, the run is a database in the model store.",
    )
