"""A model that is too large for one GPU, divided among the processes of a training (torch's fully_shard, FSDP2).

    shard       each process keeps its part of weights, gradients and optimizer; a layer is whole only while it computes
    measuring   rank 0 measures as if it were alone; at each layer that it comes to, the others lend it their parts
    gathered    what is saved is put together in rank 0: checkpoints and models have the files of a single process

Rank 0 says over sockets which layer is next, so that a measurement may end, fail or try again anywhere and nobody waits for ever.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jobs.llm.distributed import ProcessTopology
    from jobs.llm.model import DeviceConfig
    from schema.training import TrainingConfig

EVALUATION_DONE = -1  # the measurement is over


@dataclass(frozen=True)
class Parallelism:
    """How processes share a training: not at all, each with the whole model, or each with a part of it; and why."""

    value: Literal["none", "ddp", "fsdp"]
    reason: str


@dataclass(frozen=True)
class MemoryEstimate:
    """What a training needs on each GPU with the whole model there, and with its part of it; and what there is. In bytes."""

    full_model_bytes: float
    shard_bytes: float
    available_bytes: float


def fsdp_unsupported_reason(config: "TrainingConfig") -> str:
    """Why the model of this training cannot be divided; empty where it can."""
    if config.trainer_type != "sft" or config.modality != "text":
        return "only trainer_type sft on text divides its model"
    if config.method == "QLoRA":
        return "weights of 4 bits cannot be divided"
    return ""


def choose_parallelism(
    world_size: int, unsupported_reason: str, requested: Literal["ddp", "fsdp"] | None, memory: MemoryEstimate | None
) -> Parallelism:
    """Whole models wherever they fit: they say less to each other. `room` is None on a processor, whose memory all of them share."""
    if world_size == 1:
        return Parallelism("none", "one process trains")
    if requested == "ddp" or (requested == "fsdp" and not unsupported_reason):
        return Parallelism(requested, "JOB_PARALLELISM says so")
    if memory is None:
        return Parallelism("ddp", unsupported_reason or "on a processor all processes share one memory")
    told = (
        f"a GPU has room for {memory.available_bytes / 1e9:.1f} GB, and the whole model needs about {memory.full_model_bytes / 1e9:.1f} GB"
    )
    if memory.full_model_bytes < memory.available_bytes:
        return Parallelism("ddp", told)
    if unsupported_reason:
        return Parallelism("ddp", f"{told}; {unsupported_reason}")
    parts = f"{told}, {memory.shard_bytes / 1e9:.1f} GB for one of {world_size} parts"
    return Parallelism("fsdp" if memory.shard_bytes < memory.available_bytes else "ddp", parts)


def shard(model: Any, device_config: "DeviceConfig") -> Any:
    """The model, on the processor until now, as this process's part of it, on the machine's device. All processes call this together."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device_config.device.type, (torch.distributed.get_world_size(),))
    # As autocast has it: products in bf16, with what goes from layer to layer left alone; and the sums of gradients in fp32.
    product = torch.bfloat16 if device_config.autocast else None
    policy = MixedPrecisionPolicy(param_dtype=product, reduce_dtype=torch.float32, cast_forward_inputs=False)
    kinds = set(model._no_split_modules)
    for layer in [part for part in model.modules() if type(part).__name__ in kinds]:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # What is left is needed from the first to the last moment of a step: the embeddings, and the head that is tied to them.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), reshard_after_forward=False)
    model._get_fsdp_state()._lazy_init()  # now, because a model that generates first comes to a layer and not to the root
    for part in (model, _unwrap_peft(model)):
        # By this mark transformers would have generation wait for all processes, and whole gradients kept until a step's last batch.
        part._is_fsdp_managed_module = False
    return model


def _unwrap_peft(model: Any) -> Any:
    """Transformers' model, also below peft's."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


# --- measuring -----------------------------------------------------------------------------------------------------------


@contextmanager
def unsharded_evaluation(topology: "ProcessTopology", model: Any) -> Generator[None]:
    """In rank 0: until this ends the model computes without the other processes' computing, which are in `lend` meanwhile."""
    if not topology.sharded:
        yield
        return
    model.unshard()
    layers = _fsdp_layers(model)
    hooks = [layer.register_forward_pre_hook(partial(_request_layer, topology, place), prepend=True) for place, layer in enumerate(layers)]
    yield  # an error that comes out here ends the training, and with it the others
    for hook in hooks:
        hook.remove()
    topology.broadcast_object(EVALUATION_DONE)
    model.reset_iter_state()


def serve_shards(topology: "ProcessTopology", model: Any) -> None:
    """In the other processes: give rank 0 each layer that it asks for, until it has measured."""
    if not topology.sharded:
        return
    model.unshard()
    layers = _fsdp_layers(model)
    while (place := topology.broadcast_object(None)) != EVALUATION_DONE:
        layers[place].unshard()
        layers[place].reshard()
    model.reset_iter_state()


def _fsdp_layers(model: Any) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [part for part in model.modules() if isinstance(part, FSDPModule) and part is not model]


def _request_layer(topology: "ProcessTopology", layer_index: int, layer: Any, _: Any) -> None:
    layer.reshard()  # memory may have run out in it before
    topology.broadcast_object(layer_index)


# --- what is saved -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullStateDict:
    """What a checkpoint has of a divided model, as a single process would have it; empty in all but rank 0."""

    weights: dict[str, Any]
    optimizer: dict[str, Any]


def gather_full_state(topology: "ProcessTopology", trainer: Any) -> FullStateDict | None:
    """The model and its optimizer; None where they are not divided. All processes call this together."""
    if not topology.sharded:
        return None
    state = trainer.optimizer.state_dict()
    moments = {place: full_tensors(topology, parts) for place, parts in state["state"].items()}
    return FullStateDict(gather_weights(topology, trainer.model), state | {"state": moments})


def gather_weights(topology: "ProcessTopology", model: Any) -> dict[str, Any]:
    """The weights that are saved, by name: an adapter's, or all."""
    from peft import PeftModel

    parts = model.state_dict(keep_vars=True)
    adapts = isinstance(model, PeftModel)
    return full_tensors(topology, {name: part for name, part in parts.items() if part.requires_grad or not adapts})


def full_tensors(topology: "ProcessTopology", parts: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors on the processor of rank 0, one after the other; what has two names stays one. All processes call this together."""
    import torch
    from torch.distributed.tensor import DTensor

    found: dict[int, Any] = {}
    with torch.no_grad():
        for part in parts.values():
            if id(part) not in found:
                whole = part.full_tensor() if isinstance(part, DTensor) else part
                found[id(part)] = whole.detach().cpu() if topology.is_main_process else None
    return {name: found[id(part)] for name, part in parts.items()} if topology.is_main_process else {}


def save_optimizer(trainer: Any, full_state: FullStateDict, folder: Path) -> None:
    """Optimizer and schedule into a checkpoint, as transformers' trainer does it in a single process."""
    import torch
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    torch.save(full_state.optimizer, folder / OPTIMIZER_NAME)
    torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_optimizer(trainer: Any, folder: Path) -> None:
    """This process's part of the optimizer of a checkpoint, and the schedule."""
    import torch
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
    weights = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    saved["state"] = {
        place: {name: _local_shard(whole, weights[place]) for name, whole in moments.items()} for place, moments in saved["state"].items()
    }
    trainer.optimizer.load_state_dict(saved)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


def _local_shard(whole: Any, weight: Any) -> Any:
    """What belongs to this process's part of the weight; a count of steps belongs to all."""
    from torch.distributed.tensor import distribute_tensor

    if whole.shape != weight.shape:
        return whole
    part = distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    return part.clone()  # a part that is not cloned keeps the whole in memory
