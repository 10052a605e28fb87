"""Checks for the toy family."""

from typing import Any

from schema.capabilities import FamilyCapabilities
from schema.dataset import Dataset
from service.core.errors import InvalidRequest
from service.core.ports import Profile
from service.core.validation.common import check_dataset_type
from storage import ObjectStore


def check_job(config: Any, dataset: Dataset, models: ObjectStore) -> None:
    check_dataset_type(config, dataset)
    if config.hyperparameters.max_steps == 13:
        raise InvalidRequest("13 brings bad luck", param="training_config.hyperparameters.max_steps")


def check_support(config: Any, capabilities: FamilyCapabilities, profile: Profile) -> None:
    """Runs everywhere."""
