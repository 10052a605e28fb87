"""Direct preference optimization: learn which of two answers is preferred, without going far from the base.

    1. pairs to tokens and labels
    2. TRL's loss: how much more the model prefers the chosen answer than the base does
    3. held-out pairs measured in the same way, beside the likelihood of the chosen answers

The base is the model without its adapter; when all weights are trained it is loaded a second time, and stays as it is.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.preference import PreferencePair
from jobs.llm.data.tokenize import TokenizedExample
from jobs.llm.distributed import LossReduction
from jobs.llm.model import load_base, lora_config
from jobs.llm.preference import (
    IndexCollator,
    cast_adapter_to_fp32,
    completion_batch,
    concat_chosen_rejected,
    evaluate_pairs,
    index_dataset,
    non_padding_tokens,
    patch_fused_head,
    prepare_pairs,
    validate_dataset_type,
)
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_loop import TrainingContext, prepare_training, run_training, untrained_special_tokens
from jobs.runtime.training_control import TrainingControl
from schema.job import EvalMetrics
from schema.training import DpoConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext


def train(config: DpoConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    validate_dataset_type(config, context)
    ground = prepare_training(config, context)
    pairs, held_out = prepare_pairs(ground)
    return run_training(DpoTask(config, ground, pairs, held_out, untrained_special_tokens(ground, concat_chosen_rejected(pairs))), ground)


@dataclass(frozen=True)
class DpoTask:
    """Pairs of answers, and how much better the chosen ones are liked than by the base."""

    config: DpoConfig
    training: TrainingContext
    pairs: list[PreferencePair]
    held_out: list[PreferencePair]
    trainable_token_ids: list[int]

    @property
    def examples_per_epoch(self) -> int:
        return len(self.pairs)

    @property
    def held_out_examples(self) -> Sequence[TokenizedExample]:
        return [pair.chosen for pair in self.held_out]

    @property
    def has_held_out_rows(self) -> bool:
        return bool(self.held_out)

    @property
    def train_examples(self) -> Sequence[TokenizedExample]:
        return [pair.chosen for pair in self.pairs]

    @property
    def worker_task_factory(self) -> "Callable[[TrainingContext], DpoTask]":
        return partial(DpoTask, self.config, pairs=self.pairs, held_out=[], trainable_token_ids=self.trainable_token_ids)

    @property
    def loss_reduction(self) -> LossReduction:
        return "batches"

    def build_model(self, weights: Path) -> Any:
        """Without an adapter: the library puts it on, and knows then that the model without it is what to compare with."""
        return load_base(self.config, self.training.device_config, weights)

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        from trl import DPOConfig, DPOTrainer

        class PretokenizedDpoTrainer(DPOTrainer):
            """TRL's trainer, given tokens."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        knobs, ground = self.config.hyperparameters, self.training
        base = None if ground.trains_adapter else load_base(self.config, ground.device_config, ground.base_folder).requires_grad_(False)
        forwards = [(part, part.forward) for part in (model, base) if part is not None]
        trainer = instrument(PretokenizedDpoTrainer)(
            model=model,
            ref_model=base,
            args=DPOConfig(
                **arguments,
                beta=knobs.beta,
                loss_type=[knobs.loss_type],
                label_smoothing=knobs.label_smoothing,
                max_length=None,  # the rows are cut
                disable_dropout=not knobs.lora_dropout,
            ),
            data_collator=IndexCollator(self.pairs, self._batch),
            train_dataset=index_dataset(self.pairs),
            eval_dataset=index_dataset(self.held_out) if self.held_out else None,
            processing_class=ground.tokenizer,
            peft_config=lora_config(self.config, model, trainable_token_ids=self.trainable_token_ids) if ground.trains_adapter else None,
        )
        cast_adapter_to_fp32(trainer.model)
        if self.trainable_token_ids or not ground.device_config.on_gpu:
            for part, forward in forwards:
                patch_fused_head(part, forward)
        return trainer

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._metrics["train"]

    def count_tokens(self, inputs: Any) -> int:
        return non_padding_tokens(inputs, "attention_mask")

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        return null_accuracy_at_init(
            evaluate_pairs(trainer, trainer._metrics["eval"], self.training, self.held_out, self._batch, check_stop)
        )

    def _batch(self, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
        return completion_batch(concat_chosen_rejected(pairs), self.training.pad_id)


def null_accuracy_at_init(metrics: EvalMetrics) -> EvalMetrics:
    """The same; of a model that is still the base, the library counts every tie as a mistake."""
    values = metrics.values
    if any(values.get(f"rewards/{name}") != 0 for name in ("chosen", "rejected", "margins")):
        return metrics
    why = "the model is still the base: it likes no answer better or worse than that"
    return metrics.model_copy(
        update={"values": values | {"rewards/accuracies": None}, "notes": metrics.notes | {"rewards/accuracies": why}}
    )
