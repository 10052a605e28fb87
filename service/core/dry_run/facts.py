"""What is known before a job: the base, the datasets, and the lengths of their rows where a tokenizer counted them."""

from collections.abc import Sequence
from dataclasses import dataclass

from schema.dataset import Dataset, WeightedDataset
from schema.ingestion import TokenLengths
from service.core.datasets.token_lengths import find_token_lengths
from service.core.models.sizes import StoredBase
from storage import ObjectStore, StorageError


@dataclass(frozen=True)
class JobFacts:
    """What a plan is made from."""

    base: StoredBase | None  # None: the model store does not have it
    datasets: tuple[WeightedDataset, ...]
    token_lengths: tuple[TokenLengths | None, ...]  # of each dataset; None: not counted with this base's tokenizer


def read_token_lengths(objects: ObjectStore, datasets: Sequence[WeightedDataset], base_model_id: str) -> tuple[TokenLengths | None, ...]:
    """The token lengths of each dataset by the base's tokenizer, where they were counted. A store that does not answer has none."""
    return tuple(_find(objects, each.dataset, base_model_id) for each in datasets)


def _find(objects: ObjectStore, dataset: Dataset, base_model_id: str) -> TokenLengths | None:
    try:
        return find_token_lengths(objects, dataset, base_model_id)
    except StorageError:
        return None
