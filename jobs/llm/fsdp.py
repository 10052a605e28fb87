"""Train a model that is too large for one GPU: shard it over the processes of a training (torch's fully_shard, FSDP2).

    training     each process keeps its shard of weights, gradients and optimizer; a layer is whole only while it computes
    evaluation   rank 0 computes alone; it asks the other ranks for each layer, and they take part in unsharding it
    checkpoints  rank 0 gathers what is saved, so that checkpoints and models have the files of a single process

Rank 0 announces the next layer over sockets, so an evaluation may end, fail or be retried at any layer and no rank waits forever.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jobs.llm.distributed import ProcessTopology
from jobs.llm.hardware import DeviceConfig

EVALUATION_DONE = -1  # announced instead of a layer index


def shard(model: Any, device_config: DeviceConfig) -> Any:
    """Shard a model that is on the CPU, and move this process's shard to the device. All processes call this together."""
    import torch
    from peft import PeftModel
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device_config.device.type, (torch.distributed.get_world_size(),))
    # As with autocast: matrix products in bf16, the inputs of a layer unchanged, gradients reduced in fp32.
    param_dtype = torch.bfloat16 if device_config.autocast else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layer_classes = set(model._no_split_modules)
    for layer in [module for module in model.modules() if type(module).__name__ in layer_classes]:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # The rest (embeddings and the tied head) is needed throughout a step, so it is not resharded after forward.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), reshard_after_forward=False)
    model._get_fsdp_state()._lazy_init()  # before any generation, which would reach a layer before the root
    for module in (model, model.get_base_model() if isinstance(model, PeftModel) else model):
        # If set, transformers' generation waits for all processes, and whole gradients are kept until the last batch of a step.
        module._is_fsdp_managed_module = False
    return model


# --- evaluation ----------------------------------------------------------------------------------------------------------


@contextmanager
def unsharded_evaluation(topology: ProcessTopology, model: Any) -> Generator[None]:
    """In rank 0: inside, the model computes in this process alone. The other ranks must be in `serve_shards`."""
    if not topology.sharded:
        yield
        return
    model.unshard()
    layers = _fsdp_layers(model)
    hooks = [layer.register_forward_pre_hook(partial(_request_layer, topology, index), prepend=True) for index, layer in enumerate(layers)]
    yield  # an error raised here ends the training in every process
    for hook in hooks:
        hook.remove()
    topology.broadcast_json(EVALUATION_DONE)
    model.reset_iter_state()


def serve_shards(topology: ProcessTopology, model: Any) -> None:
    """In other ranks: take part in unsharding each layer that rank 0 asks for, until its evaluation is done."""
    if not topology.sharded:
        return
    model.unshard()
    layers = _fsdp_layers(model)
    while (index := topology.broadcast_json(None)) != EVALUATION_DONE:
        layers[index].unshard()
        layers[index].reshard()
    model.reset_iter_state()


def _fsdp_layers(model: Any) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]


def _request_layer(topology: ProcessTopology, layer_index: int, layer: Any, _: Any) -> None:
    layer.reshard()  # an earlier try may have run out of memory in this layer
    topology.broadcast_json(layer_index)


# --- checkpoints ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullStateDict:
    """The gathered state of a sharded model, as a single process would save it. Empty in other ranks than 0."""

    weights: dict[str, Any]
    optimizer: dict[str, Any]


def gather_full_state(topology: ProcessTopology, trainer: Any) -> FullStateDict | None:
    """Gather the model and its optimizer; None if they are not sharded. All processes call this together."""
    if not topology.sharded:
        return None
    state = trainer.optimizer.state_dict()
    moments = {index: full_tensors(topology, shards) for index, shards in state["state"].items()}
    return FullStateDict(gather_weights(topology, trainer.model), state | {"state": moments})


def gather_weights(topology: ProcessTopology, model: Any) -> dict[str, Any]:
    """Gather the weights to save, by name: the adapter's, or all. All processes call this together."""
    from peft import PeftModel

    weights = model.state_dict(keep_vars=True)
    is_adapter = isinstance(model, PeftModel)
    return full_tensors(topology, {name: weight for name, weight in weights.items() if weight.requires_grad or not is_adapter})


def full_tensors(topology: ProcessTopology, shards: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors on the CPU of rank 0, gathered one by one. Tied tensors stay tied. All processes call this together."""
    import torch
    from torch.distributed.tensor import DTensor

    gathered: dict[int, Any] = {}
    with torch.no_grad():
        for tensor in shards.values():
            if id(tensor) not in gathered:
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                gathered[id(tensor)] = full.detach().cpu() if topology.is_main_process else None
    return {name: gathered[id(tensor)] for name, tensor in shards.items()} if topology.is_main_process else {}


def save_optimizer(trainer: Any, full_state: FullStateDict, folder: Path) -> None:
    """Save optimizer and scheduler into a checkpoint, as transformers' trainer does in a single process."""
    import torch
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    torch.save(full_state.optimizer, folder / OPTIMIZER_NAME)
    torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_optimizer(trainer: Any, folder: Path) -> None:
    """Load this process's shard of the optimizer, and the scheduler, from a checkpoint."""
    import torch
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
    weights = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    saved["state"] = {
        index: {name: _local_shard(full, weights[index]) for name, full in moments.items()} for index, moments in saved["state"].items()
    }
    trainer.optimizer.load_state_dict(saved)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


def _local_shard(full: Any, weight: Any) -> Any:
    """The shard of the tensor `full` that belongs to this process's shard of `weight`. A step count is not sharded."""
    from torch.distributed.tensor import distribute_tensor

    if full.shape != weight.shape:
        return full
    local = distribute_tensor(full.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    return local.clone()  # without a copy it would keep the whole tensor in memory
