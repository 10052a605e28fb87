"""Detect the device of an attempt and choose what depends on it: precision, gradient checkpointing, data loader workers, torch.compile.

Also estimates the memory and time of a training; `parallelism.py` uses the memory estimate to decide whether the model is sharded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.model_files import measure_weights_bytes
from jobs.llm.probe import has_native_bf16
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# Activation memory in bytes per token, hidden unit and layer: measured for Gemma in bf16 without gradient checkpointing.
# The logits at labeled positions are extra.
ACTIVATION_BYTES = 40
CHECKPOINTED_ACTIVATION_BYTES = 4  # the same with gradient checkpointing: only the layer's input is kept
UNSHARDED_LAYERS = 3  # FSDP layers that are whole at once: the computing one, the prefetched one, and the previous one's gradients
USABLE_MEMORY_FRACTION = 0.8  # of free memory; the rest is left to the allocator

# torch.compile takes a minute or more, then saves a fraction of each step.
COMPILE_S = 300.0
COMPILE_SAVED_FRACTION = 0.15
GPU_FLOP_PER_S = 40e12  # an L4 at a third of its peak; faster GPUs finish sooner, so compiling pays off less often


@dataclass(frozen=True)
class DeviceConfig:
    """The device an attempt trains on, and the settings that follow from it."""

    device: Any  # torch.device
    dtype: Any  # torch.dtype of the weights
    autocast: bool  # compute in bf16 with fp32 weights
    on_gpu: bool
    gradient_checkpointing: bool
    torch_compile: bool = False
    dataloader_num_workers: int = 0


def detect_device(config: TrainingConfig, context: "JobContext", base_folder: Path) -> DeviceConfig:
    """Detect the device and choose the settings that follow from it. Logs each choice with its reason."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    context.log_decision("device", str(device), torch.cuda.get_device_name() if on_gpu else "no GPU was found")
    has_bf16 = torch.cuda.is_bf16_supported() if on_gpu else has_native_bf16()
    trains_adapter = config.method != "Full"
    # Full fine-tuning with bf16 weights loses small updates. With fp32 weights, autocast still multiplies in bf16.
    dtype = torch.bfloat16 if has_bf16 and trains_adapter else torch.float32
    reason = "the device computes bf16 natively" if has_bf16 else "the device has no native bf16"
    if not trains_adapter:
        reason = "method Full trains all weights, and small updates need fp32"
    context.log_decision("dtype", str(dtype).removeprefix("torch."), reason)
    return DeviceConfig(
        device,
        dtype,
        autocast=has_bf16 and not trains_adapter and on_gpu,
        on_gpu=on_gpu,
        gradient_checkpointing=_choose_gradient_checkpointing(config, context, base_folder, on_gpu=on_gpu),
        dataloader_num_workers=_choose_dataloader_num_workers(config, context, on_gpu=on_gpu),
    )


def _choose_gradient_checkpointing(config: TrainingConfig, context: "JobContext", base_folder: Path, *, on_gpu: bool) -> bool:
    """Whether to recompute activations in the backward pass, which costs a third of the speed and saves most of their memory."""
    import psutil
    import torch

    requested = config.hyperparameters.gradient_checkpointing
    if requested is not None:
        context.log_decision("gradient_checkpointing", str(requested).lower(), "set in the request")
        return requested
    free_bytes = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    required_bytes = estimate_training_bytes(config, base_folder)
    fits = required_bytes < free_bytes * USABLE_MEMORY_FRACTION
    reason = f"training without it needs about {required_bytes / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB are free"
    context.log_decision("gradient_checkpointing", str(not fits).lower(), reason)
    return not fits


def _choose_dataloader_num_workers(config: TrainingConfig, context: "JobContext", *, on_gpu: bool) -> int:
    """Worker processes of the data loader. Text needs none: its rows are tokens in memory. On a CPU they would take cores from training."""
    requested = config.hyperparameters.dataloader_num_workers
    if requested is not None:
        return requested
    count = 2 if on_gpu and config.modality == "vision" else 0
    reason = "images are decoded in parallel with training" if count else "the rows are tokens in memory, so there is nothing to prepare"
    context.log_decision("dataloader_num_workers", str(count), reason)
    return count


def estimate_training_bytes(
    config: TrainingConfig, base_folder: Path, *, gradient_checkpointing: bool = False, num_shards: int = 1
) -> float:
    """Rough peak memory of a training on one device: weights, gradients, optimizer state and activations.

    With `num_shards` above 1, weights, gradients and optimizer state are sharded; a few layers and the embeddings stay whole.
    """
    model_config = json.loads((base_folder / "config.json").read_text())
    text_config = model_config.get("text_config", model_config)
    hyperparameters = config.hyperparameters
    parameters = measure_weights_bytes(base_folder) / 2  # bases are stored in bf16; an fp32 one is overestimated by a factor of 2
    bytes_per_parameter = {"Full": 16.0, "LoRA": 2.0, "QLoRA": 0.6}[config.method]
    if config.method == "Full" and config.trainer_type in ("dpo", "kto"):
        bytes_per_parameter += 4  # the reference model
    hidden_size = text_config.get("hidden_size", 4096)
    layers = text_config.get("num_hidden_layers", 32)
    vocab_size = text_config.get("vocab_size", 262_144)
    sequences_per_row = 2 if config.trainer_type in ("dpo", "orpo", "reward") else 1
    tokens = hyperparameters.batch_size * hyperparameters.max_seq_length * sequences_per_row
    bytes_per_hidden_unit = _activation_bytes_per_token(layers, gradient_checkpointing=gradient_checkpointing)
    activations = tokens * (hidden_size * bytes_per_hidden_unit + 6 * vocab_size)
    if getattr(hyperparameters, "train_vision_tower", False):  # only SFT has the field; a frozen tower keeps no activations
        vision_config = model_config.get("vision_config", {})
        activations += hyperparameters.batch_size * _vision_activation_bytes(vision_config, gradient_checkpointing=gradient_checkpointing)
    unsharded = 0.0 if num_shards == 1 else 8 * vocab_size * hidden_size + UNSHARDED_LAYERS * 4 * parameters / layers
    return parameters * bytes_per_parameter / num_shards + unsharded + activations


def _activation_bytes_per_token(layers: int, *, gradient_checkpointing: bool) -> float:
    """Activation bytes of a token in all layers, per hidden unit."""
    return layers * CHECKPOINTED_ACTIVATION_BYTES + ACTIVATION_BYTES if gradient_checkpointing else layers * ACTIVATION_BYTES


def _vision_activation_bytes(vision_config: dict[str, Any], *, gradient_checkpointing: bool) -> float:
    """Activation bytes of one image in the vision tower."""
    patches = (vision_config.get("image_size", 896) // vision_config.get("patch_size", 14)) ** 2
    layers = vision_config.get("num_hidden_layers", 27)
    bytes_per_hidden_unit = _activation_bytes_per_token(layers, gradient_checkpointing=gradient_checkpointing)
    return patches * vision_config.get("hidden_size", 1152) * bytes_per_hidden_unit


def choose_torch_compile(config: TrainingConfig, context: "JobContext", device_config: DeviceConfig, base_folder: Path, steps: int) -> bool:
    """Whether to compile the model before training it for `steps` optimizer steps. Logs the choice with its reason."""
    import shutil

    requested = config.hyperparameters.torch_compile
    if requested and not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        context.warn("torch_compile_skipped", "torch_compile needs a C compiler and none is installed; training continues without it")
        return False
    if requested is not None:
        context.log_decision("torch_compile", str(requested).lower(), "set in the request")
        return requested
    if not device_config.on_gpu:
        context.log_decision("torch_compile", "false", "on a CPU the model is compiled only on request")
        return False
    saved_s = estimate_training_s(config, base_folder, steps) * COMPILE_SAVED_FRACTION
    reason = f"compiling would save about {saved_s:.0f} s in {steps} steps and take about {COMPILE_S:.0f} s"
    context.log_decision("torch_compile", str(saved_s > COMPILE_S).lower(), reason)
    return saved_s > COMPILE_S


def estimate_training_s(config: TrainingConfig, base_folder: Path, steps: int) -> float:
    """Rough duration of `steps` optimizer steps on a data-center GPU that reaches GPU_FLOP_PER_S."""
    hyperparameters = config.hyperparameters
    tokens = steps * hyperparameters.batch_size * hyperparameters.gradient_accumulation_steps * hyperparameters.max_seq_length
    flop_per_token = (6 if config.method == "Full" else 4) * measure_weights_bytes(base_folder) / 2
    return tokens * flop_per_token / GPU_FLOP_PER_S
