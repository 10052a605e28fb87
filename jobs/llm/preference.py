"""What the trainers that learn from judged answers share: batches, heads that score labels, and honest means of the library's figures.

The losses are TRL's. Its rows are ours, so that every trainer reads a chat in the same way; and so are its means, in which each
held-out row counts the same, however they are batched.
"""

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.llm.data.cache import load_or_tokenize_pairs
from jobs.llm.data.preference import PreferencePair, TokenizedPreferenceSplit, TokenizedUnpairedSplit
from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample, TokenizedSplit
from jobs.llm.evaluation.state import evaluation_state
from jobs.llm.loss import collate, compute_labeled_logits, evaluate_likelihood
from jobs.llm.oom import free_memory, is_out_of_memory
from jobs.llm.trainable_tokens import patch_trainable_token_embedding
from jobs.llm.training_loop import TrainingContext, preference_metrics, require_examples, warn_truncation
from jobs.runtime.errors import JobFailed
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

Row = TypeVar("Row")

# Of the library's figures these are means over rows.
ROW_MEAN_PREFIXES = ("rewards/", "logps/", "kl", "nll_loss", "log_odds")


# --- rows ----------------------------------------------------------------------------------------------------------------


def validate_dataset_type(config: TrainingConfig, context: "JobContext") -> None:
    """Raises JobFailed for rows of another form than the trainer type learns from, and a provider that does not train it."""
    found = context.spec.dataset.dataset_type
    if found not in config.dataset_types:
        known = " or ".join(config.dataset_types)
        message = f"trainer_type '{config.trainer_type}' learns from rows of the form {known}, and the dataset has {found}"
        raise JobFailed("invalid_data", message, "use another dataset, or another trainer_type")
    if config.provider == "unsloth":
        message = f"provider 'unsloth' does not train trainer_type '{config.trainer_type}'"
        raise JobFailed("invalid_config", message, "use provider 'huggingface': the same request, and the same result")


def prepare_pairs(training: TrainingContext) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """The pairs to learn from, and the held-out ones. Raises JobFailed when there is nothing to learn."""
    found = load_or_tokenize_pairs(training)
    for name, rendered in found.items():
        warn_preference_truncation(training, name, rendered)
    train = found[TRAIN_SPLIT].rows
    held_out = found[EVAL_SPLIT].rows if EVAL_SPLIT in found else []
    require_examples(training, len(train), len(held_out))
    return train, held_out


def warn_preference_truncation(training: TrainingContext, split: str, rendered: TokenizedPreferenceSplit | TokenizedUnpairedSplit) -> None:
    """Say how many rows were cut or left out."""
    warn_truncation(training, split, TokenizedSplit(truncated=rendered.truncated, dropped=rendered.dropped))


def concat_chosen_rejected(pairs: Sequence[PreferencePair]) -> list[TokenizedExample]:
    """All answers: first the chosen ones, then the rejected ones, as TRL has them."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def sort_by_length(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Pairs of like length beside each other: little padding."""
    return sorted(pairs, key=lambda pair: max(len(pair.chosen.input_ids), len(pair.rejected.input_ids)))


def index_dataset(rows: Sequence[object]) -> Any:
    """A dataset, as TRL insists on, of nothing but the places of the rows: their tokens stay where they are."""
    from datasets import Dataset

    return Dataset.from_dict({"row_index": list(range(len(rows)))})


@dataclass(frozen=True)
class IndexCollator:
    """Makes a batch of the rows at the places."""

    rows: Sequence[Any]
    collate_fn: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, items: Sequence[dict[str, int]]) -> dict[str, Any]:
        return self.collate_fn([self.rows[item["row_index"]] for item in items])


def completion_batch(rows: Sequence[TokenizedExample], pad_id: int, prefix: str = "") -> dict[str, Any]:
    """Rows as TRL's DPO and KTO read them: tokens, and a mask of what was answered. (B, T) each."""
    batch = collate([[row] for row in rows], pad_id)
    found = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    found["completion_mask"] = (batch["labels"] != IGNORE_INDEX).long()
    return {prefix + name: part for name, part in found.items()}


# --- the model -----------------------------------------------------------------------------------------------------------


def cast_adapter_to_fp32(model: Any) -> None:
    """After TRL put its adapter on: trained in fp32, for bf16 loses small updates, as it has them for a base of 4 bits."""
    import torch

    for part in model.parameters():
        if part.requires_grad and part.dtype == torch.bfloat16:
            part.data = part.data.float()
    patch_trainable_token_embedding(model)


def patch_fused_head(model: Any, forward: Callable[..., Any]) -> None:
    """Let what TRL calls the fused head score labelled positions only, by the model's own `forward`.

    TRL's scores every position where there is no Triton, prompts and padding as well; and it multiplies by the head's weight, which
    is not what a head does of which a few rows are trained.
    """
    import torch

    @wraps(forward)
    def scored(*args: Any, fused_lm_head: bool = False, labels: Any = None, **inputs: Any) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        if not fused_lm_head:
            return forward(*args, **inputs if labels is None else inputs | {"labels": labels})
        inputs.pop("use_cache", None)
        logits, wanted = compute_labeled_logits(forward, inputs, labels)
        mask = labels[:, 1:] != IGNORE_INDEX
        logps = logits.log_softmax(-1)

        def placed(values: Any) -> Any:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        said = logps.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            figures = {
                "entropy": placed(-(logps.exp() * logps).sum(-1)),
                "mean_logits": placed(logits.mean(-1)),
                "is_top1": placed(logits.argmax(-1) == wanted),
            }
        return FusedCausalLMOutput(loss=-said.mean(), log_probs=placed(said), label_mask=mask, **figures)

    model.forward = scored


# --- measuring -----------------------------------------------------------------------------------------------------------


@dataclass
class WeightedMeans:
    """Figures of batches, and how many rows each stands for."""

    sums: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: float, rows: int) -> None:
        """A mean over so many rows."""
        self.sums[name] = self.sums.get(name, 0.0) + value * rows
        self.rows[name] = self.rows.get(name, 0) + rows

    def means(self) -> dict[str, float]:
        """Over all rows, by name."""
        return {name: total / self.rows[name] for name, total in self.sums.items() if self.rows[name]}


def run_in_batches(
    rows: Sequence[Row], batch_size: int, process_batch: Callable[[Sequence[Row]], None], check_stop: Callable[[], None]
) -> None:
    """Work on so many rows at once, or on fewer when memory runs out. Raises JobFailed when a single one is too many."""
    done = 0
    while done < len(rows):
        check_stop()
        batch = rows[done : done + batch_size]
        if _run_or_oom(process_batch, batch):
            done += len(batch)
        elif len(batch) == 1:
            hint = "lower max_seq_length, or ask for hardware with more memory"
            raise JobFailed("out_of_memory", "memory ran out while a single held-out row was measured", hint)
        else:
            batch_size = len(batch) // 2
            free_memory()


def _run_or_oom(process_batch: Callable[[Sequence[Row]], None], batch: Sequence[Row]) -> bool:
    try:
        process_batch(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


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
    """The loss and the figures of the library's trainer on rows, by its own names, each row counting the same.

    `gathered` is where the trainer puts the figures of a batch; `count` says of how many of its rows a figure is the mean.
    """
    means = WeightedMeans()

    def work(batch: Sequence[Row]) -> None:
        logged_metrics_buffer.clear()
        loss, _, _ = trainer.prediction_step(trainer.model, collate_fn(batch), True)
        means.add("loss", float(loss), len(batch))
        for name, values in logged_metrics_buffer.items():
            means.add(name.removeprefix("eval_"), values[-1], count_rows(name, batch))

    try:
        with evaluation_state(trainer.model):
            run_in_batches(rows, batch_size, work, check_stop)
    finally:
        logged_metrics_buffer.clear()  # it would be among the figures of the next time
    return means.means()


def row_mean_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that are means over rows; the others are of the tokens of a batch, and change with its size."""
    return {name: value for name, value in metrics.items() if name == "loss" or name.startswith(ROW_MEAN_PREFIXES)}


def evaluate_pairs(
    trainer: Any,
    logged_metrics_buffer: MutableMapping[str, list[float]],
    training: TrainingContext,
    pairs: Sequence[PreferencePair],
    collate_fn: Callable[[Sequence[PreferencePair]], dict[str, Any]],
    check_stop: Callable[[], None],
) -> EvalMetrics:
    """The trainer's own objective on held-out pairs, and how likely the model finds the chosen answers."""
    began = time.monotonic()
    config = training.config
    found = evaluate_trainer_metrics(
        trainer,
        logged_metrics_buffer,
        sort_by_length(pairs),
        collate_fn,
        batch_size=config.hyperparameters.batch_size,
        check_stop=check_stop,
    )
    likelihood = evaluate_likelihood(trainer.model, [pair.chosen for pair in pairs], training.pad_id, config, check_stop)
    return preference_metrics(row_mean_metrics(found), likelihood, began)


def non_padding_tokens(inputs: dict[str, Any], *names: str) -> int:
    """Tokens in a batch that are no padding, by its attention masks."""
    return sum(int(inputs[name].sum()) for name in names)
