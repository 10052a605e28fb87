"""What the configuration of every family has, whatever it trains."""

from typing import ClassVar

from schema.base import Strict
from schema.training.trackers import MlflowConfig, TensorboardConfig, TrackioConfig, WandbConfig
from schema.types import DatasetType


class BaseTrainingConfig(Strict):
    """Base of every trainer type's configuration. Subclasses add `trainer_type`, hyperparameters, evaluation and exports."""

    # The functions of the family, as "module:function"; jobs/runtime/family.py says what each of them does.
    train: ClassVar[str]
    check_export: ClassVar[str]
    export: ClassVar[str]
    dataset_types: ClassVar[tuple[DatasetType, ...]]  # the dataset types that it can train on

    wandb_config: WandbConfig | None = None
    mlflow_config: MlflowConfig | None = None
    tensorboard_config: TensorboardConfig | None = None
    trackio_config: TrackioConfig | None = None

    def reject_unused_fields(self) -> None:
        """Raise a PydanticCustomError, for the field, when a request sets a field that this configuration would not use.

        Only requests are checked: a stored configuration has every field spelled out.
        """
