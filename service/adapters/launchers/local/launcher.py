"""Attempts as child processes on this machine, each with its own environment and process group.

A service that is killed leaves its attempts running; the next service finds them by the name in their command line and adopts them. A
service that shuts down ends them, and their jobs return to the queue.
"""

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Self

import psutil

from schema.capabilities import EnvironmentManifest
from schema.training import IngestConfig
from service.adapters.launchers import LauncherDeployment
from service.adapters.launchers.local.attempt_limits import AttemptLimits, AttemptWatcher, default_memory_limit
from service.adapters.launchers.local.device import detect_profile
from service.adapters.launchers.local.environments import LocalEnvironments
from service.adapters.launchers.local.settings import LocalSettings
from service.attempt_socket import find_attempt_socket
from service.core.errors import LaunchFailed, Unavailable
from service.core.limits import Limits
from service.core.ports import ExecutionState, ExitReason, LaunchRequest, LogPage, Profile
from service.setting_types import SOURCE_ROOT

HANDLE = re.compile(r"\d+@[\d.]+")
STOP_GRACE_S = 10.0  # to finish a step and save a checkpoint, as on Cloud Run


class LocalLauncher:
    """Child processes of `python -m jobs.run`, at most `max_concurrent_jobs` at a time, besides `max_concurrent_ingestions` that make
    datasets. Handles are `pid@start time`."""

    name = "local"
    polling_is_free = True
    limits = Limits()

    def __init__(
        self,
        *,
        home: Path,
        environments: LocalEnvironments,
        source: Path,
        service_url: str,
        max_concurrent_jobs: int,
        max_concurrent_ingestions: int = 1,
        variables: Mapping[str, str],
        time_limit_s: int | None = None,
        attempt_limits: AttemptLimits | None = None,
    ) -> None:
        self._home = home
        self._folder = home / "attempts"
        self._environments = environments
        self._source = source
        self._service_url = service_url
        self._max_concurrent_jobs = max_concurrent_jobs
        self._max_concurrent_ingestions = max_concurrent_ingestions
        self._inherited_variables = dict(variables)
        self._time_limit_s = time_limit_s
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._watcher = AttemptWatcher(attempt_limits, self._find_process) if attempt_limits else None

    @classmethod
    def from_environment(cls, deployment: LauncherDeployment) -> Self:
        """The launcher with the settings in the environment. Raises ValueError for a setting that is not valid."""
        settings = LocalSettings()  # pyright: ignore[reportCallIssue]  # pydantic fills them from the environment
        return cls(
            home=deployment.home,
            environments=LocalEnvironments(
                environments=settings.environments, venvs=settings.venvs, source=SOURCE_ROOT, variables=deployment.variables
            ),
            source=SOURCE_ROOT,
            service_url=deployment.service_url,
            max_concurrent_jobs=settings.max_concurrent_jobs,
            max_concurrent_ingestions=settings.max_concurrent_ingestions,
            variables=deployment.variables,
            time_limit_s=settings.time_limit_s,
            attempt_limits=AttemptLimits(
                memory_bytes=settings.memory_limit_bytes or default_memory_limit(), processes=settings.max_processes
            ),
        )

    # --- Launcher ----------------------------------------------------------------------------------------------------

    @cached_property
    def profiles(self) -> Mapping[str, Profile]:
        return {self.name: detect_profile(self.name, self._time_limit_s)}

    def list_environments(self) -> Mapping[str, EnvironmentManifest]:
        return self._environments.list_installed()

    def launch(self, launch_request: LaunchRequest) -> str:
        python = self._environments.python_of(launch_request.environment)
        if not python.exists():
            hint = f"run `make setup-{launch_request.environment}`"
            raise LaunchFailed(f"the environment {launch_request.environment!r} is missing: no {python}", hint=hint)
        workdir = self._folder / launch_request.name
        try:
            workdir.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._log_path(launch_request.name).open("ab") as output:
                child = subprocess.Popen(
                    [python, "-m", "jobs.run", "--name", launch_request.name],
                    cwd=self._source,
                    env=self._build_variables(launch_request, workdir),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise Unavailable(f"cannot start a process: {error.strerror}") from error
        handle = _process_handle(psutil.Process(child.pid))
        with self._lock:
            self._children[handle] = child
        self._watch(handle)
        return handle

    def find_handle(self, name: str) -> str | None:
        return next((_process_handle(process) for process in self._running_attempts() if _attempt_name(process) == name), None)

    def check(self, handle: str) -> ExecutionState:
        process = self._find_process(handle)
        if not process and not HANDLE.fullmatch(handle):
            return "unknown"  # not one of this launcher's
        if process:
            self._watch(handle)  # an earlier service may have launched it
        return "running" if process else "ended"

    def cancel(self, handle: str, *, force: bool) -> None:
        """Send SIGINT. SIGTERM means preemption: the attempt would save a checkpoint before it ends."""
        process = self._find_process(handle)
        if process is None:
            return
        if force:
            _kill_group(process.pid)
        else:
            _send_signal(process.pid, signal.SIGINT)

    def count_free_slots(self, active_jobs: int) -> int:  # noqa: ARG002
        """Counts the processes: one that is ending still uses memory."""
        self._reap()
        return self._max_concurrent_jobs - sum(not self._is_ingestion(process) for process in self._running_attempts())

    def ping(self) -> None:
        self._environments.list_installed()

    def close(self) -> None:
        """End all attempts, adopted ones included: SIGTERM, a grace period, then SIGKILL.

        The attempts of the next service continue from the checkpoints that these save.
        """
        if self._watcher:
            self._watcher.stop()
        attempts = self._running_attempts()
        for process in attempts:
            _send_signal(process.pid, signal.SIGTERM)
        _, still_running = psutil.wait_procs(attempts, timeout=STOP_GRACE_S)
        for process in still_running:
            _kill_group(process.pid)
        psutil.wait_procs(still_running, timeout=STOP_GRACE_S)
        for child in list(self._children.values()):  # includes children that are just ending
            with suppress(subprocess.TimeoutExpired):
                child.wait(STOP_GRACE_S)
        self._reap()

    # --- AttemptOwner ------------------------------------------------------------------------------------------------

    def count_attempts(self) -> int:
        return len(self._running_attempts())

    # --- SlotReserver ------------------------------------------------------------------------------------------------

    reserved_environments = (IngestConfig.environment,)

    def count_free_reserved_slots(self, environment: str) -> int:  # noqa: ARG002  # there is one
        self._reap()
        return self._max_concurrent_ingestions - sum(map(self._is_ingestion, self._running_attempts()))

    # --- ExitReasonReader --------------------------------------------------------------------------------------------

    def get_exit_reason(self, handle: str) -> ExitReason | None:
        """The limit for which this launcher ended the attempt, if it did."""
        failure = self._watcher.find_failure(handle) if self._watcher else None
        return ExitReason(failure) if failure else None

    # --- LogReader ---------------------------------------------------------------------------------------------------

    def read_log(self, name: str, offset: int, max_bytes: int, *, whole_lines: bool = False) -> LogPage | None:
        try:
            with self._log_path(name).open("rb") as stream:
                stream.seek(offset)
                content = stream.read(max_bytes)
        except FileNotFoundError:
            return None
        content = _trim_partial_utf8(content)
        if whole_lines:
            content = content[: content.rfind(b"\n") + 1] or content
        return LogPage(text=content.decode(errors="replace"), next_offset=offset + len(content))

    def find_log_tail(self, name: str, lines: int, max_bytes: int) -> int | None:
        try:
            with self._log_path(name).open("rb") as stream:
                size_bytes = stream.seek(0, os.SEEK_END)
                start = stream.seek(max(0, size_bytes - max_bytes))
                content = stream.read(size_bytes - start)
        except FileNotFoundError:
            return None
        return start + _find_tail(content, lines, is_cut=start > 0)

    def delete_log(self, name: str) -> bool:
        """Delete the output of an attempt and its working folder."""
        folder = self._folder / name
        existed = self._log_path(name).exists()
        self._log_path(name).unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        return existed

    # --- LogMeter ----------------------------------------------------------------------------------------------------

    def measure_logs(self, job_id: str) -> int:
        own = re.compile(rf"{re.escape(job_id)}\.\d+(\.log)?")  # an id may have a dot too
        attempts = [path for path in self._folder.glob(f"{job_id}.*") if own.fullmatch(path.name)]
        return sum(_size_of(path) for attempt in attempts for path in (attempt, *attempt.rglob("*")))

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _build_variables(self, launch_request: LaunchRequest, workdir: Path) -> dict[str, str]:
        attempt_socket = find_attempt_socket(self._home)
        return {
            **_thread_variables(self._max_concurrent_jobs),
            "TOKENIZERS_PARALLELISM": "false",
            **self._inherited_variables,
            **launch_request.variables,
            "SERVICE_URL": self._service_url,
            **({"JOB_SERVICE_SOCKET": str(attempt_socket)} if attempt_socket else {}),
            "JOB_WORKDIR": str(workdir),
            **({"JOB_TIME_LIMIT_S": str(self._time_limit_s)} if self._time_limit_s is not None else {}),
            "JOB_REPORT_INTERVAL_S": "0.5",  # the answer to a report carries a cancel, and local reports cost nothing
            "PYTHONPATH": str(self._source),
            "PYTHONUNBUFFERED": "1",
        }

    def _watch(self, handle: str) -> None:
        if self._watcher:
            self._watcher.watch(handle)

    def _log_path(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _running_attempts(self) -> list[psutil.Process]:
        """The running attempts of this home, whichever service launched them."""
        return [process for process in psutil.process_iter() if self._is_own_attempt(process)]

    def _is_own_attempt(self, process: psutil.Process) -> bool:
        """Whether an attempt belongs to this home. Another home may have one of the same name, in another working folder."""
        name = _attempt_name(process)
        try:
            return name is not None and process.environ().get("JOB_WORKDIR") == str(self._folder / name)
        except psutil.Error:
            return False

    def _is_ingestion(self, process: psutil.Process) -> bool:
        """Whether an attempt makes a dataset, which the Python in its command line tells."""
        try:
            return process.cmdline()[:1] == [str(self._environments.python_of(IngestConfig.environment))]
        except psutil.Error:
            return False

    def _reap(self) -> None:
        """Forget children that have ended."""
        with self._lock:
            self._children = {handle: child for handle, child in self._children.items() if child.poll() is None}

    def _find_process(self, handle: str) -> psutil.Process | None:
        """The process of a handle, if that process is still running."""
        with self._lock:
            child = self._children.get(handle)
        if child is not None and child.poll() is not None:
            return None
        try:
            process = psutil.Process(int(handle.partition("@")[0]))
            alive = _process_handle(process) == handle and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError):  # ValueError: a handle of another launcher
            return None
        return process if alive else None


def _thread_variables(max_concurrent_jobs: int) -> dict[str, str]:
    """The variables that limit an attempt's threads to its share of the cores.

    Threads wait passively: spinning threads slow down when another process needs their core (measured: 1 s a step became 27 s).
    """
    share = max(1, len(os.sched_getaffinity(0)) // max_concurrent_jobs)
    return {"OMP_NUM_THREADS": str(share), "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def _attempt_name(process: psutil.Process) -> str | None:
    """The attempt that a process runs, if its command is `python -m jobs.run --name NAME`."""
    try:
        command = process.cmdline()
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.Error:
        return None
    return command[4] if command[1:4] == ["-m", "jobs.run", "--name"] and len(command) == 5 else None


def _process_handle(process: psutil.Process) -> str:
    return f"{process.pid}@{process.create_time():.2f}"


def _send_signal(pid: int, signal_number: signal.Signals) -> None:
    """Signal only the attempt: it ends its own children, and would report one that ended first as a failure."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _size_of(path: Path) -> int:
    """Bytes of a file; 0 for anything else, such as a link to a base model, and for a file that was just deleted."""
    try:
        stat = path.lstat()
    except FileNotFoundError:
        return 0
    return stat.st_size if S_ISREG(stat.st_mode) else 0


def _find_tail(content: bytes, lines: int, *, is_cut: bool) -> int:
    """Where the last lines begin. The first line of cut content is left out, unless it is the only one."""
    end = len(content.removesuffix(b"\n"))  # the end of the last line begins no other one
    for _ in range(lines):
        end = content.rfind(b"\n", 0, end)
        if end < 0:
            break
    if end >= 0 or not is_cut:
        return end + 1
    first_whole = content.find(b"\n", 0, len(content) - 1) + 1
    return first_whole or len(content) - len(content.lstrip(bytes(range(0x80, 0xC0))))  # not inside a character


def _trim_partial_utf8(content: bytes) -> bytes:
    """The content without a UTF-8 character that is cut at the end; the next page begins with it."""
    for cut in range(1, min(4, len(content)) + 1):
        lead = content[-cut]
        if lead & 0xC0 != 0x80:
            length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return content[:-cut] if length > cut else content
    return content
