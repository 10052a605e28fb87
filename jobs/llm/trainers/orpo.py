"""Odds ratio preference optimization: learn the chosen answer, and away from the rejected one, without a reference model.

1. pairs to tokens and labels
2. TRL's loss: the likelihood of the chosen answer, and its odds against the rejected one
3. the same on held-out pairs, and the likelihood of the chosen answers
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.preference import PreferencePair
from jobs.llm.loss import collate
from jobs.llm.model import add_adapter, load_base, lora_config
from jobs.llm.preference import (
    IndexCollator,
    PairTask,
    concat_chosen_rejected,
    evaluate_pairs,
    non_padding_tokens,
    validate_dataset_type,
)
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_context import prepare_training
from jobs.llm.training_loop import run_training
from jobs.runtime.training_control import TrainingControl
from schema.job import EvalMetrics
from schema.training import OrpoConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext


def train(config: OrpoConfig, context: "JobContext") -> TrainedModel:
    """Train as configured, or resume an earlier attempt. Raises JobFailed and Stopped."""
    validate_dataset_type(config, context)
    training = prepare_training(config, context)
    task = OrpoTask.load(config, training)
    return run_training(task, training)


class IndexDataset(list[dict[str, int]]):
    """A dataset of row indices. TRL's trainer calls `map` to tokenize, and the rows are tokens already."""

    def map(self, *_: Any, **__: Any) -> "IndexDataset":
        """The dataset unchanged."""
        return self


@dataclass(frozen=True)
class OrpoTask(PairTask):
    """Pairs of answers, and the odds of the chosen ones."""

    config: OrpoConfig

    def build_model(self, weights: Path) -> Any:
        model = load_base(self.config, self.training.device_config, weights)
        if not self.training.trains_adapter:
            return model
        return add_adapter(model, self.config, lora_config(self.config, model, trainable_token_ids=self.trainable_token_ids))

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        import warnings

        with warnings.catch_warnings(action="ignore"):  # TRL warns that the experimental API may change; its version is pinned
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        class Fp32LogitsOrpoTrainer(ORPOTrainer):
            """TRL's trainer with fp32 logits: the log odds of two answers are a small difference of large numbers."""

            def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
                def forward_in_fp32(*args: Any, **inputs: Any) -> Any:
                    outputs = model(*args, **inputs)
                    outputs.logits = outputs.logits.float()
                    return outputs

                return super().concatenated_forward(forward_in_fp32, batch)

        hyperparameters = self.config.hyperparameters
        trainer = instrument(Fp32LogitsOrpoTrainer)(
            model=model,
            args=ORPOConfig(
                **arguments,
                beta=hyperparameters.beta,
                max_length=hyperparameters.max_seq_length,
                disable_dropout=not hyperparameters.lora_dropout,
            ),
            data_collator=IndexCollator(self.pairs, self._collate),
            train_dataset=IndexDataset({"row_index": n} for n in range(len(self.pairs))),
            eval_dataset=IndexDataset({"row_index": n} for n in range(len(self.held_out))) if self.held_out else None,
            processing_class=self.training.tokenizer,
        )
        trainer.use_dpo_data_collator = True  # its batches have the same keys as ours
        # gather_for_metrics would cut the metrics of an epoch's last step to the size of its last batch.
        trainer.accelerator.gather_for_metrics = trainer.accelerator.gather
        return trainer

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._stored_metrics["train"]

    def count_tokens(self, inputs: Any) -> int:
        return non_padding_tokens(inputs, "chosen_attention_mask", "rejected_attention_mask")

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        return evaluate_pairs(trainer, trainer._stored_metrics["eval"], self.training, self.held_out, self._collate, check_stop)

    def _collate(self, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
        batch = collate([[row] for row in concat_chosen_rejected(pairs)], self.training.pad_id)
        halves = {"chosen": slice(None, len(pairs)), "rejected": slice(len(pairs), None)}
        return {f"{half}_{name}": batch[name][rows] for half, rows in halves.items() for name in ("input_ids", "attention_mask", "labels")}
