"""Ingestions as child processes: `python -m jobs.ingest` in the environment `data`, without secrets and network, with limits."""

import logging
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from schema.ingestion import IngestOutcome, IngestTask
from service.core.errors import InvalidRequest, TunesmithError, Unavailable
from service.core.ports import IngestTimeout
from service.setting_types import SOURCE_ROOT

log = logging.getLogger(__name__)

ISOLATION = SOURCE_ROOT / "jobs/runtime/isolated_process.py"  # replaces itself by a program without network
OUTCOME_FILE = "outcome.json"
MAX_LOGGED_CHARACTERS = 4000
# What a child may read of the service's environment: where programs and temporary files are, and how text is written.
INHERITED = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "TZ")


class ProcessIngester:
    """Runs each ingestion in a process of its own."""

    def __init__(self, *, python: Path, variables: Mapping[str, str], source: Path = SOURCE_ROOT) -> None:
        self._python = python
        self._source = source
        self._variables = {name: variables[name] for name in INHERITED if name in variables}

    def ingest(self, task: IngestTask, *, timeout_s: float | None = None) -> IngestOutcome:
        if not self._python.exists():
            message = f"this deployment cannot read datasets: there is no {self._python}"
            raise Unavailable(message, hint="the operator runs `make setup-data`, which installs what reads them")
        folder = Path(task.output)
        task_file = folder / "task.json"
        task_file.write_text(task.model_dump_json())
        try:
            done = subprocess.run(
                [self._python, "-I", ISOLATION, self._python, "-m", "jobs.ingest", task_file],
                cwd=self._source,
                env={**self._variables, "PYTHONPATH": str(self._source), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise IngestTimeout from error
        except OSError as error:
            raise Unavailable(f"cannot start a process: {error.strerror}") from error
        if done.returncode:
            raise _describe_failure(done.returncode, done.stderr.decode(errors="replace"), task.limits.max_memory_bytes)
        return IngestOutcome.load((folder / OUTCOME_FILE).read_bytes())


def _describe_failure(code: int, output: str, memory_bytes: int) -> TunesmithError:
    """The error for a process that ended without an outcome."""
    log.error("ingestion failed", extra={"code": code, "output": output[-MAX_LOGGED_CHARACTERS:]})
    if "MemoryError" in output or code in (-signal.SIGKILL, -signal.SIGABRT):
        message = f"reading the file takes more than the {memory_bytes >> 20:,} MiB of memory that one file may use"
        return InvalidRequest(message, hint="split it into several files, or save it as JSON lines", param="file")
    return Unavailable("the file could not be read because of an error in this deployment", hint="the operator finds it in the log")
