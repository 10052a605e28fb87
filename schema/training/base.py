"""What the configuration of every family has, whatever it trains.

The service and the runtime read a configuration through `BaseTrainingConfig` only. A family that has no base model, no epochs or no
checkpoints keeps the defaults here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast, get_args

from pydantic import Field, JsonValue

from schema.base import Strict
from schema.training.evaluation import BaseEvalConfig
from schema.training.export import BaseExportConfig
from schema.training.trackers import MlflowConfig, TensorboardConfig, TrackioConfig, WandbConfig
from schema.types import ArtifactKind, DatasetType, Phase

# The hyperparameters in which the length of a training may be counted; they may grow between two attempts.
LENGTH_UNITS = ("epochs", "max_steps")


@dataclass(frozen=True)
class ArtifactKindInfo:
    """A kind of artifact that a family makes."""

    name: ArtifactKind
    folder: str  # in the model bucket; several kinds may share one


@dataclass(frozen=True)
class TrainingSummary:
    """What lists, ids and views show of a configuration; empty where the family has no such thing."""

    base_model_id: str = ""
    modality: str = ""
    method: str = ""


class BaseHyperparameters(Strict):
    """Hyperparameters of every trainer type."""

    seed: int = Field(3407, ge=0, le=2**31 - 1, description="Seeds weights, shuffling and dropout.")
    save_total_limit: int = Field(2, ge=1, le=100, description="How many of the newest checkpoints to keep, besides the best.")


class BaseTrainingConfig(Strict):
    """Base of every trainer type's configuration. Subclasses add `trainer_type`, hyperparameters, evaluation and exports."""

    family: ClassVar[str]
    environment: ClassVar[str]  # the folder of jobs/environments/ that has its packages
    # The functions of the family, as "module:function"; jobs/runtime/family.py says what each of them does.
    train: ClassVar[str]
    check_export: ClassVar[str]
    export: ClassVar[str]
    probe: ClassVar[str]
    predict: ClassVar[str | None] = None
    dataset_types: ClassVar[tuple[DatasetType, ...]]  # the dataset types that it can train on
    modalities: ClassVar[tuple[str, ...]] = ()  # what `summarize().modality` may be
    artifact_kinds: ClassVar[tuple[ArtifactKindInfo, ...]]  # a download without a name returns the first kind that the job has
    resume_only_files: ClassVar[tuple[str, ...]] = ()  # large files of a checkpoint that only a continued training reads, not an export
    out_of_memory_hint: ClassVar[str] = "request hardware with more memory"
    phases: ClassVar[tuple[Phase, ...]]  # what an attempt may report to be doing, in the usual order

    hyperparameters: BaseHyperparameters = BaseHyperparameters()  # type: ignore[call-arg]  # pyright: every field has a default
    export_config: BaseExportConfig = BaseExportConfig()  # type: ignore[call-arg]
    eval_config: BaseEvalConfig = BaseEvalConfig()  # type: ignore[call-arg]
    wandb_config: WandbConfig | None = None
    mlflow_config: MlflowConfig | None = None
    tensorboard_config: TensorboardConfig | None = None
    trackio_config: TrackioConfig | None = None

    def reject_unused_fields(self) -> None:
        """Raise a PydanticCustomError, for the field, when a request sets a field that this configuration would not use.

        Only requests are checked: a stored configuration has every field spelled out.
        """

    def reject_unused_export(self) -> None:
        """As `reject_unused_fields`, for the `export_config` of a later request to export a checkpoint of such a job."""

    def summarize(self) -> TrainingSummary:
        """What lists, ids and views show."""
        return TrainingSummary()

    def computed_defaults(self) -> Mapping[str, JsonValue]:
        """Values that the configuration filled in because the request left them out, nested as its fields.

        A clone does not repeat them, so that they follow its changes.
        """
        return {}

    @property
    def length_unit(self) -> str | None:
        """The one of LENGTH_UNITS in which this training's length is counted; None: it cannot be extended."""
        return None

    @property
    def hub_model_id(self) -> str | None:
        """The model that the job downloads from the Hugging Face Hub unless the model store has it; None: it downloads none."""
        return None

    @property
    def earlier_job_id(self) -> str | None:
        """The earlier job whose model a request asks to start from; None: it names no job.

        The stored configuration of a job names the original base instead, and `Job.earlier_model` the model that it starts from.
        """
        return None

    @classmethod
    def trainer_type_name(cls) -> str:
        """The value of `trainer_type`, which each subclass declares as a Literal."""
        return get_args(cls.model_fields["trainer_type"].annotation)[0]

    @classmethod
    def hyperparameter_names(cls) -> frozenset[str]:
        """The names of this trainer type's hyperparameters."""
        return frozenset(cast(type[BaseHyperparameters], cls.model_fields["hyperparameters"].annotation).model_fields)

    @classmethod
    def recommends_artifact(cls, name: str, fidelity: Mapping[str, JsonValue] | None) -> bool:  # noqa: ARG003  # for families
        """Whether a download without a name takes this artifact before those that the family does not recommend."""
        return True

    @classmethod
    def artifact_folder(cls, kind: ArtifactKind) -> str:
        """The folder of the model bucket for artifacts of that kind."""
        return next(info.folder for info in cls.artifact_kinds if info.name == kind)

    @classmethod
    def artifact_folders(cls) -> tuple[str, ...]:
        """The folders of the model bucket that hold artifacts of this trainer type."""
        return tuple(dict.fromkeys(info.folder for info in cls.artifact_kinds))
