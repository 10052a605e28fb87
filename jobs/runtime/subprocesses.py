"""The child processes of an attempt: run a program, exchange JSON with it, and kill all children.

A child may read files that somebody else wrote, such as a base model. So it gets `child_environment`, which holds no secret, and where
the system permits it no network either (`isolated_process.py`).
"""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jobs
from jobs.runtime import isolated_process
from jobs.runtime.settings import child_environment
from schema.base import ForwardCompatible

log = logging.getLogger(__name__)

REPOSITORY = Path(jobs.__file__).parent.parent  # `python -m jobs...` runs from here, wherever the attempt's own folder is
MAX_MESSAGE_CHARACTERS = 300  # of the last line of a program's output, in an error message
MAX_LOGGED_CHARACTERS = 4000

Response = TypeVar("Response", bound=ForwardCompatible)


class SubprocessFailed(Exception):
    """A program crashed or exited with an error; the message says how it ended and holds the last line of its output."""


def run_program(name: str, command: Sequence[str], cwd: Path = REPOSITORY, timeout_s: float | None = None) -> None:
    """Run a program without secrets and network, and wait until it exits. Raises SubprocessFailed unless it exits with code 0 in time.

    When an exception interrupts the wait, such as Stopped, `subprocess.run` kills the program.
    """
    started = time.monotonic()
    try:
        process = subprocess.run(
            [sys.executable, "-I", isolated_process.__file__, *command],  # by path, because the program may run in any folder
            cwd=cwd,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise SubprocessFailed(f"{name} took longer than {timeout_s:g} s") from error
    code = process.returncode
    output = process.stdout.decode(errors="replace").strip()
    network, output = _split_network_line(output)
    log.info("program ended", extra={"program": name, "code": code, "seconds": round(time.monotonic() - started, 2), "network": network})
    if code == 0:
        return
    log.error("program failed", extra={"program": name, "output": output[-MAX_LOGGED_CHARACTERS:]})
    ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    last_line = output.rpartition("\n")[2]
    raise SubprocessFailed(f"{name} {ending}: {last_line[-MAX_MESSAGE_CHARACTERS:]}")


def _split_network_line(output: str) -> tuple[str, str]:
    """Whether the child had a network, which it prints first, and the rest of its output."""
    first, _, rest = output.partition("\n")
    if not first.startswith(isolated_process.NETWORK_LINE):  # it was killed before
        return "unknown", output
    return first.removeprefix(isolated_process.NETWORK_LINE), rest


def run_module(name: str, module: str, *arguments: str | Path, timeout_s: float | None = None) -> None:
    """Run `python -m module` and wait until it exits. Raises SubprocessFailed."""
    run_program(name, [sys.executable, "-m", module, *map(str, arguments)], timeout_s=timeout_s)


def exchange_json(
    name: str,
    module: str,
    request: ForwardCompatible,
    response_type: type[Response],
    folder: Path,
    arguments: Sequence[str] = (),
    timeout_s: float | None = None,
) -> Response:
    """Run `python -m module *arguments REQUEST RESPONSE`, two JSON files in `folder`, and read the response. Raises SubprocessFailed."""
    request_path, response_path = folder / f"{name}-request.json", folder / f"{name}-response.json"
    request_path.write_text(request.model_dump_json())
    run_module(name, module, *arguments, request_path, response_path, timeout_s=timeout_s)
    return response_type.load(response_path.read_bytes())


def kill_children() -> None:
    """Kill every child process and its descendants, so that none outlives the attempt."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
