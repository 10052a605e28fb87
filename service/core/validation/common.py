"""Checks for every job: the dataset's type, and which models are stored."""

from schema.dataset import Dataset
from schema.training import TRAINER_TYPES, BaseTrainingConfig
from service.core.errors import InvalidRequest
from storage import ObjectStore


def check_dataset_type(config: BaseTrainingConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when the trainer cannot train on a dataset of that type."""
    if dataset.dataset_type not in config.dataset_types:
        matching = [name for name, trainer in TRAINER_TYPES.items() if dataset.dataset_type in trainer.dataset_types]
        raise InvalidRequest(
            f"trainer_type {config.trainer_type_name()!r} needs a dataset of {' or '.join(config.dataset_types)}; "
            f"{dataset.processed_dataset_id} is {dataset.dataset_type}",
            hint=f"trainer_type {' or '.join(matching)} trains on {dataset.dataset_type}" if matching else "",
            param="processed_dataset_id",
        )


def is_stored(models: ObjectStore, model_id: str) -> bool:
    """Whether the deployment's model store has a copy of a model of the Hub. Raises StorageError."""
    return models.stat(f"pretrained_weights/huggingface/{model_id}/config.json") is not None
