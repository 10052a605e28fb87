"""Kahneman-Tversky optimization: learn from answers that are each good or bad.

    1. rows to tokens and labels; a preference pair becomes a good row and a bad one
    2. TRL's loss: good answers gain likelihood over the reference and bad ones lose it, relative to the KL divergence from the
       reference. That is estimated from mismatched pairs: the prompt of one row with the answer of another
    3. the same on held-out rows, and the likelihood of the good answers

The reference is the model without its adapter. When all weights are trained, it is a second, frozen copy of the base.
"""

import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.cache import load_or_tokenize_unpaired
from jobs.llm.data.mixing import load_mixed
from jobs.llm.data.preference import UnpairedExample
from jobs.llm.data.splits import check_splits, untrained_special_tokens
from jobs.llm.data.tokenize import TokenizedExample
from jobs.llm.loss import evaluate_likelihood
from jobs.llm.model import load_base, lora_config
from jobs.llm.preference import (
    IndexCollator,
    cast_adapter_to_fp32,
    completion_batch,
    evaluate_trainer_metrics,
    index_dataset,
    load_reference_model,
    non_padding_tokens,
    patch_fused_head,
    preference_metrics,
    row_mean_metrics,
    validate_dataset_type,
)
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_context import LossReduction, TrainingContext, prepare_training
from jobs.llm.training_loop import run_training
from jobs.llm.turn_ends import get_turn_ends
from jobs.runtime.training_control import TrainingControl
from schema.estimate.llm_memory import LongestRows, find_longest_rows
from schema.job import EvalMetrics
from schema.training import KtoConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# desirable_weight times the good rows, over undesirable_weight times the bad ones: Eq. (8) of arXiv 2402.01306.
RECOMMENDED_WEIGHT_RATIO = (1.0, 1.33)
MAX_LOOKBACK = 64  # earlier rows searched for one with another prompt


def train(config: KtoConfig, context: "JobContext") -> TrainedModel:
    """Train as configured, or resume an earlier attempt. Raises JobFailed and Stopped."""
    validate_dataset_type(config, context)
    training = prepare_training(config, context)
    splits = load_mixed(training, lambda source: load_or_tokenize_unpaired(source, source.dataset.dataset_type))
    train_rows, held_out = check_splits(training, splits)
    good_count = sum(row.is_good for row in train_rows)
    hyperparameters = config.hyperparameters
    warning = class_balance_warning(
        good_count, len(train_rows) - good_count, hyperparameters.desirable_weight, hyperparameters.undesirable_weight
    )
    if warning:
        context.warn("class_imbalance", warning)
    token_ids = untrained_special_tokens(training, [row.row for row in train_rows])
    task = KtoTask(config, training, add_kl_examples(train_rows), add_kl_examples(held_out), token_ids)
    return run_training(task, training)


@dataclass(frozen=True)
class KtoExample:
    """A good or bad row, and an answer to another prompt for a batch that has none."""

    example: UnpairedExample
    kl_fallback: TokenizedExample

    def choose_kl_example(self, neighbor: "KtoExample") -> TokenizedExample:
        """The neighbor's answer if it is to another prompt, else the fallback."""
        return self.kl_fallback if has_same_prompt(self.example.row, neighbor.example.row) else neighbor.example.row


@dataclass(frozen=True)
class KtoTask:
    """Good and bad answers, and how their likelihood differs from the reference's."""

    config: KtoConfig
    training: TrainingContext
    rows: list[KtoExample]
    held_out: list[KtoExample]
    trainable_token_ids: list[int]

    @property
    def examples_per_epoch(self) -> int:
        return len(self.rows)

    @property
    def held_out_examples(self) -> Sequence[TokenizedExample]:
        """The good held-out rows."""
        return [row.example.row for row in self.held_out if row.example.is_good]

    def find_longest_rows(self, count: int) -> LongestRows:
        return find_longest_rows(((len(row.example.row.input_ids), row.example.row.label_count) for row in self.rows), count)

    @property
    def has_held_out_rows(self) -> bool:
        return bool(self.held_out)

    @property
    def train_examples(self) -> Sequence[TokenizedExample]:
        return [row.example.row for row in self.rows]

    @property
    def worker_task_factory(self) -> "Callable[[TrainingContext], KtoTask]":
        return partial(KtoTask, self.config, rows=self.rows, held_out=[], trainable_token_ids=self.trainable_token_ids)

    @property
    def loss_reduction(self) -> LossReduction:
        return "batches"

    def build_model(self, weights: Path) -> Any:
        """Without an adapter: TRL adds it, and then uses the model without it as the reference."""
        return load_base(self.config, self.training.device_config, weights)

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        from trl import KTOConfig, KTOTrainer

        class PretokenizedKtoTrainer(KTOTrainer):
            """TRL's trainer for rows that are tokens already."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        hyperparameters, training = self.config.hyperparameters, self.training
        reference = load_reference_model(training)
        forwards = [(module, module.forward) for module in (model, reference) if module is not None]  # before TRL wraps the model
        peft_config = lora_config(self.config, model, trainable_token_ids=self.trainable_token_ids) if training.trains_adapter else None
        batch_size = arguments["per_device_train_batch_size"]
        trainer = instrument(PretokenizedKtoTrainer)(
            model=model,
            ref_model=reference,
            args=KTOConfig(
                # TRL rejects a batch size of 1, because its mismatched pairs come from the same batch; ours may come from other rows.
                **arguments | {"per_device_train_batch_size": max(batch_size, 2)},
                beta=hyperparameters.beta,
                desirable_weight=hyperparameters.desirable_weight,
                undesirable_weight=hyperparameters.undesirable_weight,
                max_length=None,  # the rows are truncated already
                disable_dropout=not hyperparameters.lora_dropout,
            ),
            data_collator=IndexCollator(self.rows, self._collate),
            train_dataset=index_dataset(self.rows),
            eval_dataset=index_dataset(self.held_out) if self.held_out else None,
            processing_class=training.tokenizer,
            peft_config=peft_config,
        )
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = batch_size
        # TRL keeps the rows in order, because it builds mismatched pairs in advance; ours are built with each batch.
        trainer.args.train_sampling_strategy = "random"
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
        started_at = time.monotonic()
        metrics = evaluate_trainer_metrics(
            trainer,
            trainer._metrics["eval"],
            self.held_out,
            self._collate,
            batch_size=self.config.hyperparameters.batch_size,
            check_stop=check_stop,
            count_rows=count_metric_rows,
        )
        metrics = row_mean_metrics(metrics)
        metrics.pop("rewards/margins", None)  # TRL's is of the batches that have both good and bad rows
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        good_rows = self.held_out_examples
        if good_rows:
            turn_ends = get_turn_ends(self.training)
            likelihood = evaluate_likelihood(trainer.model, good_rows, self.training.pad_id, self.config, turn_ends, check_stop)
        else:
            note = "no held-out row is good"
            likelihood = EvalMetrics(notes={"perplexity": note, "content_perplexity": note, "accuracy": note})
        return preference_metrics(metrics, likelihood.model_copy(update={"eval_rows": len(self.held_out)}), started_at)

    def _collate(self, rows: Sequence[KtoExample]) -> dict[str, Any]:
        import torch

        examples, pad_id = [row.example for row in rows], self.training.pad_id
        max_length = self.config.hyperparameters.max_seq_length
        mismatched = [mismatched_pair(row.example.row, row.choose_kl_example(rows[n - 1]), max_length) for n, row in enumerate(rows)]
        batch = completion_batch([example.row for example in examples], pad_id) | completion_batch(mismatched, pad_id, prefix="KL_")
        return batch | {"label": torch.tensor([example.is_good for example in examples])}


def count_metric_rows(name: str, batch: Sequence[KtoExample]) -> int:
    """The number of rows of a batch over which a metric is a mean."""
    good_count = sum(row.example.is_good for row in batch)
    return {"chosen": good_count, "rejected": len(batch) - good_count}.get(name.rpartition("/")[2], len(batch))


def mismatched_pair(row: TokenizedExample, other: TokenizedExample, max_length: int) -> TokenizedExample:
    """The prompt of `row` with the answer of `other`."""
    ids = row.input_ids[: row.prompt_tokens] + other.input_ids[other.prompt_tokens :]
    labels = row.labels[: row.prompt_tokens] + other.labels[other.prompt_tokens :]
    return TokenizedExample(ids, labels, row.prompt_text, row.prompt_tokens).truncate(max_length)


def class_balance_warning(desirable_count: int, undesirable_count: int, desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to change when good and bad rows are weighted too differently; None when they are balanced."""
    if not desirable_count or not undesirable_count:
        missing, effect = ("bad", "more") if desirable_count else ("good", "less")
        return f"there is no {missing} row: the model only learns to make the answers in the dataset {effect} likely"
    least, most = (undesirable_count * undesirable_weight / desirable_count * ratio for ratio in RECOMMENDED_WEIGHT_RATIO)
    if round(least, 2) <= desirable_weight <= round(most, 2):
        return None
    low, high = (desirable_count * desirable_weight / undesirable_count / ratio for ratio in reversed(RECOMMENDED_WEIGHT_RATIO))
    if round(low, 2) <= undesirable_weight <= round(high, 2):
        return None
    return (
        f"{desirable_count} rows are good and {undesirable_count} are bad: set desirable_weight between {least:.2f} and {most:.2f}, "
        f"or undesirable_weight between {low:.2f} and {high:.2f}"
    )


def add_kl_examples(rows: Sequence[UnpairedExample]) -> list[KtoExample]:
    """Each row with the nearest earlier row that has another prompt, for its mismatched pair."""
    lookback = min(len(rows), MAX_LOOKBACK)
    examples: list[KtoExample] = []
    for n, example in enumerate(rows):
        earlier = (rows[n - k].row for k in range(1, lookback))
        kl_fallback = next((row for row in earlier if not has_same_prompt(row, example.row)), rows[n - 1].row)
        examples.append(KtoExample(example, kl_fallback))
    return examples


def has_same_prompt(row: TokenizedExample, other: TokenizedExample) -> bool:
    """Whether both rows answer the same prompt."""
    return row.prompt_text == other.prompt_text
