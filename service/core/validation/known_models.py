"""Base models that are recognized by name, and what is known of them before anything is downloaded. Any other name passes.

A name is compared without its account and without regard to case, whichever account publishes the copy.
"""

import re
from dataclasses import dataclass
from typing import Literal

# Whether a model accepts images, and whether modality `vision` can train them: the trainer knows the images of Gemma 3.
Images = Literal["none", "untrained", "trained"]


@dataclass(frozen=True)
class KnownModel:
    """Models whose names begin alike."""

    name: str
    images: Images
    hidden_size: int | None  # of the hidden states; the rank of a LoRA must not exceed it. None: not known, or it differs


# `hidden_size` (of the text part) and the presence of a vision tower, in each model's config.json on the Hub. The first match counts.
KNOWN_MODELS = (
    KnownModel("gemma-3-270m", "none", 640),
    KnownModel("gemma-3-1b", "none", 1152),
    KnownModel("gemma-3-4b", "trained", 2560),
    KnownModel("gemma-3-12b", "trained", 3840),
    KnownModel("gemma-3-27b", "trained", 5376),
    KnownModel("gemma-2b", "none", 2048),
    KnownModel("gemma-7b", "none", 3072),
    KnownModel("gemma-2-2b", "none", 2304),
    KnownModel("gemma-2-9b", "none", 3584),
    KnownModel("gemma-2-27b", "none", 4608),
    KnownModel("gemma-3n-e4b", "untrained", 2048),
    KnownModel("gemma-3n", "untrained", None),
    KnownModel("gemma-4", "untrained", None),
    KnownModel("llama-2-7b", "none", 4096),
    KnownModel("llama-2-13b", "none", 5120),
    KnownModel("llama-2-70b", "none", 8192),
    KnownModel("llama-3-8b", "none", 4096),
    KnownModel("llama-3-70b", "none", 8192),
    KnownModel("llama-3.1-8b", "none", 4096),
    KnownModel("llama-3.1-70b", "none", 8192),
    KnownModel("llama-3.1-405b", "none", 16384),
    KnownModel("llama-3.2-1b", "none", 2048),
    KnownModel("llama-3.2-3b", "none", 3072),
    KnownModel("llama-3.2-11b-vision", "untrained", None),
    KnownModel("llama-3.2-90b-vision", "untrained", None),
    KnownModel("llama-3.3-70b", "none", 8192),
    KnownModel("llama-4", "untrained", None),
    KnownModel("qwen2.5-vl", "untrained", None),
    KnownModel("qwen2.5-omni", "untrained", None),
    KnownModel("qwen2.5-0.5b", "none", 896),
    KnownModel("qwen2.5-1.5b", "none", 1536),
    KnownModel("qwen2.5-3b", "none", 2048),
    KnownModel("qwen2.5-7b", "none", 3584),
    KnownModel("qwen2.5-14b", "none", 5120),
    KnownModel("qwen2.5-32b", "none", 5120),
    KnownModel("qwen2.5-72b", "none", 8192),
    KnownModel("qwen2.5-coder-0.5b", "none", 896),
    KnownModel("qwen2.5-coder-1.5b", "none", 1536),
    KnownModel("qwen2.5-coder-3b", "none", 2048),
    KnownModel("qwen2.5-coder-7b", "none", 3584),
    KnownModel("qwen2.5-coder-14b", "none", 5120),
    KnownModel("qwen2.5-coder-32b", "none", 5120),
    KnownModel("qwen2.5-math-1.5b", "none", 1536),
    KnownModel("qwen2.5-math-7b", "none", 3584),
    KnownModel("qwen2.5-math-72b", "none", 8192),
    KnownModel("qwq-32b", "none", 5120),
    KnownModel("qwen3-vl", "untrained", None),
    KnownModel("qwen3-omni", "untrained", None),
    KnownModel("qwen3-0.6b", "none", 1024),
    KnownModel("qwen3-1.7b", "none", 2048),
    KnownModel("qwen3-4b", "none", 2560),
    KnownModel("qwen3-8b", "none", 4096),
    KnownModel("qwen3-14b", "none", 5120),
    KnownModel("qwen3-32b", "none", 5120),
    KnownModel("qwen3-30b-a3b", "none", 2048),
    KnownModel("qwen3-235b-a22b", "none", 4096),
    KnownModel("qwen3-next", "none", None),
    KnownModel("qwen3.5", "untrained", None),
    KnownModel("mistral-7b", "none", 4096),
    KnownModel("mistral-small-24b", "none", 5120),
    KnownModel("mistral-small-3.1", "untrained", None),
    KnownModel("mistral-small-3.2", "untrained", None),
    KnownModel("mistral-large-instruct-2407", "none", 12288),
    KnownModel("mistral-large-instruct-2411", "none", 12288),
    KnownModel("mathstral-7b", "none", 4096),
    KnownModel("mixtral-8x7b", "none", 4096),
    KnownModel("mixtral-8x22b", "none", 6144),
    KnownModel("phi-1_5", "none", 2048),
    KnownModel("phi-2", "none", 2560),
    KnownModel("phi-3-mini", "none", 3072),
    KnownModel("phi-3-vision", "untrained", None),
    KnownModel("phi-3.5-mini", "none", 3072),
    KnownModel("phi-3.5-vision", "untrained", None),
    KnownModel("phi-4-multimodal", "untrained", None),
    KnownModel("phi-4-mini-instruct", "none", 3072),
    KnownModel("phi-4-mini-reasoning", "none", 3072),
    KnownModel("phi-4-reasoning", "none", 5120),
    KnownModel("phi-4", "none", 5120),
    KnownModel("smollm2-135m", "none", 576),
    KnownModel("smollm2-360m", "none", 960),
    KnownModel("smollm2-1.7b", "none", 2048),
    KnownModel("smollm3-3b", "none", 2048),
    KnownModel("tinyllama-1.1b", "none", 2048),
    KnownModel("gpt-oss-20b", "none", 2880),
    KnownModel("gpt-oss-120b", "none", 2880),
    KnownModel("deepseek-r1-distill-llama-8b", "none", 4096),
    KnownModel("deepseek-r1-distill-llama-70b", "none", 8192),
    KnownModel("olmo-2-1124-7b", "none", 4096),
    KnownModel("olmo-2-1124-13b", "none", 5120),
)
# Architectures whose layers carry a state along the sequence (Mamba, RWKV, gated delta nets, convolutions over tokens): the state of one
# packed row would reach the next. The attempt reads the same from the model's config, whatever its name.
STATEFUL_NAME = re.compile(
    r"(?<![a-z0-9])("
    r"lfm[23]|qwen3-next|qwen3-coder-next|qwen3\.[56]|mamba2?|falcon-h1|jamba|zamba2?|bamba|rwkv\d*|xlstm|recurrentgemma|kimi-linear"
    r"|olmo-hybrid|minimax-text-01|granite-4\.0-h|nemotron-h|nemotron-nano-9b-v2|nemotron-nano-12b-v2|nemotron-3-nano"
    r")(?![a-z0-9])"
)


def find_known_model(base_model_id: str) -> KnownModel | None:
    """What is known of a base model by its name, or None."""
    name = _shorten(base_model_id).removeprefix("meta-")
    return next((base for base in KNOWN_MODELS if re.match(rf"{re.escape(base.name)}(?![a-z0-9])", name)), None)


def is_stateful_name(base_model_id: str) -> bool:
    """Whether the name is one of an architecture that carries a state along the sequence."""
    return STATEFUL_NAME.search(_shorten(base_model_id)) is not None


def _shorten(base_model_id: str) -> str:
    """The name without the account."""
    return base_model_id.rpartition("/")[2].lower()
