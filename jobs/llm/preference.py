"""What the preference trainers (DPO, ORPO, KTO and reward) share: rows, batches, adapters and evaluation.

The losses are TRL's. Rows are tokenized by our own code, so that every trainer reads a chat in the same way. Evaluation metrics are
weighted by rows, so that they do not depend on the batch size.
"""

import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Self, TypeVar

from jobs.llm.data.arrow_rows import ArrowPairs, ChosenRows
from jobs.llm.data.cache import load_or_tokenize_pairs
from jobs.llm.data.mixing import load_mixed
from jobs.llm.data.preference import PreferencePair
from jobs.llm.data.splits import check_splits, untrained_special_tokens
from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample
from jobs.llm.evaluation.state import evaluation_state
from jobs.llm.loss import collate, compute_labeled_logits, evaluate_likelihood
from jobs.llm.model import load_base
from jobs.llm.oom import run_in_batches
from jobs.llm.trainable_tokens import patch_trainable_token_embedding
from jobs.llm.training_context import LossReduction, TrainingContext
from jobs.llm.turn_ends import get_turn_ends
from jobs.runtime.errors import JobFailed
from schema.estimate.llm_memory import LongestRows, find_longest_rows
from schema.job import EvalMetrics
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

Row = TypeVar("Row")

# Prefixes of the library's metrics that are means over rows.
ROW_MEAN_PREFIXES = ("rewards/", "logps/", "kl", "nll_loss", "log_odds")
# The library's evaluation metrics that are not about the model.
EXCLUDED_EVAL_KEYS = {"runtime", "samples_per_second", "steps_per_second", "num_tokens", "model_preparation_time", "epoch"}


def validate_dataset_type(config: TrainingConfig, context: "JobContext") -> None:
    """Raises JobFailed for a dataset type or a provider that the trainer type does not support."""
    dataset_type = context.spec.dataset.dataset_type
    if dataset_type not in config.dataset_types:
        supported = " or ".join(config.dataset_types)
        message = f"trainer_type '{config.trainer_type}' trains on {supported} rows, and the dataset has {dataset_type} rows"
        raise JobFailed("invalid_data", message, "use another dataset or another trainer_type")
    if config.provider == "unsloth":
        message = f"provider 'unsloth' does not support trainer_type '{config.trainer_type}'"
        raise JobFailed("invalid_config", message, "use provider 'huggingface': the same request trains the same way")


# --- pairs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairTask:
    """The part of a TrainingTask that DPO, ORPO and reward models share: pairs of a chosen and a rejected answer."""

    config: TrainingConfig
    training: TrainingContext
    pairs: Sequence[PreferencePair]
    held_out: Sequence[PreferencePair]
    trainable_token_ids: list[int]

    @classmethod
    def load(cls, config: TrainingConfig, training: TrainingContext) -> Self:
        """Tokenize the pairs of both splits. Raises JobFailed without training pairs."""
        pairs, held_out = check_splits(training, load_mixed(training, load_or_tokenize_pairs))
        answers = pairs.rows if isinstance(pairs, ArrowPairs) else concat_chosen_rejected(pairs)
        return cls(config, training, pairs, held_out, untrained_special_tokens(training, answers))

    @property
    def examples_per_epoch(self) -> int:
        return len(self.pairs)

    @property
    def held_out_examples(self) -> Sequence[TokenizedExample]:
        return ChosenRows(self.held_out)

    def find_longest_rows(self, count: int) -> LongestRows:
        answers = ((pair.chosen, pair.rejected) for pair in self.pairs)
        rows = ((max(len(row.input_ids) for row in pair), sum(row.label_count for row in pair)) for pair in answers)
        return replace(find_longest_rows(rows, count), sequences_per_row=2)

    @property
    def has_held_out_rows(self) -> bool:
        return bool(self.held_out)

    @property
    def train_examples(self) -> Sequence[TokenizedExample]:
        return ChosenRows(self.pairs)

    @property
    def worker_task_factory(self) -> Callable[[TrainingContext], Self]:
        return partial(type(self), self.config, pairs=self.pairs, held_out=[], trainable_token_ids=self.trainable_token_ids)

    @property
    def loss_reduction(self) -> LossReduction:
        return "batches"


def concat_chosen_rejected(pairs: Sequence[PreferencePair]) -> list[TokenizedExample]:
    """All answers in TRL's order: the chosen ones, then the rejected ones."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def sort_by_length(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs by length, so that batches have little padding."""
    return sorted(pairs, key=lambda pair: max(len(pair.chosen.input_ids), len(pair.rejected.input_ids)))


# --- batches -------------------------------------------------------------------------------------------------------------


def index_dataset(rows: Sequence[object]) -> Any:
    """A dataset of row indices. TRL requires a datasets.Dataset; copying the tokens into it would double their memory."""
    from datasets import Dataset

    return Dataset.from_dict({"row_index": list(range(len(rows)))})


@dataclass(frozen=True)
class IndexCollator:
    """Collates the rows with the given indices."""

    rows: Sequence[Any]
    collate_fn: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, items: Sequence[dict[str, int]]) -> dict[str, Any]:
        return self.collate_fn([self.rows[item["row_index"]] for item in items])


def completion_batch(rows: Sequence[TokenizedExample], pad_id: int, prefix: str = "") -> dict[str, Any]:
    """Rows as TRL's DPO and KTO trainers read them: input_ids, attention_mask and completion_mask, each (B, T)."""
    batch = collate([[row] for row in rows], pad_id)
    tensors = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    tensors["completion_mask"] = (batch["labels"] != IGNORE_INDEX).long()
    return {prefix + name: tensor for name, tensor in tensors.items()}


def non_padding_tokens(inputs: dict[str, Any], *mask_names: str) -> int:
    """The tokens of a batch without padding, by its attention masks."""
    return sum(int(inputs[name].sum()) for name in mask_names)


# --- model ---------------------------------------------------------------------------------------------------------------


def load_reference_model(training: TrainingContext) -> Any:
    """The frozen base that a fully trained model is compared with. None for an adapter: the base is the model without it."""
    if training.trains_adapter:
        return None
    return load_base(training.config, training.device_config, training.base_folder).requires_grad_(False)


def cast_adapter_to_fp32(model: Any) -> None:
    """Cast the adapter that TRL added to fp32: bf16 loses small updates, and TRL casts to bf16 for a 4-bit base."""
    import torch

    for weight in model.parameters():
        if weight.requires_grad and weight.dtype == torch.bfloat16:
            weight.data = weight.data.float()
    patch_trainable_token_embedding(model)


def patch_fused_head(model: Any, forward: Callable[..., Any]) -> None:
    """Make TRL's fused LM head compute labeled positions only, through the model's own `forward`.

    Without Triton, TRL computes every position, prompts and padding included. It also multiplies by the head's weight, which is wrong
    for a head with trainable tokens.
    """
    import torch

    @wraps(forward)
    def labeled_forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, **inputs: Any) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        if not fused_lm_head:
            return forward(*args, **inputs if labels is None else inputs | {"labels": labels})
        inputs.pop("use_cache", None)
        logits, targets = compute_labeled_logits(forward, inputs, labels)
        mask = labels[:, 1:] != IGNORE_INDEX
        log_probs = logits.log_softmax(-1)

        def scatter(values: Any) -> Any:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        target_log_probs = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            metrics = {
                "entropy": scatter(-(log_probs.exp() * log_probs).sum(-1)),
                "mean_logits": scatter(logits.mean(-1)),
                "is_top1": scatter(logits.argmax(-1) == targets),
            }
        return FusedCausalLMOutput(loss=-target_log_probs.mean(), log_probs=scatter(target_log_probs), label_mask=mask, **metrics)

    model.forward = labeled_forward


# --- evaluation ----------------------------------------------------------------------------------------------------------


def evaluate_pairs(
    trainer: Any,
    logged_metrics_buffer: MutableMapping[str, list[float]],
    training: TrainingContext,
    pairs: Sequence[PreferencePair],
    collate_fn: Callable[[Sequence[PreferencePair]], dict[str, Any]],
    check_stop: Callable[[], None],
) -> EvalMetrics:
    """The trainer's loss and metrics on held-out pairs, and the likelihood of the chosen answers."""
    started_at = time.monotonic()
    metrics = evaluate_trainer_metrics(
        trainer,
        logged_metrics_buffer,
        sort_by_length(pairs),
        collate_fn,
        batch_size=training.config.hyperparameters.batch_size,
        check_stop=check_stop,
    )
    chosen = [pair.chosen for pair in pairs]
    likelihood = evaluate_likelihood(trainer.model, chosen, training.pad_id, training.config, get_turn_ends(training), check_stop)
    return preference_metrics(row_mean_metrics(metrics), likelihood, started_at)


def evaluate_trainer_metrics(
    trainer: Any,
    logged_metrics_buffer: MutableMapping[str, list[float]],
    rows: Sequence[Row],
    collate_fn: Callable[[Sequence[Row]], dict[str, Any]],
    *,
    batch_size: int,
    check_stop: Callable[[], None],
    count_rows: Callable[[str, Sequence[Row]], int] = lambda _, batch: len(batch),
) -> dict[str, float]:
    """The loss and metrics of the library's trainer on rows, by the library's names. Every row counts the same.

    `logged_metrics_buffer` is where the trainer records the metrics of a batch. `count_rows(metric, batch)` is the number of rows of the
    batch over which the metric is a mean.
    """
    means = WeightedMeans()

    def process_batch(batch: Sequence[Row]) -> None:
        logged_metrics_buffer.clear()
        loss, _, _ = trainer.prediction_step(trainer.model, collate_fn(batch), True)
        means.add("loss", float(loss), len(batch))
        for name, values in logged_metrics_buffer.items():
            means.add(name.removeprefix("eval_"), values[-1], count_rows(name, batch))

    try:
        with evaluation_state(trainer.model):
            run_in_batches(rows, batch_size, process_batch, check_stop)
    finally:
        logged_metrics_buffer.clear()  # or the library would log these metrics with the next ones
    return means.means()


@dataclass
class WeightedMeans:
    """Means of metrics over rows, from means over batches."""

    sums: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: float, rows: int) -> None:
        """Add a mean over `rows` rows."""
        self.sums[name] = self.sums.get(name, 0.0) + value * rows
        self.rows[name] = self.rows.get(name, 0) + rows

    def means(self) -> dict[str, float]:
        """The means over all rows, by name."""
        return {name: total / self.rows[name] for name, total in self.sums.items() if self.rows[name]}


def row_mean_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are means over rows. The others are of the tokens of a batch, and change with the batch size."""
    return {name: value for name, value in metrics.items() if name == "loss" or name.startswith(ROW_MEAN_PREFIXES)}


def preference_metrics(metrics: Mapping[str, float], likelihood: EvalMetrics, started_at: float) -> EvalMetrics:
    """The library's metrics, without the prefix `eval_`, beside the likelihood of the preferred answers.

    `eval_loss` is the trainer's own; the perplexities and `accuracy` are of the preferred answers.
    """
    metrics = {name.removeprefix("eval_"): float(value) for name, value in metrics.items()}
    loss = metrics.pop("loss", math.nan)
    values: dict[str, float | None] = {}
    notes = dict(likelihood.notes)
    for name, value in metrics.items():
        if name not in EXCLUDED_EVAL_KEYS:
            values[name] = value if math.isfinite(value) else None
            if not math.isfinite(value):
                notes[name] = f"the value is {value}"
    if likelihood.eval_loss is not None:
        values["chosen/nll"] = likelihood.eval_loss
    if not math.isfinite(loss):
        notes["eval_loss"] = "not a finite number"
    return likelihood.model_copy(
        update={
            "eval_loss": loss if math.isfinite(loss) else None,
            "eval_runtime": time.monotonic() - started_at,
            "values": values,
            "notes": notes,
        }
    )
