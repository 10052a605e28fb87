"""The sizes of widely used base models, by the beginning of their names: what is known before a model's files are.

Each entry copies the model's config.json on the Hugging Face Hub and the number of parameters on its page.
"""

import re
from collections.abc import Mapping
from typing import Any

from schema.estimate.llm_shapes import DEFAULT_STORED_BYTES_PER_PARAMETER, ModelShape, read_model_shape


def _config(
    model_type: str, layers: int, hidden: int, intermediate: int, heads: tuple[int, int, int], vocab: int, tied: bool
) -> Mapping[str, Any]:
    """`heads` are the attention heads, the heads of keys and values, and the size of a head."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


# Billions of parameters, and the config.
KNOWN_MODELS: Mapping[str, tuple[float, Mapping[str, Any]]] = {
    "gemma-3-270m": (0.268, _config("gemma3_text", 18, 640, 2048, (4, 1, 256), 262_144, True)),
    "gemma-3-1b": (1.0, _config("gemma3_text", 26, 1152, 6912, (4, 1, 256), 262_144, True)),
    "gemma-3-4b": (4.3, _config("gemma3_text", 34, 2560, 10_240, (8, 4, 256), 262_208, True)),
    "gemma-3-12b": (12.2, _config("gemma3_text", 48, 3840, 15_360, (16, 8, 256), 262_208, True)),
    "gemma-3-27b": (27.4, _config("gemma3_text", 62, 5376, 21_504, (32, 16, 128), 262_208, True)),
    "llama-3.2-1b": (1.24, _config("llama", 16, 2048, 8192, (32, 8, 64), 128_256, True)),
    "llama-3.2-3b": (3.21, _config("llama", 28, 3072, 8192, (24, 8, 128), 128_256, True)),
    "llama-3.1-8b": (8.03, _config("llama", 32, 4096, 14_336, (32, 8, 128), 128_256, False)),
    "llama-3.1-70b": (70.6, _config("llama", 80, 8192, 28_672, (64, 8, 128), 128_256, False)),
    "llama-3.3-70b": (70.6, _config("llama", 80, 8192, 28_672, (64, 8, 128), 128_256, False)),
    "qwen3-0.6b": (0.6, _config("qwen3", 28, 1024, 3072, (16, 8, 128), 151_936, True)),
    "qwen3-1.7b": (1.7, _config("qwen3", 28, 2048, 6144, (16, 8, 128), 151_936, True)),
    "qwen3-4b": (4.0, _config("qwen3", 36, 2560, 9728, (32, 8, 128), 151_936, True)),
    "qwen3-8b": (8.2, _config("qwen3", 36, 4096, 12_288, (32, 8, 128), 151_936, False)),
    "qwen3-14b": (14.8, _config("qwen3", 40, 5120, 17_408, (40, 8, 128), 151_936, False)),
    "qwen3-32b": (32.8, _config("qwen3", 64, 5120, 25_600, (64, 8, 128), 151_936, False)),
    "mistral-7b": (7.25, _config("mistral", 32, 4096, 14_336, (32, 8, 128), 32_768, False)),
}


def find_known_shape(base_model_id: str) -> ModelShape | None:
    """The sizes of a model by its name, whichever account publishes the copy; None if they are not known."""
    name = base_model_id.rpartition("/")[2].lower().removeprefix("meta-")
    for prefix, (billions, config) in KNOWN_MODELS.items():
        if re.match(rf"{re.escape(prefix)}(?![a-z0-9.])", name):
            return read_model_shape(config, round(billions * 1e9) * DEFAULT_STORED_BYTES_PER_PARAMETER)
    return None
