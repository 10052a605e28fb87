"""The sizes of a base model on which memory and time depend, as its config.json states them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

# What a config.json that does not state it is assumed to have: Gemma's vocabulary and vision tower, and the widths and depth of a 7B model.
DEFAULT_HIDDEN_SIZE, DEFAULT_LAYERS, DEFAULT_VOCAB_SIZE = 4096, 32, 262_144
DEFAULT_INTERMEDIATE_RATIO = 4  # of the hidden size
DEFAULT_HEAD_SIZE = 128
DEFAULT_VISION_HIDDEN_SIZE, DEFAULT_VISION_LAYERS, DEFAULT_IMAGE_SIZE, DEFAULT_PATCH_SIZE = 1152, 27, 896, 14

BYTES_PER_STORED_PARAMETER: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
DEFAULT_STORED_BYTES_PER_PARAMETER = 2  # bases are stored in bf16


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision tower."""

    hidden_size: int
    layers: int
    patches: int  # of one image


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a base model on which its memory and time depend."""

    weights_bytes: int  # as stored
    stored_bytes_per_parameter: int
    model_type: str  # of the text model
    hidden_size: int
    layers: int
    vocab_size: int
    active_intermediate_size: int  # of all experts that compute a token, in a mixture of experts
    heads: int
    query_size: int  # all heads together
    key_value_size: int
    experts_per_token: int  # 0 unless the model is a mixture of experts
    experts: int  # of a layer, likewise
    expert_intermediate_size: int  # of one expert
    ties_embeddings: bool  # the head's weights are the embeddings
    vision: VisionShape  # the default one for a text model, which trains no vision tower

    @property
    def parameters(self) -> float:
        """Number of weights, from the size of the stored ones."""
        return self.weights_bytes / self.stored_bytes_per_parameter

    @property
    def embedding_parameters(self) -> int:
        """Number of weights of the embeddings and the head."""
        return self.vocab_size * self.hidden_size * (1 if self.ties_embeddings else 2)

    @property
    def expert_parameters(self) -> int:
        """Number of weights of all experts of a layer: two matrices into the expert and one out of it."""
        return 3 * self.experts * self.hidden_size * self.expert_intermediate_size

    def count_adapter_parameters(self, rank: int, *, adapts_experts: bool = False) -> int:
        """Number of weights of an adapter of all linear layers, and of all experts on request.

        The two matrices into an expert share an update.
        """
        attention = (self.hidden_size + self.query_size) * 2 + (self.hidden_size + self.key_value_size) * 2
        feed_forward = 0 if self.experts_per_token else 3 * (self.hidden_size + self.active_intermediate_size)
        expert = 2 * self.hidden_size + 3 * self.expert_intermediate_size
        return rank * self.layers * (attention + feed_forward + (self.experts * expert if adapts_experts else 0))


def read_model_shape(model_config: Mapping[str, Any], weights_bytes: int) -> ModelShape:  # Any: JSON
    """The sizes stated by a model's config.json, or the defaults."""
    text_config = _section(model_config, "text_config") or model_config
    vision_config = _section(model_config, "vision_config")
    hidden_size = _read(text_config, DEFAULT_HIDDEN_SIZE, "hidden_size", "n_embd")
    heads = _read(text_config, max(1, hidden_size // DEFAULT_HEAD_SIZE), "num_attention_heads", "n_head")
    head_size = _read(text_config, hidden_size // heads, "head_dim")
    experts = _read(text_config, 0, "num_experts_per_tok", "top_k_experts")
    dtype = model_config.get("dtype") or model_config.get("torch_dtype") or text_config.get("dtype")
    tied = text_config.get("tie_word_embeddings", model_config.get("tie_word_embeddings"))
    return ModelShape(
        weights_bytes=weights_bytes,
        stored_bytes_per_parameter=BYTES_PER_STORED_PARAMETER.get(str(dtype).removeprefix("torch."), DEFAULT_STORED_BYTES_PER_PARAMETER),
        model_type=str(text_config.get("model_type", "")),
        hidden_size=hidden_size,
        layers=_read(text_config, DEFAULT_LAYERS, "num_hidden_layers", "n_layer"),
        vocab_size=_read(text_config, DEFAULT_VOCAB_SIZE, "vocab_size"),
        active_intermediate_size=_read_active_intermediate_size(text_config, hidden_size, experts),
        heads=heads,
        query_size=heads * head_size,
        key_value_size=_read(text_config, heads, "num_key_value_heads") * head_size,
        experts_per_token=experts,
        experts=_read(text_config, experts, "num_experts", "num_local_experts") if experts else 0,
        expert_intermediate_size=_read_expert_size(text_config, hidden_size) if experts else 0,
        ties_embeddings=True if tied is None else bool(tied),
        vision=VisionShape(
            hidden_size=_read(vision_config, DEFAULT_VISION_HIDDEN_SIZE, "hidden_size"),
            layers=_read(vision_config, DEFAULT_VISION_LAYERS, "num_hidden_layers"),
            patches=(_read(vision_config, DEFAULT_IMAGE_SIZE, "image_size") // _read(vision_config, DEFAULT_PATCH_SIZE, "patch_size")) ** 2,
        ),
    )


def _read_active_intermediate_size(text_config: Mapping[str, Any], hidden_size: int, experts: int) -> int:
    if not experts:
        return _read(text_config, DEFAULT_INTERMEDIATE_RATIO * hidden_size, "intermediate_size", "n_inner")
    expert = _read_expert_size(text_config, hidden_size)
    shared = _read(text_config, expert * _read(text_config, 0, "n_shared_experts"), "shared_expert_intermediate_size")
    return experts * expert + shared


def _read_expert_size(text_config: Mapping[str, Any], hidden_size: int) -> int:
    return _read(text_config, DEFAULT_INTERMEDIATE_RATIO * hidden_size, "moe_intermediate_size", "intermediate_size", "n_inner")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return cast(Mapping[str, Any], section) if isinstance(section, Mapping) else {}


def _read(config: Mapping[str, Any], default: int, *names: str) -> int:
    """The first of the values that is a number above 0: a hostile or unusual config.json may hold anything."""
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), default)
