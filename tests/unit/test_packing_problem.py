"""Which configs of base models name a reason why rows cannot be packed."""

from typing import Any

import pytest

from jobs.llm.packing import find_packing_problem

STATEFUL: dict[str, dict[str, Any]] = {
    "LFM2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    "LFM2, older config": {"model_type": "lfm2", "full_attn_idxs": [2, 5], "conv_L_cache": 3},
    "Qwen 3.5": {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", "layer_types": ["linear_attention"] * 3}},
    "Qwen3-Next without layer types": {"model_type": "qwen3_next", "linear_conv_kernel_dim": 4, "full_attention_interval": 4},
    "Mamba": {"model_type": "mamba", "state_size": 16},
    "Jamba": {"model_type": "jamba", "attn_layer_period": 8, "attn_layer_offset": 4},
    "Zamba 2": {"model_type": "zamba2", "layers_block_type": ["mamba", "hybrid"]},
    "Bamba": {"model_type": "bamba", "mamba_d_conv": 4, "attn_layer_indices": [9, 18]},
    "Falcon-H1": {"model_type": "falcon_h1", "mamba_d_conv": 4},
    "Granite 4 hybrid": {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"], "mamba_d_conv": 4},
    "Nemotron-H": {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*"},
    "RecurrentGemma": {"model_type": "recurrent_gemma", "block_types": ["recurrent", "recurrent", "attention"]},
    "RWKV": {"model_type": "rwkv"},
    "xLSTM": {"model_type": "xlstm"},
    "MiniMax": {"model_type": "minimax"},
    "Kimi Linear": {"model_type": "kimi_linear", "linear_attn_config": {"kda_layers": [1, 2, 3]}},
    "an unknown layer type": {"model_type": "of_next_year", "layer_types": ["full_attention", "wave"]},
}
ATTENTION_ONLY: dict[str, dict[str, Any]] = {
    "Gemma 3": {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma 4 with a vision tower": {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}, "vision_config": {}},
    "Llama": {"model_type": "llama"},
    "Llama 4": {"model_type": "llama4", "layer_types": ["chunked_attention", "full_attention"]},
    "Qwen 3 mixture of experts": {"model_type": "qwen3_moe", "num_experts": 128},
    "a dense Granite 4": {"model_type": "granitemoehybrid", "layer_types": ["attention"] * 4, "mamba_d_conv": 4},
}


@pytest.mark.parametrize("config", STATEFUL.values(), ids=STATEFUL)
def test_layers_that_carry_state_are_found(config: dict[str, Any]) -> None:
    problem = find_packing_problem(config)
    assert problem is not None
    assert "pass the state of one row on to the next row" in problem
    assert (config.get("text_config") or config)["model_type"] in problem


@pytest.mark.parametrize("config", ATTENTION_ONLY.values(), ids=ATTENTION_ONLY)
def test_attention_has_no_problem(config: dict[str, Any]) -> None:
    assert find_packing_problem(config) is None


def test_attention_that_ignores_positions_is_found() -> None:
    problem = find_packing_problem({"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"]})
    assert problem is not None
    assert "does not see where a row begins" in problem
