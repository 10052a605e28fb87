"""Direct preference optimization: learn which of two answers is preferred, without moving far from the base.

    1. pairs to tokens and labels
    2. TRL's loss: how much more the model prefers the chosen answer than the reference does
    3. the same on held-out pairs, and the likelihood of the chosen answers

The reference is the model without its adapter. When all weights are trained, it is a second, frozen copy of the base.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.preference import PreferencePair
from jobs.llm.model import load_base, lora_config
from jobs.llm.preference import (
    IndexCollator,
    PairTask,
    cast_adapter_to_fp32,
    completion_batch,
    concat_chosen_rejected,
    evaluate_pairs,
    index_dataset,
    load_reference_model,
    non_padding_tokens,
    patch_fused_head,
    validate_dataset_type,
)
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_context import prepare_training
from jobs.llm.training_loop import run_training
from jobs.runtime.training_control import TrainingControl
from schema.job import EvalMetrics
from schema.training import DpoConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext


def train(config: DpoConfig, context: "JobContext") -> TrainedModel:
    """Train as configured, or resume an earlier attempt. Raises JobFailed and Stopped."""
    validate_dataset_type(config, context)
    training = prepare_training(config, context)
    task = DpoTask.load(config, training)
    return run_training(task, training)


@dataclass(frozen=True)
class DpoTask(PairTask):
    """Pairs of answers, and how much more than the reference the model prefers the chosen ones."""

    config: DpoConfig

    def build_model(self, weights: Path) -> Any:
        """Without an adapter: TRL adds it, and then uses the model without it as the reference."""
        return load_base(self.config, self.training.device_config, weights)

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        from trl import DPOConfig, DPOTrainer

        class PretokenizedDpoTrainer(DPOTrainer):
            """TRL's trainer for rows that are tokens already."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        hyperparameters, training = self.config.hyperparameters, self.training
        reference = load_reference_model(training)
        forwards = [(module, module.forward) for module in (model, reference) if module is not None]  # before TRL wraps the model
        peft_config = lora_config(self.config, model, trainable_token_ids=self.trainable_token_ids) if training.trains_adapter else None
        trainer = instrument(PretokenizedDpoTrainer)(
            model=model,
            ref_model=reference,
            args=DPOConfig(
                **arguments,
                beta=hyperparameters.beta,
                loss_type=[hyperparameters.loss_type],
                label_smoothing=hyperparameters.label_smoothing,
                max_length=None,  # the rows are truncated already
                disable_dropout=not hyperparameters.lora_dropout,
            ),
            data_collator=IndexCollator(self.pairs, self._collate),
            train_dataset=index_dataset(self.pairs),
            eval_dataset=index_dataset(self.held_out) if self.held_out else None,
            processing_class=training.tokenizer,
            peft_config=peft_config,
        )
        cast_adapter_to_fp32(trainer.model)
        if self.trainable_token_ids or not training.device_config.on_gpu:
            for module, forward in forwards:
                patch_fused_head(module, forward)
        return trainer

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._metrics["train"]

    def count_tokens(self, inputs: Any) -> int:
        return non_padding_tokens(inputs, "attention_mask")

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        metrics = evaluate_pairs(trainer, trainer._metrics["eval"], self.training, self.held_out, self._collate, check_stop)
        return null_accuracy_at_init(metrics)

    def _collate(self, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
        return completion_batch(concat_chosen_rejected(pairs), self.training.pad_id)


def null_accuracy_at_init(metrics: EvalMetrics) -> EvalMetrics:
    """The metrics without `rewards/accuracies` if the model still equals the base: TRL counts every tie as a mistake."""
    values = metrics.values
    if any(values.get(f"rewards/{name}") != 0 for name in ("chosen", "rejected", "margins")):
        return metrics
    note = "the model still equals the base, so it prefers neither answer"
    return metrics.model_copy(
        update={"values": values | {"rewards/accuracies": None}, "notes": metrics.notes | {"rewards/accuracies": note}}
    )
