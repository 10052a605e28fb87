"""Start, watch and end the worker processes of a training on several GPUs.

    rank 0        the attempt's own process: it decides, evaluates, reports and saves; `worker_pool` starts the workers and ends them
    other ranks   `python -m jobs.llm.worker`: they load the same task, emit no events and follow rank 0

Workers never outlive rank 0: each ends when its stdin is closed.
"""

import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jobs.llm.distributed import FIRST_STEP_TIMEOUT_S, ProcessTopology, StartupWatchdog, create_store, create_topology
from jobs.llm.oom import is_out_of_memory
from jobs.llm.parallelism import DeviceSlots
from jobs.llm.training_context import TrainingContext, TrainingTask
from jobs.runtime.checkpoints import Checkpoints
from jobs.runtime.context import JobContext, Secrets, Stores
from jobs.runtime.errors import JobFailed
from jobs.runtime.save_policy import TrainingControlState
from jobs.runtime.settings import clear_rank_environment, set_rank_environment, worker_environment
from jobs.runtime.stop import NeverStop
from schema.events import Event
from schema.job import Failure, Progress
from schema.spec import JobSpec, StoreUrls
from schema.types import Phase

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.1
WORKER_EXIT_GRACE_S = 3.0  # from a worker's closed sockets to the exit code that tells why
ABORT_GRACE_S = 20.0  # for the main thread to return from an aborted GPU collective

RANK_ZERO_FIELDS = ("context", "resume_checkpoint")  # of TrainingContext: a worker has none, or its own

EXIT_OOM = 17  # exit code of a worker that ran out of memory
EXIT_PEER_LOST = 18  # exit code of a worker that lost the connection to another process


@dataclass(frozen=True)
class WorkerArgs:
    """What a worker process needs to take part in a training. Pickled to its stdin."""

    rank: int
    world_size: int
    sharded: bool
    store_folder: Path  # of the file in which the processes find each other
    on_gpu: bool
    workdir: Path
    attempt: int
    spec: JobSpec
    worker_task_factory: Callable[[TrainingContext], TrainingTask]
    training: dict[str, Any]  # the fields of TrainingContext by name, without those that only rank 0 has
    state: TrainingControlState
    total_steps: int
    checkpoint: Path | None


class WorkerOutOfMemory(MemoryError):
    """A worker process ran out of memory."""


class WorkerFailed(RuntimeError):
    """A worker process ended early, or the first step did not end in time."""


# --- rank 0 --------------------------------------------------------------------------------------------------------------


@contextmanager
def worker_pool(
    training: TrainingContext,
    worker_task_factory: Callable[[TrainingContext], TrainingTask],
    slots: DeviceSlots,
    resume_args: dict[str, Any],
) -> Generator[ProcessTopology]:
    """Start a worker for each slot but the first, and yield rank 0's topology. `resume_args` are the last three fields of WorkerArgs.

    Raises WorkerOutOfMemory when a worker ran out of memory or was killed, JobFailed when it reported why it failed, and WorkerFailed
    when it ended otherwise.
    """
    context, world_size, on_gpu = training.context, slots.max_world_size, training.device_config.on_gpu
    store_folder = Path(tempfile.mkdtemp(prefix="processes-", dir=context.workdir))  # only this user can open it
    store = create_store(store_folder, world_size)
    common = {
        "world_size": world_size,
        "sharded": slots.sharded,
        "store_folder": store_folder,
        "on_gpu": on_gpu,
        "workdir": context.workdir,
        "attempt": context.attempt,
        "spec": context.spec,
        "worker_task_factory": worker_task_factory,
        "training": {field.name: getattr(training, field.name) for field in fields(training) if field.name not in RANK_ZERO_FIELDS},
    }
    workers = WorkerPool(world_size, slots, f"{context.spec.job_id}.{context.attempt}")
    try:
        workers.send(lambda rank: WorkerArgs(rank=rank, **common, **resume_args))
        workers.wait_until_ready(store, context.check_stop)
        set_rank_environment(0, world_size)
        topology = create_topology(0, world_size, store, on_gpu=on_gpu, sharded=slots.sharded)
        if on_gpu:  # sockets notice a lost process by themselves, a GPU's collectives do not
            workers.monitor(topology.startup_watchdog)
        yield topology
    except (RuntimeError, MemoryError, BrokenPipeError, ValueError) as error:  # torch raises ValueError for an aborted process group
        worker_failure = None if is_out_of_memory(error) else workers.find_failure()
        if worker_failure is None:
            raise
        raise _read_worker_failure(context.workdir, world_size) or worker_failure from error
    finally:
        workers.kill_all()
        _reset_distributed_state()
        shutil.rmtree(store_folder, ignore_errors=True)


class WorkerPool:
    """The worker processes that this process started."""

    def __init__(self, world_size: int, slots: DeviceSlots, name: str) -> None:
        self._closing = threading.Event()
        self._timed_out = False
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(1, world_size):
            gpu = slots.gpus[rank] if slots.gpus else None
            self._workers[rank] = subprocess.Popen(
                [sys.executable, "-m", "jobs.llm.worker", "--name", f"{name}.{rank}"],
                env=worker_environment(rank, world_size, gpu),
                stdin=subprocess.PIPE,  # closed when rank 0 ends, which ends the worker
            )

    def send(self, make_worker_args: Callable[[int], WorkerArgs]) -> None:
        """Send each worker its arguments. Raises BrokenPipeError when a worker has ended."""
        for rank, worker in self._workers.items():
            assert worker.stdin is not None
            pickle.dump(make_worker_args(rank), worker.stdin)
            worker.stdin.flush()

    def wait_until_ready(self, store: Any, check_stop: Callable[[], None]) -> None:
        """Wait until every worker has loaded its task. Raises RuntimeError when one has ended, and what `check_stop` raises."""
        while not store.check([_ready_key(rank) for rank in self._workers]):
            check_stop()
            if self._failed_exit_codes():
                raise RuntimeError("a worker process ended before the training began")
            time.sleep(POLL_INTERVAL_S)

    def monitor(self, startup_watchdog: StartupWatchdog) -> None:
        """Abort the collectives when a worker ends early or the first step times out, so that no process waits forever."""
        threading.Thread(target=self._monitor, args=(startup_watchdog,), name="worker-monitor", daemon=True).start()

    def find_failure(self, timeout_s: float = WORKER_EXIT_GRACE_S) -> WorkerOutOfMemory | WorkerFailed | None:
        """Why the workers ended; None when all of them still run, so that this process is the one that failed."""
        if self._timed_out:
            return WorkerFailed(f"the first step did not end within {FIRST_STEP_TIMEOUT_S:.0f} s")
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._root_cause_exit_codes():
            time.sleep(POLL_INTERVAL_S)
        exit_codes = self._root_cause_exit_codes() or self._failed_exit_codes()
        return worker_error(exit_codes) if exit_codes else None

    def kill_all(self) -> None:
        """Kill every worker."""
        self._closing.set()
        for worker in self._workers.values():
            worker.kill()
        for worker in self._workers.values():
            with suppress(BrokenPipeError):  # from flushing arguments that it never read
                worker.communicate()

    def _failed_exit_codes(self) -> dict[int, int]:
        """Exit codes of the workers that ended early, by rank."""
        return {rank: exit_code for rank, worker in self._workers.items() if (exit_code := worker.poll())}

    def _root_cause_exit_codes(self) -> dict[int, int]:
        """The same, without workers that ended because another process did."""
        return {rank: exit_code for rank, exit_code in self._failed_exit_codes().items() if exit_code != EXIT_PEER_LOST}

    def _monitor(self, startup_watchdog: StartupWatchdog) -> None:
        while not self._failed_exit_codes() and not startup_watchdog.has_timed_out:
            if self._closing.wait(POLL_INTERVAL_S):
                return
        self._timed_out = not self._failed_exit_codes()
        log.error("a worker process ended early or hangs", extra={"exit_codes": str(self._failed_exit_codes())})
        _abort_collectives()
        if not self._closing.wait(ABORT_GRACE_S):
            log.error(
                "the GPU does not return from a collective; exiting so that the next attempt resumes. Set JOB_PROCESSES=1 for one GPU"
            )
            self.kill_all()
            os._exit(1)


def worker_error(exit_codes: dict[int, int]) -> WorkerOutOfMemory | WorkerFailed:
    """The error for workers that ended with these exit codes. SIGKILL counts as out of memory: the kernel's OOM killer sends it."""
    out_of_memory = [rank for rank, exit_code in exit_codes.items() if exit_code in (EXIT_OOM, -9)]
    if out_of_memory:
        return WorkerOutOfMemory(f"process {out_of_memory[0]} ran out of memory, or was killed")
    rank, exit_code = next(iter(exit_codes.items()))
    return WorkerFailed(f"process {rank} of the training ended with code {exit_code}; its traceback is in the log of the attempt")


def _read_worker_failure(workdir: Path, world_size: int) -> JobFailed | None:
    """The failure that a worker reported; None if none did."""
    for path in (_failure_path(workdir, rank) for rank in range(1, world_size)):
        if path.exists():
            failure = Failure.model_validate_json(path.read_text())
            return JobFailed(failure.code, failure.message, failure.hint)
    return None


def _reset_distributed_state() -> None:
    """Reset this process to training alone."""
    from accelerate.state import AcceleratorState, GradientState

    clear_rank_environment()
    _abort_collectives()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _abort_collectives() -> None:
    """Abort pending collectives. An orderly shutdown would wait for processes that have ended."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._abort_process_group()


# --- workers -------------------------------------------------------------------------------------------------------------


def join_process_group(worker_args: WorkerArgs) -> ProcessTopology:
    """Tell rank 0 that this worker is ready, and join the process group."""
    store = create_store(worker_args.store_folder, worker_args.world_size)
    store.set(_ready_key(worker_args.rank), "")
    return create_topology(worker_args.rank, worker_args.world_size, store, on_gpu=worker_args.on_gpu, sharded=worker_args.sharded)


def write_worker_failure(worker_args: WorkerArgs, error: JobFailed) -> None:
    """Report to rank 0 why this worker failed."""
    _failure_path(worker_args.workdir, worker_args.rank).write_text(error.failure.model_dump_json())


def null_context(worker_args: WorkerArgs) -> JobContext:
    """A JobContext that emits no events, is never stopped and stores nothing outside the worker's folder."""
    folder = worker_args.workdir / f"rank-{worker_args.rank}"
    stores = Stores(StoreUrls.model_validate(dict.fromkeys(StoreUrls.model_fields, folder.as_uri())))
    checkpoints = Checkpoints(
        store=stores.models, spec=worker_args.spec, attempt=worker_args.attempt, folder=folder, save_total_limit=1, emit=lambda _: None
    )
    return JobContext(
        worker_args.spec, worker_args.attempt, worker_args.workdir, Secrets({}), stores, _NullEventSink(), NeverStop(), checkpoints
    )


class _NullEventSink:
    """Drops all events: rank 0 reports them."""

    def report(self, event: Event) -> None:
        pass

    def set_progress(self, *, phase: Phase | None = None, progress: Progress | None = None) -> None:
        pass


def _ready_key(rank: int) -> str:
    """The key in the store that a worker sets when it is ready."""
    return f"ready-{rank}"


def _failure_path(workdir: Path, rank: int) -> Path:
    return workdir / f"failure-{rank}.json"
