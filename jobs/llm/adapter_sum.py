"""The sum of two LoRA adapters as one adapter: B₁A₁·s₁ + B₂A₂·s₂ is [s₁B₁ s₂B₂]·[A₁; A₂], exactly, of rank r₁ + r₂.

Used where an adapter was trained on a base with an earlier adapter merged into it: the sum applies to the base itself. Ranks are filled up
with zeros to one rank for all layers, because llama.cpp and others read no ranks by layer. A trained embedding, and a head that was
trained as a whole, are values and no updates: the later adapter's count. peft stores the matrices of all experts of a mixture in one: A
as (experts · rank, in), B as (out, rank · experts).
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.llm.exporters.model_files import write_json

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
TOKENS_SUFFIX = ".token_adapter.trainable_tokens_delta"
LAYER_PREFIX = "base_model.model."  # of every name in the weights' file

# The fields of peft's LoraConfig that say what a trained adapter is. Others change the base while it is loaded, or name code.
KEPT_FIELDS = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "bias",
    "lora_bias",
    "fan_in_fan_out",
    "lora_dropout",
)


class AdapterMismatch(Exception):
    """The adapters have no sum that is an adapter; the message says why."""


def copy_adapter_config(path: Path) -> None:
    """Rewrite an adapter's config with the fields that are used. Raises AdapterMismatch for one that is not a LoRA's."""
    try:
        settings: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterMismatch("its config is not JSON") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise AdapterMismatch("it is not a LoRA adapter")
    write_json(path, {name: settings[name] for name in KEPT_FIELDS if name in settings})


def check_readable(adapter: Path) -> None:
    """Raise AdapterMismatch for an adapter whose file of weights is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter / WEIGHTS_FILE, framework="pt"):
            return
    except SafetensorError as error:
        raise AdapterMismatch(f"its weights cannot be read: {error}") from error


def check_summable(adapter: Path) -> None:
    """Raise AdapterMismatch for an adapter to which another cannot be added."""
    settings = _read_settings(adapter)
    if settings.get("use_dora"):
        raise AdapterMismatch("it uses DoRA, whose magnitudes do not add up")
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        raise AdapterMismatch("it trains biases")
    if not isinstance(settings.get("trainable_token_indices") or [], list):
        raise AdapterMismatch("it names trained tokens by layer")


def write_sum(earlier: Path, later: Path, target: Path) -> None:
    """Write the sum of two adapters, trained one after the other, to a folder, which may be one of theirs. Raises AdapterMismatch."""
    from safetensors.torch import load_file, save_file

    for adapter in (earlier, later):
        check_summable(adapter)
    settings = [_read_settings(adapter) for adapter in (earlier, later)]
    if settings[0].get("target_parameters") != settings[1].get("target_parameters"):
        raise AdapterMismatch("one of the two adapts the experts, and the other does not, or others")
    tensors = [load_file(adapter / WEIGHTS_FILE) for adapter in (earlier, later)]
    layers = sorted({name.removesuffix(A_SUFFIX) for part in tensors for name in part if name.endswith(A_SUFFIX)})
    experts = {layer: max(_count_experts(layer, own, part) for own, part in zip(settings, tensors, strict=True)) for layer in layers}
    ranks = [
        max((len(part[layer + A_SUFFIX]) // experts[layer] for layer in layers if layer + A_SUFFIX in part), default=0) for part in tensors
    ]
    added: dict[str, torch.Tensor] = {}
    for layer in layers:
        added[layer + A_SUFFIX], added[layer + B_SUFFIX] = _add_layer(layer, experts[layer], settings, tensors, ranks)
    token_ids, rows = _join_tokens(settings, tensors)
    low_rank = (A_SUFFIX, B_SUFFIX, TOKENS_SUFFIX)
    others = {name: tensor for part in tensors for name, tensor in part.items() if not name.endswith(low_rank)}
    changes: dict[str, Any] = {"r": sum(ranks), "lora_alpha": sum(ranks), "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    changes |= {"trainable_token_indices": token_ids or None, "inference_mode": True, "init_lora_weights": True}
    if any(settings[0].get(name) != settings[1].get(name) for name in ("target_modules", "exclude_modules")):
        linear = [layer.removeprefix(LAYER_PREFIX) for layer in layers if experts[layer] == 1]
        changes |= {"target_modules": linear, "exclude_modules": None}
    save_file(added | rows | others, target / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(target / CONFIG_FILE, settings[1] | changes)


def _add_layer(
    layer: str, experts: int, settings: list[dict[str, Any]], tensors: "list[dict[str, torch.Tensor]]", ranks: list[int]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """The two matrices of a layer in the sum. An adapter that leaves the layer as it is adds zeros."""
    import torch

    name = layer.removeprefix(LAYER_PREFIX)
    present = next(part for part in tensors if layer + A_SUFFIX in part)
    inputs, outputs = present[layer + A_SUFFIX].shape[1:], present[layer + B_SUFFIX].shape[:1]
    down: list[torch.Tensor] = []
    up: list[torch.Tensor] = []
    for part, own, rank in zip(tensors, settings, ranks, strict=True):
        a, b = part.get(layer + A_SUFFIX, torch.zeros(0, *inputs)), part.get(layer + B_SUFFIX, torch.zeros(*outputs, 0))
        if a.shape[1:] != inputs or b.shape[:1] != outputs or a.ndim != 2 or b.ndim != 2 or len(a) % experts:
            raise AdapterMismatch(f"the two have different shapes at {name}")
        own_rank = len(a) // experts
        scale = _scale(name, own, own_rank) if own_rank else 0.0
        down += [a.float().reshape(experts, own_rank, *inputs), torch.zeros(experts, rank - own_rank, *inputs)]
        up += [b.float().reshape(*outputs, own_rank, experts) * scale, torch.zeros(*outputs, rank - own_rank, experts)]
    return torch.cat(down, dim=1).flatten(0, 1).contiguous(), torch.cat(up, dim=1).flatten(1).contiguous()


def _count_experts(layer: str, settings: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]") -> int:
    """How many experts' matrices a layer has in one; 1 for a linear layer, and where the adapter leaves the layer as it is."""
    rows = len(tensors.get(layer + A_SUFFIX, ()))
    if not settings.get("target_parameters") or not rows:
        return 1
    return rows // _match(settings.get("rank_pattern"), layer.removeprefix(LAYER_PREFIX), settings["r"])


def _scale(layer: str, settings: Mapping[str, Any], rank: int) -> float:
    """By what a layer's update is multiplied, as peft computes it."""
    alpha = _match(settings.get("alpha_pattern"), layer, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _match(pattern: "Mapping[str, T] | None", layer: str, default: "T") -> "T":
    """The value of a layer, as peft finds it in a pattern."""
    from peft.utils.other import get_pattern_key

    known = pattern or {}
    return known.get(get_pattern_key(list(known), layer) or "", default)


def _join_tokens(settings: list[dict[str, Any]], tensors: "list[dict[str, torch.Tensor]]") -> "tuple[list[int], dict[str, torch.Tensor]]":
    """The tokens whose embeddings either adapter trained, and the embeddings by the name of their layer."""
    import torch

    ids = [list[int](own.get("trainable_token_indices") or []) for own in settings]
    joined = sorted({*ids[0], *ids[1]})
    rows: dict[str, torch.Tensor] = {}
    for name in _names_ending(TOKENS_SUFFIX, tensors):
        by_id = {
            token: row for own, part in zip(ids, tensors, strict=True) if name in part for token, row in zip(own, part[name], strict=True)
        }
        if by_id.keys() != set(joined):
            raise AdapterMismatch("the two train embeddings of different layers")
        rows[name] = torch.stack([by_id[token] for token in joined]).contiguous()
    return joined, rows


def _names_ending(suffix: str, tensors: "Iterable[Mapping[str, torch.Tensor]]") -> list[str]:
    return sorted({name for part in tensors for name in part if name.endswith(suffix)})


def _read_settings(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / CONFIG_FILE).read_text())
