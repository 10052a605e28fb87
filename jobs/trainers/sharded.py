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
    from jobs.trainers.model import Machine
    from jobs.trainers.several import Crew
    from schema.training import TrainingConfig

NO_LAYER = -1  # the measurement is over


@dataclass(frozen=True)
class Parallelism:
    """How processes share a training: not at all, each with the whole model, or each with a part of it; and why."""

    value: Literal["none", "ddp", "fsdp"]
    why: str


@dataclass(frozen=True)
class Room:
    """What a training needs on each GPU with the whole model there, and with its part of it; and what there is. In bytes."""

    whole: float
    part: float
    there: float


def obstacle_of(config: "TrainingConfig") -> str:
    """Why the model of this training cannot be divided; empty where it can."""
    if config.trainer_type != "sft" or config.modality != "text":
        return "only trainer_type sft on text divides its model"
    if config.method == "QLoRA":
        return "weights of 4 bits cannot be divided"
    return ""


def parallelism_of(processes: int, obstacle: str, asked: Literal["ddp", "fsdp"] | None, room: Room | None) -> Parallelism:
    """Whole models wherever they fit: they say less to each other. `room` is None on a processor, whose memory all of them share."""
    if processes == 1:
        return Parallelism("none", "one process trains")
    if asked == "ddp" or (asked == "fsdp" and not obstacle):
        return Parallelism(asked, "JOB_PARALLELISM says so")
    if room is None:
        return Parallelism("ddp", obstacle or "on a processor all processes share one memory")
    told = f"a GPU has room for {room.there / 1e9:.1f} GB, and about {room.whole / 1e9:.1f} GB are needed for the whole model"
    if room.whole < room.there:
        return Parallelism("ddp", told)
    if obstacle:
        return Parallelism("ddp", f"{told}; {obstacle}")
    parts = f"{told}, {room.part / 1e9:.1f} GB for one of {processes} parts"
    return Parallelism("fsdp" if room.part < room.there else "ddp", parts)


def shard(model: Any, machine: "Machine") -> Any:
    """The model, on the processor until now, as this process's part of it, on the machine's device. All processes call this together."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(machine.device.type, (torch.distributed.get_world_size(),))
    # As autocast has it: products in bf16, with what goes from layer to layer left alone; and the sums of gradients in fp32.
    product = torch.bfloat16 if machine.autocast else None
    policy = MixedPrecisionPolicy(param_dtype=product, reduce_dtype=torch.float32, cast_forward_inputs=False)
    kinds = set(model._no_split_modules)
    for layer in [part for part in model.modules() if type(part).__name__ in kinds]:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # What is left is needed from the first to the last moment of a step: the embeddings, and the head that is tied to them.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), reshard_after_forward=False)
    model._get_fsdp_state()._lazy_init()  # now, because a model that generates first comes to a layer and not to the root
    for part in (model, _base_of(model)):
        # By this mark transformers would have generation wait for all processes, and whole gradients kept until a step's last batch.
        part._is_fsdp_managed_module = False
    return model


def _base_of(model: Any) -> Any:
    """Transformers' model, also below peft's."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


# --- measuring -----------------------------------------------------------------------------------------------------------


@contextmanager
def measuring(crew: "Crew", model: Any) -> Generator[None]:
    """In rank 0: until this ends the model computes without the other processes' computing, which are in `lend` meanwhile."""
    if not crew.sharded:
        yield
        return
    model.unshard()
    layers = _layers(model)
    hooks = [layer.register_forward_pre_hook(partial(_ask_for, crew, place), prepend=True) for place, layer in enumerate(layers)]
    yield  # an error that comes out here ends the training, and with it the others
    for hook in hooks:
        hook.remove()
    crew.tell(NO_LAYER)
    model.reset_iter_state()


def lend(crew: "Crew", model: Any) -> None:
    """In the other processes: give rank 0 each layer that it asks for, until it has measured."""
    if not crew.sharded:
        return
    model.unshard()
    layers = _layers(model)
    while (place := crew.tell(None)) != NO_LAYER:
        layers[place].unshard()
        layers[place].reshard()
    model.reset_iter_state()


def _layers(model: Any) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [part for part in model.modules() if isinstance(part, FSDPModule) and part is not model]


def _ask_for(crew: "Crew", place: int, layer: Any, _: Any) -> None:
    layer.reshard()  # memory may have run out in it before
    crew.tell(place)


# --- what is saved -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """What a checkpoint has of a divided model, as a single process would have it; empty in all but rank 0."""

    weights: dict[str, Any]
    optimizer: dict[str, Any]


def gather_all(crew: "Crew", trainer: Any) -> Whole | None:
    """The model and its optimizer; None where they are not divided. All processes call this together."""
    if not crew.sharded:
        return None
    state = trainer.optimizer.state_dict()
    moments = {place: gathered(crew, parts) for place, parts in state["state"].items()}
    return Whole(gather_weights(crew, trainer.model), state | {"state": moments})


def gather_weights(crew: "Crew", model: Any) -> dict[str, Any]:
    """The weights that are saved, by name: an adapter's, or all."""
    from peft import PeftModel

    parts = model.state_dict(keep_vars=True)
    adapts = isinstance(model, PeftModel)
    return gathered(crew, {name: part for name, part in parts.items() if part.requires_grad or not adapts})


def gathered(crew: "Crew", parts: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors on the processor of rank 0, one after the other; what has two names stays one. All processes call this together."""
    import torch
    from torch.distributed.tensor import DTensor

    found: dict[int, Any] = {}
    with torch.no_grad():
        for part in parts.values():
            if id(part) not in found:
                whole = part.full_tensor() if isinstance(part, DTensor) else part
                found[id(part)] = whole.detach().cpu() if crew.leads else None
    return {name: found[id(part)] for name, part in parts.items()} if crew.leads else {}


def save_optimizer(trainer: Any, whole: Whole, folder: Path) -> None:
    """Optimizer and schedule into a checkpoint, as transformers' trainer does it in a single process."""
    import torch
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    torch.save(whole.optimizer, folder / OPTIMIZER_NAME)
    torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_optimizer(trainer: Any, folder: Path) -> None:
    """This process's part of the optimizer of a checkpoint, and the schedule."""
    import torch
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
    weights = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    saved["state"] = {
        place: {name: _part_of(whole, weights[place]) for name, whole in moments.items()} for place, moments in saved["state"].items()
    }
    trainer.optimizer.load_state_dict(saved)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


def _part_of(whole: Any, weight: Any) -> Any:
    """What belongs to this process's part of the weight; a count of steps belongs to all."""
    from torch.distributed.tensor import distribute_tensor

    if whole.shape != weight.shape:
        return whole
    part = distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    return part.clone()  # a part that is not cloned keeps the whole in memory
