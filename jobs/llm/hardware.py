"""Detect the device of an attempt and choose what depends on it: precision, data loader workers, torch.compile.

`memory_planner.py` chooses what depends on the memory, once the lengths of the rows are known.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from schema.estimate import llm
from schema.estimate.llm_memory import TrainingShape
from schema.estimate.llm_shapes import ModelShape
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext


@dataclass(frozen=True)
class DeviceConfig:
    """The device an attempt trains on, and the settings that follow from it and from the rows."""

    device: Any  # torch.device
    dtype: Any  # torch.dtype of the weights
    autocast: bool  # compute in bf16 with fp32 weights
    on_gpu: bool
    gradient_checkpointing: bool = False  # chosen by `memory_planner.py`, which knows the rows
    torch_compile: bool = False
    dataloader_num_workers: int = 0


def detect_device(config: TrainingConfig, context: "JobContext") -> DeviceConfig:
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
        dataloader_num_workers=_choose_dataloader_num_workers(config, context, on_gpu=on_gpu),
    )


def _choose_dataloader_num_workers(config: TrainingConfig, context: "JobContext", *, on_gpu: bool) -> int:
    """Worker processes of the data loader. Text needs none: its rows are tokens in memory. On a CPU they would take cores from training."""
    requested = config.hyperparameters.dataloader_num_workers
    if requested is not None:
        return requested
    count = 2 if on_gpu and config.modality == "vision" else 0
    reason = "images are decoded in parallel with training" if count else "the rows are tokens in memory, so there is nothing to prepare"
    context.log_decision("dataloader_num_workers", str(count), reason)
    return count


def choose_torch_compile(
    config: TrainingConfig, context: "JobContext", device_config: DeviceConfig, model: ModelShape, training: TrainingShape, steps: int
) -> bool:
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
    training_s = llm.estimate_training_s(model, training, steps)
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
