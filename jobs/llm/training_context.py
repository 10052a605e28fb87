"""The inputs of a training, and the interface between the training loop and the trainers.

`prepare_training` downloads and detects what every trainer needs and returns it as a TrainingContext. Each trainer type builds a
TrainingTask from it, which `training_loop.run_training` trains.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from jobs.llm.base_model import fetch_base
from jobs.llm.data.tokenize import END_OF_TURN, START_OF_TURN, TokenizedExample, set_default_chat_template
from jobs.llm.evaluation.generation import Features
from jobs.llm.evaluation.prompts import EvalPrompt
from jobs.llm.exporters import check_exportable
from jobs.llm.hardware import DeviceConfig, detect_device
from jobs.llm.model import import_unsloth
from jobs.runtime.errors import JobFailed
from jobs.runtime.retry import download_with_retry
from jobs.runtime.training_control import TrainingControl
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.runtime.checkpoints import LocalCheckpoint
    from jobs.runtime.context import JobContext

Row = TypeVar("Row")

# How several processes arrive at the loss of one: every label of an optimizer step counts the same, every batch counts the same, or the
# library's trainer distributes the rows and normalizes the loss itself.
LossReduction = Literal["labels", "batches", "trainer"]


@dataclass(frozen=True)
class TrainingContext:
    """Prepared inputs: config, base model, dataset splits, tokenizer, device, checkpoint."""

    config: TrainingConfig
    context: "JobContext"
    base_folder: Path
    splits: dict[str, Path]  # split name -> JSONL file
    tokenizer: Any
    uses_default_chat_template: bool  # the base model has no chat template of its own
    device_config: DeviceConfig
    resume_checkpoint: "LocalCheckpoint | None"

    @property
    def pad_id(self) -> int:
        """The token that pads short rows."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def trains_adapter(self) -> bool:
        """Only an adapter is trained (LoRA, QLoRA), not the whole model."""
        return self.config.method != "Full"


class TrainingTask(Protocol):
    """What a trainer type adds to the shared loop: data, model, the library's trainer with its loss, and evaluation."""

    @property
    def examples_per_epoch(self) -> int:
        """Items the data loader yields per epoch: rows, or blocks of packed rows."""
        ...

    @property
    def held_out_examples(self) -> Sequence[TokenizedExample]:
        """Held-out rows as tokens: the source of evaluation prompts, and of the texts on which exported files are compared."""
        ...

    @property
    def has_held_out_rows(self) -> bool:
        """Whether there are held-out rows to evaluate on."""
        ...

    @property
    def train_examples(self) -> Sequence[TokenizedExample]:
        """Training rows as tokens, for the importance matrix and the row count."""
        ...

    def build_model(self, weights: Path) -> Any:
        """Load the model, with a new adapter if only an adapter is trained. `weights` is the base or a full-model checkpoint."""
        ...

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        """Build the library's trainer for this loss. Its class must be wrapped with `instrument`; its `model` is the trained model."""
        ...

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        """The metrics that the library's trainer collected since it last logged, by name."""
        ...

    @property
    def worker_task_factory(self) -> "Callable[[TrainingContext], TrainingTask]":
        """A picklable function that builds this task in a worker process, with only the data that training needs."""
        ...

    @property
    def loss_reduction(self) -> LossReduction:
        """How several processes arrive at the loss of one."""
        ...

    def count_tokens(self, inputs: Any) -> int:
        """The tokens of a batch, without padding."""
        ...

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        """Evaluate the model on the held-out rows. Calls `check_stop`, which may raise, before each batch."""
        ...


@runtime_checkable
class MultimodalTask(Protocol):
    """A task whose evaluation prompts contain images as well as tokens."""

    def eval_prompts(self, count: int) -> list[EvalPrompt]:
        """The prompts of the first `count` held-out rows; every call returns the same."""
        ...

    def prompt_features(self, eval_prompts: Sequence[EvalPrompt]) -> Sequence[Features]:
        """The model inputs of each prompt besides its tokens."""
        ...


class TokenizedRows(Protocol[Row]):
    """A tokenized split of any kind."""

    @property
    def rows(self) -> list[Row]:
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


def prepare_training(config: TrainingConfig, context: "JobContext") -> TrainingContext:
    """Download the checkpoint, base model and dataset, load the tokenizer and detect the device. Raises JobFailed and Stopped."""
    import_unsloth(config)

    from transformers import AutoTokenizer

    context.enter_phase("downloading")
    source = context.spec.export_of
    checkpoint = context.checkpoints.fetch(source) if source else context.checkpoints.fetch_latest()
    base_folder = fetch_base(context)
    check_exportable(config, base_folder)
    splits = {
        name: download_with_retry(context.stores.datasets, split.key, context.workdir / "data" / f"{name}.jsonl")
        for name, split in context.spec.dataset.splits.items()
    }
    context.enter_phase("tokenizing")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    uses_default_chat_template = set_default_chat_template(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device_config = detect_device(config, context, base_folder)
    return TrainingContext(config, context, base_folder, splits, tokenizer, uses_default_chat_template, device_config, checkpoint)


def check_splits(training: TrainingContext, splits: Mapping[str, TokenizedRows[Row]]) -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out rows. Warns about truncated and dropped rows; raises JobFailed without training rows."""
    for name, split in splits.items():
        warn_truncation(training, name, truncated=split.truncated, dropped=split.dropped)
    train_rows = splits[TRAIN_SPLIT].rows
    held_out = splits[EVAL_SPLIT].rows if EVAL_SPLIT in splits else []
    require_examples(training, len(train_rows), len(held_out))
    return train_rows, held_out


def warn_truncation(training: TrainingContext, split: str, *, truncated: int, dropped: int) -> None:
    """Warn about rows that were truncated or dropped."""
    max_length = training.config.hyperparameters.max_seq_length
    if truncated:
        message = f"{truncated} rows of {split} are longer than max_seq_length {max_length} and were truncated"
        training.context.warn("rows_truncated", message)
    if dropped:
        message = f"{dropped} rows of {split} have nothing to train on within max_seq_length {max_length} and were dropped"
        training.context.warn("rows_dropped", message)


def require_examples(training: TrainingContext, train_count: int, held_out_count: int) -> None:
    """Raises JobFailed without training rows. Without held-out rows, warns that the model is not evaluated."""
    if not train_count:
        raise JobFailed(
            "invalid_data", "no training row has anything to train on", "raise max_seq_length, or check the answers in the dataset"
        )
    if not held_out_count:
        message = "no held-out row has anything to evaluate on, so the model is not evaluated"
        training.context.warn("evaluation_skipped", message)


def untrained_special_tokens(training: TrainingContext, rows: Sequence[TokenizedExample]) -> list[int]:
    """Turn tokens that occur in the rows but were never trained in the base; their embeddings are trained with the adapter.

    In a base that was never trained on chats, their embeddings are nearly equal to those of other unused tokens, and LoRA on the
    layers between cannot tell them apart.
    """
    if not training.uses_default_chat_template:
        return []
    turn_tokens = set(training.tokenizer.convert_tokens_to_ids([START_OF_TURN, END_OF_TURN])) - {None, training.tokenizer.unk_token_id}
    token_ids = sorted(turn_tokens & {token for row in rows for token in row.input_ids})
    if token_ids:
        reason = "the base model has no chat template; the embeddings of the turn tokens are trained too"
        training.context.log_decision("chat_template", "gemma3", reason)
    return token_ids
