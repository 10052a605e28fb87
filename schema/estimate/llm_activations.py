"""Activation memory of a layer by architecture, as measured by `python -m bench.activation_memory --write`.

Bytes of one token in one layer are linear in the layer's widths; a coefficient is the bytes per unit of one width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# What is trained and computed in which precision. Adapters are in fp32 beside a base in bf16 or fp32, all of whose linear layers they
# adapt; without an adapter, all weights are in fp32, with or without autocast to bf16.
WayToTrain = Literal["adapter_bf16", "adapter_bf16_dropout", "adapter_fp32", "adapter_fp32_dropout", "full_fp32", "full_autocast"]
WAYS_TO_TRAIN: tuple[WayToTrain, ...] = (
    "adapter_bf16",
    "adapter_bf16_dropout",
    "adapter_fp32",
    "adapter_fp32_dropout",
    "full_fp32",
    "full_autocast",
)


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of a token in a layer, per unit of a width."""

    hidden: float
    intermediate: float  # of the experts that compute the token, in a mixture of experts
    query: float  # all heads together
    key_value: float
    routed_hidden: float  # per hidden unit and expert that computes the token
    rank: float  # of the adapter
    mask: float  # per token of the row
    attention_matrix: float  # per token of the row and head, where attention is computed eagerly
    backward: float  # per unit of the intermediate width, at the peak of a layer's backward pass, beside all that is saved


MEASURED: Mapping[tuple[str, WayToTrain], ActivationBytes] = {
    # --- measured: begin ---
    ("llama", "adapter_bf16"): ActivationBytes(28.0, 10.0, 12.2, 0.0, 0.0, 28.0, 2.0, 0.0, 5.6),
    ("llama", "adapter_bf16_dropout"): ActivationBytes(48.0, 14.0, 16.2, 0.0, 0.0, 28.0, 2.0, 0.0, 9.6),
    ("llama", "adapter_fp32"): ActivationBytes(16.0, 16.0, 16.2, 0.0, 0.0, 28.0, 4.0, 0.0, 7.9),
    ("llama", "adapter_fp32_dropout"): ActivationBytes(48.0, 20.0, 24.2, 0.0, 0.0, 28.0, 4.0, 0.0, 8.1),
    ("llama", "full_fp32"): ActivationBytes(24.0, 16.0, 16.2, 0.0, 0.0, 0.0, 4.0, 0.0, 7.0),
    ("llama", "full_autocast"): ActivationBytes(26.0, 8.0, 8.2, 0.0, 0.0, 0.0, 2.0, 0.0, 4.0),
    ("mistral", "adapter_bf16"): ActivationBytes(28.0, 10.0, 12.2, 0.0, 0.0, 28.0, 2.0, 0.0, 5.6),
    ("mistral", "adapter_bf16_dropout"): ActivationBytes(48.0, 14.0, 16.2, 0.0, 0.0, 28.0, 2.0, 0.0, 9.6),
    ("mistral", "adapter_fp32"): ActivationBytes(16.0, 16.0, 16.2, 0.0, 0.0, 28.0, 4.0, 0.0, 7.9),
    ("mistral", "adapter_fp32_dropout"): ActivationBytes(48.0, 20.0, 24.2, 0.0, 0.0, 28.0, 4.0, 0.0, 8.1),
    ("mistral", "full_fp32"): ActivationBytes(24.0, 16.0, 16.2, 0.0, 0.0, 0.0, 4.0, 0.0, 7.0),
    ("mistral", "full_autocast"): ActivationBytes(26.0, 8.0, 8.2, 0.0, 0.0, 0.0, 2.0, 0.0, 4.0),
    ("qwen2", "adapter_bf16"): ActivationBytes(28.0, 10.0, 12.2, 0.0, 0.0, 28.0, 2.0, 0.0, 5.6),
    ("qwen2", "adapter_bf16_dropout"): ActivationBytes(48.0, 14.0, 16.2, 0.0, 0.0, 28.0, 2.0, 0.0, 9.6),
    ("qwen2", "adapter_fp32"): ActivationBytes(16.0, 16.0, 16.2, 0.0, 0.0, 28.0, 4.0, 0.0, 7.9),
    ("qwen2", "adapter_fp32_dropout"): ActivationBytes(48.0, 20.0, 24.2, 0.0, 0.0, 28.0, 4.0, 0.0, 8.1),
    ("qwen2", "full_fp32"): ActivationBytes(24.0, 16.0, 16.2, 0.0, 0.0, 0.0, 4.0, 0.0, 7.0),
    ("qwen2", "full_autocast"): ActivationBytes(26.0, 8.0, 8.2, 0.0, 0.0, 0.0, 2.0, 0.0, 4.0),
    ("qwen3", "adapter_bf16"): ActivationBytes(28.0, 10.0, 16.3, 4.2, 0.0, 28.0, 2.0, 0.0, 5.6),
    ("qwen3", "adapter_bf16_dropout"): ActivationBytes(48.0, 14.0, 20.3, 4.2, 0.0, 28.0, 2.0, 0.0, 9.6),
    ("qwen3", "adapter_fp32"): ActivationBytes(16.0, 16.0, 20.3, 4.2, 0.0, 28.0, 4.0, 0.0, 7.9),
    ("qwen3", "adapter_fp32_dropout"): ActivationBytes(48.0, 20.0, 28.3, 4.2, 0.0, 28.0, 4.0, 0.0, 8.1),
    ("qwen3", "full_fp32"): ActivationBytes(24.0, 16.0, 24.3, 8.2, 0.0, 0.0, 4.0, 0.0, 7.0),
    ("qwen3", "full_autocast"): ActivationBytes(26.0, 8.0, 14.3, 6.2, 0.0, 0.0, 2.0, 0.0, 4.0),
    ("smollm3", "adapter_bf16"): ActivationBytes(28.0, 10.0, 12.2, 0.0, 0.0, 28.0, 2.0, 0.0, 5.6),
    ("smollm3", "adapter_bf16_dropout"): ActivationBytes(48.0, 14.0, 16.2, 0.0, 0.0, 28.0, 2.0, 0.0, 9.6),
    ("smollm3", "adapter_fp32"): ActivationBytes(16.0, 16.0, 16.2, 0.0, 0.0, 28.0, 4.0, 0.0, 7.9),
    ("smollm3", "adapter_fp32_dropout"): ActivationBytes(48.0, 20.0, 24.2, 0.0, 0.0, 28.0, 4.0, 0.0, 8.1),
    ("smollm3", "full_fp32"): ActivationBytes(24.0, 16.0, 16.2, 0.0, 0.0, 0.0, 4.0, 0.0, 7.0),
    ("smollm3", "full_autocast"): ActivationBytes(26.0, 8.0, 8.2, 0.0, 0.0, 0.0, 2.0, 0.0, 4.0),
    ("phi3", "adapter_bf16"): ActivationBytes(16.0, 10.0, 12.2, 8.0, 0.0, 16.0, 2.0, 0.0, 11.1),
    ("phi3", "adapter_bf16_dropout"): ActivationBytes(24.0, 14.0, 16.2, 8.0, 0.0, 16.0, 2.0, 0.0, 9.6),
    ("phi3", "adapter_fp32"): ActivationBytes(16.0, 16.0, 20.2, 16.0, 0.0, 16.0, 4.0, 0.0, 8.1),
    ("phi3", "adapter_fp32_dropout"): ActivationBytes(24.0, 20.0, 24.2, 16.0, 0.0, 16.0, 4.0, 0.0, 8.1),
    ("phi3", "full_fp32"): ActivationBytes(24.0, 16.0, 20.2, 16.0, 0.0, 0.0, 4.0, 0.0, 7.0),
    ("phi3", "full_autocast"): ActivationBytes(20.0, 8.0, 10.2, 8.0, 0.0, 0.0, 2.0, 0.0, 4.0),
    ("gemma", "adapter_bf16"): ActivationBytes(28.0, 10.0, 12.2, 0.0, 0.0, 28.0, 2.0, 0.0, 5.6),
    ("gemma", "adapter_bf16_dropout"): ActivationBytes(48.0, 14.0, 16.2, 0.0, 0.0, 28.0, 2.0, 0.0, 9.6),
    ("gemma", "adapter_fp32"): ActivationBytes(16.0, 16.0, 16.2, 0.0, 0.0, 28.0, 4.0, 0.0, 7.9),
    ("gemma", "adapter_fp32_dropout"): ActivationBytes(48.0, 20.0, 24.2, 0.0, 0.0, 28.0, 4.0, 0.0, 8.1),
    ("gemma", "full_fp32"): ActivationBytes(24.0, 16.0, 16.2, 0.0, 0.0, 0.0, 4.0, 0.0, 7.0),
    ("gemma", "full_autocast"): ActivationBytes(26.0, 8.0, 8.2, 0.0, 0.0, 0.0, 2.0, 0.0, 4.0),
    ("gemma2", "adapter_bf16"): ActivationBytes(36.0, 10.0, 10.0, 0.0, 0.0, 28.0, 0.0, 8.0, 5.0),
    ("gemma2", "adapter_bf16_dropout"): ActivationBytes(56.0, 14.0, 14.0, 0.0, 0.0, 28.0, 0.0, 8.0, 9.0),
    ("gemma2", "adapter_fp32"): ActivationBytes(24.0, 16.0, 16.0, 0.0, 0.0, 28.0, 0.0, 8.0, 6.9),
    ("gemma2", "adapter_fp32_dropout"): ActivationBytes(56.0, 20.0, 20.0, 0.0, 0.0, 28.0, 0.0, 8.0, 8.0),
    ("gemma2", "full_fp32"): ActivationBytes(40.0, 16.0, 16.0, 0.0, 0.0, 0.0, 0.0, 8.0, 4.5),
    ("gemma2", "full_autocast"): ActivationBytes(42.0, 8.0, 8.0, 0.0, 0.0, 0.0, 0.0, 8.0, 4.0),
    ("gemma3_text", "adapter_bf16"): ActivationBytes(36.0, 10.0, 16.3, 4.2, 0.0, 28.0, 2.0, 0.0, 5.0),
    ("gemma3_text", "adapter_bf16_dropout"): ActivationBytes(56.0, 14.0, 20.3, 4.2, 0.0, 28.0, 2.0, 0.0, 8.8),
    ("gemma3_text", "adapter_fp32"): ActivationBytes(24.0, 16.0, 20.3, 4.2, 0.0, 28.0, 4.0, 0.0, 6.9),
    ("gemma3_text", "adapter_fp32_dropout"): ActivationBytes(56.0, 20.0, 28.3, 4.2, 0.0, 28.0, 4.0, 0.0, 7.2),
    ("gemma3_text", "full_fp32"): ActivationBytes(40.0, 16.0, 24.3, 8.2, 0.0, 0.0, 4.0, 0.0, 4.5),
    ("gemma3_text", "full_autocast"): ActivationBytes(42.0, 8.0, 16.3, 8.2, 0.0, 0.0, 2.0, 0.0, 4.0),
    ("gemma4_text", "adapter_bf16"): ActivationBytes(45.8, 10.0, 16.5, 8.7, 0.0, 36.0, 2.0, 0.0, 5.0),
    ("gemma4_text", "adapter_bf16_dropout"): ActivationBytes(70.2, 14.0, 20.5, 8.7, 0.0, 36.0, 2.0, 0.0, 5.2),
    ("gemma4_text", "adapter_fp32"): ActivationBytes(34.5, 16.0, 20.5, 8.7, 0.0, 36.0, 4.0, 0.0, 5.0),
    ("gemma4_text", "adapter_fp32_dropout"): ActivationBytes(71.0, 20.0, 28.5, 8.7, 0.0, 36.0, 4.0, 0.0, 5.0),
    ("gemma4_text", "full_fp32"): ActivationBytes(55.0, 16.0, 24.5, 12.7, 0.0, 0.0, 4.0, 0.0, 4.0),
    ("gemma4_text", "full_autocast"): ActivationBytes(54.2, 8.0, 16.5, 12.7, 0.0, 0.0, 2.0, 0.0, 4.0),
    ("qwen3_moe", "adapter_bf16"): ActivationBytes(18.6, 6.0, 16.3, 4.2, 2.4, 16.0, 2.0, 0.0, 7.3),
    ("qwen3_moe", "adapter_bf16_dropout"): ActivationBytes(30.6, 6.0, 20.3, 4.2, 2.4, 16.0, 2.0, 0.0, 7.3),
    ("qwen3_moe", "adapter_fp32"): ActivationBytes(10.5, 12.0, 20.3, 4.2, 4.4, 16.0, 4.0, 0.0, 13.4),
    ("qwen3_moe", "adapter_fp32_dropout"): ActivationBytes(30.5, 12.0, 28.3, 4.2, 4.4, 16.0, 4.0, 0.0, 13.4),
    ("qwen3_moe", "full_fp32"): ActivationBytes(22.5, 16.0, 24.3, 8.2, 8.4, 0.0, 4.0, 0.0, 11.0),
    ("qwen3_moe", "full_autocast"): ActivationBytes(22.6, 16.0, 14.3, 6.2, 8.4, 0.0, 2.0, 0.0, 11.0),
    ("mixtral", "adapter_bf16"): ActivationBytes(18.3, 6.0, 12.2, 0.0, 2.4, 16.0, 2.0, 0.0, 13.4),
    ("mixtral", "adapter_bf16_dropout"): ActivationBytes(30.3, 6.0, 16.2, 0.0, 2.4, 16.0, 2.0, 0.0, 13.4),
    ("mixtral", "adapter_fp32"): ActivationBytes(10.3, 12.0, 16.2, 0.0, 4.4, 16.0, 4.0, 0.0, 13.4),
    ("mixtral", "adapter_fp32_dropout"): ActivationBytes(30.3, 12.0, 24.2, 0.0, 4.4, 16.0, 4.0, 0.0, 13.4),
    ("mixtral", "full_fp32"): ActivationBytes(22.3, 16.0, 16.2, 0.0, 8.4, 0.0, 4.0, 0.0, 11.0),
    ("mixtral", "full_autocast"): ActivationBytes(22.3, 16.0, 8.2, 0.0, 8.4, 0.0, 2.0, 0.0, 11.0),
    # --- measured: end ---
}
