"""The processes of one training: their collectives, and how they share the batches of each optimizer step.

One process runs per GPU. Gradients are averaged by torch's DistributedDataParallel or fully_shard. Everything else is sent over
loopback sockets of this machine (gloo), so that a long evaluation in rank 0 keeps no GPU waiting in a kernel. What is sent is a tensor
or JSON, never a pickle: other users of the machine can reach loopback, and a pickle from one of them would be code.

An optimizer step has the same rows as in a single process, and its loss and metrics are those of all rows: see `shard_training_steps`.
"""

import time
from collections.abc import Callable, Generator, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from jobs.llm.data.tokenize import IGNORE_INDEX
from jobs.llm.json_objects import decode_json, encode_json, exchange_objects_as_json
from jobs.llm.training_context import TrainingTask

COLLECTIVE_TIMEOUT = timedelta(days=7)  # an evaluation in rank 0 may take any time; a lost process is noticed by other means
FIRST_STEP_TIMEOUT_S = 900.0  # until the first step ends; where a GPU's collectives do not work, they often hang

STORE_FILE = "rendezvous"
PADDING_BATCH = "padding_batch"  # marks a batch that a process gets where the last step of an epoch has too few
_NO_GATHER_OVERRIDES: dict[str, Any] = dict.fromkeys(("gather", "gather_for_metrics", "reduce"), lambda tensor, *_, **__: tensor)


class StartupWatchdog:
    """Notices when the first optimizer step does not end in time."""

    def __init__(self, timeout_s: float = FIRST_STEP_TIMEOUT_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s, self._clock = timeout_s, clock
        self._deadline: float | None = None

    def start(self) -> None:
        """Start the timeout: every process is ready for the first step."""
        self._deadline = self._clock() + self._timeout_s

    def stop(self) -> None:
        """Stop the timeout: later steps may take any time."""
        self._deadline = None

    @property
    def has_timed_out(self) -> bool:
        """The timeout was started, not stopped, and has elapsed."""
        return self._deadline is not None and self._clock() > self._deadline


@dataclass(frozen=True)
class ProcessTopology:
    """The processes of a training as one of them sees them. With a single process every collective returns its argument."""

    rank: int = 0
    world_size: int = 1
    sharded: bool = False  # every process holds a shard of the model
    group: Any = None  # a gloo ProcessGroup, also where gradients go from GPU to GPU
    startup_watchdog: StartupWatchdog = field(default_factory=StartupWatchdog)

    @property
    def is_main_process(self) -> bool:
        """This is rank 0, the attempt's own process."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            import torch

            torch.distributed.barrier(group=self.group)

    def broadcast_flags(self, *flags: bool) -> tuple[bool, ...]:
        """The flags of rank 0."""
        if self.world_size == 1:
            return flags
        import torch

        values = torch.tensor([int(flag) for flag in flags], dtype=torch.uint8)
        torch.distributed.broadcast(values, src=0, group=self.group)
        return tuple(bool(value) for value in values.tolist())

    def broadcast_json(self, value: Any) -> Any:
        """The JSON value of rank 0; what other ranks pass is ignored."""
        if self.world_size == 1:
            return value
        import torch

        content = encode_json(value) if self.is_main_process else torch.empty(0, dtype=torch.uint8)
        (size,) = self._broadcast_sizes(len(content))
        content = content if self.is_main_process else torch.empty(size, dtype=torch.uint8)
        torch.distributed.broadcast(content, src=0, group=self.group)
        return decode_json(content)

    def gather_json(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, by rank, in rank 0; empty in other ranks."""
        if self.world_size == 1:
            return [value]
        import torch

        content = encode_json(value)
        sizes = self.all_reduce_sum(*(float(len(content)) if rank == self.rank else 0.0 for rank in range(self.world_size)))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)  # all ranks must send the same number of bytes
        padded[: len(content)] = content
        received = [torch.empty_like(padded) for _ in sizes] if self.is_main_process else None
        torch.distributed.gather(padded, received, dst=0, group=self.group)
        return [decode_json(part[: int(size)]) for part, size in zip(received or (), sizes, strict=False)]

    def all_reduce_sum(self, *values: float) -> tuple[float, ...]:
        """Each value summed over all processes."""
        if self.world_size == 1:
            return values
        import torch

        sums = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(sums, group=self.group)
        return tuple(sums.tolist())

    def gather_metrics(self, logged_metrics_buffer: MutableMapping[str, list[float]]) -> None:
        """Move the buffered metrics of every process into rank 0's buffer."""
        if self.world_size == 1:
            return
        buffers = self.gather_json({} if self.is_main_process else dict(logged_metrics_buffer))
        if not self.is_main_process:
            logged_metrics_buffer.clear()
            return
        for buffer in buffers:
            for name, values in buffer.items():
                logged_metrics_buffer.setdefault(name, []).extend(values)

    def seed_per_rank(self, seed: int) -> None:
        """Seed ranks above 0 differently: they have different rows, and must not drop out the same units."""
        if self.rank:
            import torch

            torch.manual_seed(seed + self.rank)

    def gather_rng_states(self) -> list[dict[str, Any]]:
        """The RNG state of every process, as transformers' trainer loads it. Empty in other ranks than 0, and in a single process."""
        if self.world_size == 1:
            return []
        return [restore_rng_state(state) for state in self.gather_json(capture_rng_state())]

    def _broadcast_sizes(self, *sizes: int) -> tuple[int, ...]:
        """The sizes of rank 0."""
        import torch

        values = torch.tensor(sizes, dtype=torch.int64)
        torch.distributed.broadcast(values, src=0, group=self.group)
        return tuple(values.tolist())


SINGLE_PROCESS = ProcessTopology()


def create_topology(rank: int, world_size: int, store: Any, *, on_gpu: bool, sharded: bool) -> ProcessTopology:
    """Join the training's process group as `rank`. `store` is the store through which the processes find each other."""
    import torch

    exchange_objects_as_json()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    return ProcessTopology(rank, world_size, sharded, torch.distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT))


def create_store(folder: Path, world_size: int) -> Any:
    """The store through which the processes find each other: a file in a folder that only this user can open, and not a port."""
    import torch

    return torch.distributed.FileStore(str(folder / STORE_FILE), world_size)


def capture_rng_state() -> dict[str, Any]:
    """The RNG state of this process, as a JSON value."""
    import random

    import numpy as np
    import torch

    algorithm, keys, *rest = np.random.get_state(legacy=True)
    state = {"python": random.getstate(), "numpy": [algorithm, keys.tolist(), *rest], "cpu": torch.random.get_rng_state().tolist()}
    if torch.cuda.is_available():
        state["cuda"] = [device_state.tolist() for device_state in torch.cuda.random.get_rng_state_all()]
    return state


def restore_rng_state(captured: dict[str, Any]) -> dict[str, Any]:
    """The RNG state of another process in the types that transformers' trainer loads, from what `capture_rng_state` returned there."""
    import numpy as np
    import torch

    version, internal, gauss = captured["python"]
    algorithm, keys, *rest = captured["numpy"]
    state: dict[str, Any] = {
        "python": (version, tuple(internal), gauss),
        "numpy": (algorithm, np.array(keys, dtype=np.uint32), *rest),
        "cpu": torch.tensor(captured["cpu"], dtype=torch.uint8),
    }
    if "cuda" in captured:
        state["cuda"] = [torch.tensor(device_state, dtype=torch.uint8) for device_state in captured["cuda"]]
    return state


def save_rng_states(folder: Path, states: Sequence[dict[str, Any]]) -> None:
    """Write the RNG states into a checkpoint under the names that transformers' trainer reads."""
    import torch

    for rank, state in enumerate(states):
        torch.save(state, folder / f"rng_state_{rank}.pth")


# --- sharing an optimizer step -------------------------------------------------------------------------------------------


def make_distributed_arguments(world_size: int, gradient_accumulation_steps: int) -> dict[str, Any]:
    """Training arguments with which `world_size` processes share an optimizer step of `gradient_accumulation_steps` batches."""
    if world_size == 1:
        return {"gradient_accumulation_steps": gradient_accumulation_steps}
    return {
        "gradient_accumulation_steps": gradient_accumulation_steps // world_size,
        "accelerator_config": {"even_batches": False},  # it would repeat rows; `make_distributed_dataloader` adds padding batches
        "ddp_find_unused_parameters": False,  # it searches the model's output, which does not contain our loss
        "ddp_broadcast_buffers": False,
    }


def shard_training_steps(trainer_class: type, task: TrainingTask, topology: ProcessTopology) -> type:
    """A subclass of the trainer that takes its share of each optimizer step; the same class in a single process."""
    if topology.world_size == 1:
        return trainer_class
    match task.loss_reduction:
        case "labels":
            return _reduce_by_labels(trainer_class, topology)
        case "batches":
            return _reduce_by_batches(trainer_class, task, topology)
        case "trainer":
            return _reduce_by_trainer(trainer_class, topology)


def _reduce_by_labels(trainer_class: type, topology: ProcessTopology) -> type:
    """For a loss divided by the labels of the step. A padding batch has no labels, so it needs no further care."""

    class LabelReducedTrainer(trainer_class):
        def get_train_dataloader(self) -> Any:
            return make_distributed_dataloader(self, topology.world_size, mask_labels)

    return LabelReducedTrainer


def _reduce_by_batches(trainer_class: type, task: TrainingTask, topology: ProcessTopology) -> type:
    """For a loss and metrics that are means over the batches of the step, in which padding batches must not count."""

    class BatchReducedTrainer(trainer_class):
        batch_weight = 1.0  # turns the mean over all batches of the step into the mean over those that are not padding

        def create_accelerator_and_postprocess(self) -> None:
            """Metrics are those of the process's own batch: other processes may have fewer rows, or none."""
            super().create_accelerator_and_postprocess()
            vars(self.accelerator).update(_NO_GATHER_OVERRIDES)

        def get_train_dataloader(self) -> Any:
            return make_distributed_dataloader(self, topology.world_size, as_padding_batch)

        def get_batch_samples(self, *args: Any) -> Any:
            batches, items = super().get_batch_samples(*args)
            (count,) = topology.all_reduce_sum(sum(PADDING_BATCH not in batch for batch in batches))
            self.batch_weight = len(batches) * topology.world_size / count
            return batches, items

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if not self.model.training:
                return super().compute_loss(model, inputs, *args, **kwargs)
            if not inputs.pop(PADDING_BATCH, False):
                return super().compute_loss(model, inputs, *args, **kwargs) * self.batch_weight
            buffer = task.logged_metrics_buffer(self)
            before = {name: list(values) for name, values in buffer.items()}
            loss = super().compute_loss(model, inputs, *args, **kwargs) * 0.0  # averaging gradients waits for every process
            buffer.clear()
            buffer.update(before)
            return loss

    return BatchReducedTrainer


def _reduce_by_trainer(trainer_class: type, topology: ProcessTopology) -> type:
    """For a trainer that distributes the rows of a step and normalizes its loss itself."""

    class SelfReducedTrainer(trainer_class):
        def training_step(self, *args: Any) -> Any:
            topology.startup_watchdog.stop()  # wrapping the model was the first collective; generating completions may take long
            return super().training_step(*args)

    return SelfReducedTrainer


@contextmanager
def disable_metric_gathering(accelerator: Any) -> Generator[None]:
    """Inside, metrics are those of the process's own batch, as in a single process."""
    vars(accelerator).update(_NO_GATHER_OVERRIDES)
    try:
        yield
    finally:
        for name in _NO_GATHER_OVERRIDES:
            del vars(accelerator)[name]


def make_distributed_dataloader(trainer: Any, world_size: int, make_padding_batch: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The data loader of the batches that this process takes.

    The batches are those of a single process, dealt out in turn. Where the last step of an epoch has too few, `make_padding_batch` turns
    a copy of the first row into a batch that does not count.
    """
    from torch.utils.data import BatchSampler, DataLoader

    rows, arguments = trainer.train_dataset, trainer.args

    class EvenBatchSampler(BatchSampler):
        """As many batches as the processes can share evenly. A padding batch has the index after the last row."""

        def __iter__(self) -> Iterator[list[int]]:
            yield from super().__iter__()
            yield from [[len(rows)]] * (len(self) - super().__len__())

        def __len__(self) -> int:
            return -(-super().__len__() // world_size) * world_size

    def collate(batch: list[Any]) -> dict[str, Any]:
        return trainer.data_collator(batch) if batch[0] is not None else make_padding_batch(trainer.data_collator([rows[0]]))

    loader = DataLoader(
        _PaddedRows(rows),  # pyright: ignore[reportArgumentType]  # torch's Dataset adds nothing to the protocol
        batch_sampler=EvenBatchSampler(trainer._get_train_sampler(rows), arguments.train_batch_size, drop_last=False),
        collate_fn=collate,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
    )
    return trainer.accelerator.prepare(loader)


class _PaddedRows:
    """The rows by index, and None for the index after the last."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index] if index < len(self._rows) else None


def mask_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without labels, and without tokens to count."""
    return batch | {"labels": batch["labels"].new_full(batch["labels"].shape, IGNORE_INDEX), "non_padding_tokens": 0}


def as_padding_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, marked as padding."""
    return batch | {PADDING_BATCH: True}
