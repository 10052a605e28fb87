"""Measures the activation memory of architectures: `python -m bench.activation_memory [--write] [MODEL_TYPE…]`.

Runs in the trainer's environment, on the CPU, with random weights. For each architecture and way to train, it counts the bytes that
autograd saves in a layer for a token, and those that the backward pass of a layer takes beside them. Both are linear in the widths of
the layer, so a coefficient is the difference between two models that differ in one width. `--write` writes the coefficients into
`schema/estimate/llm_activations.py`, from which the estimates are made.

A CPU saves what a GPU saves: the tensors are those of the model's code. Attention differs slightly: every kernel keeps queries, keys,
values, output and one number per row and head, and the CPU's also keeps the mask in the type of the queries, as the GPU's
memory-efficient one does.
"""

import argparse
import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.live_tensors import LiveTensors, measure_saved_bytes
from schema.estimate.llm_activations import WAYS_TO_TRAIN, ActivationBytes
from schema.estimate.llm_shapes import ModelShape, read_model_shape

TARGET = Path(__file__).resolve().parent.parent / "schema/estimate/llm_activations.py"
FIRST_MARK, LAST_MARK = "# --- measured: begin ---", "# --- measured: end ---"

# The widths of the model to which others are compared: an intermediate layer four times as wide as the hidden states, as usual.
WIDTHS = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
OTHERS = {"vocab_size": 64, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROW_TOKENS, FEW_ROWS, MANY_ROWS = 48, 2, 6
RANK = 8


@dataclass(frozen=True)
class Architecture:
    """How to build a small model of a model type."""

    config: dict[str, Any]  # beside WIDTHS
    period: int = 1  # layers until the kinds of layers repeat
    attention: str = "sdpa"


MIXTURE = {"num_local_experts": 8, "num_experts_per_tok": 4}  # together as wide as the intermediate layer of the others
ARCHITECTURES = {
    "llama": Architecture({}),
    "mistral": Architecture({"sliding_window": None}),
    "qwen2": Architecture({}),
    "qwen3": Architecture({}),
    "smollm3": Architecture({}),
    "phi3": Architecture({}),
    "gemma": Architecture({}),
    "gemma2": Architecture({"sliding_window": 4096}, period=2, attention="eager"),
    "gemma3_text": Architecture({"sliding_window": 4096}, period=2),
    "gemma4_text": Architecture({"sliding_window": 4096, "vocab_size_per_layer_input": 64, "per_layer_config": None}, period=2),
    "qwen3_moe": Architecture(MIXTURE | {"moe_intermediate_size": 96}),
    "mixtral": Architecture(MIXTURE | {"intermediate_size": 96}),
}


def main() -> int:
    """Measure, print, and write on request."""
    parser = argparse.ArgumentParser(prog="python -m bench.activation_memory", description="Measures the activation memory of models.")
    parser.add_argument("names", nargs="*", metavar="MODEL_TYPE", help=f"default: {', '.join(ARCHITECTURES)}")
    parser.add_argument("--write", action="store_true", help=f"write the coefficients into {TARGET.name}")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - ARCHITECTURES.keys()):
        parser.error(f"no model type {', '.join(unknown)}; known: {', '.join(ARCHITECTURES)}")
    lines: list[str] = []
    for name in args.names or ARCHITECTURES:
        for way in WAYS_TO_TRAIN:
            numbers = ", ".join(f"{value:.1f}" for value in astuple(measure_coefficients(name, way)))
            lines.append(f'    ("{name}", "{way}"): ActivationBytes({numbers}),')
            print(lines[-1], flush=True)
    if args.write:
        before, _, rest = TARGET.read_text().partition(FIRST_MARK)
        _, _, after = rest.partition(LAST_MARK)
        TARGET.write_text("\n".join([before + FIRST_MARK, *lines, "    " + LAST_MARK + after]))
    return 0


def measure_coefficients(model_type: str, way: str) -> ActivationBytes:
    """The activation bytes of one token in one layer, by the widths of the layer."""
    base = _measure(model_type, way)

    def slope(name: str, feature: str, value: int) -> float:
        """The change of the saved bytes per unit of `feature` when a width of the config becomes `value`."""
        other = _measure(model_type, way, {name: value})
        return (other.saved_bytes - base.saved_bytes) / (getattr(other.model, feature) - getattr(base.model, feature))

    width_name = "moe_intermediate_size" if "moe_intermediate_size" in ARCHITECTURES[model_type].config else "intermediate_size"
    intermediate = slope(width_name, "active_intermediate_size", 2 * _config(model_type)[width_name])
    routed_hidden = 0.0
    if experts := base.model.experts_per_token:  # another expert adds its width and another copy of the hidden states
        of_expert = slope("num_experts_per_tok", "experts_per_token", experts + 2)
        routed_hidden = (of_expert - intermediate * base.model.active_intermediate_size / experts) / base.model.hidden_size
    attention_row = (_measure(model_type, way, row_tokens=2 * ROW_TOKENS).saved_bytes - base.saved_bytes) / ROW_TOKENS
    is_eager = ARCHITECTURES[model_type].attention == "eager"
    query = slope("num_attention_heads", "query_size", 2 * WIDTHS["num_attention_heads"])
    if is_eager:  # another head adds another attention matrix
        query -= attention_row / WIDTHS["num_attention_heads"] * ROW_TOKENS / WIDTHS["head_dim"]
    return ActivationBytes(
        hidden=slope("hidden_size", "hidden_size", 2 * WIDTHS["hidden_size"]) - routed_hidden * experts,
        intermediate=intermediate,
        query=query,
        key_value=slope("num_key_value_heads", "key_value_size", 2 * WIDTHS["num_key_value_heads"]),
        routed_hidden=routed_hidden,
        rank=(_measure(model_type, way, rank=2 * RANK).saved_bytes - base.saved_bytes) / RANK,
        mask=0.0 if is_eager else attention_row,
        attention_matrix=attention_row / WIDTHS["num_attention_heads"] if is_eager else 0.0,
        backward=base.backward_bytes / base.model.active_intermediate_size,
    )


@dataclass(frozen=True)
class _LayerBytes:
    """Bytes of a token in a layer."""

    model: ModelShape
    saved_bytes: float  # kept for the backward pass
    backward_bytes: float  # at the peak of the backward pass, beside everything saved


def _measure(
    model_type: str, way: str, widths: dict[str, int] | None = None, *, rank: int = RANK, row_tokens: int = ROW_TOKENS
) -> _LayerBytes:
    """Differences between numbers of layers and rows leave neither the embeddings nor the weights."""
    period = ARCHITECTURES[model_type].period
    few, many = (_build(model_type, way, layers, widths or {}, rank) for layers in (period, 3 * period))
    tokens = (MANY_ROWS - FEW_ROWS) * row_tokens
    sizes = {
        (name, rows): _measure_step(model, way, rows, row_tokens)
        for name, model in (("few", few), ("many", many))
        for rows in (FEW_ROWS, MANY_ROWS)
    }
    saved = {name: (sizes[name, MANY_ROWS][0] - sizes[name, FEW_ROWS][0]) / tokens for name in ("few", "many")}
    peak = (sizes["many", MANY_ROWS][1] - sizes["many", FEW_ROWS][1]) / tokens
    shape = read_model_shape(many.config.to_dict(), 0)
    return _LayerBytes(shape, (saved["many"] - saved["few"]) / (2 * period), peak - saved["many"])


def _config(model_type: str) -> dict[str, Any]:
    return WIDTHS | OTHERS | ARCHITECTURES[model_type].config


def _build(model_type: str, way: str, layers: int, widths: dict[str, int], rank: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = ARCHITECTURES[model_type]
    sizes = _config(model_type) | {"num_hidden_layers": layers} | widths
    if model_type == "gemma4_text":
        sizes["hidden_size_per_layer_input"] = sizes["hidden_size"] // 8
    if architecture.period == 2:
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if way in ("adapter_bf16", "adapter_bf16_dropout") else torch.float32
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=architecture.attention)
    if way.startswith("adapter"):
        names = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
        dropout = 0.05 if way.endswith("dropout") else 0.0
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=sorted(names - {"lm_head"}), lora_dropout=dropout))
    return model.train()


def _measure_step(model: Any, way: str, rows: int, row_tokens: int) -> tuple[int, int]:
    """Bytes saved for the backward pass, and the peak of forward and backward pass beside weights and gradients."""
    decoder = (model.get_base_model() if way.startswith("adapter") else model).model
    tokens = torch.full((rows, row_tokens), 5)
    # Two packed rows in each: there is a mask.
    positions = torch.arange(row_tokens // 2).repeat(2).expand(rows, -1)

    def compute() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "full_autocast"):
            return decoder(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state.sum()

    saved_bytes, loss = measure_saved_bytes(compute, model)
    loss.backward()  # afterwards there are gradients, and the measured pass adds none
    del loss
    with LiveTensors() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor.data)
            if tensor.grad is not None:
                live.add(tensor.grad)
        live.peak_bytes = steady_bytes = live.live_bytes
        compute().backward()
    return saved_bytes, live.peak_bytes - steady_bytes


if __name__ == "__main__":
    sys.exit(main())
