"""What the trainers that learn from judged answers share: batches, heads that score labels, and honest means of the library's figures.

The losses are TRL's. Its rows are ours, so that every trainer reads a chat in the same way; and so are its means, in which each
held-out row counts the same, however they are batched.
"""

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.data.cache import pairs_cached
from jobs.data.pairs import Pair, RenderedJudged, RenderedPairs
from jobs.data.render import NO_LABEL, Rendered, TokenRow
from jobs.errors import JobFailed
from jobs.evaluation.undisturbed import undisturbed
from jobs.trainers.healing import free_memory, is_out_of_memory
from jobs.trainers.likelihood import collate, labelled_logits, measure
from jobs.trainers.loop import Ground, objective, refuse_nothing_to_learn, tell_losses
from jobs.turn_tokens import train_few_rows_only
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.context import JobContext

Row = TypeVar("Row")

# Of the library's figures these are means over rows.
ROW_MEANS = ("rewards/", "logps/", "kl", "nll_loss", "log_odds")


# --- rows ----------------------------------------------------------------------------------------------------------------


def refuse_what_cannot_be(config: TrainingConfig, context: "JobContext") -> None:
    """Raises JobFailed for rows of another form than the trainer type learns from, and a provider that does not train it."""
    found = context.spec.dataset.dataset_type
    if found not in config.dataset_types:
        known = " or ".join(config.dataset_types)
        message = f"trainer_type '{config.trainer_type}' learns from rows of the form {known}, and the dataset has {found}"
        raise JobFailed("invalid_data", message, "use another dataset, or another trainer_type")
    if config.provider == "unsloth":
        message = f"provider 'unsloth' does not train trainer_type '{config.trainer_type}'"
        raise JobFailed("invalid_config", message, "use provider 'huggingface': the same request, and the same result")


def prepare_pairs(ground: Ground) -> tuple[list[Pair], list[Pair]]:
    """The pairs to learn from, and the held-out ones. Raises JobFailed when there is nothing to learn."""
    found = pairs_cached(ground)
    for name, rendered in found.items():
        tell_cuts(ground, name, rendered)
    train = found[TRAIN_SPLIT].rows
    held_out = found[EVAL_SPLIT].rows if EVAL_SPLIT in found else []
    refuse_nothing_to_learn(ground, len(train), len(held_out))
    return train, held_out


def tell_cuts(ground: Ground, split: str, rendered: RenderedPairs | RenderedJudged) -> None:
    """Say how many rows were cut or left out."""
    tell_losses(ground, split, Rendered(cut=rendered.cut, dropped=rendered.dropped))


def both(pairs: Sequence[Pair]) -> list[TokenRow]:
    """All answers: first the chosen ones, then the rejected ones, as TRL has them."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def by_length(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs of like length beside each other: little padding."""
    return sorted(pairs, key=lambda pair: max(len(pair.chosen.input_ids), len(pair.rejected.input_ids)))


def places(rows: Sequence[object]) -> Any:
    """A dataset, as TRL insists on, of nothing but the places of the rows: their tokens stay where they are."""
    from datasets import Dataset

    return Dataset.from_dict({"place": list(range(len(rows)))})


@dataclass(frozen=True)
class Picked:
    """Makes a batch of the rows at the places."""

    rows: Sequence[Any]
    batch_of: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, items: Sequence[dict[str, int]]) -> dict[str, Any]:
        return self.batch_of([self.rows[item["place"]] for item in items])


def tensors(rows: Sequence[TokenRow], pad_id: int, prefix: str = "") -> dict[str, Any]:
    """Rows as TRL's DPO and KTO read them: tokens, and a mask of what was answered. (B, T) each."""
    batch = collate([[row] for row in rows], pad_id)
    found = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    found["completion_mask"] = (batch["labels"] != NO_LABEL).long()
    return {prefix + name: part for name, part in found.items()}


# --- the model -----------------------------------------------------------------------------------------------------------


def ready_adapter(model: Any) -> None:
    """After TRL put its adapter on: trained in fp32, for bf16 loses small updates, as it has them for a base of 4 bits."""
    import torch

    for part in model.parameters():
        if part.requires_grad and part.dtype == torch.bfloat16:
            part.data = part.data.float()
    train_few_rows_only(model)


def score_labels(model: Any, forward: Callable[..., Any]) -> None:
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
        logits, wanted = labelled_logits(forward, inputs, labels)
        mask = labels[:, 1:] != NO_LABEL
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
class Means:
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


def in_batches(rows: Sequence[Row], size: int, work: Callable[[Sequence[Row]], None], pulse: Callable[[], None]) -> None:
    """Work on so many rows at once, or on fewer when memory runs out. Raises JobFailed when a single one is too many."""
    done = 0
    while done < len(rows):
        pulse()
        batch = rows[done : done + size]
        if _fits(work, batch):
            done += len(batch)
        elif len(batch) == 1:
            hint = "lower max_seq_length, or ask for hardware with more memory"
            raise JobFailed("out_of_memory", "memory ran out while a single held-out row was measured", hint)
        else:
            size = len(batch) // 2
            free_memory()


def _fits(work: Callable[[Sequence[Row]], None], batch: Sequence[Row]) -> bool:
    try:
        work(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def library_means(
    trainer: Any,
    gathered: MutableMapping[str, list[float]],
    rows: Sequence[Row],
    batch_of: Callable[[Sequence[Row]], dict[str, Any]],
    *,
    size: int,
    pulse: Callable[[], None],
    count: Callable[[str, Sequence[Row]], int] = lambda _, batch: len(batch),
) -> dict[str, float]:
    """The loss and the figures of the library's trainer on rows, by its own names, each row counting the same.

    `gathered` is where the trainer puts the figures of a batch; `count` says of how many of its rows a figure is the mean.
    """
    means = Means()

    def work(batch: Sequence[Row]) -> None:
        gathered.clear()
        loss, _, _ = trainer.prediction_step(trainer.model, batch_of(batch), True)
        means.add("loss", float(loss), len(batch))
        for name, values in gathered.items():
            means.add(name.removeprefix("eval_"), values[-1], count(name, batch))

    try:
        with undisturbed(trainer.model):
            in_batches(rows, size, work, pulse)
    finally:
        gathered.clear()  # it would be among the figures of the next time
    return means.means()


def of_rows(found: Mapping[str, float]) -> dict[str, float]:
    """Those that are means over rows; the others are of the tokens of a batch, and change with its size."""
    return {name: value for name, value in found.items() if name == "loss" or name.startswith(ROW_MEANS)}


def measure_pairs(
    trainer: Any,
    gathered: MutableMapping[str, list[float]],
    ground: Ground,
    pairs: Sequence[Pair],
    batch_of: Callable[[Sequence[Pair]], dict[str, Any]],
    pulse: Callable[[], None],
) -> EvalMetrics:
    """The trainer's own objective on held-out pairs, and how likely the model finds the chosen answers."""
    began = time.monotonic()
    config = ground.config
    found = library_means(trainer, gathered, by_length(pairs), batch_of, size=config.hyperparameters.batch_size, pulse=pulse)
    likelihood = measure(trainer.model, [pair.chosen for pair in pairs], ground.pad_id, config, pulse)
    return objective(of_rows(found), likelihood, began)


def real_tokens(inputs: dict[str, Any], *names: str) -> int:
    """Tokens in a batch that are no padding, by its attention masks."""
    return sum(int(inputs[name].sum()) for name in names)
