"""What the packages of an environment let this family do. Nothing heavy is imported: installed packages are found by their metadata."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import get_args

from jobs.llm.llama_cpp import is_llama_cpp_available
from schema.capabilities import FamilyCapabilities
from schema.training import TRAINER_TYPES
from schema.training.llm import Modality


def probe() -> FamilyCapabilities:
    """The family's capabilities here. Raises RuntimeError when a package is missing without which nothing can be trained."""
    missing = [package for package in ("torch", "transformers", "trl", "peft") if not _is_installed(package)]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not installed")
    quantized, unsloth, gguf = _is_installed("bitsandbytes"), _is_installed("unsloth"), is_llama_cpp_available()
    flash, onnx, lm_eval = find_spec("flash_attn") is not None, _is_installed("onnx"), _is_installed("lm_eval")
    requirements = {
        "method": (quantized, "QLoRA needs bitsandbytes in the trainer's environment"),
        "provider": (unsloth, "unsloth is not installed in the trainer's environment"),
        "use_fa2": (flash, "FlashAttention 2 needs an Ampere or newer GPU, and the package flash-attn"),
        "include_gguf": (gguf, "`make setup` builds llama.cpp into the trainer's environment"),
        "include_lora_gguf": (gguf, "`make setup` builds llama.cpp into the trainer's environment"),
        "format": (onnx, "the ONNX exporter is not installed in the trainer's environment"),
        "lm_eval_tasks": (lm_eval, "install lm_eval in the trainer's environment"),
    }
    return FamilyCapabilities(
        trainer_types=tuple(name for name, config in TRAINER_TYPES.items() if config.family == "llm"),
        options={
            "provider": ("huggingface", "unsloth") if unsloth else ("huggingface",),
            "method": ("LoRA", "QLoRA", "Full") if quantized else ("LoRA", "Full"),
            "modality": get_args(Modality),
        },
        features={"gguf": gguf, "onnx": onnx, "lm_eval": lm_eval, "flash_attention_2": flash},
        needs_gpu=("unsloth", "flash_attention_2"),
        notes={field: note for field, (available, note) in requirements.items() if not available},
    )


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
