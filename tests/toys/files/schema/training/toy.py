"""Training configurations of the toy family, which counts rows."""

from typing import ClassVar, Literal

from pydantic import Field

from schema.base import Strict
from schema.training.base import ArtifactKindInfo, BaseHyperparameters, BaseTrainingConfig
from schema.training.export import BaseExportConfig
from schema.types import DatasetType, Phase


class ToyHyperparameters(BaseHyperparameters):
    """How long to count."""

    max_steps: int = Field(40, ge=1)
    step_s: float = Field(0.05, ge=0)


class ToyExportConfig(BaseExportConfig):
    """In which form the count is published."""

    format: Literal["text"] = "text"


class ToyTrackerConfig(Strict):
    """The toy tracker."""

    name: str


class CounterConfig(BaseTrainingConfig):
    """Counts up."""

    family: ClassVar[str] = "toy"
    environment: ClassVar[str] = "toy"
    train: ClassVar[str] = "jobs.toy.trainer:count_up"
    check_export: ClassVar[str] = "jobs.toy.exporters:check_exportable"
    export: ClassVar[str] = "jobs.toy.exporters:export_all"
    probe: ClassVar[str] = "jobs.toy.probe:probe"
    dataset_types: ClassVar[tuple[DatasetType, ...]] = ("messages",)
    artifact_kinds: ClassVar[tuple[ArtifactKindInfo, ...]] = (ArtifactKindInfo("count", "toy_counts"),)
    phases: ClassVar[tuple[Phase, ...]] = ("counting", "uploading")

    trainer_type: Literal["toy_counter"]
    hyperparameters: ToyHyperparameters = ToyHyperparameters()  # type: ignore[call-arg]
    export_config: ToyExportConfig = ToyExportConfig()  # type: ignore[call-arg]
    toy_config: ToyTrackerConfig | None = None

    @property
    def length_unit(self) -> str | None:
        return "max_steps"


class DoublerConfig(CounterConfig):
    """A second trainer type: counts by two."""

    train: ClassVar[str] = "jobs.toy.trainer:count_by_two"

    trainer_type: Literal["toy_doubler"]  # type: ignore[assignment]
