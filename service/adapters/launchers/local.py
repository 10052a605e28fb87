"""Attempts as child processes on this machine, each in an environment and a process group of its own.

A service that is killed leaves its attempts running; the next one finds them by the name in their command
line and adopts them. A service that is stopped in good order ends them, and their jobs go back to the queue.
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
from schema.types import Modality
from service.core.errors import LaunchFailed, Unavailable, Unsupported
from service.core.ports import ExecutionState, LaunchRequest, LogPage, RuntimeCapabilities

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 120  # importing torch from a cold disk
STOP_GRACE_S = 10.0  # to finish a step and save it, as on Cloud Run


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
        self._inherited = dict(environment)
        self._time_limit_s = time_limit_s
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._probe_lock = threading.Lock()  # two requests at once ask the trainer's environment once

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
        """Told by SIGINT; SIGTERM means that the compute is taken away, and an attempt would save before it ends."""
        process = self._find_process(handle)
        if process is None:
            return
        if force:
            _kill_group(process.pid)
        else:
            _send_signal(process.pid, signal.SIGINT)

    def count_free_slots(self, active_jobs: int) -> int:  # noqa: ARG002
        """Counted among the processes: one that is dying still takes memory."""
        self._reap()
        return self._max_concurrent_jobs - len(self._running_attempts())

    def get_capabilities(self, profile: str | None = None) -> RuntimeCapabilities:
        if profile not in (None, *self.profiles):
            raise Unsupported(f"no hardware {profile!r}; this deployment has: local", param="hardware")
        with self._probe_lock:
            return self._capabilities

    def close(self) -> None:
        """End the attempts in good order, adopted ones too: each is told, then waited for, then made to. Nothing is left behind.

        What they save, the next service's attempts go on from.
        """
        ours = self._running_attempts()
        for process in ours:
            _send_signal(process.pid, signal.SIGTERM)
        _, stubborn = psutil.wait_procs(ours, timeout=STOP_GRACE_S)
        for process in stubborn:
            _kill_group(process.pid)
        psutil.wait_procs(stubborn, timeout=STOP_GRACE_S)
        for child in list(self._children.values()):  # also one that ends just now, and is no attempt any more
            with suppress(subprocess.TimeoutExpired):
                child.wait(STOP_GRACE_S)
        self._reap()

    # --- LogSource ---------------------------------------------------------------------------------------------------

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
        """Remove the output of an attempt with its working folder."""
        folder = self._folder / name
        there = self._log_path(name).exists()
        self._log_path(name).unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        return there

    # --- helpers -----------------------------------------------------------------------------------------------------

    @cached_property
    def _capabilities(self) -> RuntimeCapabilities:
        """Asked of the trainer's environment once: only there can the libraries tell."""
        return capabilities_from_probe(self._probe())

    def _probe(self) -> dict[str, object]:
        try:
            answer = subprocess.run(
                [self._python, "-m", "jobs.llm.probe"],
                cwd=self._source,
                env={**self._inherited, "PYTHONPATH": str(self._source)},
                capture_output=True,
                timeout=PROBE_TIMEOUT_S,
                check=True,
            )
            return json.loads(answer.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            log.error("the trainer's environment does not work", extra={"python": str(self._python), "error": str(error)})
            raise Unavailable("the trainer's environment does not work; nothing can be trained", hint="run `make setup`") from error

    def _build_environment(self, launch_request: LaunchRequest, workdir: Path) -> dict[str, str]:
        return {
            **_thread_environment(self._max_concurrent_jobs),
            "TOKENIZERS_PARALLELISM": "false",
            **self._inherited,
            **launch_request.environment,
            "SERVICE_URL": self._service_url,
            "JOB_WORKDIR": str(workdir),
            **({"JOB_TIME_LIMIT_S": str(self._time_limit_s)} if self._time_limit_s is not None else {}),
            "JOB_REPORT_INTERVAL_S": "0.5",  # the answer to a report is how a cancel arrives, and reports cost nothing here
            "PYTHONPATH": str(self._source),
            "PYTHONUNBUFFERED": "1",
        }

    def _log_path(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _running_attempts(self) -> list[psutil.Process]:
        """The attempts of this home that are at work, whoever launched them."""
        return [process for process in psutil.process_iter() if self._is_own_attempt(process)]

    def _is_own_attempt(self, process: psutil.Process) -> bool:
        """Another home on this machine may have an attempt of the same name: the working folder tells them apart."""
        name = _attempt_name(process)
        try:
            return name is not None and process.environ().get("JOB_WORKDIR") == str(self._folder / name)
        except psutil.Error:
            return False

    def _reap(self) -> None:
        """Let children that have ended go."""
        with self._lock:
            self._children = {handle: child for handle, child in self._children.items() if child.poll() is None}

    def _find_process(self, handle: str) -> psutil.Process | None:
        """The process behind a handle, if it still is that process and still works."""
        with self._lock:
            child = self._children.get(handle)
        if child is not None and child.poll() is not None:
            return None
        try:
            process = psutil.Process(int(handle.partition("@")[0]))
            alive = _process_handle(process) == handle and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError):  # the second is a handle of another launcher
            return None
        return process if alive else None


def capabilities_from_probe(probe_result: Mapping[str, object]) -> RuntimeCapabilities:
    """What an attempt can do here, of what `python -m jobs.llm.probe` told; and why not, where it cannot."""
    packages = probe_result.get("packages")
    installed = set(cast(Mapping[str, object], packages)) if isinstance(packages, dict) else set[str]()
    on_gpu, flash, gguf = probe_result.get("device") == "cuda", bool(probe_result.get("flash_attention_2")), bool(probe_result.get("gguf"))
    quantized, onnx, lm_eval = ("bitsandbytes" in installed, "onnx" in installed, "lm_eval" in installed)
    unsloth = on_gpu and "unsloth" in installed
    why_not_unsloth = "unsloth is not installed in the trainer's environment" if on_gpu else "unsloth needs a GPU"
    missing = {
        "method": (quantized, "QLoRA needs bitsandbytes in the trainer's environment"),
        "provider": (unsloth, why_not_unsloth),
        "use_fa2": (flash, "FlashAttention 2 needs an Ampere or newer GPU, and the package flash-attn"),
        "include_gguf": (gguf, "`make setup` builds llama.cpp into the trainer's environment"),
        "include_lora_gguf": (gguf, "`make setup` builds llama.cpp into the trainer's environment"),
        "format": (onnx, "the exporter of ONNX is not installed in the trainer's environment"),
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
        notes={field: why for field, (there, why) in missing.items() if not there},
    )


def _thread_environment(max_concurrent_jobs: int) -> dict[str, str]:
    """How an attempt shares the processor.

    Spinning threads collapse when another process takes their core (measured: 1 s a step became 27 s), so
    threads wait passively, and each attempt takes its share of the cores.
    """
    share = max(1, len(os.sched_getaffinity(0)) // max_concurrent_jobs)
    return {"OMP_NUM_THREADS": str(share), "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def _attempt_name(process: psutil.Process) -> str | None:
    """The attempt that a process works at, if it is one of `python -m jobs.run --name NAME`."""
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
    """To the attempt alone: it ends its own children, and would take one that died first for a failure."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _trim_partial_utf8(content: bytes) -> bytes:
    """Without a UTF-8 character that was cut at the end: the next page begins with it."""
    for cut in range(1, min(4, len(content)) + 1):
        lead = content[-cut]
        if lead & 0xC0 != 0x80:
            length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return content[:-cut] if length > cut else content
    return content
