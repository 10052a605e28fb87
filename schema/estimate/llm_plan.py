"""How a training of a language model uses the memory of a device: the rows of a forward pass, and whether activations are recomputed.

An attempt plans with the lengths of its tokenized rows and the free memory that it measures (`jobs/llm/memory_planner.py`); a dry run
with what is known before. Both decide here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from schema.estimate.llm_memory import LongestRows, TrainingMemory, TrainingShape, estimate_training_memory, find_token_budget
from schema.estimate.llm_shapes import ModelShape

# With fewer tokens in a forward pass a GPU waits for the launches of kernels: a step of Gemma 1B is about 8,000 launches of some 10 µs,
# in which an H200 could compute this many tokens. Calculated, not measured.
MIN_BUSY_TOKENS = 4096
# With more, attention between tokens of different rows, which is computed and masked, takes longer than the launches. As above.
MAX_PASS_TOKENS = 8192

Fit = Literal["fits", "fits_with_gradient_checkpointing", "fits_with_smaller_batch", "does_not_fit"]


@dataclass(frozen=True)
class TrainingNeeds:
    """What the memory of a training depends on."""

    model: ModelShape
    training: TrainingShape  # with the batch of the request
    rows: LongestRows

    @property
    def effective_batch_size(self) -> int:
        """Rows of an optimizer step."""
        return self.training.batch_size * self.training.gradient_accumulation_steps

    def with_batch(self, batch_size: int, gradient_accumulation_steps: int) -> TrainingShape:
        """The training with its largest batch of that size."""
        return replace(
            self.training,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            batch=self.rows.largest_batch(batch_size),
        )

    def estimate(self, plan: "PassPlan") -> TrainingMemory:
        """The memory of the training as planned."""
        shape = self.with_batch(plan.batch_size, plan.gradient_accumulation_steps)
        return estimate_training_memory(self.model, shape, gradient_checkpointing=plan.gradient_checkpointing)


@dataclass(frozen=True)
class PassPlan:
    """The rows of a forward pass, the passes of an optimizer step, and whether activations are recomputed."""

    batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    token_budget: int | None = None  # the most tokens of a forward pass, where rows are concatenated


def plan_passes(
    needs: TrainingNeeds,
    available_bytes: float,
    *,
    chooses_batch: bool,
    gradient_checkpointing: bool | None = None,
    max_world_size: int = 1,
) -> PassPlan:
    """What an attempt begins with. `chooses_batch`: the rows of a pass are chosen by the memory; None: so is gradient checkpointing."""
    requested = PassPlan(needs.training.batch_size, needs.training.gradient_accumulation_steps, gradient_checkpointing or False)
    if chooses_batch and needs.rows.concatenated:
        return _plan_token_budget(needs, gradient_checkpointing, available_bytes, max_world_size)
    if gradient_checkpointing is not None:
        return requested
    return replace(requested, gradient_checkpointing=needs.estimate(requested).peak >= available_bytes)


def find_fitting_plan(
    needs: TrainingNeeds, available_bytes: float, *, chooses_batch: bool, gradient_checkpointing: bool | None = None
) -> tuple[Fit, PassPlan]:
    """Whether a training fits, and how: as requested, with recomputed activations, or in smaller batches, to which an attempt goes down
    when memory runs out. Where it does not, the plan that needs least."""
    plan = plan_passes(needs, available_bytes, chooses_batch=chooses_batch, gradient_checkpointing=gradient_checkpointing)
    fit: Fit = "fits_with_gradient_checkpointing" if plan.gradient_checkpointing and gradient_checkpointing is None else "fits"
    effective = needs.effective_batch_size
    if needs.estimate(plan).peak < available_bytes:
        return fit, plan
    for size in range(plan.batch_size - 1, 0, -1):
        smaller = replace(plan, batch_size=size, gradient_accumulation_steps=effective // size)
        if effective % size == 0 and needs.estimate(smaller).peak < available_bytes:
            return "fits_with_smaller_batch", smaller
    return "does_not_fit", replace(plan, batch_size=1, gradient_accumulation_steps=effective)


def choose_rows_per_pass(longest_tokens: Sequence[int], effective_batch_size: int, max_world_size: int, token_budget: int) -> int:
    """The most rows of a forward pass with which any rows fit the budget, and the processes share an optimizer step evenly.

    `longest_tokens` are the tokens of the longest rows, descending. Every forward pass of a training has the same number of rows, so that
    the steps, their shares of several processes and their continuation are those of any other batch size. At least 1.
    """
    world_size = max(count for count in range(1, max_world_size + 1) if effective_batch_size % count == 0)
    share = effective_batch_size // world_size
    fitting = (rows for rows in range(1, share + 1) if share % rows == 0 and sum(longest_tokens[:rows]) <= token_budget)
    return max(fitting, default=1)


def _plan_token_budget(needs: TrainingNeeds, gradient_checkpointing: bool | None, available_bytes: float, max_world_size: int) -> PassPlan:
    """The plan with its token budget. Recomputing costs a third of the speed; it is chosen where the GPU would be idle without it."""
    choices = (False, True) if gradient_checkpointing is None else (gradient_checkpointing,)
    enough = max(needs.rows.tokens[0], min(MIN_BUSY_TOKENS, sum(needs.rows.tokens)))
    checkpointing, budget = False, 0
    for checkpointing in choices:
        budget = find_token_budget(needs.model, needs.training, available_bytes, gradient_checkpointing=checkpointing)
        if budget >= enough:
            break
    budget = min(budget, MAX_PASS_TOKENS)
    effective = needs.effective_batch_size
    size = choose_rows_per_pass(needs.rows.tokens, effective, max_world_size, budget)
    return PassPlan(size, effective // size, checkpointing, budget)
