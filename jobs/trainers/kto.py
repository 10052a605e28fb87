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

from jobs.data.cache import judged_cached
from jobs.data.pairs import JudgedRow
from jobs.data.render import TokenRow
from jobs.trained import TrainedModel
from jobs.trainers.course import Course
from jobs.trainers.likelihood import measure
from jobs.trainers.loop import Ground, lay_ground, new_tokens, objective, refuse_nothing_to_learn, teach
from jobs.trainers.model import adapter_config, load_base
from jobs.trainers.preferences import (
    Picked,
    library_means,
    of_rows,
    places,
    ready_adapter,
    real_tokens,
    refuse_what_cannot_be,
    score_labels,
    tell_cuts,
    tensors,
)
from jobs.trainers.several import Evenly
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics
from schema.training import KtoConfig

if TYPE_CHECKING:
    from jobs.context import JobContext

# desirable_weight times the good rows, over undesirable_weight times the bad ones: Eq. (8) of arXiv 2402.01306.
BALANCE = (1.0, 1.33)
FAR = 64  # rows back to look for another prompt


def train(config: KtoConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    refuse_what_cannot_be(config, context)
    ground = lay_ground(config, context)
    return teach(_prepare(config, ground), ground)


@dataclass(frozen=True)
class Placed:
    """A judged row, and an answer to another prompt, for a batch in which there is none."""

    judged: JudgedRow
    other: TokenRow

    def compared_with(self, neighbour: "Placed") -> TokenRow:
        """An answer to another prompt: the neighbour's, if it is one."""
        return self.other if same_prompt(self.judged.row, neighbour.judged.row) else neighbour.judged.row


@dataclass(frozen=True)
class KtoLesson:
    """Good and bad answers, and how much better or worse they are liked than by the base."""

    config: KtoConfig
    ground: Ground
    rows: list[Placed]
    held_out: list[Placed]
    new_tokens: list[int]

    @property
    def items(self) -> int:
        return len(self.rows)

    @property
    def shown(self) -> Sequence[TokenRow]:
        return [row.judged.row for row in self.held_out if row.judged.is_good]

    @property
    def is_measured(self) -> bool:
        return bool(self.held_out)

    @property
    def train_rows(self) -> Sequence[TokenRow]:
        return [row.judged.row for row in self.rows]

    @property
    def recipe(self) -> "Callable[[Ground], KtoLesson]":
        return partial(KtoLesson, self.config, rows=self.rows, held_out=[], new_tokens=self.new_tokens)

    @property
    def shares(self) -> Evenly:
        return "batches"

    def model(self, weights: Path) -> Any:
        """Without an adapter: the library puts it on, and knows then that the model without it is what to compare with."""
        return load_base(self.config, self.ground.machine, weights)

    def trainer(self, model: Any, arguments: dict[str, Any], obedient: Callable[[type], type], course: Course) -> Any:
        from trl import KTOConfig, KTOTrainer

        class Prepared(KTOTrainer):
            """TRL's trainer, given tokens."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        knobs, ground = self.config.hyperparameters, self.ground
        base = None if ground.adapts else load_base(self.config, ground.machine, ground.base_folder).requires_grad_(False)
        forwards = [(part, part.forward) for part in (model, base) if part is not None]
        size = arguments["per_device_train_batch_size"]
        trainer = obedient(Prepared)(
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
            data_collator=Picked(self.rows, self._batch),
            train_dataset=places(self.rows),
            eval_dataset=places(self.held_out) if self.held_out else None,
            processing_class=ground.tokenizer,
            peft_config=adapter_config(self.config, model, new_tokens=self.new_tokens) if ground.adapts else None,
        )
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = size
        # TRL keeps the order of the rows, because it says beforehand which are compared; here the batch says so.
        trainer.args.train_sampling_strategy = "random"
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
        began = time.monotonic()
        size = self.config.hyperparameters.batch_size
        found = library_means(trainer, trainer._metrics["eval"], self.held_out, self._batch, size=size, pulse=pulse, count=_rows_of)
        found = of_rows(found)
        found.pop("rewards/margins", None)  # of the batches that have both
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        good = self.shown
        if good:
            likelihood = measure(trainer.model, good, self.ground.pad_id, self.config, pulse)
        else:
            why = "no held-out row is good"
            likelihood = EvalMetrics(notes={"perplexity": why, "accuracy": why})
        return objective(found, likelihood.model_copy(update={"eval_rows": len(self.held_out)}), began)

    def _batch(self, rows: Sequence[Placed]) -> dict[str, Any]:
        import torch

        judged, pad_id = [row.judged for row in rows], self.ground.pad_id
        longest = self.config.hyperparameters.max_seq_length
        mixed = [answered_otherwise(row.judged.row, row.compared_with(rows[n - 1]), longest) for n, row in enumerate(rows)]
        batch = tensors([one.row for one in judged], pad_id) | tensors(mixed, pad_id, prefix="KL_")
        return batch | {"label": torch.tensor([one.is_good for one in judged])}


def _rows_of(name: str, batch: Sequence[Placed]) -> int:
    """Of how many rows of a batch a figure is the mean."""
    good = sum(row.judged.is_good for row in batch)
    return {"chosen": good, "rejected": len(batch) - good}.get(name.rpartition("/")[2], len(batch))


def answered_otherwise(row: TokenRow, other: TokenRow, longest: int) -> TokenRow:
    """The row's prompt with another row's answer."""
    ids = row.input_ids[: row.prompt_tokens] + other.input_ids[other.prompt_tokens :]
    labels = row.labels[: row.prompt_tokens] + other.labels[other.prompt_tokens :]
    return TokenRow(ids, labels, row.prompt_text, row.prompt_tokens).cut_to(longest)


def advice_on_balance(good: int, bad: int, desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to do when good and bad rows weigh too differently; None when they do not."""
    if not good or not bad:
        missing = "bad" if good else "good"
        return f"there is no {missing} row: the model only learns to {'say more' if good else 'say less'} of what it is shown"
    least, most = (bad * undesirable_weight / good * share for share in BALANCE)
    if round(least, 2) <= desirable_weight <= round(most, 2):
        return None
    low, high = (good * desirable_weight / bad / share for share in reversed(BALANCE))
    if round(low, 2) <= undesirable_weight <= round(high, 2):
        return None
    return (
        f"{good} rows are good and {bad} are bad: set desirable_weight between {least:.2f} and {most:.2f}, "
        f"or undesirable_weight between {low:.2f} and {high:.2f}"
    )


def _prepare(config: KtoConfig, ground: Ground) -> KtoLesson:
    """Rows to tokens and labels. Raises JobFailed when there is nothing to learn in them."""
    knobs, dataset_type = config.hyperparameters, ground.context.spec.dataset.dataset_type
    rows: dict[str, list[JudgedRow]] = {TRAIN_SPLIT: [], EVAL_SPLIT: []}
    for name, rendered in judged_cached(ground, dataset_type).items():
        tell_cuts(ground, name, rendered)
        rows[name] = rendered.rows
    train_rows, held_out = rows[TRAIN_SPLIT], rows[EVAL_SPLIT]
    refuse_nothing_to_learn(ground, len(train_rows), len(held_out))
    good = sum(row.is_good for row in train_rows)
    advice = advice_on_balance(good, len(train_rows) - good, knobs.desirable_weight, knobs.undesirable_weight)
    if advice:
        ground.context.warn("unbalanced", advice)
    found = new_tokens(ground, [row.row for row in train_rows])
    return KtoLesson(config, ground, _placed(train_rows), _placed(held_out), found)


def _placed(rows: Sequence[JudgedRow]) -> list[Placed]:
    """Each row with the answer of the nearest one before it that has another prompt."""
    reach = min(len(rows), FAR)
    return [
        Placed(one, next((rows[n - k].row for k in range(1, reach) if not same_prompt(rows[n - k].row, one.row)), rows[n - 1].row))
        for n, one in enumerate(rows)
    ]


def same_prompt(one: TokenRow, other: TokenRow) -> bool:
    """Both answer the same."""
    return one.prompt_text == other.prompt_text
