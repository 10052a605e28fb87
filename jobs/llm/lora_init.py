"""The initializations of a LoRA adapter that are not peft's own: orthogonal, PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775).

The last two take the leading part B0·A0 out of a weight matrix W and train it: W - B0·A0 stays frozen, and the adapter starts at B0
and A0. Here W is left as it is, and the adapter has twice the rank: its first half is trained, and its second half subtracts B0·A0
and never changes. Both compute the same, and the latter is an ordinary adapter of the original base at any time: a checkpoint is all
that a resumed training needs, merging and exporting know nothing of it, and the base as the reference of a preference loss is the base
itself.
"""

import math
from typing import Any

from schema.training.llm_hyperparameters import Hyperparameters
from schema.training.llm_optimization import is_base_factor_init

ADAPTER = "default"  # peft's name of the only adapter
ORTHOGONAL_SCALE = 0.1  # as in peft


def adapter_arguments(hyperparameters: Hyperparameters) -> dict[str, Any]:
    """The rank, scale and initialization of the adapter, by the names of peft.LoraConfig."""
    rank, alpha, lora_init = hyperparameters.lora_rank, hyperparameters.lora_alpha, hyperparameters.lora_init
    if is_base_factor_init(lora_init):
        # peft divides alpha by the rank, or its square root; the scale must remain that of the requested rank.
        return {"r": 2 * rank, "lora_alpha": alpha * (math.sqrt(2) if hyperparameters.use_rslora else 2)}
    return {"r": rank, "lora_alpha": alpha, "init_lora_weights": "gaussian" if lora_init == "gaussian" else True}


def initialize_adapter(model: Any, hyperparameters: Hyperparameters) -> None:
    """Give a new adapter its initial weights. Nothing to do for peft's own initializations, and EVA needs rows: see eva.py."""
    import torch

    rank, lora_init = hyperparameters.lora_rank, hyperparameters.lora_init
    if lora_init in ("default", "gaussian", "eva"):
        return
    for layer in list_adapted_layers(model):
        lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        with torch.no_grad():
            if lora_init == "orthogonal":
                a, b = make_orthogonal(lora_a, lora_b)
            else:
                a, b = factorize(layer.get_base_layer().weight.float(), rank, layer.scaling[ADAPTER], lora_init)
                a, b = torch.cat([a, a]), torch.cat([b, -b], dim=1)
            lora_a.copy_(a)
            lora_b.copy_(b)


def make_orthogonal(lora_a: Any, lora_b: Any) -> tuple[Any, Any]:
    """Random matrices of these shapes whose product B·A is zero. In fp32: peft rounds them to the base's dtype, and then it is not."""
    import torch

    rank = len(lora_a)
    rows, _ = torch.linalg.qr(torch.randn(rank, rank))
    a = rows[0::2].T @ torch.randn(rank // 2, lora_a.shape[1])
    b = torch.randn(len(lora_b), rank // 2) @ rows[1::2]
    return ORTHOGONAL_SCALE * a, ORTHOGONAL_SCALE * b


def factorize(weight: Any, rank: int, scale: float, lora_init: str) -> tuple[Any, Any]:
    """A (rank, in) and B (out, rank) of the leading part of a weight matrix (out, in), which is `scale`·B·A."""
    import torch

    if lora_init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if lora_init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(lora_init.removeprefix("pissa_niter_")))
        vh = v.T
    root = torch.sqrt(s[:rank] / scale)
    return root[:, None] * vh[:rank], u[:, :rank] * root


def zero_initial_gradients(model: Any, hyperparameters: Hyperparameters) -> None:
    """Set the gradients of the half that does not train to zero, after they are averaged over all processes."""
    if not is_base_factor_init(hyperparameters.lora_init):
        return
    for layer in list_adapted_layers(model):
        _zero_second_half(layer.lora_A[ADAPTER].weight.grad, dim=0)
        _zero_second_half(layer.lora_B[ADAPTER].weight.grad, dim=1)


def _zero_second_half(gradient: Any, *, dim: int) -> None:
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    if gradient is None:  # of an expert that no token was routed to
        return
    mask = torch.ones(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    mask.narrow(dim, mask.shape[dim] // 2, mask.shape[dim] // 2).zero_()
    if isinstance(gradient, DTensor):  # of a sharded model
        mask = distribute_tensor(mask, gradient.device_mesh, gradient.placements, src_data_rank=None)
    gradient.mul_(mask)


def list_adapted_layers(model: Any) -> list[Any]:
    """The linear layers with an adapter of their own, also those with a quantized base."""
    import torch
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and ADAPTER in module.lora_A]
    return [layer for layer in layers if isinstance(layer.get_base_layer(), torch.nn.Linear)]
