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

from jobs.data.cache import render_cached
from jobs.data.render import TokenRow
from jobs.trained import TrainedModel
from jobs.trainers.course import Course
from jobs.trainers.likelihood import LabelledHead, collate, measure
from jobs.trainers.loop import Ground, lay_ground, new_tokens, refuse_nothing_to_learn, teach, tell_losses
from jobs.trainers.model import adapt, adapter_config, load_base
from jobs.trainers.several import Evenly
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics
from schema.training import SftConfig

if TYPE_CHECKING:
    from jobs.context import JobContext


def train(config: SftConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    if config.modality == "vision":
        from jobs.trainers.vision import train as train_on_images

        return train_on_images(config, context)
    ground = lay_ground(config, context)
    return teach(_prepare(ground), ground)


@dataclass(frozen=True)
class SftLesson:
    """Rows to be said, and the likelihood of saying them."""

    ground: Ground
    train_rows: list[TokenRow]
    shown: list[TokenRow]  # held-out rows
    blocks: list[list[TokenRow]]  # the train rows as they go through the model: one by one, or packed
    new_tokens: list[int]

    @property
    def items(self) -> int:
        return len(self.blocks)

    @property
    def is_measured(self) -> bool:
        return bool(self.shown)

    @property
    def recipe(self) -> "Callable[[Ground], SftLesson]":
        return partial(SftLesson, train_rows=[], shown=[], blocks=self.blocks, new_tokens=self.new_tokens)

    @property
    def shares(self) -> Evenly:
        return "labels"

    def model(self, weights: Path) -> Any:
        config = self.ground.config
        model = load_base(config, self.ground.machine, weights)
        if config.method == "Full":
            return model
        return adapt(model, config, adapter_config(config, model, new_tokens=self.new_tokens))

    def trainer(self, model: Any, arguments: dict[str, Any], obedient: Callable[[type], type], course: Course) -> Any:
        from transformers import Trainer, TrainingArguments

        knobs, pad_id = self.ground.config.hyperparameters, self.ground.pad_id
        head = LabelledHead(model)

        class SftTrainer(Trainer):
            """Transformers' trainer with the loss at labelled positions."""

            def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
                inputs.pop("real_tokens")
                loss = head.loss(model, inputs, inputs.pop("labels"), num_items_in_batch)
                if num_items_in_batch is not None:  # counted over all processes, whose gradients are averaged
                    loss = loss * self.accelerator.num_processes
                return (loss, None) if return_outputs else loss

        trainer = obedient(SftTrainer)(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=self.blocks,
            eval_dataset=self.shown or None,
            # FlashAttention tells packed rows apart in a single sequence only: for it a batch is one long block.
            data_collator=lambda batch: collate([list(chain(*batch))] if knobs.packing and knobs.use_fa2 else batch, pad_id),
            processing_class=self.ground.tokenizer,
        )
        trainer.model_accepts_loss_kwargs = True  # the loss is divided by all labels of an optimizer step, not by micro-batch
        return trainer

    def window(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return {}  # the library gathers nothing beside the loss

    def tokens_in(self, inputs: Any) -> int:
        return int(inputs["real_tokens"])

    def measure(self, trainer: Any, pulse: Callable[[], None]) -> EvalMetrics:
        return measure(trainer.model, self.shown, self.ground.pad_id, self.ground.config, pulse)


def _prepare(ground: Ground) -> SftLesson:
    """Rows to tokens and labels. Raises JobFailed when there is nothing to learn in them."""
    knobs = ground.config.hyperparameters
    rendered = render_cached(ground, ground.context.spec.dataset.dataset_type)
    for name, found in rendered.items():
        tell_losses(ground, name, found)
    train_rows = rendered[TRAIN_SPLIT].rows
    held_out = rendered[EVAL_SPLIT].rows if EVAL_SPLIT in rendered else []
    refuse_nothing_to_learn(ground, len(train_rows), len(held_out))
    blocks = blocks_of(train_rows, knobs.max_seq_length) if knobs.packing else [[row] for row in train_rows]
    return SftLesson(ground, train_rows, held_out, blocks, new_tokens(ground, train_rows))


def blocks_of(rows: Sequence[TokenRow], length: int) -> list[list[TokenRow]]:
    """Rows in blocks of at most `length` tokens, by best fit, longest first."""
    from bisect import bisect_left, insort

    free: list[tuple[int, int]] = []  # (tokens left, block), ascending
    blocks: list[list[TokenRow]] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        size = len(row.input_ids)
        best = bisect_left(free, (size, -1))
        left, block = free.pop(best) if best < len(free) else (length, len(blocks))
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(row)
        insort(free, (left - size, block))
    return blocks
