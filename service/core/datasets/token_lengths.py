"""The token lengths of a stored dataset, by the tokenizer of a base model."""

from hashlib import sha256

from pydantic import ValidationError

from schema.dataset import Dataset
from schema.ingestion import TokenLengths
from storage import NoSuchObject, ObjectStore


def token_lengths_key(dataset_id: str, base_model_id: str) -> str:
    """Where the lengths are stored, in the dataset bucket."""
    return f"datasets/{dataset_id}/token_lengths/{sha256(base_model_id.encode()).hexdigest()[:16]}.json"


def find_token_lengths(objects: ObjectStore, dataset: Dataset, base_model_id: str) -> TokenLengths | None:
    """The lengths of a dataset's rows by the tokenizer of that base; None if they were not counted. Raises StorageError."""
    try:
        return TokenLengths.load(objects.read(token_lengths_key(dataset.processed_dataset_id, base_model_id)))
    except (NoSuchObject, ValidationError):
        return None
