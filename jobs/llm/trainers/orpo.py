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

from jobs.llm.data.preference import PreferencePair
from jobs.llm.data.tokenize import TokenizedExample
from jobs.llm.distributed import LossReduction
from jobs.llm.loss import collate
from jobs.llm.model import add_adapter, load_base, lora_config
from jobs.llm.preference import (
    IndexCollator,
    concat_chosen_rejected,
    evaluate_pairs,
    non_padding_tokens,
    prepare_pairs,
    validate_dataset_type,
)
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_loop import TrainingContext, prepare_training, run_training, untrained_special_tokens
from jobs.runtime.training_control import TrainingControl
from schema.job import EvalMetrics
from schema.training import OrpoConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext


def train(config: OrpoConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    validate_dataset_type(config, context)
    ground = prepare_training(config, context)
    pairs, held_out = prepare_pairs(ground)
    return run_training(OrpoTask(config, ground, pairs, held_out, untrained_special_tokens(ground, concat_chosen_rejected(pairs))), ground)


class IndexDataset(list[dict[str, int]]):
    """The places of the rows, which are tokens already: nothing is mapped."""

    def map(self, *_: Any, **__: Any) -> "IndexDataset":
        """The same."""
        return self


@dataclass(frozen=True)
class OrpoTask:
    """Pairs of answers, and the odds of the chosen ones."""

    config: OrpoConfig
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
    def worker_task_factory(self) -> "Callable[[TrainingContext], OrpoTask]":
        return partial(OrpoTask, self.config, pairs=self.pairs, held_out=[], trainable_token_ids=self.trainable_token_ids)

    @property
    def loss_reduction(self) -> LossReduction:
        return "batches"

    def build_model(self, weights: Path) -> Any:
        model = load_base(self.config, self.training.device_config, weights)
        if not self.training.trains_adapter:
            return model
        return add_adapter(model, self.config, lora_config(self.config, model, trainable_token_ids=self.trainable_token_ids))

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        import warnings

        with warnings.catch_warnings(action="ignore"):  # that it may change: its version is pinned
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        class Fp32LogitsOrpoTrainer(ORPOTrainer):
            """TRL's trainer with likelihoods in fp32: the odds of two answers are a small difference of them."""

            def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
                def with_precise_logits(*args: Any, **inputs: Any) -> Any:
                    outputs = model(*args, **inputs)
                    outputs.logits = outputs.logits.float()
                    return outputs

                return super().concatenated_forward(with_precise_logits, batch)

        knobs = self.config.hyperparameters
        trainer = instrument(Fp32LogitsOrpoTrainer)(
            model=model,
            args=ORPOConfig(**arguments, beta=knobs.beta, max_length=knobs.max_seq_length, disable_dropout=not knobs.lora_dropout),
            data_collator=IndexCollator(self.pairs, self._batch),
            train_dataset=IndexDataset({"row_index": n} for n in range(len(self.pairs))),
            eval_dataset=IndexDataset({"row_index": n} for n in range(len(self.held_out))) if self.held_out else None,
            processing_class=self.training.tokenizer,
        )
        trainer.use_dpo_data_collator = True  # its batches look the same as ours
        # The other one cuts the figures of an epoch's last batches to as many rows as the very last one has.
        trainer.accelerator.gather_for_metrics = trainer.accelerator.gather
        return trainer

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._stored_metrics["train"]

    def count_tokens(self, inputs: Any) -> int:
        return non_padding_tokens(inputs, "chosen_attention_mask", "rejected_attention_mask")

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        return evaluate_pairs(trainer, trainer._stored_metrics["eval"], self.training, self.held_out, self._batch, check_stop)

    def _batch(self, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
        batch = collate([[row] for row in concat_chosen_rejected(pairs)], self.training.pad_id)
        halves = {"chosen": slice(None, len(pairs)), "rejected": slice(len(pairs), None)}
        return {
            f"{half}_{name}": batch[name][place] for half, place in halves.items() for name in ("input_ids", "attention_mask", "labels")
        }
