"""Decide how a training uses the device's memory: the rows of a forward pass, and gradient checkpointing.

The decisions use the lengths of the tokenized rows and the estimates of `schema.estimate.llm_memory`. They are made once in an attempt,
before the model is loaded; `oom.py` corrects them when memory runs out all the same. Each is logged with its reason.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.llm.experts import find_setting_problem
from jobs.llm.exporters.model_files import measure_weights_bytes
from jobs.llm.hardware import DeviceConfig
from jobs.llm.memory_plan import MemoryPlan
from jobs.llm.training_context import TrainingContext, TrainingTask
from jobs.runtime.batch_config import BatchConfig
from schema.estimate.llm_memory import (
    LongestRows,
    TrainingShape,
    estimate_training_memory,
    find_token_budget,
    usable_memory_bytes,
)
from schema.estimate.llm_shapes import ModelShape, read_model_shape

# With fewer tokens in a forward pass a GPU waits for the launches of kernels: a step of Gemma 1B is about 8,000 launches of some 10 µs,
# in which an H200 could compute this many tokens. Calculated, not measured.
MIN_BUSY_TOKENS = 4096
# With more, attention between tokens of different rows, which is computed and masked, takes longer than the launches. As above.
MAX_PASS_TOKENS = 8192


@dataclass(frozen=True)
class MemoryNeeds:
    """What the memory of a training depends on."""

    model: ModelShape
    training: TrainingShape  # with the batch of the request
    rows: LongestRows

    def with_batch(self, batch_config: BatchConfig) -> TrainingShape:
        """The training with its largest batch of that size."""
        return replace(
            self.training,
            batch_size=batch_config.batch_size,
            gradient_accumulation_steps=batch_config.gradient_accumulation_steps,
            batch=self.rows.largest_batch(batch_config.batch_size),
        )


def plan_memory(task: TrainingTask, training: TrainingContext, max_world_size: int) -> tuple[MemoryNeeds, MemoryPlan]:
    """Choose what the request leaves to the job, for at most `max_world_size` processes. Also returns what the choice was based on."""
    context, hyperparameters = training.context, training.config.hyperparameters
    needs = read_memory_needs(task, training)
    free_bytes = measure_free_bytes(training.device_config)
    available_bytes = usable_memory_bytes(free_bytes)
    batch_config, requested = _requested_batch_config(training), hyperparameters.gradient_checkpointing
    chooses_batch = getattr(hyperparameters, "micro_batches", "fixed") == "auto"  # only SFT has the field
    if chooses_batch and needs.rows.concatenated:
        plan, budget = _plan_token_budget(needs, batch_config, requested, available_bytes, max_world_size)
        step = f"{batch_config.effective_batch_size} rows of an optimizer step"
        reason = f"a forward pass may have {budget:,} tokens, and the {step} have at most {sum(needs.rows.tokens):,}"
        context.log_decision("batch_size", str(plan.batch_config.batch_size), reason)
        checkpointing_reason = "chosen with the rows of a forward pass, which need memory too"
    else:
        plain_bytes = estimate_training_memory(needs.model, needs.with_batch(batch_config)).peak
        plan = MemoryPlan(batch_config, plain_bytes >= available_bytes if requested is None else requested)
        checkpointing_reason = f"training without it needs about {plain_bytes / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB are free"
    reason = checkpointing_reason if requested is None else "set in the request"
    context.log_decision("gradient_checkpointing", str(plan.gradient_checkpointing).lower(), reason)
    _log_estimate(training, needs, plan)
    return needs, plan


def choose_rows_per_pass(longest_tokens: Sequence[int], effective_batch_size: int, max_world_size: int, token_budget: int) -> int:
    """The most rows of a forward pass with which any rows fit the budget, and the processes share an optimizer step evenly.

    `longest_tokens` are the tokens of the longest rows, descending. Every forward pass of a training has the same number of rows, so that
    the steps, their shares of several processes and their continuation are those of any other batch size. At least 1.
    """
    world_size = max(count for count in range(1, max_world_size + 1) if effective_batch_size % count == 0)
    share = effective_batch_size // world_size
    fitting = (rows for rows in range(1, share + 1) if share % rows == 0 and sum(longest_tokens[:rows]) <= token_budget)
    return max(fitting, default=1)


def read_memory_needs(task: TrainingTask, training: TrainingContext) -> MemoryNeeds:
    """The sizes of the base, the settings and the longest rows."""
    batch_config = _requested_batch_config(training)
    rows = task.find_longest_rows(batch_config.effective_batch_size)
    needs = MemoryNeeds(read_base_shape(training.base_folder), get_training_shape(training), rows)
    return replace(needs, training=replace(needs.with_batch(batch_config), keeps_logits=rows.keeps_logits))


def read_base_shape(base_folder: Path) -> ModelShape:
    """The sizes of a base model that its memory and time depend on."""
    return read_model_shape(json.loads((base_folder / "config.json").read_text()), measure_weights_bytes(base_folder))


def get_training_shape(training: TrainingContext) -> TrainingShape:
    """The settings that memory and time depend on, without the lengths of the rows."""
    import torch

    config, device_config = training.config, training.device_config
    hyperparameters = config.hyperparameters
    return TrainingShape(
        trainer_type=config.trainer_type,
        method=config.method,
        batch_size=hyperparameters.batch_size,
        max_seq_length=hyperparameters.max_seq_length,
        gradient_accumulation_steps=hyperparameters.accumulation_steps,
        train_vision_tower=getattr(hyperparameters, "train_vision_tower", False),  # only SFT has the field
        lora_rank=hyperparameters.lora_rank,
        has_dropout=training.trains_adapter and hyperparameters.lora_dropout > 0,
        adapts_experts=training.trains_adapter and find_setting_problem(hyperparameters) is None,
        optimizer=hyperparameters.optim,
        computes_bf16=device_config.autocast or device_config.dtype == torch.bfloat16,
        on_gpu=device_config.on_gpu,
    )


def measure_free_bytes(device_config: DeviceConfig) -> float:
    """The free memory of the device."""
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if device_config.on_gpu else psutil.virtual_memory().available


def _requested_batch_config(training: TrainingContext) -> BatchConfig:
    hyperparameters = training.config.hyperparameters
    return BatchConfig(hyperparameters.batch_size, hyperparameters.accumulation_steps)


def _plan_token_budget(
    needs: MemoryNeeds, requested: BatchConfig, gradient_checkpointing: bool | None, available_bytes: float, max_world_size: int
) -> tuple[MemoryPlan, int]:
    """The plan and its token budget. Recomputing costs a third of the speed; it is chosen where the GPU would be idle without it."""
    choices = (False, True) if gradient_checkpointing is None else (gradient_checkpointing,)
    enough = max(needs.rows.tokens[0], min(MIN_BUSY_TOKENS, sum(needs.rows.tokens)))
    checkpointing, budget = False, 0
    for checkpointing in choices:
        budget = find_token_budget(needs.model, needs.training, available_bytes, gradient_checkpointing=checkpointing)
        if budget >= enough:
            break
    budget = min(budget, MAX_PASS_TOKENS)
    size = choose_rows_per_pass(needs.rows.tokens, requested.effective_batch_size, max_world_size, budget)
    return MemoryPlan(BatchConfig(size, requested.effective_batch_size // size), checkpointing), budget


def _log_estimate(training: TrainingContext, needs: MemoryNeeds, plan: MemoryPlan) -> None:
    shape = needs.with_batch(plan.batch_config)
    memory = estimate_training_memory(needs.model, shape, gradient_checkpointing=plan.gradient_checkpointing)
    parts = {
        "weights": memory.weights,
        "optimizer": memory.optimizer_state,
        "gradients": memory.gradients,
        "activations": memory.activations,
        "loss head": memory.head,
        "backward pass": memory.backward,
    }
    batch = shape.largest_batch
    reason = "an estimate: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in parts.items())
    reason += f"; the largest batch has {batch.sequences} sequences of {batch.sequence_tokens} tokens"
    training.context.log_decision("training_memory", f"{memory.peak / 1e6:.0f} MB", reason)
