"""A training on several GPUs of one machine: one process for each, all of which go over their share of each step, and hold the model or,
where it is too large, a part of it (sharded.py).

    rank 0     the attempt's own process: it decides, measures, tells, saves; `together` starts the others and ends them whatever happens
    the rest   `python -m jobs.rank`: the same lesson and weights, and no voice; they do at each step what rank 0 says

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

from jobs.checkpoints import Checkpoints
from jobs.context import JobContext, Secrets, Stores
from jobs.data.render import NO_LABEL
from jobs.errors import JobFailed
from jobs.settings import be_alone, be_rank, environment_of_rank, gpus_shown, most_processes
from jobs.system_metrics import nvidia_gpus
from jobs.trainers.healing import BatchPlan, is_out_of_memory
from jobs.trainers.saving import TrainingState
from schema.events import Event
from schema.job import Failure, Phase, Progress
from schema.spec import JobSpec, StoreUrls

if TYPE_CHECKING:
    from jobs.trainers.loop import Ground, Lesson

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
LONGEST = timedelta(days=7)  # a measurement in rank 0 may take as long as it likes; a process that is gone is noticed otherwise
LOOK_S = 0.1
LOST_S = 3.0  # until a process whose sockets are closed has ended, and its exit code says why
FIRST_STEP_S = 900.0  # until the first step is taken; where a GPU's collectives do not work, they often hang
STUCK_S = 20.0  # until a main thread comes back from a GPU's collective that was given up

OUT_OF_MEMORY = 17  # how another process ends when its memory runs out,
LEFT_ALONE = 18  # and when the others are gone

# What counts the same in the loss of an optimizer step: each label of it, or each batch; or the library's trainer sees to it that the
# loss is that of all rows, and deals them out itself.
Evenly = Literal["labels", "batches", "as the library does"]
_AS_IN_ONE_PROCESS: dict[str, Any] = dict.fromkeys(("gather", "gather_for_metrics", "reduce"), lambda part, *_, **__: part)
FILLS = "fills"  # marks a batch that is there so that a process has one, where an epoch's last step has too few


@dataclass(frozen=True)
class Places:
    """Where processes may run: on so many, and on which GPUs, as CUDA names them; none on a processor. Whether they divide the model."""

    most: int
    gpus: tuple[str, ...] = ()
    sharded: bool = False


@dataclass(frozen=True)
class Choice:
    """How many processes train, and why; `idle` says what keeps the other places from being used."""

    processes: int
    why: str
    idle: str = ""


@dataclass(frozen=True)
class Errand:
    """What another process is told to do."""

    rank: int
    processes: int
    sharded: bool
    port: int
    on_gpu: bool
    workdir: Path
    attempt: int
    spec: JobSpec
    recipe: "Callable[[Ground], Lesson]"
    ground: dict[str, Any]  # the fields of Ground by name, without what only rank 0 has
    state: TrainingState
    total_steps: int
    checkpoint: Path | None


class LostToMemory(MemoryError):
    """Another process of the training ran out of memory."""


class LostProcess(RuntimeError):
    """Another process of the training ended before its time, or none of them got anywhere."""


def look_for_places(*, on_gpu: bool) -> Places:
    """What this machine offers: each of its GPUs; on a processor one, or as many processes as the deployment says."""
    most = most_processes()
    if not on_gpu:
        return Places(most or 1)
    found = nvidia_gpus()
    gpus = gpus_shown(len(found.names) if found else 1)
    return Places(min(most or len(gpus), len(gpus)) or 1, gpus)


def choose(plan: BatchPlan, items: int, most: int) -> Choice:
    """The most processes among which the batches of an optimizer step can be shared evenly; an epoch goes over `items`."""
    accumulated = plan.gradient_accumulation_steps
    batches = -(-items // plan.batch_size)
    processes = max(count for count in range(1, most + 1) if accumulated % count == 0 and count <= batches)
    why = f"there is room for {most}, and each goes over {accumulated // processes} of the {accumulated} batches of an optimizer step"
    if processes == most:
        return Choice(processes, why)
    if batches < most:
        return Choice(processes, why, f"an epoch has only {batches} batches")
    hint = f"make it a multiple of {most}, with a smaller batch_size if a step is to have as many rows"
    return Choice(processes, why, f"gradient_accumulation_steps {accumulated} cannot be shared among more; {hint}")


# --- what the processes say to each other ------------------------------------------------------------------------------


class FirstStep:
    """Whether the processes come to work together at all."""

    def __init__(self, patience_s: float = FIRST_STEP_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s, self._clock = patience_s, clock
        self._due: float | None = None

    def begins(self) -> None:
        """All are ready for it."""
        self._due = self._clock() + self._patience_s

    def is_done(self) -> None:
        """From here on a step may take as long as it likes."""
        self._due = None

    @property
    def is_late(self) -> bool:
        """It began, and nothing came of it."""
        return self._due is not None and self._clock() > self._due


@dataclass(frozen=True)
class Crew:
    """The processes of a training, seen from one of them. Alone, it agrees with itself."""

    rank: int = 0
    processes: int = 1
    sharded: bool = False  # each holds a part of the model only
    group: Any = None  # sockets, also where gradients go from GPU to GPU
    first_step: FirstStep = field(default_factory=FirstStep)

    @property
    def leads(self) -> bool:
        """This is the attempt's own process."""
        return self.rank == 0

    def meet(self) -> None:
        """Wait for all."""
        if self.processes > 1:
            import torch

            torch.distributed.barrier(group=self.group)

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """What rank 0 wishes."""
        if self.processes == 1:
            return wishes
        import torch

        told = torch.tensor([int(wish) for wish in wishes], dtype=torch.uint8)
        torch.distributed.broadcast(told, src=0, group=self.group)
        return tuple(bool(wish) for wish in told.tolist())

    def tell(self, word: Any) -> Any:
        """What rank 0 says; what the others would say does not count."""
        if self.processes == 1:
            return word
        import torch

        told = [word]
        torch.distributed.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def total(self, *values: float) -> tuple[float, ...]:
        """The sums over all processes."""
        if self.processes == 1:
            return values
        import torch

        summed = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(summed, group=self.group)
        return tuple(summed.tolist())

    def bring_home(self, gathered: MutableMapping[str, list[float]]) -> None:
        """Let rank 0 have what all have gathered, and the others nothing."""
        if self.processes == 1:
            return
        import torch

        found: list[Any] = [None] * self.processes
        torch.distributed.gather_object({} if self.leads else dict(gathered), found if self.leads else None, group=self.group)
        if not self.leads:
            gathered.clear()
            return
        for name, values in ((name, values) for of_one in found for name, values in of_one.items()):
            gathered.setdefault(name, []).extend(values)

    def differ(self, seed: int) -> None:
        """Draw other random numbers than the other processes: they have other rows, and are not to drop out the same parts."""
        if self.rank:
            import torch

            torch.manual_seed(seed + self.rank)

    def random_states(self) -> list[dict[str, Any]]:
        """Where everybody's random numbers are, as transformers' trainer loads it; for rank 0 alone, and empty in one process."""
        if self.processes == 1:
            return []
        import torch

        found: list[Any] = [None] * self.processes
        torch.distributed.gather_object(random_state(), found if self.leads else None, group=self.group)
        return found if self.leads else []


ALONE = Crew()


def random_state() -> dict[str, Any]:
    """Where this process's random numbers are."""
    import random

    import numpy as np
    import torch

    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all()
    return state


def save_random_states(folder: Path, states: Sequence[dict[str, Any]]) -> None:
    """Beside the other files of a checkpoint, under the names by which transformers' trainer finds them."""
    import torch

    for rank, state in enumerate(states):
        torch.save(state, folder / f"rng_state_{rank}.pth")


def quiet_context(errand: Errand) -> JobContext:
    """An attempt from inside, for a process that has nothing to say, nobody to hear and no store."""
    folder = errand.workdir / f"rank-{errand.rank}"
    stores = Stores(StoreUrls.model_validate(dict.fromkeys(StoreUrls.model_fields, folder.as_uri())))
    checkpoints = Checkpoints(store=stores.models, spec=errand.spec, attempt=errand.attempt, folder=folder, keep=1, tell=lambda _: None)
    return JobContext(errand.spec, errand.attempt, errand.workdir, Secrets({}), stores, _Silence(), _Undisturbed(), checkpoints)


class _Silence:
    """A voice that says nothing: rank 0 does."""

    def report(self, event: Event) -> None:
        pass

    def place(self, *, phase: Phase | None = None, progress: Progress | None = None) -> None:
        pass


class _Undisturbed:
    """Nobody asks this process to stop: rank 0 tells it, or ends it."""

    wanted = None

    def check(self) -> None:
        pass

    def politely(self) -> AbstractContextManager[None]:
        return nullcontext()

    def time_left_s(self) -> float | None:
        return None


def arrive(errand: Errand) -> Crew:
    """Join the others, from another process than rank 0."""
    import torch

    store = torch.distributed.TCPStore(HOST, errand.port, errand.processes, is_master=False)
    store.set(_ready(errand.rank), "")
    return _join(errand.rank, errand.processes, store, on_gpu=errand.on_gpu, sharded=errand.sharded)


def _join(rank: int, processes: int, store: Any, *, on_gpu: bool, sharded: bool) -> Crew:
    """Become that process of a training; `store` is torch's, where they find each other."""
    import torch

    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=LONGEST)
    return Crew(rank, processes, sharded, torch.distributed.new_group(backend="gloo", timeout=LONGEST))


def arguments_for(processes: int, accumulated: int) -> dict[str, Any]:
    """What transformers' trainer is told where several processes share a step of so many batches."""
    if processes == 1:
        return {"gradient_accumulation_steps": accumulated}
    return {
        "gradient_accumulation_steps": accumulated // processes,
        "accelerator_config": {"even_batches": False},  # with rows that come a second time; `shared_batches` makes them even
        "ddp_find_unused_parameters": False,  # it would look in what the model returns, where our loss is not
        "ddp_broadcast_buffers": False,
    }


# --- the rows of a step ------------------------------------------------------------------------------------------------


class _Rows:
    """Rows by their number, and None for the one after the last."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        return self._rows[number] if number < len(self._rows) else None


def shared(kind: type, lesson: "Lesson", crew: Crew) -> type:
    """A class of trainer that goes over its share of each step; the same class in one process."""
    if crew.processes == 1:
        return kind
    match lesson.shares:
        case "labels":
            return _by_labels(kind, crew)
        case "batches":
            return _by_batches(kind, lesson, crew)
        case "as the library does":
            return _by_itself(kind, crew)


@contextmanager
def figures_of_a_batch(accelerator: Any) -> Generator[None]:
    """Inside, a figure is that of a process's own batch, as in one process, and not of as many as there are processes."""
    vars(accelerator).update(_AS_IN_ONE_PROCESS)
    try:
        yield
    finally:
        for name in _AS_IN_ONE_PROCESS:
            del vars(accelerator)[name]


def _by_labels(kind: type, crew: Crew) -> type:
    """For a loss that is divided by the labels of a step, of which what fills it has none."""

    class Shared(kind):
        def get_train_dataloader(self) -> Any:
            return shared_batches(self, crew.processes, unlabelled)

    return Shared


def _by_batches(kind: type, lesson: "Lesson", crew: Crew) -> type:
    """For a loss that is the mean of those of a step's batches, and figures that are means over batches; what fills counts in neither."""

    class Shared(kind):
        weight = 1.0  # of a batch: what is divided by the batches that the processes have is to be divided by those that count

        def create_accelerator_and_postprocess(self) -> None:
            """A figure is of a batch as in one process, and not of as many as there are processes: their rows may be fewer or none."""
            super().create_accelerator_and_postprocess()
            vars(self.accelerator).update(_AS_IN_ONE_PROCESS)

        def get_train_dataloader(self) -> Any:
            return shared_batches(self, crew.processes, filling)

        def get_batch_samples(self, *which: Any) -> Any:
            batches, items = super().get_batch_samples(*which)
            (count,) = crew.total(sum(FILLS not in batch for batch in batches))
            self.weight = len(batches) * crew.processes / count
            return batches, items

        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **how: Any) -> Any:
            if not self.model.training:
                return super().compute_loss(model, inputs, *rest, **how)
            if not inputs.pop(FILLS, False):
                return super().compute_loss(model, inputs, *rest, **how) * self.weight
            gathered = lesson.window(self)
            before = {name: list(values) for name, values in gathered.items()}
            loss = super().compute_loss(model, inputs, *rest, **how) * 0.0  # the gradients' average waits for every process
            gathered.clear()
            gathered.update(before)
            return loss

    return Shared


def _by_itself(kind: type, crew: Crew) -> type:
    """For a trainer that deals out the rows of a step, and divides its loss, by itself."""

    class Shared(kind):
        def training_step(self, *batch: Any) -> Any:
            crew.first_step.is_done()  # the processes have met when the model was wrapped; what they generate now may take long
            return super().training_step(*batch)

    return Shared


def shared_batches(trainer: Any, processes: int, fill: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
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
            return -(-super().__len__() // processes) * processes

    def collate(some: list[Any]) -> dict[str, Any]:
        return trainer.data_collator(some) if some[0] is not None else fill(trainer.data_collator([rows[0]]))

    loader = DataLoader(
        _Rows(rows),  # pyright: ignore[reportArgumentType]  # torch's class adds nothing to the protocol
        batch_sampler=Batches(trainer._get_train_sampler(rows), arguments.train_batch_size, drop_last=False),
        collate_fn=collate,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
    )
    return trainer.accelerator.prepare(loader)


def unlabelled(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, with nothing to learn in it, and no tokens that count."""
    return batch | {"labels": batch["labels"].new_full(batch["labels"].shape, NO_LABEL), "real_tokens": 0}


def filling(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, marked as one that counts for nothing."""
    return batch | {FILLS: True}


# --- the other processes -----------------------------------------------------------------------------------------------


@contextmanager
def together(ground: "Ground", recipe: "Callable[[Ground], Lesson]", places: Places, told: dict[str, Any]) -> Generator[Crew]:
    """The crew of `places.most` processes, led from here. `told` is the rest of an Errand: how far the training is.

    Raises LostToMemory when another process ran out of memory or was killed, and LostProcess when it ended otherwise.
    """
    import torch

    processes = places.most
    store = torch.distributed.TCPStore(HOST, 0, processes, is_master=True, wait_for_workers=False)
    context = ground.context
    common = {
        "processes": processes,
        "sharded": places.sharded,
        "port": store.port,
        "on_gpu": ground.machine.on_gpu,
        "workdir": context.workdir,
        "attempt": context.attempt,
        "spec": context.spec,
        "recipe": recipe,
        "ground": {name: value for name, value in vars(ground).items() if name not in ("context", "restored")},
    }
    others = Others(processes, places, store.port, f"{context.spec.job_id}.{context.attempt}")
    try:
        others.send(lambda rank: Errand(rank=rank, **common, **told))
        others.wait_until_ready(store, context.check)
        be_rank(0, processes, store.port)
        crew = _join(0, processes, store, on_gpu=ground.machine.on_gpu, sharded=places.sharded)
        others.watch(crew.first_step, on_gpu=ground.machine.on_gpu)
        yield crew
    except (RuntimeError, MemoryError, BrokenPipeError, ValueError) as error:  # the last is torch's word for a group that was given up
        lost = None if is_out_of_memory(error) else others.why_lost()
        if lost is None:
            raise
        raise _word_left(context.workdir, processes) or lost from error
    finally:
        others.end()
        _leave()


class Others:
    """The processes beside this one."""

    def __init__(self, processes: int, places: Places, port: int, name: str) -> None:
        self._ending = threading.Event()
        self._gave_up = False
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(1, processes):
            gpu = places.gpus[rank] if places.gpus else None
            self._children[rank] = subprocess.Popen(
                [sys.executable, "-m", "jobs.rank", "--name", f"{name}.{rank}"],
                env=environment_of_rank(rank, processes, port, gpu),
                stdin=subprocess.PIPE,  # it ends when this is closed: nothing outlives rank 0
            )

    def send(self, errand: Callable[[int], Errand]) -> None:
        """Tell each what to do. Raises BrokenPipeError when one is gone."""
        for rank, child in self._children.items():
            assert child.stdin is not None
            pickle.dump(errand(rank), child.stdin)
            child.stdin.flush()

    def wait_until_ready(self, store: Any, check: Callable[[], None]) -> None:
        """Until all have loaded what they need. Raises RuntimeError when one is gone, and what `check` raises."""
        while not store.check([_ready(rank) for rank in self._children]):
            check()
            if self._ended():
                raise RuntimeError("a process of the training ended before it began")
            time.sleep(LOOK_S)

    def watch(self, first_step: FirstStep, *, on_gpu: bool) -> None:
        """See to it that nobody waits for one that is gone. Sockets notice by themselves, a GPU's collectives do not."""
        if on_gpu:
            threading.Thread(target=self._watch, args=(first_step,), name="other-processes", daemon=True).start()

    def why_lost(self, patience_s: float = LOST_S) -> LostToMemory | LostProcess | None:
        """What to say of the others' end; None when all of them are at work, so that it is this process that failed."""
        if self._gave_up:
            return LostProcess("the first step was not taken in time")
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and not self._causes():
            time.sleep(LOOK_S)
        codes = self._causes() or self._ended()
        return verdict(codes) if codes else None

    def end(self) -> None:
        """End them, at once."""
        self._ending.set()
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            with suppress(BrokenPipeError):  # what it never read
                child.communicate()

    def _ended(self) -> dict[int, int]:
        """Exit codes of those that ended before their time, by rank."""
        return {rank: code for rank, child in self._children.items() if (code := child.poll())}

    def _causes(self) -> dict[int, int]:
        """Of these, the ones that did not only follow another."""
        return {rank: code for rank, code in self._ended().items() if code != LEFT_ALONE}

    def _watch(self, first_step: FirstStep) -> None:
        while not self._ended() and not first_step.is_late:
            if self._ending.wait(LOOK_S):
                return
        self._gave_up = not self._ended()
        log.error("a process of the training is gone, or waits for ever", extra={"exit_codes": str(self._ended())})
        _abort()
        if not self._ending.wait(STUCK_S):
            log.error(
                "the GPU does not give this process back; ending, so that the next attempt goes on. JOB_PROCESSES=1 uses one GPU alone"
            )
            self.end()
            os._exit(1)


def _ready(rank: int) -> str:
    """The name under which a process says that it is ready."""
    return f"ready-{rank}"


def verdict(codes: dict[int, int]) -> LostToMemory | LostProcess:
    """What it means that processes ended like this. A kernel that has no memory left kills with SIGKILL."""
    short = [rank for rank, code in codes.items() if code in (OUT_OF_MEMORY, -9)]
    if short:
        return LostToMemory(f"process {short[0]} ran out of memory, or was killed")
    rank, code = next(iter(codes.items()))
    return LostProcess(f"process {rank} of the training ended with code {code}; its traceback is in the log of the attempt")


def leave_word(errand: Errand, failed: JobFailed) -> None:
    """Let rank 0 say why this process cannot go on."""
    _word(errand.workdir, errand.rank).write_text(failed.failure.model_dump_json())


def _word_left(workdir: Path, processes: int) -> JobFailed | None:
    """Why another process said that it cannot go on."""
    found = [path for rank in range(1, processes) if (path := _word(workdir, rank)).exists()]
    if not found:
        return None
    failure = Failure.model_validate_json(found[0].read_text())
    return JobFailed(failure.code, failure.message, failure.hint)


def _word(workdir: Path, rank: int) -> Path:
    return workdir / f"failure-{rank}.json"


def _leave() -> None:
    """Be a single process again."""
    from accelerate.state import AcceleratorState, GradientState

    be_alone()
    _abort()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _abort() -> None:
    """Give up what goes on between the processes. An orderly goodbye would wait for those that are gone."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._abort_process_group()
