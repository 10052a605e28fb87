"""Memory and time of training, generating from and exporting a language model.

Estimates are rough: they choose between settings (gradient checkpointing, sharding, torch.compile) and are not a promise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# --- coefficients ---

# Coefficients whose comment names no measurement were not measured; the comment says what the number is consistent with.

# Weights, gradients and optimizer state, in bytes per parameter of the base. Consistent with fp32 weights, gradients and Adam's two moments
# (Full), bf16 weights (LoRA), and 4-bit weights with the scales of their blocks (QLoRA). An adapter's own state is not counted.
BYTES_PER_PARAMETER: Mapping[str, float] = {"Full": 16.0, "LoRA": 2.0, "QLoRA": 0.6}
REFERENCE_BYTES_PER_PARAMETER = 4  # a second model in fp32, the reference of a Full training
REFERENCE_TRAINER_TYPES = ("dpo", "kto")  # with an adapter, the reference is the same model with the adapter disabled
PAIRED_TRAINER_TYPES = ("dpo", "orpo", "reward")  # a row is a pair: two sequences

STORED_BYTES_PER_PARAMETER = 2  # bases are stored in bf16; an fp32 one is overestimated by a factor of 2

# Activation memory in bytes per token, hidden unit and layer: measured for Gemma in bf16 without gradient checkpointing.
# The logits at labeled positions are extra.
ACTIVATION_BYTES = 40
CHECKPOINTED_ACTIVATION_BYTES = 4  # the same with gradient checkpointing: only the layer's input is kept
LOGIT_BYTES = 6  # per token and entry of the vocabulary; consistent with a bf16 logit and its fp32 copy

UNSHARDED_LAYERS = 3  # FSDP layers that are whole at once: the computing one, the prefetched one, and the previous one's gradients
UNSHARDED_LAYER_BYTES = 4  # per parameter of such a layer; consistent with fp32
UNSHARDED_EMBEDDING_BYTES = 8  # per embedding weight under FSDP; consistent with fp32 weight and gradient, whole throughout a step

USABLE_MEMORY_FRACTION = 0.8  # of free memory; the rest is left to the allocator

# What a config.json that does not state it is assumed to have: Gemma's vocabulary and vision tower, and the width and depth of a 7B model.
DEFAULT_HIDDEN_SIZE, DEFAULT_LAYERS, DEFAULT_VOCAB_SIZE = 4096, 32, 262_144
DEFAULT_VISION_HIDDEN_SIZE, DEFAULT_VISION_LAYERS, DEFAULT_IMAGE_SIZE, DEFAULT_PATCH_SIZE = 1152, 27, 896, 14

GPU_FLOP_PER_S = 40e12  # an L4 at a third of its peak; faster GPUs finish sooner, so compiling pays off less often
FULL_FLOP_PER_PARAMETER = 6  # per token: 2 in the forward pass, 4 in the backward pass
ADAPTER_FLOP_PER_PARAMETER = 4  # per token: the gradients of frozen weights are not computed

# torch.compile takes a minute or more, then saves a fraction of each step.
COMPILE_S = 300.0
COMPILE_SAVED_FRACTION = 0.15

# Larger batches cost less per generated token, and need memory for the keys and values of every prompt.
MIN_BATCH_PROMPTS, MAX_BATCH_PROMPTS, MAX_BATCH_TOKENS = 8, 32, 16_384

ONNX_MAX_PARAMETERS = 1_500_000_000  # 6 GB of float32, and 30 GB during tracing, which takes five times the weights
COMPARISON_MEMORY_FACTOR = 1.5  # of the weights, to compute with them: half as much again for the activations and the logits


# --- what is estimated ---


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
    hidden_size: int
    layers: int
    vocab_size: int
    vision: VisionShape  # the default one for a text model, which trains no vision tower

    @property
    def parameters(self) -> float:
        """Number of weights, from the size of the stored ones."""
        return self.weights_bytes / STORED_BYTES_PER_PARAMETER


@dataclass(frozen=True)
class TrainingShape:
    """The settings of a training on which its memory and time depend; batches are those of one device."""

    trainer_type: str
    method: str  # a key of BYTES_PER_PARAMETER
    batch_size: int  # rows
    max_seq_length: int  # tokens
    gradient_accumulation_steps: int = 1
    train_vision_tower: bool = False


def read_model_shape(model_config: Mapping[str, Any], weights_bytes: int) -> ModelShape:  # Any: JSON
    """The sizes stated by a model's config.json, or the defaults."""
    text_config = model_config.get("text_config", model_config)
    vision_config = model_config.get("vision_config", {})
    return ModelShape(
        weights_bytes=weights_bytes,
        hidden_size=text_config.get("hidden_size", DEFAULT_HIDDEN_SIZE),
        layers=text_config.get("num_hidden_layers", DEFAULT_LAYERS),
        vocab_size=text_config.get("vocab_size", DEFAULT_VOCAB_SIZE),
        vision=VisionShape(
            hidden_size=vision_config.get("hidden_size", DEFAULT_VISION_HIDDEN_SIZE),
            layers=vision_config.get("num_hidden_layers", DEFAULT_VISION_LAYERS),
            patches=(vision_config.get("image_size", DEFAULT_IMAGE_SIZE) // vision_config.get("patch_size", DEFAULT_PATCH_SIZE)) ** 2,
        ),
    )


# --- training ---


def estimate_training_bytes(
    model: ModelShape, training: TrainingShape, *, gradient_checkpointing: bool = False, num_shards: int = 1
) -> float:
    """Rough peak memory of a training on one device: weights, gradients, optimizer state and activations.

    With `num_shards` above 1, weights, gradients and optimizer state are sharded; a few layers and the embeddings stay whole.
    """
    bytes_per_parameter = BYTES_PER_PARAMETER[training.method]
    if training.method == "Full" and training.trainer_type in REFERENCE_TRAINER_TYPES:
        bytes_per_parameter += REFERENCE_BYTES_PER_PARAMETER
    unsharded = 0.0
    if num_shards > 1:
        embeddings = UNSHARDED_EMBEDDING_BYTES * model.vocab_size * model.hidden_size
        unsharded = embeddings + UNSHARDED_LAYERS * UNSHARDED_LAYER_BYTES * model.parameters / model.layers
    activations = _estimate_activation_bytes(model, training, gradient_checkpointing=gradient_checkpointing)
    return model.parameters * bytes_per_parameter / num_shards + unsharded + activations


def usable_memory_bytes(free_bytes: float) -> float:
    """The part of a device's free memory that a training may be planned to take."""
    return free_bytes * USABLE_MEMORY_FRACTION


def estimate_training_s(model: ModelShape, training: TrainingShape, steps: int) -> float:
    """Rough duration of `steps` optimizer steps on a data-center GPU that reaches GPU_FLOP_PER_S."""
    tokens = steps * training.batch_size * training.gradient_accumulation_steps * training.max_seq_length
    flop_per_parameter = FULL_FLOP_PER_PARAMETER if training.method == "Full" else ADAPTER_FLOP_PER_PARAMETER
    return tokens * (flop_per_parameter * model.parameters) / GPU_FLOP_PER_S


def estimate_compile_saving_s(training_s: float) -> float:
    """Seconds that torch.compile saves in the steps of a training, beside the COMPILE_S that it takes."""
    return training_s * COMPILE_SAVED_FRACTION


# --- generation and export ---


def limit_generation_batch(train_batch_size: int, longest_prompt_tokens: int, max_new_tokens: int) -> int:
    """The number of prompts per batch of a generation, at least the training batch size."""
    fitting = MAX_BATCH_TOKENS // (longest_prompt_tokens + max_new_tokens)
    return max(train_batch_size, MIN_BATCH_PROMPTS, min(MAX_BATCH_PROMPTS, fitting))


def float32_weights_bytes(weights_bytes: int, *, stored_in_float32: bool) -> int:
    """The memory of a model's weights in float32. Weights stored otherwise have two bytes each."""
    return weights_bytes * (1 if stored_in_float32 else 2)


def estimate_comparison_bytes(weights_bytes: int) -> float:
    """Memory to compute a model's outputs, in order to compare an exported file with it."""
    return weights_bytes * COMPARISON_MEMORY_FACTOR


# --- activations ---


def _estimate_activation_bytes(model: ModelShape, training: TrainingShape, *, gradient_checkpointing: bool) -> float:
    sequences_per_row = 2 if training.trainer_type in PAIRED_TRAINER_TYPES else 1
    tokens = training.batch_size * training.max_seq_length * sequences_per_row
    bytes_per_hidden_unit = _activation_bytes_per_token(model.layers, gradient_checkpointing=gradient_checkpointing)
    activations = tokens * (model.hidden_size * bytes_per_hidden_unit + LOGIT_BYTES * model.vocab_size)
    if training.train_vision_tower:  # a frozen tower keeps no activations
        vision = model.vision
        bytes_per_hidden_unit = _activation_bytes_per_token(vision.layers, gradient_checkpointing=gradient_checkpointing)
        activations += training.batch_size * vision.patches * vision.hidden_size * bytes_per_hidden_unit
    return activations


def _activation_bytes_per_token(layers: int, *, gradient_checkpointing: bool) -> int:
    """Activation bytes of a token in all layers, per hidden unit."""
    return layers * CHECKPOINTED_ACTIVATION_BYTES + ACTIVATION_BYTES if gradient_checkpointing else layers * ACTIVATION_BYTES
