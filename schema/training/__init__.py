"""`training_config` of a request: what to train, how, and what to publish.

One file per family, the parts that families share, and the union of all config classes, discriminated by `trainer_type`. Code that runs
a config does not belong here.
"""

from typing import Annotated, cast

from pydantic import BeforeValidator, Field, TypeAdapter

from schema.training.base import BaseTrainingConfig
from schema.training.llm import DpoConfig, GrpoConfig, KtoConfig, LlmTrainingConfig, OrpoConfig, RewardConfig, SftConfig

DEFAULT_TRAINER_TYPE = "sft"


def _add_default_trainer_type(value: object) -> object:
    if isinstance(value, dict) and "trainer_type" not in value:
        return {"trainer_type": DEFAULT_TRAINER_TYPE, **cast(dict[str, object], value)}
    return value  # pyright: ignore[reportUnknownVariableType]  # any JSON value


TrainingConfig = Annotated[
    Annotated[SftConfig | DpoConfig | OrpoConfig | KtoConfig | GrpoConfig | RewardConfig, Field(discriminator="trainer_type")],
    BeforeValidator(_add_default_trainer_type),
]
TRAINING_CONFIG: TypeAdapter[TrainingConfig] = TypeAdapter(TrainingConfig)
TRAINER_TYPES: dict[str, type[LlmTrainingConfig]] = {
    "sft": SftConfig,
    "dpo": DpoConfig,
    "orpo": OrpoConfig,
    "kto": KtoConfig,
    "grpo": GrpoConfig,
    "reward": RewardConfig,
}

__all__ = [
    "TRAINER_TYPES",
    "TRAINING_CONFIG",
    "BaseTrainingConfig",
    "DpoConfig",
    "GrpoConfig",
    "KtoConfig",
    "LlmTrainingConfig",
    "OrpoConfig",
    "RewardConfig",
    "SftConfig",
    "TrainingConfig",
]
