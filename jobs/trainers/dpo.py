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

from jobs.data.pairs import Pair
from jobs.data.render import TokenRow
from jobs.trained import TrainedModel
from jobs.trainers.course import Course
from jobs.trainers.loop import Ground, lay_ground, new_tokens, teach
from jobs.trainers.model import adapter_config, load_base
from jobs.trainers.preferences import (
    Picked,
    both,
    measure_pairs,
    places,
    prepare_pairs,
    ready_adapter,
    real_tokens,
    refuse_what_cannot_be,
    score_labels,
    tensors,
)
from jobs.trainers.several import Evenly
from schema.job import EvalMetrics
from schema.training import DpoConfig

if TYPE_CHECKING:
    from jobs.context import JobContext


def train(config: DpoConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    refuse_what_cannot_be(config, context)
    ground = lay_ground(config, context)
    pairs, held_out = prepare_pairs(ground)
    return teach(DpoLesson(config, ground, pairs, held_out, new_tokens(ground, both(pairs))), ground)


@dataclass(frozen=True)
class DpoLesson:
    """Pairs of answers, and how much better the chosen ones are liked than by the base."""

    config: DpoConfig
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
    def recipe(self) -> "Callable[[Ground], DpoLesson]":
        return partial(DpoLesson, self.config, pairs=self.pairs, held_out=[], new_tokens=self.new_tokens)

    @property
    def shares(self) -> Evenly:
        return "batches"

    def model(self, weights: Path) -> Any:
        """Without an adapter: the library puts it on, and knows then that the model without it is what to compare with."""
        return load_base(self.config, self.ground.machine, weights)

    def trainer(self, model: Any, arguments: dict[str, Any], obedient: Callable[[type], type], course: Course) -> Any:
        from trl import DPOConfig, DPOTrainer

        class Prepared(DPOTrainer):
            """TRL's trainer, given tokens."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        knobs, ground = self.config.hyperparameters, self.ground
        base = None if ground.adapts else load_base(self.config, ground.machine, ground.base_folder).requires_grad_(False)
        forwards = [(part, part.forward) for part in (model, base) if part is not None]
        trainer = obedient(Prepared)(
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
            data_collator=Picked(self.pairs, self._batch),
            train_dataset=places(self.pairs),
            eval_dataset=places(self.held_out) if self.held_out else None,
            processing_class=ground.tokenizer,
            peft_config=adapter_config(self.config, model, new_tokens=self.new_tokens) if ground.adapts else None,
        )
        ready_adapter(trainer.model)
        if self.new_tokens or not ground.machine.on_gpu:
            for part, forward in forwards:
                score_labels(part, forward)
        return trainer

    def window(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._metrics["train"]

    def tokens_in(self, inputs: Any) -> int:
        return real_tokens(inputs, "attention_mask")

    def measure(self, trainer: Any, pulse: Callable[[], None]) -> EvalMetrics:
        return unless_the_base(measure_pairs(trainer, trainer._metrics["eval"], self.ground, self.held_out, self._batch, pulse))

    def _batch(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        return tensors(both(pairs), self.ground.pad_id)


def unless_the_base(found: EvalMetrics) -> EvalMetrics:
    """The same; of a model that is still the base, the library counts every tie as a mistake."""
    values = found.values
    if any(values.get(f"rewards/{name}") != 0 for name in ("chosen", "rejected", "margins")):
        return found
    why = "the model is still the base: it likes no answer better or worse than that"
    return found.model_copy(update={"values": values | {"rewards/accuracies": None}, "notes": found.notes | {"rewards/accuracies": why}})
