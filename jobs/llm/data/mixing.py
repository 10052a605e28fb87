"""Several datasets in one training: the rows that an epoch takes from each.

Every dataset is tokenized by itself, so that each keeps its own cache of tokens. What is mixed are the tokenized rows: a row without
anything to train on has no share.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from jobs.llm.data.splits import TokenizedRows
from schema.dataset import TRAIN_SPLIT
from schema.mixing import count_mixed_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jobs.llm.training_context import TrainingContext

Row = TypeVar("Row")


@dataclass(frozen=True)
class MixedRows(Generic[Row]):
    """A split of several datasets. The counts are of the datasets' rows, each counted once."""

    rows: Sequence[Row]
    truncated: int
    dropped: int


class SelectedRows(Sequence[Row]):
    """Rows of several sequences, which are read as they are needed. `indices` (rows, 2) has the sequence of each, and the row in it."""

    def __init__(self, parts: Sequence[Sequence[Row]], indices: "NDArray[np.int64]") -> None:
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
            return [self[n] for n in range(*index.indices(len(self)))]
        part, row = self.indices[index]  # raises IndexError at the end, which ends an iteration
        return self.parts[part][int(row)]


def load_mixed(
    training: "TrainingContext", load: "Callable[[TrainingContext], Mapping[str, TokenizedRows[Row]]]"
) -> Mapping[str, TokenizedRows[Row]]:
    """The splits of all datasets, by `load`, which tokenizes those of one.

    Training rows are mixed by the weights. Held-out rows are those of all datasets in turn, so that the first ones, on which samples
    are generated and files compared, come from each.
    """
    if len(training.sources) < 2:
        return load(training)
    import numpy as np

    loaded = [load(training.for_source(source)) for source in training.sources]
    mixed: dict[str, TokenizedRows[Row]] = {}
    for name in sorted({name for splits in loaded for name in splits}):
        present = [splits[name] for splits in loaded if name in splits]
        parts: list[Sequence[Row]] = [splits[name].rows if name in splits else () for splits in loaded]
        row_counts = [len(part) for part in parts]
        indices = _choose_rows(training, row_counts) if name == TRAIN_SPLIT else take_turns(row_counts)
        mixed[name] = MixedRows(
            SelectedRows(parts, np.array(indices, np.int64).reshape(-1, 2)),
            truncated=sum(split.truncated for split in present),
            dropped=sum(split.dropped for split in present),
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


def take_turns(row_counts: Sequence[int]) -> list[tuple[int, int]]:
    """All rows of all datasets, as `mix_indices`: the first of each, the second of each, and so on."""
    longest = max(row_counts, default=0)
    return [(dataset, row) for row in range(longest) for dataset, count in enumerate(row_counts) if row < count]


def _choose_rows(training: "TrainingContext", row_counts: Sequence[int]) -> list[tuple[int, int]]:
    """The training rows of an epoch. Logs the decision."""
    sources = training.sources
    indices = mix_indices(row_counts, [source.weight for source in sources], training.config.hyperparameters.seed)
    taken = Counter(dataset for dataset, _ in indices)
    shares = [
        f"{taken[index]} rows of {source.dataset.processed_dataset_id}, which has {row_counts[index]}"
        for index, source in enumerate(sources)
    ]
    training.context.log_decision("dataset_mix", "; ".join(shares), "an epoch takes from each dataset in proportion to its weight")
    return indices
