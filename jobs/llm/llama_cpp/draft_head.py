"""Tells the converter when a model has no layers for multi-token prediction, which it otherwise requires of some architectures.

Bases of Qwen3-Next and Qwen 3.5 hold such layers, for speculative decoding. transformers neither loads nor saves them, so a fully trained
model has none. A merged one has those of its base, copied.
"""

import json
from pathlib import Path

ARCHITECTURE_PREFIXES = ("Qwen3Next", "Qwen3_5")
TENSOR_PREFIXES = ("mtp.", "model.mtp.")


def list_draft_head_options(model_folder: Path) -> list[str]:
    """The converter's options for a Hugging Face model folder: `--no-mtp` where it would look for layers that are not there."""
    from safetensors import safe_open

    architectures = json.loads((model_folder / "config.json").read_text()).get("architectures") or [""]
    if not architectures[0].startswith(ARCHITECTURE_PREFIXES):
        return []
    for path in model_folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as tensors:
            if any(name.startswith(TENSOR_PREFIXES) for name in tensors.keys()):  # noqa: SIM118  # not a mapping
                return []
    return ["--no-mtp"]
