"""Several datasets in one training: the rows that an epoch takes from each.

Every dataset is tokenized by itself, so that each keeps its own cache of tokens. What is mixed are the tokenized rows: a row without
anything to train on has no share.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from jobs.llm.data.splits import TokenizedRows
from jobs.runtime.retry import download_with_retry
from schema.dataset import TRAIN_SPLIT, Dataset
from schema.mixing import count_mixed_rows

if TYPE_CHECKING:
    from jobs.llm.training_context import TrainingContext
    from jobs.runtime.context import JobContext

Row = TypeVar("Row")


@dataclass(frozen=True)
class DatasetSource:
    """A dataset with its weight among several, and its downloaded splits by name."""

    dataset: Dataset
    weight: float
    splits: dict[str, Path]


@dataclass(frozen=True)
class MixedRows(Generic[Row]):
    """A split of several datasets. The counts are of the datasets' rows, each counted once."""

    rows: Sequence[Row]
    truncated: int
    dropped: int


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


def load_mixed(
    training: "TrainingContext", load: "Callable[[TrainingContext], Mapping[str, TokenizedRows[Row]]]"
) -> Mapping[str, TokenizedRows[Row]]:
    """The splits of all datasets, by `load`, which tokenizes those of one.

    Training rows are mixed by the weights. Held-out rows are those of all datasets in turn, so that the first ones, on which samples
    are generated and files compared, come from each.
    """
    if len(training.sources) < 2:
        return load(training)
    loaded = [load(training.for_source(source)) for source in training.sources]
    mixed: dict[str, TokenizedRows[Row]] = {}
    for name in sorted({name for splits in loaded for name in splits}):
        splits = {index: splits[name] for index, splits in enumerate(loaded) if name in splits}
        rows = {index: split.rows for index, split in splits.items()}
        mixed[name] = MixedRows(
            _mix_rows(training, rows) if name == TRAIN_SPLIT else take_turns(list(rows.values())),
            truncated=sum(split.truncated for split in splits.values()),
            dropped=sum(split.dropped for split in splits.values()),
        )
    return mixed


def mix_indices(row_counts: Sequence[int], weights: Sequence[float], seed: int) -> list[tuple[int, int]]:
    """The rows of an epoch, as pairs of a dataset's index and a row's, in order.

    There are as many as all datasets have, and from each in proportion to its weight: whole passes over its rows, and for the rest a
    sample without repetition. A dataset without rows has no share.
    """
    present = [index for index, count in enumerate(row_counts) if count]
    counts = count_mixed_rows([row_counts[index] for index in present], [weights[index] for index in present])
    indices: list[tuple[int, int]] = []
    for index, count in zip(present, counts, strict=True):
        passes, rest = divmod(count, row_counts[index])
        extra = Random(f"{seed}/{index}").sample(range(row_counts[index]), rest)  # noqa: S311  # not a secret
        indices += [(index, row) for row in sorted([*list(range(row_counts[index])) * passes, *extra])]
    return indices


def take_turns(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of all parts: the first of each, the second of each, and so on."""
    missing = object()
    return [row for row in chain(*zip_longest(*parts, fillvalue=missing)) if row is not missing]  # pyright: ignore[reportReturnType]


class SelectedRows(Sequence[Row]):
    """Rows of several sequences, read when they are asked for. `indices` has a sequence's number and a row's for each of them."""

    def __init__(self, parts: Mapping[int, Sequence[Row]], indices: Sequence[tuple[int, int]]) -> None:
        self.parts = parts
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.parts[part][row] for part, row in self.indices[index]]
        part, row = self.indices[index]
        return self.parts[part][row]


def _mix_rows(training: "TrainingContext", rows: Mapping[int, Sequence[Row]]) -> Sequence[Row]:
    sources, config = training.sources, training.config
    row_counts = [len(rows.get(index, ())) for index in range(len(sources))]
    indices = mix_indices(row_counts, [source.weight for source in sources], config.hyperparameters.seed)
    taken = [sum(index == dataset for dataset, _ in indices) for index in range(len(sources))]
    shares = [
        f"{count} rows of {source.dataset.processed_dataset_id}, which has {available}"
        for source, count, available in zip(sources, taken, row_counts, strict=True)
    ]
    training.context.log_decision("dataset_mix", "; ".join(shares), "an epoch takes from each dataset in proportion to its weight")
    return SelectedRows(rows, indices)
