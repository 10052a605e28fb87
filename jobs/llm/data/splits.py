"""Checks the tokenized splits of a dataset before training, and warns about rows that were truncated or dropped."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from jobs.llm.data.arrow_rows import find_tokens
from jobs.llm.data.tokenize import TokenizedExample
from jobs.runtime.errors import JobFailed
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT

if TYPE_CHECKING:
    from jobs.llm.training_context import TrainingContext

Row = TypeVar("Row", covariant=True)


class TokenizedRows(Protocol[Row]):
    """A tokenized split of any kind."""

    @property
    def rows(self) -> Sequence[Row]:
        """The rows with something to train on."""
        ...

    @property
    def truncated(self) -> int:
        """How many rows were cut to max_seq_length."""
        ...

    @property
    def dropped(self) -> int:
        """How many rows were left out because nothing to train on is left of them."""
        ...


def check_splits(training: "TrainingContext", splits: Mapping[str, TokenizedRows[Row]]) -> tuple[Sequence[Row], Sequence[Row]]:
    """The training rows and the held-out rows. Warns about truncated and dropped rows; raises JobFailed without training rows."""
    for name, split in splits.items():
        warn_truncation(training, name, truncated=split.truncated, dropped=split.dropped)
    train_rows = splits[TRAIN_SPLIT].rows
    held_out = splits[EVAL_SPLIT].rows if EVAL_SPLIT in splits else []
    require_examples(training, len(train_rows), len(held_out))
    return train_rows, held_out


def warn_truncation(training: "TrainingContext", split: str, *, truncated: int, dropped: int) -> None:
    """Warn about rows that were truncated or dropped."""
    max_length = training.config.hyperparameters.max_seq_length
    if truncated:
        message = f"{truncated} rows of {split} are longer than max_seq_length {max_length} and were truncated"
        training.context.warn("rows_truncated", message)
    if dropped:
        message = f"{dropped} rows of {split} have nothing to train on within max_seq_length {max_length} and were dropped"
        training.context.warn("rows_dropped", message)


def require_examples(training: "TrainingContext", train_count: int, held_out_count: int) -> None:
    """Raises JobFailed without training rows. Without held-out rows, warns that the model is not evaluated."""
    if not train_count:
        raise JobFailed(
            "invalid_data", "no training row has anything to train on", "raise max_seq_length, or check the answers in the dataset"
        )
    if not held_out_count:
        message = "no held-out row has anything to evaluate on, so the model is not evaluated"
        training.context.warn("evaluation_skipped", message)


def untrained_special_tokens(training: "TrainingContext", rows: Iterable[TokenizedExample]) -> list[int]:
    """Turn tokens that occur in the rows but were never trained in the base; their embeddings are trained with the adapter.

    In a base that was never trained on chats, their embeddings are nearly equal to those of other unused tokens, and LoRA on the
    layers between cannot tell them apart.
    """
    chat_format = training.chat_format
    if chat_format.turn_tokens_are_trained:
        return []
    return sorted(find_tokens(rows, chat_format.turn_token_ids))
