"""A training on several GPUs of one machine: one process for each, all of which go over their share of each step, and hold the model or,
where it is too large, a part of it (sharded.py).

    rank 0     the attempt's own process: it decides, measures, tells, saves; `together` starts the others and ends them whatever happens
    the rest   `python -m jobs.llm.worker`: the same lesson and weights, and no voice; they do at each step what rank 0 says

Gradients are averaged by torch's DistributedDataParallel, or its fully_shard; everything else goes over sockets of this machine, so that
a long measurement in rank 0 keeps no GPU waiting in a kernel. A step has the rows that it has in one process, and its loss and figures are
theirs: see `shared`.
"""

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.llm.data.tokenize import IGNORE_INDEX
from jobs.llm.oom import BatchConfig, is_out_of_memory
from jobs.runtime.checkpoints import Checkpoints
from jobs.runtime.context import JobContext, Secrets, Stores
from jobs.runtime.errors import JobFailed
from jobs.runtime.save_policy import TrainingControlState
from jobs.runtime.settings import clear_rank_environment, read_max_processes, set_rank_environment, visible_gpus, worker_environment
from jobs.runtime.system_metrics import nvidia_gpus
from schema.events import Event
from schema.job import Failure, Phase, Progress
from schema.spec import JobSpec, StoreUrls

if TYPE_CHECKING:
    from jobs.llm.training_loop import TrainingContext, TrainingTask

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
COLLECTIVE_TIMEOUT = timedelta(days=7)  # a measurement in rank 0 may take as long as it likes; a process that is gone is noticed otherwise
POLL_INTERVAL_S = 0.1
WORKER_EXIT_GRACE_S = 3.0  # until a process whose sockets are closed has ended, and its exit code says why
FIRST_STEP_TIMEOUT_S = 900.0  # until the first step is taken; where a GPU's collectives do not work, they often hang
ABORT_GRACE_S = 20.0  # until a main thread comes back from a GPU's collective that was given up

EXIT_OOM = 17  # how another process ends when its memory runs out,
EXIT_PEER_LOST = 18  # and when the others are gone

# What counts the same in the loss of an optimizer step: each label of it, or each batch; or the library's trainer sees to it that the
# loss is that of all rows, and deals them out itself.
LossReduction = Literal["labels", "batches", "trainer"]
_NO_GATHER_OVERRIDES: dict[str, Any] = dict.fromkeys(("gather", "gather_for_metrics", "reduce"), lambda part, *_, **__: part)
PADDING_BATCH = "padding_batch"  # marks a batch that is there so that a process has one, where an epoch's last step has too few


@dataclass(frozen=True)
class DeviceSlots:
    """Where processes may run: on so many, and on which GPUs, as CUDA names them; none on a processor. Whether they divide the model."""

    max_world_size: int
    gpus: tuple[str, ...] = ()
    sharded: bool = False


@dataclass(frozen=True)
class WorldSizeDecision:
    """How many processes train, and why; `idle` says what keeps the other places from being used."""

    world_size: int
    reason: str
    idle_reason: str = ""


@dataclass(frozen=True)
class WorkerArgs:
    """What another process is told to do."""

    rank: int
    world_size: int
    sharded: bool
    port: int
    on_gpu: bool
    workdir: Path
    attempt: int
    spec: JobSpec
    worker_task_factory: "Callable[[TrainingContext], TrainingTask]"
    training: dict[str, Any]  # the fields of TrainingContext by name, without what only rank 0 has
    state: TrainingControlState
    total_steps: int
    checkpoint: Path | None


class WorkerOutOfMemory(MemoryError):
    """Another process of the training ran out of memory."""


class WorkerFailed(RuntimeError):
    """Another process of the training ended before its time, or none of them got anywhere."""


def detect_devices(*, on_gpu: bool) -> DeviceSlots:
    """What this machine offers: each of its GPUs; on a processor one, or as many processes as the deployment says."""
    most = read_max_processes()
    if not on_gpu:
        return DeviceSlots(most or 1)
    found = nvidia_gpus()
    gpus = visible_gpus(len(found.names) if found else 1)
    return DeviceSlots(min(most or len(gpus), len(gpus)) or 1, gpus)


def choose_world_size(batch_config: BatchConfig, examples_per_epoch: int, max_world_size: int) -> WorldSizeDecision:
    """The most processes among which the batches of an optimizer step can be shared evenly; an epoch goes over `items`."""
    accumulated = batch_config.gradient_accumulation_steps
    batches = -(-examples_per_epoch // batch_config.batch_size)
    processes = max(count for count in range(1, max_world_size + 1) if accumulated % count == 0 and count <= batches)
    why = f"there is room for {max_world_size}, and each goes over {accumulated // processes} of {accumulated} batches of an optimizer step"
    if processes == max_world_size:
        return WorldSizeDecision(processes, why)
    if batches < max_world_size:
        return WorldSizeDecision(processes, why, f"an epoch has only {batches} batches")
    hint = f"make it a multiple of {max_world_size}, with a smaller batch_size if a step is to have as many rows"
    return WorldSizeDecision(processes, why, f"gradient_accumulation_steps {accumulated} cannot be shared among more; {hint}")


# --- what the processes say to each other ------------------------------------------------------------------------------


class StartupWatchdog:
    """Whether the processes come to work together at all."""

    def __init__(self, timeout_s: float = FIRST_STEP_TIMEOUT_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s, self._clock = timeout_s, clock
        self._deadline: float | None = None

    def start(self) -> None:
        """All are ready for it."""
        self._deadline = self._clock() + self._timeout_s

    def stop(self) -> None:
        """From here on a step may take as long as it likes."""
        self._deadline = None

    @property
    def has_timed_out(self) -> bool:
        """It began, and nothing came of it."""
        return self._deadline is not None and self._clock() > self._deadline


@dataclass(frozen=True)
class ProcessTopology:
    """The processes of a training, seen from one of them. Alone, it agrees with itself."""

    rank: int = 0
    world_size: int = 1
    sharded: bool = False  # each holds a part of the model only
    group: Any = None  # sockets, also where gradients go from GPU to GPU
    startup_watchdog: StartupWatchdog = field(default_factory=StartupWatchdog)

    @property
    def is_main_process(self) -> bool:
        """This is the attempt's own process."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            import torch

            torch.distributed.barrier(group=self.group)

    def broadcast_flags(self, *flags: bool) -> tuple[bool, ...]:
        """What rank 0 wishes."""
        if self.world_size == 1:
            return flags
        import torch

        told = torch.tensor([int(wish) for wish in flags], dtype=torch.uint8)
        torch.distributed.broadcast(told, src=0, group=self.group)
        return tuple(bool(wish) for wish in told.tolist())

    def broadcast_object(self, value: Any) -> Any:
        """What rank 0 says; what the others would say does not count."""
        if self.world_size == 1:
            return value
        import torch

        told = [value]
        torch.distributed.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def all_reduce_sum(self, *values: float) -> tuple[float, ...]:
        """The sums over all processes."""
        if self.world_size == 1:
            return values
        import torch

        summed = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(summed, group=self.group)
        return tuple(summed.tolist())

    def gather_metrics(self, logged_metrics_buffer: MutableMapping[str, list[float]]) -> None:
        """Let rank 0 have what all have gathered, and the others nothing."""
        if self.world_size == 1:
            return
        import torch

        found: list[Any] = [None] * self.world_size
        torch.distributed.gather_object(
            {} if self.is_main_process else dict(logged_metrics_buffer), found if self.is_main_process else None, group=self.group
        )
        if not self.is_main_process:
            logged_metrics_buffer.clear()
            return
        for name, values in ((name, values) for of_one in found for name, values in of_one.items()):
            logged_metrics_buffer.setdefault(name, []).extend(values)

    def seed_per_rank(self, seed: int) -> None:
        """Draw other random numbers than the other processes: they have other rows, and are not to drop out the same parts."""
        if self.rank:
            import torch

            torch.manual_seed(seed + self.rank)

    def gather_rng_states(self) -> list[dict[str, Any]]:
        """Where everybody's random numbers are, as transformers' trainer loads it; for rank 0 alone, and empty in one process."""
        if self.world_size == 1:
            return []
        import torch

        found: list[Any] = [None] * self.world_size
        torch.distributed.gather_object(capture_rng_state(), found if self.is_main_process else None, group=self.group)
        return found if self.is_main_process else []


SINGLE_PROCESS = ProcessTopology()


def capture_rng_state() -> dict[str, Any]:
    """Where this process's random numbers are."""
    import random

    import numpy as np
    import torch

    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all()
    return state


def save_rng_states(folder: Path, states: Sequence[dict[str, Any]]) -> None:
    """Beside the other files of a checkpoint, under the names by which transformers' trainer finds them."""
    import torch

    for rank, state in enumerate(states):
        torch.save(state, folder / f"rng_state_{rank}.pth")


def null_context(worker_args: WorkerArgs) -> JobContext:
    """An attempt from inside, for a process that has nothing to say, nobody to hear and no store."""
    folder = worker_args.workdir / f"rank-{worker_args.rank}"
    stores = Stores(StoreUrls.model_validate(dict.fromkeys(StoreUrls.model_fields, folder.as_uri())))
    checkpoints = Checkpoints(
        store=stores.models, spec=worker_args.spec, attempt=worker_args.attempt, folder=folder, save_total_limit=1, emit=lambda _: None
    )
    return JobContext(
        worker_args.spec, worker_args.attempt, worker_args.workdir, Secrets({}), stores, _NullEventSink(), _NeverStop(), checkpoints
    )


class _NullEventSink:
    """A voice that says nothing: rank 0 does."""

    def report(self, event: Event) -> None:
        pass

    def set_progress(self, *, phase: Phase | None = None, progress: Progress | None = None) -> None:
        pass


class _NeverStop:
    """Nobody asks this process to stop: rank 0 tells it, or ends it."""

    stop_reason = None

    def check(self) -> None:
        pass

    def defer_stop(self) -> AbstractContextManager[None]:
        return nullcontext()

    def time_left_s(self) -> float | None:
        return None


def join_process_group(worker_args: WorkerArgs) -> ProcessTopology:
    """Join the others, from another process than rank 0."""
    import torch

    store = torch.distributed.TCPStore(HOST, worker_args.port, worker_args.world_size, is_master=False)
    store.set(_ready_key(worker_args.rank), "")
    return _create_topology(worker_args.rank, worker_args.world_size, store, on_gpu=worker_args.on_gpu, sharded=worker_args.sharded)


def _create_topology(rank: int, world_size: int, store: Any, *, on_gpu: bool, sharded: bool) -> ProcessTopology:
    """Become that process of a training; `store` is torch's, where they find each other."""
    import torch

    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    return ProcessTopology(rank, world_size, sharded, torch.distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT))


def make_distributed_arguments(world_size: int, gradient_accumulation_steps: int) -> dict[str, Any]:
    """What transformers' trainer is told where several processes share a step of so many batches."""
    if world_size == 1:
        return {"gradient_accumulation_steps": gradient_accumulation_steps}
    return {
        "gradient_accumulation_steps": gradient_accumulation_steps // world_size,
        "accelerator_config": {"even_batches": False},  # with rows that come a second time; `shared_batches` makes them even
        "ddp_find_unused_parameters": False,  # it would look in what the model returns, where our loss is not
        "ddp_broadcast_buffers": False,
    }


# --- the rows of a step ------------------------------------------------------------------------------------------------


class _PaddedRows:
    """Rows by their number, and None for the one after the last."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        return self._rows[number] if number < len(self._rows) else None


def shard_training_steps(trainer_class: type, task: "TrainingTask", topology: ProcessTopology) -> type:
    """A class of trainer that goes over its share of each step; the same class in one process."""
    if topology.world_size == 1:
        return trainer_class
    match task.loss_reduction:
        case "labels":
            return _reduce_by_labels(trainer_class, topology)
        case "batches":
            return _reduce_by_batches(trainer_class, task, topology)
        case "trainer":
            return _reduce_by_trainer(trainer_class, topology)


@contextmanager
def disable_metric_gathering(accelerator: Any) -> Generator[None]:
    """Inside, a figure is that of a process's own batch, as in one process, and not of as many as there are processes."""
    vars(accelerator).update(_NO_GATHER_OVERRIDES)
    try:
        yield
    finally:
        for name in _NO_GATHER_OVERRIDES:
            del vars(accelerator)[name]


def _reduce_by_labels(trainer_class: type, topology: ProcessTopology) -> type:
    """For a loss that is divided by the labels of a step, of which what fills it has none."""

    class Shared(trainer_class):
        def get_train_dataloader(self) -> Any:
            return make_distributed_dataloader(self, topology.world_size, mask_labels)

    return Shared


def _reduce_by_batches(trainer_class: type, task: "TrainingTask", topology: ProcessTopology) -> type:
    """For a loss that is the mean of those of a step's batches, and figures that are means over batches; what fills counts in neither."""

    class Shared(trainer_class):
        weight = 1.0  # of a batch: what is divided by the batches that the processes have is to be divided by those that count

        def create_accelerator_and_postprocess(self) -> None:
            """A figure is of a batch as in one process, and not of as many as there are processes: their rows may be fewer or none."""
            super().create_accelerator_and_postprocess()
            vars(self.accelerator).update(_NO_GATHER_OVERRIDES)

        def get_train_dataloader(self) -> Any:
            return make_distributed_dataloader(self, topology.world_size, as_padding_batch)

        def get_batch_samples(self, *which: Any) -> Any:
            batches, items = super().get_batch_samples(*which)
            (count,) = topology.all_reduce_sum(sum(PADDING_BATCH not in batch for batch in batches))
            self.weight = len(batches) * topology.world_size / count
            return batches, items

        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **how: Any) -> Any:
            if not self.model.training:
                return super().compute_loss(model, inputs, *rest, **how)
            if not inputs.pop(PADDING_BATCH, False):
                return super().compute_loss(model, inputs, *rest, **how) * self.weight
            gathered = task.logged_metrics_buffer(self)
            before = {name: list(values) for name, values in gathered.items()}
            loss = super().compute_loss(model, inputs, *rest, **how) * 0.0  # the gradients' average waits for every process
            gathered.clear()
            gathered.update(before)
            return loss

    return Shared


def _reduce_by_trainer(trainer_class: type, topology: ProcessTopology) -> type:
    """For a trainer that deals out the rows of a step, and divides its loss, by itself."""

    class Shared(trainer_class):
        def training_step(self, *batch: Any) -> Any:
            topology.startup_watchdog.stop()  # the processes have met when the model was wrapped; what they generate now may take long
            return super().training_step(*batch)

    return Shared


def make_distributed_dataloader(trainer: Any, world_size: int, make_padding_batch: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The library's loader of the batches that this process has to go over.

    They are those of a single process, dealt out in turn; where an epoch's last step has too few, somebody gets one that teaches nothing:
    what `fill` makes of a batch.
    """
    from torch.utils.data import BatchSampler, DataLoader

    rows, arguments = trainer.train_dataset, trainer.args

    class Batches(BatchSampler):
        """As many as can be dealt out evenly."""

        def __iter__(self) -> Iterator[list[int]]:
            yield from super().__iter__()
            yield from [[len(rows)]] * (len(self) - super().__len__())

        def __len__(self) -> int:
            return -(-super().__len__() // world_size) * world_size

    def collate(some: list[Any]) -> dict[str, Any]:
        return trainer.data_collator(some) if some[0] is not None else make_padding_batch(trainer.data_collator([rows[0]]))

    loader = DataLoader(
        _PaddedRows(rows),  # pyright: ignore[reportArgumentType]  # torch's class adds nothing to the protocol
        batch_sampler=Batches(trainer._get_train_sampler(rows), arguments.train_batch_size, drop_last=False),
        collate_fn=collate,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
    )
    return trainer.accelerator.prepare(loader)


def mask_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, with nothing to learn in it, and no tokens that count."""
    return batch | {"labels": batch["labels"].new_full(batch["labels"].shape, IGNORE_INDEX), "non_padding_tokens": 0}


def as_padding_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, marked as one that counts for nothing."""
    return batch | {PADDING_BATCH: True}


# --- the other processes -----------------------------------------------------------------------------------------------


@contextmanager
def worker_pool(
    training: "TrainingContext",
    worker_task_factory: "Callable[[TrainingContext], TrainingTask]",
    slots: DeviceSlots,
    resume_args: dict[str, Any],
) -> Generator[ProcessTopology]:
    """The crew of `places.most` processes, led from here. `told` is the rest of an Errand: how far the training is.

    Raises LostToMemory when another process ran out of memory or was killed, and LostProcess when it ended otherwise.
    """
    import torch

    processes = slots.max_world_size
    store = torch.distributed.TCPStore(HOST, 0, processes, is_master=True, wait_for_workers=False)
    context = training.context
    common = {
        "world_size": processes,
        "sharded": slots.sharded,
        "port": store.port,
        "on_gpu": training.device_config.on_gpu,
        "workdir": context.workdir,
        "attempt": context.attempt,
        "spec": context.spec,
        "worker_task_factory": worker_task_factory,
        "training": {name: value for name, value in vars(training).items() if name not in ("context", "resume_checkpoint")},
    }
    others = WorkerPool(processes, slots, store.port, f"{context.spec.job_id}.{context.attempt}")
    try:
        others.send(lambda rank: WorkerArgs(rank=rank, **common, **resume_args))
        others.wait_until_ready(store, context.check_stop)
        set_rank_environment(0, processes, store.port)
        crew = _create_topology(0, processes, store, on_gpu=training.device_config.on_gpu, sharded=slots.sharded)
        others.watch(crew.startup_watchdog, on_gpu=training.device_config.on_gpu)
        yield crew
    except (RuntimeError, MemoryError, BrokenPipeError, ValueError) as error:  # the last is torch's word for a group that was given up
        lost = None if is_out_of_memory(error) else others.find_failure()
        if lost is None:
            raise
        raise _read_worker_failure(context.workdir, processes) or lost from error
    finally:
        others.kill_all()
        _reset_distributed_state()


class WorkerPool:
    """The processes beside this one."""

    def __init__(self, world_size: int, slots: DeviceSlots, port: int, name: str) -> None:
        self._closing = threading.Event()
        self._timed_out = False
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(1, world_size):
            gpu = slots.gpus[rank] if slots.gpus else None
            self._workers[rank] = subprocess.Popen(
                [sys.executable, "-m", "jobs.llm.worker", "--name", f"{name}.{rank}"],
                env=worker_environment(rank, world_size, port, gpu),
                stdin=subprocess.PIPE,  # it ends when this is closed: nothing outlives rank 0
            )

    def send(self, make_worker_args: Callable[[int], WorkerArgs]) -> None:
        """Tell each what to do. Raises BrokenPipeError when one is gone."""
        for rank, child in self._workers.items():
            assert child.stdin is not None
            pickle.dump(make_worker_args(rank), child.stdin)
            child.stdin.flush()

    def wait_until_ready(self, store: Any, check_stop: Callable[[], None]) -> None:
        """Until all have loaded what they need. Raises RuntimeError when one is gone, and what `check` raises."""
        while not store.check([_ready_key(rank) for rank in self._workers]):
            check_stop()
            if self._failed_exit_codes():
                raise RuntimeError("a process of the training ended before it began")
            time.sleep(POLL_INTERVAL_S)

    def watch(self, startup_watchdog: StartupWatchdog, *, on_gpu: bool) -> None:
        """See to it that nobody waits for one that is gone. Sockets notice by themselves, a GPU's collectives do not."""
        if on_gpu:
            threading.Thread(target=self._monitor, args=(startup_watchdog,), name="worker-monitor", daemon=True).start()

    def find_failure(self, timeout_s: float = WORKER_EXIT_GRACE_S) -> WorkerOutOfMemory | WorkerFailed | None:
        """What to say of the others' end; None when all of them are at work, so that it is this process that failed."""
        if self._timed_out:
            return WorkerFailed("the first step was not taken in time")
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._root_cause_exit_codes():
            time.sleep(POLL_INTERVAL_S)
        codes = self._root_cause_exit_codes() or self._failed_exit_codes()
        return worker_error(codes) if codes else None

    def kill_all(self) -> None:
        """End them, at once."""
        self._closing.set()
        for child in self._workers.values():
            child.kill()
        for child in self._workers.values():
            with suppress(BrokenPipeError):  # what it never read
                child.communicate()

    def _failed_exit_codes(self) -> dict[int, int]:
        """Exit codes of those that ended before their time, by rank."""
        return {rank: code for rank, child in self._workers.items() if (code := child.poll())}

    def _root_cause_exit_codes(self) -> dict[int, int]:
        """Of these, the ones that did not only follow another."""
        return {rank: code for rank, code in self._failed_exit_codes().items() if code != EXIT_PEER_LOST}

    def _monitor(self, startup_watchdog: StartupWatchdog) -> None:
        while not self._failed_exit_codes() and not startup_watchdog.has_timed_out:
            if self._closing.wait(POLL_INTERVAL_S):
                return
        self._timed_out = not self._failed_exit_codes()
        log.error("a process of the training is gone, or waits for ever", extra={"exit_codes": str(self._failed_exit_codes())})
        _abort_collectives()
        if not self._closing.wait(ABORT_GRACE_S):
            log.error(
                "the GPU does not give this process back; ending, so that the next attempt goes on. JOB_PROCESSES=1 uses one GPU alone"
            )
            self.kill_all()
            os._exit(1)


def _ready_key(rank: int) -> str:
    """The name under which a process says that it is ready."""
    return f"ready-{rank}"


def worker_error(exit_codes: dict[int, int]) -> WorkerOutOfMemory | WorkerFailed:
    """What it means that processes ended like this. A kernel that has no memory left kills with SIGKILL."""
    short = [rank for rank, code in exit_codes.items() if code in (EXIT_OOM, -9)]
    if short:
        return WorkerOutOfMemory(f"process {short[0]} ran out of memory, or was killed")
    rank, code = next(iter(exit_codes.items()))
    return WorkerFailed(f"process {rank} of the training ended with code {code}; its traceback is in the log of the attempt")


def write_worker_failure(worker_args: WorkerArgs, error: JobFailed) -> None:
    """Let rank 0 say why this process cannot go on."""
    _failure_path(worker_args.workdir, worker_args.rank).write_text(error.failure.model_dump_json())


def _read_worker_failure(workdir: Path, world_size: int) -> JobFailed | None:
    """Why another process said that it cannot go on."""
    found = [path for rank in range(1, world_size) if (path := _failure_path(workdir, rank)).exists()]
    if not found:
        return None
    failure = Failure.model_validate_json(found[0].read_text())
    return JobFailed(failure.code, failure.message, failure.hint)


def _failure_path(workdir: Path, rank: int) -> Path:
    return workdir / f"failure-{rank}.json"


def _reset_distributed_state() -> None:
    """Be a single process again."""
    from accelerate.state import AcceleratorState, GradientState

    clear_rank_environment()
    _abort_collectives()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _abort_collectives() -> None:
    """Give up what goes on between the processes. An orderly goodbye would wait for those that are gone."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._abort_process_group()
