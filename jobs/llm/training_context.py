"""The inputs of a training, and the interface between the training loop and the trainers.

`prepare_training` downloads and detects what every trainer needs and returns it as a TrainingContext. Each trainer type builds a
TrainingTask from it, which `training_loop.run_training` trains.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from jobs.llm.chat_format import ChatFormat, choose_chat_format, read_template
from jobs.llm.chat_templates import check_chat_template
from jobs.llm.data.sources import DatasetSource, download_sources, list_split_paths
from jobs.llm.data.tokenize import RowTokenizer, TokenizedExample
from jobs.llm.data.turns import sample_rows
from jobs.llm.earlier_model import fetch_starting_model
from jobs.llm.evaluation.generation import Features
from jobs.llm.evaluation.prompts import EvalPrompt
from jobs.llm.exporters import check_exportable
from jobs.llm.hardware import DeviceConfig, detect_device
from jobs.llm.model import import_unsloth
from jobs.llm.remote_code import forbid_remote_code
from jobs.runtime.errors import JobFailed
from jobs.runtime.training_control import TrainingControl
from schema.dataset import Dataset
from schema.estimate.llm_memory import LongestRows
from schema.job import EvalMetrics
from schema.training import SftConfig, TrainingConfig

if TYPE_CHECKING:
    from jobs.runtime.checkpoints import LocalCheckpoint
    from jobs.runtime.context import JobContext

# How several processes compute the loss of a single one: every label of an optimizer step counts the same, every batch counts the same,
# or the library's trainer distributes the rows and normalizes the loss itself.
LossReduction = Literal["labels", "batches", "trainer"]


@dataclass(frozen=True)
class TrainingContext:
    """Prepared inputs: config, base model, dataset splits, tokenizer, device, checkpoint."""

    config: TrainingConfig
    context: "JobContext"
    base_folder: Path
    splits: dict[str, Path]  # split name -> JSONL file; of several datasets the first
    tokenizer: Any
    chat_format: ChatFormat
    device_config: DeviceConfig
    resume_checkpoint: "LocalCheckpoint | None"
    sources: tuple[DatasetSource, ...] = ()  # all datasets; one or none means that `splits` are everything

    @property
    def dataset(self) -> Dataset:
        """The dataset of `splits`."""
        return self.sources[0].dataset if self.sources else self.context.spec.dataset

    def for_source(self, source: DatasetSource) -> "TrainingContext":
        """The same training, with one of its datasets alone."""
        return replace(self, splits=source.splits, sources=(source,))

    @property
    def pad_id(self) -> int:
        """The token that pads short rows."""
        return int(self.tokenizer.pad_token_id or 0)

    @cached_property
    def row_tokenizer(self) -> RowTokenizer:
        """Turns rows into tokens and labels; other processes get a copy."""
        tokenizer = RowTokenizer(self.tokenizer, self.chat_format)
        if not isinstance(self.config, SftConfig):
            return tokenizer
        return replace(tokenizer, train_on_inputs=self.config.train_on_inputs, last_turn_only=self.config.last_turn_only)

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

    def find_longest_rows(self, count: int) -> LongestRows:
        """The longest `count` training rows, which decide how much memory a batch takes."""
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
        """How several processes compute the loss of a single one."""
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


def prepare_training(config: TrainingConfig, context: "JobContext") -> TrainingContext:
    """Download the checkpoint, base model and dataset, load the tokenizer and detect the device. Raises JobFailed and Stopped."""
    import_unsloth(config)
    forbid_remote_code()
    context.enter_phase("downloading")
    source = context.spec.export_of
    checkpoint = context.checkpoints.fetch(source) if source else context.checkpoints.fetch_latest()
    base_folder = fetch_starting_model(context)
    check_exportable(config, base_folder)
    sources = download_sources(context)
    context.enter_phase("tokenizing")
    tokenizer = load_tokenizer(base_folder, config.base_model_id)
    chat_format = decide_chat_format(tokenizer, config, context, list_split_paths(sources))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device_config = detect_device(config, context)
    return TrainingContext(config, context, base_folder, sources[0].splits, tokenizer, chat_format, device_config, checkpoint, sources)


def decide_chat_format(tokenizer: Any, config: TrainingConfig, context: "JobContext", paths: Sequence[Path]) -> ChatFormat:
    """The form of the rows, after a check of the template that may be hostile. The tokenizer gets the template. Raises JobFailed."""
    sample = sample_rows(paths, context.spec.dataset.dataset_type, is_raw=config.prompt_format == "raw")
    check_chat_template(read_template(tokenizer, config.chat_template), tokenizer, config, sample, context.workdir / "data")
    chat_format = choose_chat_format(tokenizer, config, sample)
    context.log_decision("chat_template", chat_format.name, chat_format.reason)
    return chat_format


def load_tokenizer(base_folder: Path, base_model_id: str) -> Any:
    """The base model's tokenizer. Raises JobFailed for one that transformers cannot load without code of its repository."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base_folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:200]
        message = f"the tokenizer of base model {base_model_id} cannot be loaded: {reason}"
        hint = "use another base_model_id; code of a model's repository is never run"
        raise JobFailed("invalid_config", message, hint) from error
