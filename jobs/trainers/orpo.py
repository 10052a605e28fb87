"""Odds ratio preference optimization: learn the chosen answer, and away from the rejected one, in one go.

1. pairs to tokens and labels
2. TRL's loss: the likelihood of what was chosen, and the odds of it against what was rejected; no base is compared with
3. held-out pairs measured in the same way, beside the likelihood of the chosen answers
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
from jobs.trainers.likelihood import collate
from jobs.trainers.loop import Ground, lay_ground, new_tokens, teach
from jobs.trainers.model import adapt, adapter_config, load_base
from jobs.trainers.preferences import Picked, both, measure_pairs, prepare_pairs, real_tokens, refuse_what_cannot_be
from jobs.trainers.several import Evenly
from schema.job import EvalMetrics
from schema.training import OrpoConfig

if TYPE_CHECKING:
    from jobs.context import JobContext


def train(config: OrpoConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    refuse_what_cannot_be(config, context)
    ground = lay_ground(config, context)
    pairs, held_out = prepare_pairs(ground)
    return teach(OrpoLesson(config, ground, pairs, held_out, new_tokens(ground, both(pairs))), ground)


class Places(list[dict[str, int]]):
    """The places of the rows, which are tokens already: nothing is mapped."""

    def map(self, *_: Any, **__: Any) -> "Places":
        """The same."""
        return self


@dataclass(frozen=True)
class OrpoLesson:
    """Pairs of answers, and the odds of the chosen ones."""

    config: OrpoConfig
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
    def recipe(self) -> "Callable[[Ground], OrpoLesson]":
        return partial(OrpoLesson, self.config, pairs=self.pairs, held_out=[], new_tokens=self.new_tokens)

    @property
    def shares(self) -> Evenly:
        return "batches"

    def model(self, weights: Path) -> Any:
        model = load_base(self.config, self.ground.machine, weights)
        if not self.ground.adapts:
            return model
        return adapt(model, self.config, adapter_config(self.config, model, new_tokens=self.new_tokens))

    def trainer(self, model: Any, arguments: dict[str, Any], obedient: Callable[[type], type], course: Course) -> Any:
        import warnings

        with warnings.catch_warnings(action="ignore"):  # that it may change: its version is pinned
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        class Precise(ORPOTrainer):
            """TRL's trainer with likelihoods in fp32: the odds of two answers are a small difference of them."""

            def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
                def with_precise_logits(*args: Any, **inputs: Any) -> Any:
                    outputs = model(*args, **inputs)
                    outputs.logits = outputs.logits.float()
                    return outputs

                return super().concatenated_forward(with_precise_logits, batch)

        knobs = self.config.hyperparameters
        trainer = obedient(Precise)(
            model=model,
            args=ORPOConfig(**arguments, beta=knobs.beta, max_length=knobs.max_seq_length, disable_dropout=not knobs.lora_dropout),
            data_collator=Picked(self.pairs, self._batch),
            train_dataset=Places({"place": n} for n in range(len(self.pairs))),
            eval_dataset=Places({"place": n} for n in range(len(self.held_out))) if self.held_out else None,
            processing_class=self.ground.tokenizer,
        )
        trainer.use_dpo_data_collator = True  # its batches look the same as ours
        # The other one cuts the figures of an epoch's last batches to as many rows as the very last one has.
        trainer.accelerator.gather_for_metrics = trainer.accelerator.gather
        return trainer

    def window(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._stored_metrics["train"]

    def tokens_in(self, inputs: Any) -> int:
        return real_tokens(inputs, "chosen_attention_mask", "rejected_attention_mask")

    def measure(self, trainer: Any, pulse: Callable[[], None]) -> EvalMetrics:
        return measure_pairs(trainer, trainer._stored_metrics["eval"], self.ground, self.held_out, self._batch, pulse)

    def _batch(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        batch = collate([[row] for row in both(pairs)], self.ground.pad_id)
        halves = {"chosen": slice(None, len(pairs)), "rejected": slice(len(pairs), None)}
        return {
            f"{half}_{name}": batch[name][place] for half, place in halves.items() for name in ("input_ids", "attention_mask", "labels")
        }
