"""A reward model: a score for an answer, learned from which of two is preferred.

    1. pairs to tokens
    2. a head of one number on the base; TRL's loss: the chosen answer is to have the higher score (Bradley-Terry)
    3. held-out pairs measured in the same way: a fresh head knows nothing, and is right in half of them

It gives numbers and no text: nothing is generated, and there is no perplexity.
"""

import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.preference import PreferencePair
from jobs.llm.data.tokenize import TokenizedExample
from jobs.llm.distributed import LossReduction
from jobs.llm.model import add_adapter, load_base, lora_config
from jobs.llm.preference import (
    IndexCollator,
    cast_adapter_to_fp32,
    completion_batch,
    concat_chosen_rejected,
    evaluate_trainer_metrics,
    index_dataset,
    non_padding_tokens,
    prepare_pairs,
    sort_by_length,
    validate_dataset_type,
)
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_loop import TrainingContext, preference_metrics, prepare_training, run_training, untrained_special_tokens
from jobs.runtime.training_control import TrainingControl
from schema.job import EvalMetrics
from schema.training import RewardConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# TRL's names for what the other trainers of preferences call so; `accuracy` is of tokens elsewhere.
METRIC_NAMES = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "mean_reward": "rewards/mean",
    "min_reward": "rewards/min",
    "max_reward": "rewards/max",
}


def train(config: RewardConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    validate_dataset_type(config, context)
    ground = prepare_training(config, context)
    pairs, held_out = prepare_pairs(ground)
    return run_training(
        RewardTask(config, ground, pairs, held_out, untrained_special_tokens(ground, concat_chosen_rejected(pairs))), ground
    )


@dataclass(frozen=True)
class RewardTask:
    """Pairs of answers, and how often the chosen one has the higher score."""

    config: RewardConfig
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
    def worker_task_factory(self) -> "Callable[[TrainingContext], RewardTask]":
        return partial(RewardTask, self.config, pairs=self.pairs, held_out=[], trainable_token_ids=self.trainable_token_ids)

    @property
    def loss_reduction(self) -> LossReduction:
        return "batches"

    def build_model(self, weights: Path) -> Any:
        model = load_base(self.config, self.training.device_config, weights, model_kind="score", num_labels=1)
        model.config.get_text_config().pad_token_id = self.training.pad_id  # the score is read at the last token that is none
        if not self.training.trains_adapter:
            return model
        adapted = add_adapter(
            model, self.config, lora_config(self.config, model, task_type="SEQ_CLS", trainable_token_ids=self.trainable_token_ids)
        )
        cast_score_head_input(adapted)
        return adapted

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        from trl import RewardConfig, RewardTrainer

        class PretokenizedRewardTrainer(RewardTrainer):
            """TRL's trainer, given tokens, its figures under the names that the other trainers have for them."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

            def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
                gathered = self._metrics["train"]
                renamed = {METRIC_NAMES.get(name, name): values for name, values in gathered.items()}
                gathered.clear()
                gathered.update(renamed)
                super().log(logs, start_time)

        knobs = self.config.hyperparameters
        trainer = instrument(PretokenizedRewardTrainer)(
            model=model,
            args=RewardConfig(
                **arguments,
                center_rewards_coefficient=knobs.center_rewards_coefficient,
                max_length=None,  # the rows are cut
                disable_dropout=not knobs.lora_dropout,
            ),
            data_collator=IndexCollator(self.pairs, self._batch),
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
        began = time.monotonic()
        size = self.config.hyperparameters.batch_size
        found = evaluate_trainer_metrics(
            trainer, trainer._metrics["eval"], sort_by_length(self.held_out), self._batch, batch_size=size, check_stop=check_stop
        )
        found = {METRIC_NAMES[name]: found[name] for name in ("accuracy", "margin", "mean_reward")} | {"loss": found["loss"]}
        why = "a reward model gives a score, not text"
        nothing_said = {"perplexity": why, "accuracy": why}
        tokens = sum(len(row.input_ids) for row in concat_chosen_rejected(self.held_out))
        return preference_metrics(found, EvalMetrics(eval_rows=len(self.held_out), eval_tokens=tokens, notes=nothing_said), began)

    def _batch(self, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
        batch = completion_batch(concat_chosen_rejected(pairs), self.training.pad_id)
        del batch["completion_mask"]
        return batch


def cast_score_head_input(model: Any) -> None:
    """Let the head, which is trained in fp32, take what layers in bf16 give."""

    def in_its_type(head: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(part.to(head.weight.dtype) for part in given)

    for name, part in model.named_modules():
        if name.endswith("score.modules_to_save.default"):
            part.register_forward_pre_hook(in_its_type)
