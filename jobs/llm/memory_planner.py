"""Decide how a training uses the device's memory: the rows of a forward pass, and gradient checkpointing.

The decisions use the lengths of the tokenized rows and the estimates of `schema.estimate.llm_memory`. They are made once in an attempt,
before the model is loaded; `oom.py` corrects them when memory runs out all the same. Each is logged with its reason.
"""

import json
from dataclasses import replace
from pathlib import Path

from jobs.llm.experts import find_setting_problem
from jobs.llm.exporters.model_files import measure_weights_bytes
from jobs.llm.hardware import DeviceConfig
from jobs.llm.memory_plan import MemoryPlan
from jobs.llm.training_context import TrainingContext, TrainingTask
from jobs.runtime.batch_config import BatchConfig
from schema.estimate.llm_memory import TrainingShape, usable_memory_bytes
from schema.estimate.llm_plan import PassPlan, TrainingNeeds, plan_passes
from schema.estimate.llm_shapes import ModelShape, read_model_shape


def plan_memory(task: TrainingTask, training: TrainingContext, max_world_size: int) -> tuple[TrainingNeeds, MemoryPlan]:
    """Choose what the request leaves to the job, for at most `max_world_size` processes. Also returns what the choice was based on."""
    context, hyperparameters = training.context, training.config.hyperparameters
    needs = read_memory_needs(task, training)
    free_bytes = measure_free_bytes(training.device_config)
    requested = hyperparameters.gradient_checkpointing
    plan = plan_passes(
        needs,
        usable_memory_bytes(free_bytes),
        chooses_batch=getattr(hyperparameters, "micro_batches", "fixed") == "auto",  # only SFT has the field
        gradient_checkpointing=requested,
        max_world_size=max_world_size,
    )
    if plan.token_budget is not None:
        step = f"{needs.effective_batch_size} rows of an optimizer step"
        reason = f"a forward pass may have {plan.token_budget:,} tokens, and the {step} have at most {sum(needs.rows.tokens):,}"
        context.log_decision("batch_size", str(plan.batch_size), reason)
        checkpointing_reason = "chosen with the rows of a forward pass, which need memory too"
    else:
        plain_bytes = needs.estimate(PassPlan(plan.batch_size, plan.gradient_accumulation_steps, gradient_checkpointing=False)).peak
        checkpointing_reason = f"training without it needs about {plain_bytes / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB are free"
    reason = checkpointing_reason if requested is None else "set in the request"
    context.log_decision("gradient_checkpointing", str(plan.gradient_checkpointing).lower(), reason)
    _log_estimate(training, needs, plan)
    return needs, MemoryPlan(BatchConfig(plan.batch_size, plan.gradient_accumulation_steps), plan.gradient_checkpointing)


def read_memory_needs(task: TrainingTask, training: TrainingContext) -> TrainingNeeds:
    """The sizes of the base, the settings and the longest rows."""
    shape = get_training_shape(training)
    rows = task.find_longest_rows(shape.batch_size * shape.gradient_accumulation_steps)
    return TrainingNeeds(
        read_base_shape(training.base_folder),
        replace(shape, batch=rows.largest_batch(shape.batch_size), keeps_logits=rows.keeps_logits),
        rows,
    )


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


def _log_estimate(training: TrainingContext, needs: TrainingNeeds, plan: PassPlan) -> None:
    memory = needs.estimate(plan)
    parts = {
        "weights": memory.weights,
        "optimizer": memory.optimizer_state,
        "gradients": memory.gradients,
        "activations": memory.activations,
        "loss head": memory.head,
        "backward pass": memory.backward,
    }
    batch = needs.rows.largest_batch(plan.batch_size)
    reason = "an estimate: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in parts.items())
    reason += f"; the largest batch has {batch.sequences} sequences of {batch.sequence_tokens} tokens"
    training.context.log_decision("training_memory", f"{memory.peak / 1e6:.0f} MB", reason)
