"""How large checkpoints and exported files are, and how long saving a checkpoint takes."""

from collections.abc import Mapping, Sequence

ADAM_COPIES = 3  # of a trained weight in a checkpoint: itself and Adam's two moments, by the definition of Adam

# How fast a checkpoint is written and uploaded, assumed until the first one has been saved: a conservative guess, not measured.
ASSUMED_SAVE_BYTES_PER_S = 50e6


# Bits per weight of GGUF files, as llama.cpp documents them for a 7B model. Smaller models keep a larger part in a finer form.
GGUF_BITS: Mapping[str, float] = {
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q6_k": 6.6,
    "q5_k_m": 5.7,
    "q5_k_s": 5.5,
    "q5_0": 5.5,
    "q4_k_m": 4.8,
    "q4_k_s": 4.6,
    "q4_0": 4.5,
    "q3_k_m": 3.9,
    "q2_k": 3.3,
}
ONNX_BYTES_PER_PARAMETER = 4


def estimate_export_bytes(
    parameters: int, *, merged_bytes_per_parameter: int, makes_merged: bool, quantizations: Sequence[str], makes_onnx: bool
) -> int:
    """Disk that the files of an export take at the same time; the adapter is too small to count.

    GGUF files are quantized from one file in the merged model's precision, which `none` names.
    """
    merged = parameters * merged_bytes_per_parameter
    gguf = sum(parameters * GGUF_BITS[name] / 8 for name in quantizations if name in GGUF_BITS)
    total = (merged if makes_merged else 0) + (merged + gguf if quantizations else 0)
    return round(total + (parameters * ONNX_BYTES_PER_PARAMETER if makes_onnx else 0))


def estimate_checkpoint_bytes(trained_weights_bytes: int) -> int:
    """Size of a full checkpoint: the trained weights and the optimizer's state."""
    return ADAM_COPIES * trained_weights_bytes


def estimate_save_s(checkpoint_bytes: int) -> float:
    """Seconds that writing and uploading a checkpoint takes, before any was measured."""
    return checkpoint_bytes / ASSUMED_SAVE_BYTES_PER_S
