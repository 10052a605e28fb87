"""Optimizer steps and tokens of a language model training, counted as the trainers count them."""

from dataclasses import dataclass
from math import ceil

from schema.estimate.llm_memory import PAIRED_TRAINER_TYPES
from schema.estimate.row_lengths import RowLengths

BUSY_PROMPTS = 8  # of a GRPO step on a GPU that names no gradient_accumulation_steps


@dataclass(frozen=True)
class StepPlan:
    """The length of a training. Examples are what passes through the model one by one: rows, packed blocks, completions."""

    rows: int  # training rows of an epoch
    examples: int  # of an epoch
    examples_per_step: int
    steps_per_epoch: int
    total_steps: int
    epochs: float  # that the steps make
    tokens_per_example: float  # with both sequences of a pair, without padding
    exact: bool  # the number of steps

    @property
    def total_examples(self) -> float:
        """Examples of the whole training; the last step of an epoch may have fewer than the others."""
        return self.examples * self.epochs

    @property
    def total_tokens(self) -> float:
        """Tokens of the whole training, without padding."""
        return self.total_examples * self.tokens_per_example

    def count_repetitions(self, interval: int) -> int:
        """How often something happens that happens every so many steps."""
        return self.total_steps // interval if interval > 0 else 0


def plan_steps(
    lengths: RowLengths, *, batch_size: int, accumulation_steps: int, epochs: int, max_steps: int, packing: int | None, trainer_type: str
) -> StepPlan:
    """The steps of every trainer type but GRPO. `lengths` are those of an epoch's rows, truncated; `packing`: the length of a block."""
    rows = lengths.rows
    examples = lengths.pack(packing) if packing else rows
    sequences = 2 if trainer_type in PAIRED_TRAINER_TYPES else 1
    per_example = sequences * lengths.tokens / examples if examples else 0.0
    return _count(rows, examples, batch_size * accumulation_steps, epochs, max_steps, per_example, exact=not packing)


def plan_grpo_steps(
    lengths: RowLengths,
    *,
    batch_size: int,
    accumulation_steps: int | None,
    epochs: int,
    max_steps: int,
    num_generations: int,
    num_iterations: int,
    completion_tokens: float,
    on_gpu: bool,
) -> StepPlan:
    """The steps of GRPO, whose examples are completions. Prompts that fill no step are left out."""
    prompts = lengths.rows
    chosen = accumulation_steps or choose_grpo_accumulation(batch_size, num_generations, prompts if on_gpu else 1)
    per_step = batch_size * chosen
    prompts_per_step = max(1, per_step // num_generations)
    examples = prompts // prompts_per_step * num_iterations * per_step
    per_example = (lengths.tokens / prompts if prompts else 0.0) + completion_tokens
    return _count(prompts, examples, per_step, epochs, max_steps, per_example, exact=accumulation_steps is not None)


def choose_grpo_accumulation(batch_size: int, num_generations: int, most_prompts: int) -> int:
    """About the forward passes of a GRPO step that names none: as many as BUSY_PROMPTS need, or as few as make whole groups."""
    steps = 1
    while batch_size * steps % num_generations:
        steps += 1
    return steps * max(1, min(BUSY_PROMPTS, most_prompts) * num_generations // (batch_size * steps))


def _count(rows: int, examples: int, per_step: int, epochs: int, max_steps: int, per_example: float, *, exact: bool) -> StepPlan:
    steps_per_epoch = max(1, ceil(examples / per_step)) if examples else 0
    total = max_steps if max_steps > 0 else epochs * steps_per_epoch
    # Whole epochs, and the share of the last one: its steps are full ones, except the last step of an epoch.
    whole, rest = divmod(total, steps_per_epoch) if steps_per_epoch else (0, 0)
    made = whole + (min(examples, rest * per_step) / examples if examples else 0.0)
    return StepPlan(rows, examples, per_step, steps_per_epoch, total, made, per_example, exact)
