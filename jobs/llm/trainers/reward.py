"""A reward model: learn to score answers from which of two is preferred.

    1. pairs to tokens
    2. a head with one output on the base; TRL's loss: the chosen answer gets the higher score (Bradley-Terry)
    3. the same on held-out pairs; an untrained head is right for half of them

A reward model gives numbers, not text: it generates nothing and has no perplexity.
"""

import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.preference import PreferencePair
from jobs.llm.model import add_adapter, load_base, lora_config
from jobs.llm.preference import (
    IndexCollator,
    PairTask,
    cast_adapter_to_fp32,
    completion_batch,
    concat_chosen_rejected,
    evaluate_trainer_metrics,
    index_dataset,
    non_padding_tokens,
    preference_metrics,
    sort_by_length,
    validate_dataset_type,
)
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_context import prepare_training
from jobs.llm.training_loop import run_training
from jobs.runtime.training_control import TrainingControl
from schema.job import EvalMetrics
from schema.training import RewardConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# TRL's metric names -> the names that the other preference trainers use. Elsewhere `accuracy` is of tokens.
METRIC_NAMES = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "mean_reward": "rewards/mean",
    "min_reward": "rewards/min",
    "max_reward": "rewards/max",
}


def train(config: RewardConfig, context: "JobContext") -> TrainedModel:
    """Train as configured, or resume an earlier attempt. Raises JobFailed and Stopped."""
    validate_dataset_type(config, context)
    training = prepare_training(config, context)
    task = RewardTask.load(config, training)
    return run_training(task, training)


@dataclass(frozen=True)
class RewardTask(PairTask):
    """Pairs of answers, and how often the chosen one has the higher score."""

    config: RewardConfig

    def build_model(self, weights: Path) -> Any:
        model = load_base(self.config, self.training.device_config, weights, model_kind="score", num_labels=1)
        model.config.get_text_config().pad_token_id = self.training.pad_id  # the model scores the last token that is not padding
        if not self.training.trains_adapter:
            return model
        peft_config = lora_config(self.config, model, task_type="SEQ_CLS", trainable_token_ids=self.trainable_token_ids)
        adapted = add_adapter(model, self.config, peft_config)
        cast_score_head_input(adapted)
        return adapted

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        from trl import RewardConfig as TrlRewardConfig
        from trl import RewardTrainer

        class PretokenizedRewardTrainer(RewardTrainer):
            """TRL's trainer for rows that are tokens already. It logs metrics under the names in METRIC_NAMES."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

            def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
                buffer = self._metrics["train"]
                renamed = {METRIC_NAMES.get(name, name): values for name, values in buffer.items()}
                buffer.clear()
                buffer.update(renamed)
                super().log(logs, start_time)

        hyperparameters = self.config.hyperparameters
        trainer = instrument(PretokenizedRewardTrainer)(
            model=model,
            args=TrlRewardConfig(
                **arguments,
                center_rewards_coefficient=hyperparameters.center_rewards_coefficient,
                max_length=None,  # the rows are truncated already
                disable_dropout=not hyperparameters.lora_dropout,
            ),
            data_collator=IndexCollator(self.pairs, self._collate),
            train_dataset=index_dataset(self.pairs),
            eval_dataset=index_dataset(self.held_out) if self.held_out else None,
            processing_class=self.training.tokenizer,
        )
        cast_adapter_to_fp32(trainer.model)
        return trainer

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._metrics["train"]

    def count_tokens(self, inputs: Any) -> int:
        return non_padding_tokens(inputs, "attention_mask")

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        started_at = time.monotonic()
        metrics = evaluate_trainer_metrics(
            trainer,
            trainer._metrics["eval"],
            sort_by_length(self.held_out),
            self._collate,
            batch_size=self.config.hyperparameters.batch_size,
            check_stop=check_stop,
        )
        renamed = {METRIC_NAMES[name]: metrics[name] for name in ("accuracy", "margin", "mean_reward")} | {"loss": metrics["loss"]}
        note = "a reward model gives a score, not text"
        likelihood = EvalMetrics(
            eval_rows=len(self.held_out),
            eval_tokens=sum(len(row.input_ids) for row in concat_chosen_rejected(self.held_out)),
            notes={"perplexity": note, "content_perplexity": note, "accuracy": note},
        )
        return preference_metrics(renamed, likelihood, started_at)

    def _collate(self, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
        batch = completion_batch(concat_chosen_rejected(pairs), self.training.pad_id)
        del batch["completion_mask"]
        return batch


def cast_score_head_input(model: Any) -> None:
    """Cast the hidden states to the dtype of the score head: the head is trained in fp32, the layers may compute in bf16."""

    def cast_to_head_dtype(head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(tensor.to(head.weight.dtype) for tensor in inputs)

    for name, module in model.named_modules():
        if name.endswith("score.modules_to_save.default"):
            module.register_forward_pre_hook(cast_to_head_dtype)
