"""Detect the device of an attempt and choose what depends on it: precision, gradient checkpointing, data loader workers, torch.compile.

The choices use the estimates of `schema.estimate.llm`; `parallelism.py` uses them to decide whether the model is sharded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.model_files import measure_weights_bytes
from schema.estimate import llm
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext


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
    fits = required_bytes < llm.usable_memory_bytes(free_bytes)
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
    """Rough peak memory of a training on one device, as `schema.estimate.llm` estimates it."""
    model, training = read_base_shape(base_folder), get_training_shape(config)
    return llm.estimate_training_bytes(model, training, gradient_checkpointing=gradient_checkpointing, num_shards=num_shards)


def read_base_shape(base_folder: Path) -> llm.ModelShape:
    """The sizes of a base model that its memory and time depend on."""
    return llm.read_model_shape(json.loads((base_folder / "config.json").read_text()), measure_weights_bytes(base_folder))


def get_training_shape(config: TrainingConfig) -> llm.TrainingShape:
    """The settings of a config that memory and time depend on."""
    hyperparameters = config.hyperparameters
    return llm.TrainingShape(
        trainer_type=config.trainer_type,
        method=config.method,
        batch_size=hyperparameters.batch_size,
        max_seq_length=hyperparameters.max_seq_length,
        gradient_accumulation_steps=hyperparameters.accumulation_steps,
        train_vision_tower=getattr(hyperparameters, "train_vision_tower", False),  # only SFT has the field
    )


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
    training_s = llm.estimate_training_s(read_base_shape(base_folder), get_training_shape(config), steps)
    saved_s = llm.estimate_compile_saving_s(training_s)
    reason = f"compiling would save about {saved_s:.0f} s in {steps} steps and take about {llm.COMPILE_S:.0f} s"
    context.log_decision("torch_compile", str(saved_s > llm.COMPILE_S).lower(), reason)
    return saved_s > llm.COMPILE_S


def computes_in_bf16(config: TrainingConfig) -> bool:
    """Whether the training computes with weights in bf16, as `detect_device` decides."""
    import torch

    return config.method != "Full" and (torch.cuda.is_bf16_supported() if torch.cuda.is_available() else has_native_bf16())


def has_native_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware (AVX512-BF16 or AMX); others emulate it, slower than fp32."""
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set[str]())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})
