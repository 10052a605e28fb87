"""The child processes of an attempt: run a program, exchange JSON with it, and kill all children."""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jobs
from schema.base import ForwardCompatible

log = logging.getLogger(__name__)

REPOSITORY = Path(jobs.__file__).parent.parent  # `python -m jobs...` runs from here, wherever the attempt's own folder is
MAX_MESSAGE_CHARACTERS = 300  # of the last line of a program's output, in an error message
MAX_LOGGED_CHARACTERS = 4000

Response = TypeVar("Response", bound=ForwardCompatible)


class SubprocessFailed(Exception):
    """A program crashed or exited with an error; the message says how it ended and holds the last line of its output."""


def run_program(name: str, command: Sequence[str], cwd: Path = REPOSITORY) -> None:
    """Run a program and wait until it exits. Raises SubprocessFailed unless it exits with code 0.

    When an exception interrupts the wait, such as Stopped, `subprocess.run` kills the program.
    """
    started = time.monotonic()
    process = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    code = process.returncode
    log.info("program ended", extra={"program": name, "code": code, "seconds": round(time.monotonic() - started, 2)})
    if code == 0:
        return
    output = process.stdout.decode(errors="replace").strip()
    log.error("program failed", extra={"program": name, "output": output[-MAX_LOGGED_CHARACTERS:]})
    ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    last_line = output.rpartition("\n")[2]
    raise SubprocessFailed(f"{name} {ending}: {last_line[-MAX_MESSAGE_CHARACTERS:]}")


def run_module(name: str, module: str, *arguments: str | Path) -> None:
    """Run `python -m module` and wait until it exits. Raises SubprocessFailed."""
    run_program(name, [sys.executable, "-m", module, *map(str, arguments)])


def exchange_json(
    name: str, module: str, request: ForwardCompatible, response_type: type[Response], folder: Path, arguments: Sequence[str] = ()
) -> Response:
    """Run `python -m module *arguments REQUEST RESPONSE`, two JSON files in `folder`, and read the response. Raises SubprocessFailed."""
    request_path, response_path = folder / f"{name}-request.json", folder / f"{name}-response.json"
    request_path.write_text(request.model_dump_json())
    run_module(name, module, *arguments, request_path, response_path)
    return response_type.load(response_path.read_bytes())


def kill_children() -> None:
    """Kill every child process and its descendants, so that none outlives the attempt."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
