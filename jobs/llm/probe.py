"""`python -m jobs.llm.probe`: prints this environment's capabilities as one line of JSON for the service."""

import json
import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "llama_cpp_python",
    "wandb",
    "bitsandbytes",
    "unsloth",
    "lm_eval",
    "onnx",
    "mlflow_skinny",
    "trackio",
)


def probe_environment() -> dict[str, object]:
    """The device, its precision, and the versions of the installed packages."""
    import psutil
    import torch

    from jobs.llm.llama_cpp import is_llama_cpp_available

    on_gpu = torch.cuda.is_available()
    return {
        "device": "cuda" if on_gpu else "cpu",
        "device_name": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "bf16": torch.cuda.is_bf16_supported() if on_gpu else has_native_bf16(),
        "flash_attention_2": on_gpu and torch.cuda.get_device_capability() >= (8, 0) and find_spec("flash_attn") is not None,
        "gguf": is_llama_cpp_available(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: installed for name in PACKAGES if (installed := _version(name))},
    }


def has_native_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware (AVX512-BF16 or AMX); others emulate it, slower than fp32."""
    flags = set(_cpuinfo("flags").split())
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def _cpu_name() -> str:
    return _cpuinfo("model name") or "CPU"


def _cpuinfo(field: str) -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(probe_environment()))
