"""`training_config` of a request: what to train, how, and what to publish.

One or more files per family (`llm*.py`), the parts that families share, and the union of all config classes, discriminated by
`trainer_type`. To add a trainer type, import its class and add it to the union; everything else is derived from that. Code that runs a
config does not belong here.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Union, cast, get_args

from pydantic import BeforeValidator, Field, TypeAdapter

from schema.training.base import BaseTrainingConfig
from schema.training.export import BaseExportConfig
from schema.training.ingest import IngestConfig
from schema.training.llm import DpoConfig, GrpoConfig, KtoConfig, LlmTrainingConfig, OrpoConfig, RewardConfig, SftConfig

AnyTrainingConfig = SftConfig | DpoConfig | OrpoConfig | KtoConfig | GrpoConfig | RewardConfig

DEFAULT_TRAINER_TYPE = "sft"


def _add_default_trainer_type(value: object) -> object:
    if isinstance(value, dict) and "trainer_type" not in value:
        return {"trainer_type": DEFAULT_TRAINER_TYPE, **cast(dict[str, object], value)}
    return value  # pyright: ignore[reportUnknownVariableType]  # any JSON value


TrainingConfig = Annotated[
    Annotated[AnyTrainingConfig, Field(discriminator="trainer_type")],
    BeforeValidator(_add_default_trainer_type),
]
TRAINING_CONFIG: TypeAdapter[TrainingConfig] = TypeAdapter(TrainingConfig)
# What a job and its spec have: a training, or the ingestion of a dataset, which no request to train can name.
AnyJobConfig = AnyTrainingConfig | IngestConfig
JobConfig = Annotated[
    Annotated[AnyJobConfig, Field(discriminator="trainer_type")],
    BeforeValidator(_add_default_trainer_type),
]
# Of a spec, which the family that it names reads: to a type checker it is a training, so that no family of trainers must narrow it.
if TYPE_CHECKING:
    SpecConfig = TrainingConfig
else:
    SpecConfig = JobConfig


def _group_by_family(classes: Iterable[type[BaseTrainingConfig]]) -> dict[str, tuple[type[BaseTrainingConfig], ...]]:
    families: dict[str, tuple[type[BaseTrainingConfig], ...]] = {}
    for config in classes:
        families[config.family] = (*families.get(config.family, ()), config)
    return families


_CLASSES: tuple[type[BaseTrainingConfig], ...] = get_args(AnyTrainingConfig)
TRAINER_TYPES = {config.trainer_type_name(): config for config in _CLASSES}
# What an attempt can run.
JOB_TYPES: dict[str, type[BaseTrainingConfig]] = {**TRAINER_TYPES, IngestConfig.trainer_type_name(): IngestConfig}
FAMILIES = _group_by_family(_CLASSES)  # family → its config classes

# What a request to export a checkpoint may send; the job that it names decides which of the classes it must be.
if TYPE_CHECKING:
    AnyExportConfig = BaseExportConfig
else:
    AnyExportConfig = Union[tuple(config.model_fields["export_config"].annotation for config in TRAINER_TYPES.values())]  # noqa: UP007
DEFAULT_EXPORT_CONFIG: BaseExportConfig = TRAINER_TYPES[DEFAULT_TRAINER_TYPE].model_fields["export_config"].default

__all__ = [
    "DEFAULT_EXPORT_CONFIG",
    "FAMILIES",
    "JOB_TYPES",
    "TRAINER_TYPES",
    "TRAINING_CONFIG",
    "AnyExportConfig",
    "AnyJobConfig",
    "AnyTrainingConfig",
    "BaseTrainingConfig",
    "DpoConfig",
    "GrpoConfig",
    "IngestConfig",
    "JobConfig",
    "KtoConfig",
    "LlmTrainingConfig",
    "OrpoConfig",
    "RewardConfig",
    "SftConfig",
    "SpecConfig",
    "TrainingConfig",
]
