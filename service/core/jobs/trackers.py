"""The deployment's own trackers, which record the jobs that name no tracker of that kind."""

from typing import Self

from pydantic import BaseModel, model_validator

from schema.base import Strict
from schema.training import JobConfig, TrainingConfig
from schema.training.trackers import MlflowConfig, TensorboardConfig, TrackioConfig, WandbConfig
from service.core.jobs.secrets import extract_config_secrets, redact


class DeploymentTrackers(Strict):
    """A deployment's trackers, in the fields of a request. W&B only offline: its API key would act for every caller."""

    wandb_config: WandbConfig | None = None
    mlflow_config: MlflowConfig | None = None
    tensorboard_config: TensorboardConfig | None = None
    trackio_config: TrackioConfig | None = None

    @model_validator(mode="after")
    def _require_offline_wandb(self) -> Self:
        if self.wandb_config and self.wandb_config.mode != "offline":
            raise ValueError("wandb_config of a deployment needs mode 'offline'")
        return self


def add_deployment_trackers(config: TrainingConfig, trackers: DeploymentTrackers) -> TrainingConfig:
    """The configuration with the deployment's trackers added, except those of a kind that it names itself."""
    added = {kind: tracker for kind, tracker in trackers if tracker is not None and dict(config).get(kind) is None}
    return config.model_copy(update=added) if added else config


def deployment_trackers_of(config: JobConfig, trackers: DeploymentTrackers) -> dict[str, BaseModel]:
    """Those of a stored job's trackers that are the deployment's: by kind, with their secrets."""
    stored = dict(config)
    return {kind: tracker for kind, tracker in trackers if tracker is not None and redact(tracker) == stored.get(kind)}


def deployment_tracker_secrets(config: JobConfig, trackers: DeploymentTrackers) -> dict[str, str]:
    """The secrets of the deployment's trackers that a job uses, by name. No caller has to send them."""
    return extract_config_secrets(
        trackers.model_copy(update=dict.fromkeys(DeploymentTrackers.model_fields) | deployment_trackers_of(config, trackers))
    )
