"""The datasets of a training, downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.runtime.retry import download_with_retry
from schema.dataset import Dataset

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext


@dataclass(frozen=True)
class DatasetSource:
    """A dataset with its weight among several, and its downloaded splits by name."""

    dataset: Dataset
    weight: float
    splits: dict[str, Path]


def download_sources(context: "JobContext") -> tuple[DatasetSource, ...]:
    """Download every dataset of the job. Raises JobFailed."""
    folder = context.workdir / "data"
    sources: list[DatasetSource] = []
    for index, each in enumerate(context.spec.datasets):
        prefix = f"{index}-" if index else ""
        splits = {
            name: download_with_retry(context.stores.datasets, split.key, folder / f"{prefix}{name}.jsonl")
            for name, split in each.dataset.splits.items()
        }
        sources.append(DatasetSource(each.dataset, each.weight, splits))
    return tuple(sources)


def list_split_paths(sources: Sequence[DatasetSource]) -> list[Path]:
    """The files of all splits of all datasets."""
    return [path for source in sources for path in source.splits.values()]
