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

from jobs.data.pairs import Pair
from jobs.data.render import TokenRow
from jobs.trained import TrainedModel
from jobs.trainers.course import Course
from jobs.trainers.loop import Ground, lay_ground, new_tokens, objective, teach
from jobs.trainers.model import adapt, adapter_config, load_base
from jobs.trainers.preferences import (
    Picked,
    both,
    by_length,
    library_means,
    places,
    prepare_pairs,
    ready_adapter,
    real_tokens,
    refuse_what_cannot_be,
    tensors,
)
from jobs.trainers.several import Evenly
from schema.job import EvalMetrics
from schema.training import RewardConfig

if TYPE_CHECKING:
    from jobs.context import JobContext

# TRL's names for what the other trainers of preferences call so; `accuracy` is of tokens elsewhere.
NAMES = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "mean_reward": "rewards/mean",
    "min_reward": "rewards/min",
    "max_reward": "rewards/max",
}


def train(config: RewardConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    refuse_what_cannot_be(config, context)
    ground = lay_ground(config, context)
    pairs, held_out = prepare_pairs(ground)
    return teach(RewardLesson(config, ground, pairs, held_out, new_tokens(ground, both(pairs))), ground)


@dataclass(frozen=True)
class RewardLesson:
    """Pairs of answers, and how often the chosen one has the higher score."""

    config: RewardConfig
    ground: Ground
    pairs: list[Pair]
    held_out: list[Pair]
    new_tokens: list[int]

    @property
    def items(self) -> int:
        return len(self.pairs)

    @property
    def shown(self) -> Sequence[TokenRow]:
        return [pair.chosen for pair in self.held_out]

    @property
    def is_measured(self) -> bool:
        return bool(self.held_out)

    @property
    def train_rows(self) -> Sequence[TokenRow]:
        return [pair.chosen for pair in self.pairs]

    @property
    def recipe(self) -> "Callable[[Ground], RewardLesson]":
        return partial(RewardLesson, self.config, pairs=self.pairs, held_out=[], new_tokens=self.new_tokens)

    @property
    def shares(self) -> Evenly:
        return "batches"

    def model(self, weights: Path) -> Any:
        model = load_base(self.config, self.ground.machine, weights, kind="score", num_labels=1)
        model.config.get_text_config().pad_token_id = self.ground.pad_id  # the score is read at the last token that is none
        if not self.ground.adapts:
            return model
        adapted = adapt(model, self.config, adapter_config(self.config, model, task_type="SEQ_CLS", new_tokens=self.new_tokens))
        feed_head(adapted)
        return adapted

    def trainer(self, model: Any, arguments: dict[str, Any], obedient: Callable[[type], type], course: Course) -> Any:
        from trl import RewardConfig, RewardTrainer

        class Prepared(RewardTrainer):
            """TRL's trainer, given tokens, its figures under the names that the other trainers have for them."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

            def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
                gathered = self._metrics["train"]
                renamed = {NAMES.get(name, name): values for name, values in gathered.items()}
                gathered.clear()
                gathered.update(renamed)
                super().log(logs, start_time)

        knobs = self.config.hyperparameters
        trainer = obedient(Prepared)(
            model=model,
            args=RewardConfig(
                **arguments,
                center_rewards_coefficient=knobs.center_rewards_coefficient,
                max_length=None,  # the rows are cut
                disable_dropout=not knobs.lora_dropout,
            ),
            data_collator=Picked(self.pairs, self._batch),
            train_dataset=places(self.pairs),
            eval_dataset=places(self.held_out) if self.held_out else None,
            processing_class=self.ground.tokenizer,
        )
        ready_adapter(trainer.model)
        return trainer

    def window(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._metrics["train"]

    def tokens_in(self, inputs: Any) -> int:
        return real_tokens(inputs, "attention_mask")

    def measure(self, trainer: Any, pulse: Callable[[], None]) -> EvalMetrics:
        began = time.monotonic()
        size = self.config.hyperparameters.batch_size
        found = library_means(trainer, trainer._metrics["eval"], by_length(self.held_out), self._batch, size=size, pulse=pulse)
        found = {NAMES[name]: found[name] for name in ("accuracy", "margin", "mean_reward")} | {"loss": found["loss"]}
        why = "a reward model gives a score, not text"
        nothing_said = {"perplexity": why, "accuracy": why}
        tokens = sum(len(row.input_ids) for row in both(self.held_out))
        return objective(found, EvalMetrics(eval_rows=len(self.held_out), eval_tokens=tokens, notes=nothing_said), began)

    def _batch(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        batch = tensors(both(pairs), self.ground.pad_id)
        del batch["completion_mask"]
        return batch


def feed_head(model: Any) -> None:
    """Let the head, which is trained in fp32, take what layers in bf16 give."""

    def in_its_type(head: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(part.to(head.weight.dtype) for part in given)

    for name, part in model.named_modules():
        if name.endswith("score.modules_to_save.default"):
            part.register_forward_pre_hook(in_its_type)
