"""Decides whether rows may be packed into blocks: whether a model computes each row of a block as if it were alone.

Attention separates rows where positions restart. Other layers need to be told where a row begins:

    recurrence, convolution    the state of one row flows into the next; transformers can stop that only with kernels for NVIDIA GPUs
                               (`seq_idx`, `cu_seq_lens_q`), and raises an error on every other device
    masks without positions    some models build their attention mask without looking at positions, gpt-oss among them

The config of a base tells the first, before anything is loaded. The second is measured on the loaded model: a random row is computed alone
and behind another row, which must give the same logits. Architectures of the tests' matrix were measured, so a training of those does not.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.runtime.errors import JobFailed

# Layer types, as `layer_types` and its older names list them, that pass nothing from token to token except by attention.
STATELESS_LAYER_TYPES = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "global", "local", "moe", "mlp", "dense", "sparse"}
)
LAYER_TYPE_FIELDS = ("layer_types", "layers_block_type", "block_types")
# Fields of architectures that list no layer types, or of which older configs do not.
STATE_FIELDS = (
    "attn_layer_period",  # Jamba, Zamba: every other layer is Mamba
    "conv_L_cache",  # LFM2
    "full_attn_idxs",  # LFM2, older configs
    "hybrid_override_pattern",  # Nemotron-H, older configs
    "linear_attn_config",  # Kimi Linear
    "linear_conv_kernel_dim",  # Qwen3-Next, Qwen 3.5
    "lru_width",  # RecurrentGemma
    "mamba_d_conv",  # Bamba, Falcon-H1, Granite 4
    "mamba_num_heads",
    "short_conv_kernel_size",
    "ssm_state_size",
    "state_size",  # Mamba
)
STATE_MODEL_TYPES = frozenset({"rwkv", "xlstm", "mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "minimax", "minimax_text_01"})
ROW_BLIND_MODEL_TYPES = frozenset({"gpt_oss"})  # their attention mask ignores positions (transformers 5.23)

# The architectures that tests/jobs/test_packing.py measures: differences below 2e-5 standard deviations of the logits.
MEASURED_MODEL_TYPES = frozenset({"gemma2", "gemma3_text", "gemma4_text", "llama", "qwen3", "mistral", "phi3", "smollm3", "qwen3_moe"})

PACKING_HINT = "set packing to false: the same request trains the same rows one by one"
PROBE_LENGTHS = (24, 48)  # tokens of the row in front, and of the compared one
PROBE_SEED = 20_260
PROBE_TOKENS = (16, 1000)  # control and image tokens have ids outside this range in most vocabularies
FIRST_POSITIONS = 4  # the narrowest convolution reaches as far
# Mean difference, in standard deviations of the logits. Leaks measured 0.3 to 1.5; rounding 1e-7 in float32 and 0.01 in bfloat16.
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.03}


def find_packing_problem(model_config: Mapping[str, Any]) -> str | None:
    """Why rows of a base with this config.json cannot be packed; None if the config names no reason."""
    config: Mapping[str, Any] = model_config.get("text_config") or model_config
    model_type = str(config.get("model_type") or model_config.get("model_type") or "this architecture")
    layer_types = next((list(config[field]) for field in LAYER_TYPE_FIELDS if config.get(field)), None)
    stateful = sorted({str(layer_type) for layer_type in layer_types or ()} - STATELESS_LAYER_TYPES)
    if stateful:
        return f"{model_type} has layers of type {', '.join(stateful)}, which pass the state of one row on to the next row of its block"
    # A hybrid architecture may have only attention layers, such as the dense models of Granite 4, so the layer types decide.
    if model_type in STATE_MODEL_TYPES or (layer_types is None and any(config.get(field) is not None for field in STATE_FIELDS)):
        return f"{model_type} has recurrent or convolution layers, which pass the state of one row on to the next row of its block"
    if model_type in ROW_BLIND_MODEL_TYPES:
        return f"the attention of {model_type} does not see where a row begins, so a row would attend to the rows before it in its block"
    return None


def require_packable(base_folder: Path, base_model_id: str) -> None:
    """Raise JobFailed if the base's config says that its rows cannot be packed."""
    if problem := find_packing_problem(json.loads((base_folder / "config.json").read_text())):
        raise _make_failure(base_model_id, problem)


def require_separate_rows(model: Any, base_model_id: str) -> None:
    """Raise JobFailed if the loaded model computes a row behind another one differently. Measured architectures are not measured again."""
    if model.config.model_type in MEASURED_MODEL_TYPES:
        return
    difference = measure_leak(model)
    if difference > MAX_DIFFERENCE.get(str(model.dtype).removeprefix("torch."), MAX_DIFFERENCE["float32"]):
        reason = f"a row behind another one gets logits that differ by {difference:.2f} standard deviations from those of the row alone"
        raise _make_failure(base_model_id, f"{model.config.model_type} does not separate packed rows: {reason}")


def measure_leak(model: Any) -> float:
    """How far the logits of a row behind another one are from those of the row alone, in standard deviations of the logits.

    Both rows are random tokens. The result is the larger of the mean over the row and the mean at one of its first positions, where a
    short convolution shows. It changes neither the model nor any state of random numbers.
    """
    import torch

    generator = torch.Generator().manual_seed(PROBE_SEED)
    first, last = PROBE_TOKENS
    vocab_size = model.config.get_text_config().vocab_size
    low, high = (first, min(last, vocab_size)) if vocab_size > 2 * first else (0, vocab_size)
    rows = [torch.randint(low, high, (length,), generator=generator).tolist() for length in PROBE_LENGTHS]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: a model may keep what it computes first, such as rotary tables
            alone, packed = (_compute_last_row(model, block) for block in (rows[1:], rows))
    finally:
        model.train(was_training)
    differences = (packed - alone).abs().mean(-1) / alone.std()
    return max(float(differences.mean()), float(differences[:FIRST_POSITIONS].max()))


def _compute_last_row(model: Any, block: Sequence[Sequence[int]]) -> Any:
    """The logits (T, vocabulary) of a block's last row, in float32. The block is encoded as `collate` encodes it."""
    import torch

    ids = torch.tensor([[token for row in block for token in row]], device=model.device)
    positions = torch.tensor([[position for row in block for position in range(len(row))]], device=model.device)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, -len(block[-1]) :].float()


def _make_failure(base_model_id: str, problem: str) -> JobFailed:
    return JobFailed("invalid_config", f"packing cannot be used with base model {base_model_id}: {problem}", PACKING_HINT)
