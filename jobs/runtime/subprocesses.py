"""The child processes of an attempt: run a program, exchange JSON with it, and kill all children.

A child may read files that somebody else wrote, such as a base model. So it gets `child_environment`, which holds no secret, and where
the system permits it no network either (`isolated_process.py`).
"""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import jobs
from jobs.runtime import isolated_process
from jobs.runtime.settings import child_environment
from schema.base import ForwardCompatible

log = logging.getLogger(__name__)

REPOSITORY = Path(jobs.__file__).parent.parent  # `python -m jobs...` runs from here, wherever the attempt's own folder is
MAX_MESSAGE_CHARACTERS = 300  # of the last line of a program's output, in an error message
MAX_LOGGED_CHARACTERS = 4000
POLL_S = 0.1  # between two looks at processes that run at the same time

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
    network, _ = _split_network_line(process.stdout.decode(errors="replace").strip())
    log.info("program ended", extra={"program": name, "code": code, "seconds": round(time.monotonic() - started, 2), "network": network})
    if code:
        _raise_failure(name, code, process.stdout)


def _raise_failure(name: str, code: int, raw_output: bytes) -> NoReturn:
    _, output = _split_network_line(raw_output.decode(errors="replace").strip())
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


def run_modules(
    name: str, module: str, argument_lists: Sequence[Sequence[str | Path]], folder: Path, check_stop: Callable[[], None]
) -> None:
    """Run `python -m module` once for each list of arguments, all at the same time, and wait until every one exits.

    Their output goes to files in `folder`. Raises SubprocessFailed for the first that fails, and what `check_stop` raises, which is called
    several times a second; the others are killed then.
    """
    outputs = [folder / f"{name}-{number}.log" for number in range(len(argument_lists))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for arguments, output in zip(argument_lists, outputs, strict=True):
            command = [sys.executable, "-I", isolated_process.__file__, sys.executable, "-m", module, *map(str, arguments)]
            with output.open("wb") as log_file:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=REPOSITORY,
                        env=child_environment(),
                        stdin=subprocess.DEVNULL,
                        stdout=log_file,
                        stderr=subprocess.STDOUT,
                    )
                )
        while True:
            for process, output in zip(processes, outputs, strict=True):
                if process.poll():
                    _raise_failure(name, process.returncode, output.read_bytes())
            if all(process.poll() == 0 for process in processes):
                return
            check_stop()
            time.sleep(POLL_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()


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
