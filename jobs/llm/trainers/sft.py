"""Supervised fine-tuning: learn to generate the answers in the rows.

    1. rows to tokens and labels, packed on request
    2. cross entropy at labeled positions; every label of an optimizer step counts the same
    3. the same loss on held-out rows

`vision.py` trains on rows with images.
"""

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import nlargest
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.blocks import RowBlocks, count_block_tokens, make_single_blocks, pack_rows
from jobs.llm.data.cache import load_or_tokenize_split
from jobs.llm.data.mixing import load_mixed
from jobs.llm.data.splits import check_splits, untrained_special_tokens
from jobs.llm.data.tokenize import TokenizedExample
from jobs.llm.loss import ChunkedLmHeadLoss, collate, evaluate_likelihood
from jobs.llm.model import add_adapter, load_base, lora_config
from jobs.llm.packing import MEASURED_MODEL_TYPES, find_packing_problem, require_packable, require_separate_rows
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_context import LossReduction, TrainingContext, prepare_training
from jobs.llm.training_loop import run_training
from jobs.llm.turn_ends import get_turn_ends
from jobs.runtime.training_control import TrainingControl
from schema.estimate.llm_memory import LongestRows, find_longest_rows
from schema.job import EvalMetrics
from schema.training import SftConfig
from schema.training.llm_hyperparameters import SftHyperparameters

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
    splits = load_mixed(training, lambda source: load_or_tokenize_split(source, source.dataset.dataset_type))
    train_rows, held_out = check_splits(training, splits)
    hyperparameters = config.hyperparameters
    blocks = pack_rows(train_rows, hyperparameters.max_seq_length) if hyperparameters.packing else make_single_blocks(train_rows)
    is_safe = is_packing_measured(json.loads((training.base_folder / "config.json").read_text()))
    concatenates = concatenates_rows(hyperparameters, on_gpu=training.device_config.on_gpu, packing_is_safe=is_safe)
    task = SftTask(training, train_rows, held_out, blocks, untrained_special_tokens(training, train_rows), concatenates)
    return run_training(task, training)


def is_packing_measured(model_config: Mapping[str, Any]) -> bool:
    """Whether rows of a base with this config.json were measured not to see each other in one sequence."""
    model_type = (model_config.get("text_config") or model_config).get("model_type")
    return model_type in MEASURED_MODEL_TYPES and find_packing_problem(model_config) is None


def concatenates_rows(hyperparameters: SftHyperparameters, *, on_gpu: bool, packing_is_safe: bool) -> bool:
    """Whether the rows of a batch are trained as one sequence, without padding.

    On a CPU padding is cheap and one long sequence is not: attention computes, and masks, all pairs of its tokens.
    """
    if hyperparameters.packing:
        return hyperparameters.use_fa2  # FlashAttention separates packed rows only within a single sequence
    return hyperparameters.micro_batches == "auto" and on_gpu and packing_is_safe


@dataclass(frozen=True)
class SftTask:
    """Rows to learn, and the likelihood of held-out rows."""

    training: TrainingContext
    train_examples: Sequence[TokenizedExample]
    held_out_examples: Sequence[TokenizedExample]
    blocks: RowBlocks  # the training rows as the model sees them: one by one, or packed
    trainable_token_ids: list[int]
    concatenates_rows: bool = False  # the rows of a batch become one sequence, without padding

    @property
    def examples_per_epoch(self) -> int:
        return len(self.blocks)

    def find_longest_rows(self, count: int) -> LongestRows:
        tokens = count_block_tokens(self.blocks)
        longest = nlargest(count, range(len(tokens)), key=lambda n: tokens[n])  # counting the labels of all rows would take long
        rows = ((tokens[n], sum(row.label_count for row in self.blocks[n])) for n in longest)
        return replace(find_longest_rows(rows, count), concatenated=self.concatenates_rows)

    @property
    def has_held_out_rows(self) -> bool:
        return bool(self.held_out_examples)

    @property
    def worker_task_factory(self) -> "Callable[[TrainingContext], SftTask]":
        return partial(
            SftTask,
            train_examples=[],
            held_out_examples=[],
            blocks=self.blocks,
            trainable_token_ids=self.trainable_token_ids,
            concatenates_rows=self.concatenates_rows,
        )

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

        pad_id = self.training.pad_id
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
            data_collator=lambda batch: collate([list(chain(*batch))] if self.concatenates_rows else batch, pad_id),
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
