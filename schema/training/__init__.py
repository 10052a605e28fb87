"""`training_config` of the request: what to train, how, and what to hand back.

One file per family, and the union of their config classes, told apart by `trainer_type`. Code that obeys a config does not belong here.
"""

from schema.training.llm import (
    TRAINER_TYPES,
    TRAINING_CONFIG,
    DpoConfig,
    GrpoConfig,
    KtoConfig,
    LlmTrainingConfig,
    OrpoConfig,
    RewardConfig,
    SftConfig,
    TrainingConfig,
)

__all__ = [
    "TRAINER_TYPES",
    "TRAINING_CONFIG",
    "DpoConfig",
    "GrpoConfig",
    "KtoConfig",
    "LlmTrainingConfig",
    "OrpoConfig",
    "RewardConfig",
    "SftConfig",
    "TrainingConfig",
]
