"""Supervised fine-tuning: learn to say what the rows say.

    1. rows to tokens and labels, packed if asked for
    2. the loss at labelled positions, every label of an optimizer step counting the same
    3. held-out rows measured in the same way

With images it is another matter, and in `vision.py`.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.cache import load_or_tokenize_split
from jobs.llm.data.tokenize import TokenizedExample
from jobs.llm.distributed import LossReduction
from jobs.llm.loss import ChunkedLmHeadLoss, collate, evaluate_likelihood
from jobs.llm.model import add_adapter, load_base, lora_config
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_loop import (
    TrainingContext,
    prepare_training,
    require_examples,
    run_training,
    untrained_special_tokens,
    warn_truncation,
)
from jobs.runtime.training_control import TrainingControl
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics
from schema.training import SftConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext


def train(config: SftConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    if config.modality == "vision":
        from jobs.llm.trainers.vision import train as train_on_images

        return train_on_images(config, context)
    ground = prepare_training(config, context)
    return run_training(_build_task(ground), ground)


@dataclass(frozen=True)
class SftTask:
    """Rows to be said, and the likelihood of saying them."""

    training: TrainingContext
    train_examples: list[TokenizedExample]
    held_out_examples: list[TokenizedExample]  # held-out rows
    blocks: list[list[TokenizedExample]]  # the train rows as they go through the model: one by one, or packed
    trainable_token_ids: list[int]

    @property
    def examples_per_epoch(self) -> int:
        return len(self.blocks)

    @property
    def has_held_out_rows(self) -> bool:
        return bool(self.held_out_examples)

    @property
    def worker_task_factory(self) -> "Callable[[TrainingContext], SftTask]":
        return partial(SftTask, train_examples=[], held_out_examples=[], blocks=self.blocks, trainable_token_ids=self.trainable_token_ids)

    @property
    def loss_reduction(self) -> LossReduction:
        return "labels"

    def build_model(self, weights: Path) -> Any:
        config = self.training.config
        model = load_base(config, self.training.device_config, weights)
        if config.method == "Full":
            return model
        return add_adapter(model, config, lora_config(config, model, trainable_token_ids=self.trainable_token_ids))

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        from transformers import Trainer, TrainingArguments

        knobs, pad_id = self.training.config.hyperparameters, self.training.pad_id
        head = ChunkedLmHeadLoss(model)

        class SftTrainer(Trainer):
            """Transformers' trainer with the loss at labelled positions."""

            def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
                inputs.pop("non_padding_tokens")
                loss = head.compute_loss(model, inputs, inputs.pop("labels"), num_items_in_batch)
                if num_items_in_batch is not None:  # counted over all processes, whose gradients are averaged
                    loss = loss * self.accelerator.num_processes
                return (loss, None) if return_outputs else loss

        trainer = instrument(SftTrainer)(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=self.blocks,
            eval_dataset=self.held_out_examples or None,
            # FlashAttention tells packed rows apart in a single sequence only: for it a batch is one long block.
            data_collator=lambda batch: collate([list(chain(*batch))] if knobs.packing and knobs.use_fa2 else batch, pad_id),
            processing_class=self.training.tokenizer,
        )
        trainer.model_accepts_loss_kwargs = True  # the loss is divided by all labels of an optimizer step, not by micro-batch
        return trainer

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return {}  # the library gathers nothing beside the loss

    def count_tokens(self, inputs: Any) -> int:
        return int(inputs["non_padding_tokens"])

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        return evaluate_likelihood(trainer.model, self.held_out_examples, self.training.pad_id, self.training.config, check_stop)


def _build_task(training: TrainingContext) -> SftTask:
    """Rows to tokens and labels. Raises JobFailed when there is nothing to learn in them."""
    knobs = training.config.hyperparameters
    rendered = load_or_tokenize_split(training, training.context.spec.dataset.dataset_type)
    for name, found in rendered.items():
        warn_truncation(training, name, found)
    train_rows = rendered[TRAIN_SPLIT].rows
    held_out = rendered[EVAL_SPLIT].rows if EVAL_SPLIT in rendered else []
    require_examples(training, len(train_rows), len(held_out))
    blocks = pack_examples(train_rows, knobs.max_seq_length) if knobs.packing else [[row] for row in train_rows]
    return SftTask(training, train_rows, held_out, blocks, untrained_special_tokens(training, train_rows))


def pack_examples(rows: Sequence[TokenizedExample], max_length: int) -> list[list[TokenizedExample]]:
    """Rows in blocks of at most `length` tokens, by best fit, longest first."""
    from bisect import bisect_left, insort

    free: list[tuple[int, int]] = []  # (tokens left, block), ascending
    blocks: list[list[TokenizedExample]] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        size = len(row.input_ids)
        best = bisect_left(free, (size, -1))
        left, block = free.pop(best) if best < len(free) else (max_length, len(blocks))
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(row)
        insort(free, (left - size, block))
    return blocks
