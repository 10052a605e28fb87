"""Ingestions as child processes: `python -m jobs.ingest` in the environment `data`, without secrets and network, with limits."""

import logging
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from schema.base import ForwardCompatible
from schema.ingestion import OUT_OF_MEMORY_TEXTS, IngestOutcome, IngestTask, TokenLengthsOutcome, TokenLengthsTask
from service.core.datasets.ports import IngestTimeout
from service.core.errors import DiskFull, InvalidRequest, TunesmithError, Unavailable
from service.setting_types import SOURCE_ROOT

log = logging.getLogger(__name__)

ISOLATION = SOURCE_ROOT / "jobs/runtime/isolated_process.py"  # replaces itself by a program without network
TASK_FILE, OUTCOME_FILE, LENGTHS_FILE = "task.json", "outcome.json", "token_lengths.json"
MAX_LOGGED_CHARACTERS = 4000
# What a child may read of the service's environment: where programs and temporary files are, and how text is written.
INHERITED = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "TZ")
DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large")  # as strerror() says it


class ProcessIngester:
    """Runs each ingestion in a process of its own."""

    def __init__(self, *, python: Path, variables: Mapping[str, str], source: Path = SOURCE_ROOT) -> None:
        self._python = python
        self._source = source
        self._variables = {name: variables[name] for name in INHERITED if name in variables}

    def ingest(self, task: IngestTask, *, timeout_s: float | None = None) -> IngestOutcome:
        self._run("jobs.ingest", task, Path(task.output), task.limits.max_memory_bytes, timeout_s)
        return IngestOutcome.load((Path(task.output) / OUTCOME_FILE).read_bytes())

    def count_tokens(self, task: TokenLengthsTask, *, timeout_s: float | None = None) -> TokenLengthsOutcome:
        self._run("jobs.ingest.token_lengths", task, Path(task.output), task.limits.max_memory_bytes, timeout_s)
        return TokenLengthsOutcome.load((Path(task.output) / LENGTHS_FILE).read_bytes())

    def _run(self, module: str, task: ForwardCompatible, folder: Path, memory_bytes: int, timeout_s: float | None) -> None:
        """Run a module until it has written its outcome. Raises IngestTimeout, InvalidRequest, DiskFull, Unavailable."""
        if not self._python.exists():
            message = f"this deployment cannot read datasets: there is no {self._python}"
            raise Unavailable(message, hint="the operator runs `make setup-data`, which installs what reads them")
        task_file = folder / TASK_FILE
        task_file.write_text(task.model_dump_json())
        try:
            process = subprocess.Popen(
                [self._python, "-I", ISOLATION, self._python, "-m", module, task_file],
                cwd=self._source,
                env={**self._variables, "PYTHONPATH": str(self._source), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise Unavailable(f"cannot start a process: {error.strerror}") from error
        with process:
            try:
                _, output = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                raise IngestTimeout from error
            finally:
                _end_group(process)
        if process.returncode:
            raise _describe_failure(process.returncode, output.decode(errors="replace"), memory_bytes)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End the process and the workers that it started, if any are left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _describe_failure(code: int, output: str, memory_bytes: int) -> TunesmithError:
    """The error for a process that ended without an outcome."""
    log.error("ingestion failed", extra={"code": code, "output": output[-MAX_LOGGED_CHARACTERS:]})
    if any(text in output for text in DISK_FULL):
        return DiskFull("the disk is full", hint="free some space where the service keeps its files")
    if code == -signal.SIGKILL or any(text in output for text in OUT_OF_MEMORY_TEXTS):
        message = f"reading the file takes more than the {memory_bytes >> 20:,} MiB of memory that one file may use"
        return InvalidRequest(message, hint="split it into several files, or save it as JSON lines", param="file")
    return Unavailable("the file could not be read because of an error in this deployment", hint="the operator finds it in the log")
