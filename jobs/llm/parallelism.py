"""Decide how many processes train, and whether each holds the whole model (DDP) or a shard of it (FSDP).

Every decision is logged with its reason.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from jobs.llm.memory_planner import read_base_shape
from jobs.llm.training_context import TrainingContext
from jobs.runtime.batch_config import BatchConfig
from jobs.runtime.settings import read_max_processes, read_parallelism, visible_gpus
from jobs.runtime.system_metrics import nvidia_gpus
from schema.estimate.llm_memory import TrainingShape, estimate_training_bytes, usable_memory_bytes
from schema.training import TrainingConfig

UNSLOTH_SINGLE_GPU = "only provider huggingface trains on several GPUs"


@dataclass(frozen=True)
class DeviceSlots:
    """The devices that processes may use."""

    max_world_size: int
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; empty on a CPU
    sharded: bool = False  # the processes shard the model


@dataclass(frozen=True)
class WorldSizeDecision:
    """How many processes train, and why."""

    world_size: int
    reason: str
    idle_reason: str = ""  # why the other slots stay idle


@dataclass(frozen=True)
class Parallelism:
    """How the processes share a training, and why: one process, DDP or FSDP."""

    value: Literal["none", "ddp", "fsdp"]
    reason: str


@dataclass(frozen=True)
class MemoryEstimate:
    """GPU memory that a process needs with the whole model and with its shard, and the memory that is available."""

    full_model_bytes: float
    shard_bytes: float
    available_bytes: float


def detect_devices(*, on_gpu: bool) -> DeviceSlots:
    """Every visible GPU is a slot. On a CPU there is one slot, or as many as JOB_PROCESSES allows."""
    max_processes = read_max_processes()
    if not on_gpu:
        return DeviceSlots(max_processes or 1)
    detected = nvidia_gpus()
    gpus = visible_gpus(len(detected.names) if detected else 1)
    return DeviceSlots(min(max_processes or len(gpus), len(gpus)) or 1, gpus)


def supports_multiple_processes(config: TrainingConfig) -> bool:
    """Whether the provider can train in several processes."""
    return config.provider == "huggingface"


def resolve_world_size(training: TrainingContext, batch_config: BatchConfig, examples_per_epoch: int, slots: DeviceSlots) -> int:
    """How many processes train. Logs the decision, and warns about idle slots."""
    if slots.max_world_size == 1:
        return 1
    if supports_multiple_processes(training.config):
        decision = choose_world_size(batch_config, examples_per_epoch, slots.max_world_size)
    else:
        decision = WorldSizeDecision(1, UNSLOTH_SINGLE_GPU, UNSLOTH_SINGLE_GPU)
    training.context.log_decision("world_size", str(decision.world_size), decision.reason)
    if decision.idle_reason:
        message = f"{slots.max_world_size} processes could train, and {decision.world_size} will: {decision.idle_reason}"
        training.context.warn("idle_gpus" if slots.gpus else "idle_cpu_slots", message)
    return decision.world_size


def choose_world_size(batch_config: BatchConfig, examples_per_epoch: int, max_world_size: int) -> WorldSizeDecision:
    """The largest number of processes that divides the batches of an optimizer step evenly."""
    accumulation_steps = batch_config.gradient_accumulation_steps
    batches = -(-examples_per_epoch // batch_config.batch_size)
    world_size = max(count for count in range(1, max_world_size + 1) if accumulation_steps % count == 0 and count <= batches)
    reason = (
        f"{max_world_size} processes could train; each takes {accumulation_steps // world_size} of the {accumulation_steps} batches "
        "of an optimizer step"
    )
    if world_size == max_world_size:
        return WorldSizeDecision(world_size, reason)
    if batches < max_world_size:
        return WorldSizeDecision(world_size, reason, f"an epoch has only {batches} batches")
    hint = f"make it a multiple of {max_world_size}, and lower batch_size to keep the effective batch size"
    return WorldSizeDecision(
        world_size, reason, f"gradient_accumulation_steps {accumulation_steps} is not divisible by more processes; {hint}"
    )


def resolve_sharding(training: TrainingContext, shape: TrainingShape, world_size: int) -> bool:
    """Whether the processes shard the model. Logs the decision."""
    parallelism = choose_parallelism(
        world_size, fsdp_unsupported_reason(training.config), read_parallelism(), _estimate_memory(training, shape, world_size)
    )
    training.context.log_decision("parallelism", parallelism.value, parallelism.reason)
    return parallelism.value == "fsdp"


def fsdp_unsupported_reason(config: TrainingConfig) -> str:
    """Why FSDP cannot train this config; empty if it can."""
    if config.trainer_type != "sft" or config.modality != "text":
        return "only trainer_type sft on text supports sharding"
    if config.method == "QLoRA":
        return "4-bit weights cannot be sharded"
    return ""


def choose_parallelism(
    world_size: int, unsupported_reason: str, requested: Literal["ddp", "fsdp"] | None, memory: MemoryEstimate | None
) -> Parallelism:
    """DDP wherever the whole model fits, because it communicates less. `memory` is None on a CPU, where all processes share memory."""
    if world_size == 1:
        return Parallelism("none", "a single process trains")
    if requested == "ddp" or (requested == "fsdp" and not unsupported_reason):
        return Parallelism(requested, "set by JOB_PARALLELISM")
    if memory is None:
        return Parallelism("ddp", unsupported_reason or "on a CPU all processes share one memory")
    reason = (
        f"a GPU has {memory.available_bytes / 1e9:.1f} GB available, and the whole model needs about {memory.full_model_bytes / 1e9:.1f} GB"
    )
    if memory.full_model_bytes < memory.available_bytes:
        return Parallelism("ddp", reason)
    if unsupported_reason:
        return Parallelism("ddp", f"{reason}; {unsupported_reason}")
    reason = f"{reason}, one of {world_size} shards {memory.shard_bytes / 1e9:.1f} GB"
    return Parallelism("fsdp" if memory.shard_bytes < memory.available_bytes else "ddp", reason)


def _estimate_memory(training: TrainingContext, shape: TrainingShape, world_size: int) -> MemoryEstimate | None:
    """The memory estimate of a GPU; None on a CPU."""
    import torch

    if not training.device_config.on_gpu:
        return None
    estimate = partial(
        estimate_training_bytes,
        read_base_shape(training.base_folder),
        shape,
        gradient_checkpointing=training.device_config.gradient_checkpointing,
    )
    return MemoryEstimate(
        full_model_bytes=estimate(),
        shard_bytes=estimate(num_shards=world_size),
        available_bytes=usable_memory_bytes(torch.cuda.mem_get_info()[0]),
    )
