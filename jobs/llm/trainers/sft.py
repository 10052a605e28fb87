"""Supervised fine-tuning: learn to generate the answers in the rows.

    1. rows to tokens and labels, packed on request
    2. cross entropy at labeled positions; every label of an optimizer step counts the same
    3. the same loss on held-out rows

`vision.py` trains on rows with images.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.blocks import make_single_blocks, pack_rows
from jobs.llm.data.cache import load_or_tokenize_split
from jobs.llm.data.splits import check_splits, untrained_special_tokens
from jobs.llm.data.tokenize import TokenizedExample
from jobs.llm.loss import ChunkedLmHeadLoss, collate, evaluate_likelihood
from jobs.llm.model import add_adapter, load_base, lora_config
from jobs.llm.packing import require_packable, require_separate_rows
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_context import LossReduction, TrainingContext, prepare_training
from jobs.llm.training_loop import run_training
from jobs.llm.turn_ends import get_turn_ends
from jobs.runtime.training_control import TrainingControl
from schema.job import EvalMetrics
from schema.training import SftConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext


def train(config: SftConfig, context: "JobContext") -> TrainedModel:
    """Train as configured, or resume an earlier attempt. Raises JobFailed and Stopped."""
    if config.modality == "vision":
        from jobs.llm.trainers.vision import train as train_vision

        return train_vision(config, context)
    training = prepare_training(config, context)
    if config.hyperparameters.packing:
        require_packable(training.base_folder, config.base_model_id)
    splits = load_or_tokenize_split(training, context.spec.dataset.dataset_type)
    train_rows, held_out = check_splits(training, splits)
    hyperparameters = config.hyperparameters
    blocks = pack_rows(train_rows, hyperparameters.max_seq_length) if hyperparameters.packing else make_single_blocks(train_rows)
    task = SftTask(training, train_rows, held_out, blocks, untrained_special_tokens(training, train_rows))
    return run_training(task, training)


@dataclass(frozen=True)
class SftTask:
    """Rows to learn, and the likelihood of held-out rows."""

    training: TrainingContext
    train_examples: Sequence[TokenizedExample]
    held_out_examples: Sequence[TokenizedExample]
    blocks: Sequence[list[TokenizedExample]]  # the training rows as the model sees them: one by one, or packed
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
        if config.hyperparameters.packing:
            require_separate_rows(model, config.base_model_id)
        if not self.training.trains_adapter:
            return model
        return add_adapter(model, config, lora_config(config, model, trainable_token_ids=self.trainable_token_ids))

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        from transformers import Trainer, TrainingArguments

        hyperparameters, pad_id = self.training.config.hyperparameters, self.training.pad_id
        lm_head_loss = ChunkedLmHeadLoss(model)

        class SftTrainer(Trainer):
            """Transformers' trainer with the loss at labeled positions."""

            def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
                inputs.pop("non_padding_tokens")
                loss = lm_head_loss.compute_loss(model, inputs, inputs.pop("labels"), num_items_in_batch)
                if num_items_in_batch is not None:  # it counts the labels of all processes, whose gradients are averaged
                    loss = loss * self.accelerator.num_processes
                return (loss, None) if return_outputs else loss

        trainer = instrument(SftTrainer)(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=self.blocks,
            eval_dataset=self.held_out_examples or None,
            # FlashAttention separates packed rows only within a single sequence, so a batch becomes one long block.
            data_collator=lambda batch: collate(
                [list(chain(*batch))] if hyperparameters.packing and hyperparameters.use_fa2 else batch, pad_id
            ),
            processing_class=self.training.tokenizer,
        )
        trainer.model_accepts_loss_kwargs = True  # normalize the loss by the labels of the optimizer step, not of the batch
        return trainer

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return {}  # transformers' trainer collects no metrics beside the loss

    def count_tokens(self, inputs: Any) -> int:
        return int(inputs["non_padding_tokens"])

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        training = self.training
        return evaluate_likelihood(
            trainer.model, self.held_out_examples, training.pad_id, training.config, get_turn_ends(training), check_stop
        )
