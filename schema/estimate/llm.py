"""Time of training a language model, and memory of generating from it and exporting it. `llm_memory.py` has the memory of training.

Estimates are rough: they choose between settings (torch.compile, the batches of a generation) and are not a promise.
"""

from schema.estimate.llm_memory import TrainingShape
from schema.estimate.llm_shapes import ModelShape

# --- coefficients ---

GPU_FLOP_PER_S = 40e12  # an L4 at a third of its peak; faster GPUs finish sooner, so compiling pays off less often
FULL_FLOP_PER_PARAMETER = 6  # per token: 2 in the forward pass, 4 in the backward pass
ADAPTER_FLOP_PER_PARAMETER = 4  # per token: the gradients of frozen weights are not computed

# torch.compile takes a minute or more, then saves a fraction of each step.
COMPILE_S = 300.0
COMPILE_SAVED_FRACTION = 0.15

# Larger batches cost less per generated token, and need memory for the keys and values of every prompt.
MIN_BATCH_PROMPTS, MAX_BATCH_PROMPTS, MAX_BATCH_TOKENS = 8, 64, 16_384

ONNX_MAX_PARAMETERS = 1_500_000_000  # 6 GB of float32, and 30 GB during tracing, which takes five times the weights
COMPARISON_MEMORY_FACTOR = 1.5  # of the weights, to compute with them: half as much again for the activations and the logits


# --- training ---


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
