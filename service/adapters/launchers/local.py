"""Attempts as child processes on this machine, each with its own environment and process group.

A service that is killed leaves its attempts running; the next service finds them by the name in their command line and adopts them. A
service that shuts down ends them, and their jobs return to the queue.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import cast, get_args

import psutil

from schema.training import TRAINER_TYPES
from schema.training.llm import Modality
from service.core.errors import LaunchFailed, Unavailable, Unsupported
from service.core.ports import ExecutionState, LaunchRequest, LogPage, RuntimeCapabilities

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 120  # importing torch from a cold disk
STOP_GRACE_S = 10.0  # to finish a step and save a checkpoint, as on Cloud Run


class LocalLauncher:
    """Child processes of `python -m jobs.run`, at most `max_concurrent_jobs` at a time. Handles are `pid@start time`."""

    name = "local"
    polling_is_free = True
    profiles: tuple[str, ...] = ("local",)

    def __init__(
        self,
        *,
        home: Path,
        python: Path,
        source: Path,
        service_url: str,
        max_concurrent_jobs: int,
        environment: Mapping[str, str],
        time_limit_s: float | None = None,
    ) -> None:
        self._folder = home / "attempts"
        self._python = python
        self._source = source
        self._service_url = service_url
        self._max_concurrent_jobs = max_concurrent_jobs
        self._inherited_environment = dict(environment)
        self._time_limit_s = time_limit_s
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._probe_lock = threading.Lock()  # concurrent requests probe the trainer's environment only once

    # --- Launcher ----------------------------------------------------------------------------------------------------

    def launch(self, launch_request: LaunchRequest) -> str:
        if not self._python.exists():
            raise LaunchFailed(f"the trainer's environment is missing: no {self._python}", hint="run `make setup`")
        workdir = self._folder / launch_request.name
        try:
            workdir.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._log_path(launch_request.name).open("ab") as output:
                child = subprocess.Popen(
                    [self._python, "-m", "jobs.run", "--name", launch_request.name],
                    cwd=self._source,
                    env=self._build_environment(launch_request, workdir),
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
        return handle

    def find_handle(self, name: str) -> str | None:
        return next((_process_handle(process) for process in self._running_attempts() if _attempt_name(process) == name), None)

    def check(self, handle: str) -> ExecutionState:
        process = self._find_process(handle)
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
        return self._max_concurrent_jobs - len(self._running_attempts())

    def get_capabilities(self, profile: str | None = None) -> RuntimeCapabilities:
        if profile not in (None, *self.profiles):
            raise Unsupported(f"no hardware {profile!r}; this deployment has: local", param="hardware")
        with self._probe_lock:
            return self._capabilities

    def close(self) -> None:
        """End all attempts, adopted ones included: SIGTERM, a grace period, then SIGKILL.

        The attempts of the next service continue from the checkpoints that these save.
        """
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

    # --- LogReader ---------------------------------------------------------------------------------------------------

    def read_log(self, name: str, offset: int, max_bytes: int) -> LogPage | None:
        try:
            with self._log_path(name).open("rb") as stream:
                stream.seek(offset)
                content = stream.read(max_bytes)
        except FileNotFoundError:
            return None
        content = _trim_partial_utf8(content)
        return LogPage(text=content.decode(errors="replace"), next_offset=offset + len(content))

    def delete_log(self, name: str) -> bool:
        """Delete the output of an attempt and its working folder."""
        folder = self._folder / name
        existed = self._log_path(name).exists()
        self._log_path(name).unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        return existed

    # --- helpers -----------------------------------------------------------------------------------------------------

    @cached_property
    def _capabilities(self) -> RuntimeCapabilities:
        """Probed once, in the trainer's environment, where the libraries are installed."""
        return capabilities_from_probe(self._probe())

    def _probe(self) -> dict[str, object]:
        try:
            answer = subprocess.run(
                [self._python, "-m", "jobs.llm.probe"],
                cwd=self._source,
                env={**self._inherited_environment, "PYTHONPATH": str(self._source)},
                capture_output=True,
                timeout=PROBE_TIMEOUT_S,
                check=True,
            )
            return json.loads(answer.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            log.error("probing the trainer's environment failed", extra={"python": str(self._python), "error": str(error)})
            raise Unavailable("the trainer's environment does not work, so nothing can be trained", hint="run `make setup`") from error

    def _build_environment(self, launch_request: LaunchRequest, workdir: Path) -> dict[str, str]:
        return {
            **_thread_environment(self._max_concurrent_jobs),
            "TOKENIZERS_PARALLELISM": "false",
            **self._inherited_environment,
            **launch_request.environment,
            "SERVICE_URL": self._service_url,
            "JOB_WORKDIR": str(workdir),
            **({"JOB_TIME_LIMIT_S": str(self._time_limit_s)} if self._time_limit_s is not None else {}),
            "JOB_REPORT_INTERVAL_S": "0.5",  # the answer to a report carries a cancel, and local reports cost nothing
            "PYTHONPATH": str(self._source),
            "PYTHONUNBUFFERED": "1",
        }

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


def capabilities_from_probe(probe_result: Mapping[str, object]) -> RuntimeCapabilities:
    """The capabilities of this machine, from the JSON of `python -m jobs.llm.probe`, with the reason for each missing one."""
    packages = probe_result.get("packages")
    installed = set(cast(Mapping[str, object], packages)) if isinstance(packages, dict) else set[str]()
    on_gpu, flash, gguf = probe_result.get("device") == "cuda", bool(probe_result.get("flash_attention_2")), bool(probe_result.get("gguf"))
    quantized, onnx, lm_eval = "bitsandbytes" in installed, "onnx" in installed, "lm_eval" in installed
    unsloth = on_gpu and "unsloth" in installed
    unsloth_note = "unsloth is not installed in the trainer's environment" if on_gpu else "unsloth needs a GPU"
    requirements = {
        "method": (quantized, "QLoRA needs bitsandbytes in the trainer's environment"),
        "provider": (unsloth, unsloth_note),
        "use_fa2": (flash, "FlashAttention 2 needs an Ampere or newer GPU, and the package flash-attn"),
        "include_gguf": (gguf, "`make setup` builds llama.cpp into the trainer's environment"),
        "include_lora_gguf": (gguf, "`make setup` builds llama.cpp into the trainer's environment"),
        "format": (onnx, "the ONNX exporter is not installed in the trainer's environment"),
        "lm_eval_tasks": (lm_eval, "install lm_eval in the trainer's environment"),
    }
    return RuntimeCapabilities(
        device=str(probe_result.get("device", "unknown")),
        device_name=str(probe_result.get("device_name", "unknown")),
        methods=("LoRA", "QLoRA", "Full") if quantized else ("LoRA", "Full"),
        providers=("huggingface", "unsloth") if unsloth else ("huggingface",),
        modalities=get_args(Modality),
        trainer_types=tuple(TRAINER_TYPES),
        flash_attention_2=flash,
        gguf=gguf,
        onnx=onnx,
        lm_eval=lm_eval,
        notes={field: note for field, (available, note) in requirements.items() if not available},
    )


def _thread_environment(max_concurrent_jobs: int) -> dict[str, str]:
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


def _trim_partial_utf8(content: bytes) -> bytes:
    """The content without a UTF-8 character that is cut at the end; the next page begins with it."""
    for cut in range(1, min(4, len(content)) + 1):
        lead = content[-cut]
        if lead & 0xC0 != 0x80:
            length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return content[:-cut] if length > cut else content
    return content
