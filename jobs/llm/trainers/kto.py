"""Kahneman-Tversky optimization: learn from answers that are each just good or bad.

    1. rows to tokens and labels; a pair is a good row and a bad one
    2. TRL's loss: good answers are to gain on the base, bad ones to lose, against how far the model has gone in general. That is
       estimated from answers to other prompts: those of the other rows of the batch
    3. held-out rows measured in the same way, beside the likelihood of the good answers

The base is the model without its adapter; when all weights are trained it is loaded a second time, and stays as it is.
"""

import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.cache import load_or_tokenize_unpaired
from jobs.llm.data.preference import UnpairedExample
from jobs.llm.data.tokenize import TokenizedExample
from jobs.llm.distributed import LossReduction
from jobs.llm.loss import evaluate_likelihood
from jobs.llm.model import load_base, lora_config
from jobs.llm.preference import (
    IndexCollator,
    cast_adapter_to_fp32,
    completion_batch,
    evaluate_trainer_metrics,
    index_dataset,
    non_padding_tokens,
    patch_fused_head,
    row_mean_metrics,
    validate_dataset_type,
    warn_preference_truncation,
)
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_loop import (
    TrainingContext,
    preference_metrics,
    prepare_training,
    require_examples,
    run_training,
    untrained_special_tokens,
)
from jobs.runtime.training_control import TrainingControl
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics
from schema.training import KtoConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# desirable_weight times the good rows, over undesirable_weight times the bad ones: Eq. (8) of arXiv 2402.01306.
RECOMMENDED_WEIGHT_RATIO = (1.0, 1.33)
MAX_LOOKBACK = 64  # rows back to look for another prompt


def train(config: KtoConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    validate_dataset_type(config, context)
    ground = prepare_training(config, context)
    return run_training(_build_task(config, ground), ground)


@dataclass(frozen=True)
class KtoExample:
    """A judged row, and an answer to another prompt, for a batch in which there is none."""

    example: UnpairedExample
    kl_fallback: TokenizedExample

    def choose_kl_example(self, neighbor: "KtoExample") -> TokenizedExample:
        """An answer to another prompt: the neighbour's, if it is one."""
        return self.kl_fallback if has_same_prompt(self.example.row, neighbor.example.row) else neighbor.example.row


@dataclass(frozen=True)
class KtoTask:
    """Good and bad answers, and how much better or worse they are liked than by the base."""

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
        return [row.example.row for row in self.held_out if row.example.is_good]

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
        """Without an adapter: the library puts it on, and knows then that the model without it is what to compare with."""
        return load_base(self.config, self.training.device_config, weights)

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        from trl import KTOConfig, KTOTrainer

        class PretokenizedKtoTrainer(KTOTrainer):
            """TRL's trainer, given tokens."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        knobs, ground = self.config.hyperparameters, self.training
        base = None if ground.trains_adapter else load_base(self.config, ground.device_config, ground.base_folder).requires_grad_(False)
        forwards = [(part, part.forward) for part in (model, base) if part is not None]
        size = arguments["per_device_train_batch_size"]
        trainer = instrument(PretokenizedKtoTrainer)(
            model=model,
            ref_model=base,
            args=KTOConfig(
                # TRL refuses a single row, which would be compared with itself; ours is compared with another one.
                **arguments | {"per_device_train_batch_size": max(size, 2)},
                beta=knobs.beta,
                desirable_weight=knobs.desirable_weight,
                undesirable_weight=knobs.undesirable_weight,
                max_length=None,  # the rows are cut
                disable_dropout=not knobs.lora_dropout,
            ),
            data_collator=IndexCollator(self.rows, self._batch),
            train_dataset=index_dataset(self.rows),
            eval_dataset=index_dataset(self.held_out) if self.held_out else None,
            processing_class=ground.tokenizer,
            peft_config=lora_config(self.config, model, trainable_token_ids=self.trainable_token_ids) if ground.trains_adapter else None,
        )
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = size
        # TRL keeps the order of the rows, because it says beforehand which are compared; here the batch says so.
        trainer.args.train_sampling_strategy = "random"
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
        began = time.monotonic()
        size = self.config.hyperparameters.batch_size
        found = evaluate_trainer_metrics(
            trainer,
            trainer._metrics["eval"],
            self.held_out,
            self._batch,
            batch_size=size,
            check_stop=check_stop,
            count_rows=_count_metric_rows,
        )
        found = row_mean_metrics(found)
        found.pop("rewards/margins", None)  # of the batches that have both
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        good = self.held_out_examples
        if good:
            likelihood = evaluate_likelihood(trainer.model, good, self.training.pad_id, self.config, check_stop)
        else:
            why = "no held-out row is good"
            likelihood = EvalMetrics(notes={"perplexity": why, "accuracy": why})
        return preference_metrics(found, likelihood.model_copy(update={"eval_rows": len(self.held_out)}), began)

    def _batch(self, rows: Sequence[KtoExample]) -> dict[str, Any]:
        import torch

        judged, pad_id = [row.example for row in rows], self.training.pad_id
        longest = self.config.hyperparameters.max_seq_length
        mixed = [mismatched_pair(row.example.row, row.choose_kl_example(rows[n - 1]), longest) for n, row in enumerate(rows)]
        batch = completion_batch([one.row for one in judged], pad_id) | completion_batch(mixed, pad_id, prefix="KL_")
        return batch | {"label": torch.tensor([one.is_good for one in judged])}


def _count_metric_rows(name: str, batch: Sequence[KtoExample]) -> int:
    """Of how many rows of a batch a figure is the mean."""
    good = sum(row.example.is_good for row in batch)
    return {"chosen": good, "rejected": len(batch) - good}.get(name.rpartition("/")[2], len(batch))


def mismatched_pair(row: TokenizedExample, other: TokenizedExample, max_length: int) -> TokenizedExample:
    """The row's prompt with another row's answer."""
    ids = row.input_ids[: row.prompt_tokens] + other.input_ids[other.prompt_tokens :]
    labels = row.labels[: row.prompt_tokens] + other.labels[other.prompt_tokens :]
    return TokenizedExample(ids, labels, row.prompt_text, row.prompt_tokens).truncate(max_length)


def class_balance_warning(desirable_count: int, undesirable_count: int, desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to do when good and bad rows weigh too differently; None when they do not."""
    if not desirable_count or not undesirable_count:
        missing = "bad" if desirable_count else "good"
        return f"there is no {missing} row: the model only learns to {'say more' if desirable_count else 'say less'} of what it is shown"
    least, most = (undesirable_count * undesirable_weight / desirable_count * share for share in RECOMMENDED_WEIGHT_RATIO)
    if round(least, 2) <= desirable_weight <= round(most, 2):
        return None
    low, high = (desirable_count * desirable_weight / undesirable_count / share for share in reversed(RECOMMENDED_WEIGHT_RATIO))
    if round(low, 2) <= undesirable_weight <= round(high, 2):
        return None
    return (
        f"{desirable_count} rows are good and {undesirable_count} are bad: set desirable_weight between {least:.2f} and {most:.2f}, "
        f"or undesirable_weight between {low:.2f} and {high:.2f}"
    )


def _build_task(config: KtoConfig, training: TrainingContext) -> KtoTask:
    """Rows to tokens and labels. Raises JobFailed when there is nothing to learn in them."""
    knobs, dataset_type = config.hyperparameters, training.context.spec.dataset.dataset_type
    rows: dict[str, list[UnpairedExample]] = {TRAIN_SPLIT: [], EVAL_SPLIT: []}
    for name, rendered in load_or_tokenize_unpaired(training, dataset_type).items():
        warn_preference_truncation(training, name, rendered)
        rows[name] = rendered.rows
    train_rows, held_out = rows[TRAIN_SPLIT], rows[EVAL_SPLIT]
    require_examples(training, len(train_rows), len(held_out))
    good = sum(row.is_good for row in train_rows)
    advice = class_balance_warning(good, len(train_rows) - good, knobs.desirable_weight, knobs.undesirable_weight)
    if advice:
        training.context.warn("class_imbalance", advice)
    found = untrained_special_tokens(training, [row.row for row in train_rows])
    return KtoTask(config, training, _with_kl_examples(train_rows), _with_kl_examples(held_out), found)


def _with_kl_examples(rows: Sequence[UnpairedExample]) -> list[KtoExample]:
    """Each row with the answer of the nearest one before it that has another prompt."""
    reach = min(len(rows), MAX_LOOKBACK)
    return [
        KtoExample(one, next((rows[n - k].row for k in range(1, reach) if not has_same_prompt(rows[n - k].row, one.row)), rows[n - 1].row))
        for n, one in enumerate(rows)
    ]


def has_same_prompt(one: TokenizedExample, other: TokenizedExample) -> bool:
    """Both answer the same."""
    return one.prompt_text == other.prompt_text
