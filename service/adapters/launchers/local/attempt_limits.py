"""Ends attempts that take too much of the machine: more memory, or more processes, than the operator allows.

The kernel's own limits do not fit: a limit of the address space breaks CUDA and memory-mapped weights, one of processes counts all
processes of the user, and a cgroup needs rights that a laptop's service does not have. So a thread looks at the processes of each
attempt every second. The processes are those that descend from the attempt and those in its session, which orphans stay in.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from schema.job import Failure

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0  # a hostile chat template takes 0.3 GB a second
DEFAULT_MEMORY_SHARE = 0.9  # of the machine's memory, where no limit is set
HELD_MEMORY = ("Pss_Anon:", "Pss_Shmem:", "SwapPss:")  # in /proc/PID/smaps_rollup; pages of mapped files can be dropped


@dataclass(frozen=True)
class AttemptLimits:
    """What one attempt may take."""

    memory_bytes: int
    processes: int


def default_memory_limit() -> int:
    """A share of the machine's memory, or of the container's if that has less."""
    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # no cgroup v2, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return int(total * DEFAULT_MEMORY_SHARE)


class AttemptWatcher:
    """A thread that ends the attempts that exceed their limits, and remembers why."""

    def __init__(self, limits: AttemptLimits, find_process: Callable[[str], psutil.Process | None]) -> None:
        self._limits = limits
        self._find_process = find_process
        self._handles: set[str] = set()
        self._failures: dict[str, Failure] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, handle: str) -> None:
        """Watch an attempt until it ends. Can be repeated."""
        with self._lock:
            self._handles.add(handle)
            if self._thread is None and not self._stopping.is_set():
                self._thread = threading.Thread(target=self._run, name="attempt-limits", daemon=True)
                self._thread.start()

    def find_failure(self, handle: str) -> Failure | None:
        """Why the attempt was ended; None if it was not."""
        return self._failures.get(handle)

    def stop(self) -> None:
        """Stop watching."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(CHECK_INTERVAL_S):
            with self._lock:
                handles = set(self._handles)
            for handle in handles:
                self._check(handle)

    def _check(self, handle: str) -> None:
        process = self._find_process(handle)
        if process is None:
            with self._lock:
                self._handles.discard(handle)
            return
        members = list_members(process)
        failure = check_limits(members, self._limits)
        if failure is None:
            return
        log.warning("attempt exceeds its limits", extra={"handle": handle, "error": failure.message})
        self._failures[handle] = failure
        for member in members.values():
            _kill(member)
        for member in list_members(process).values():  # started meanwhile
            _kill(member)


def list_members(process: psutil.Process) -> Mapping[int, psutil.Process]:
    """The processes of an attempt by their ids: itself, its descendants, and the members of its session."""
    members = {process.pid: process}
    with suppress(psutil.Error):
        members |= {child.pid: child for child in process.children(recursive=True)}
    for pid in psutil.pids():
        try:
            if pid not in members and os.getsid(pid) == process.pid:
                members[pid] = psutil.Process(pid)
        except (OSError, psutil.Error):
            continue
    return members


def check_limits(members: Mapping[int, psutil.Process], limits: AttemptLimits) -> Failure | None:
    """The failure of an attempt that exceeds its limits; None for one that keeps them."""
    if len(members) > limits.processes:
        return Failure(
            code="internal",
            message=f"the attempt was ended because it had {len(members)} processes; the limit is {limits.processes}",
            hint="the operator can raise TUNESMITH_LOCAL_MAX_PROCESSES",
        )
    # The resident size is cheap to read but counts shared pages once for each process, and those of mapped files.
    if sum(map(_read_resident_bytes, members.values())) <= limits.memory_bytes:
        return None
    held_bytes = sum(map(_read_held_bytes, members.values()))
    if held_bytes <= limits.memory_bytes:
        return None
    held, limit = (f"{size / 1e9:.1f} GB" for size in (held_bytes, limits.memory_bytes))
    return Failure(
        code="out_of_memory",
        message=f"the attempt was ended because it held {held} of memory; the limit is {limit}",
        hint="try a smaller batch_size, max_seq_length or base model; the operator can raise TUNESMITH_LOCAL_MEMORY_LIMIT_BYTES",
    )


def _read_resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _read_held_bytes(process: psutil.Process) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return _read_resident_bytes(process)
    return sum(int(line.split()[1]) for line in lines if line.startswith(HELD_MEMORY)) << 10


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        return
