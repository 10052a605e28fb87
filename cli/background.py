"""A service in the background: `train` starts one on this machine if none runs, `stop` ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import typer

from cli.connection import Connection
from cli.errors import ApiError, CliError
from cli.options import JsonOption, create_client
from cli.output import err, print_answer
from cli.settings import Settings

IDLE_LIMIT_S = 1800  # without a job and without a request, the service ends itself
START_TIMEOUT_S, STOP_TIMEOUT_S, POLL_S = 60.0, 120.0, 0.1  # attempts write a checkpoint before they end
SHOWN_LOG_LINES = 3


def ensure_service(context: typer.Context, settings: Settings) -> None:
    """Start a service in the background if none runs in TUNESMITH_HOME and the caller named no other."""
    connection: object = context.obj
    if not isinstance(connection, Connection) or connection.is_named or settings.service_pid is not None:
        return
    log = settings.home_folder / "service.log"
    _start(settings, log)
    context.find_root().obj = context.obj = Connection.choose(None, connection.api_key, connection.identity_token)
    message = f"started a service at {settings.service_url}, which logs to {log}; `tunesmith stop` ends it"
    err.print(message, style="dim", highlight=False, soft_wrap=True)


def _start(settings: Settings, log: Path) -> None:
    """Start a process that outlives this one, and wait until its service answers. Raises CliError with the end of its log."""
    settings.home_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # -P: do not import a package named `service` from the current directory.
    command = [sys.executable, "-P", "-m", "service", "--port", "0", "--exit-when-idle", str(IDLE_LIMIT_S)]
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    deadline = time.monotonic() + START_TIMEOUT_S
    while settings.service_pid is None:
        if process.poll() is not None or time.monotonic() > deadline:
            printed = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
            raise CliError("the service did not start:\n" + "\n".join(printed[-SHOWN_LOG_LINES:]), f"its log is {log}")
        time.sleep(POLL_S)


def stop(context: typer.Context, as_json: JsonOption = False) -> None:
    """Stop the service of TUNESMITH_HOME. Running attempts are saved, and continue when a service starts again."""
    settings = Settings.from_environment()
    pid = settings.service_pid
    if pid is None or not _is_service(pid):
        raise CliError(f"no service runs in {settings.home_folder}", "`tunesmith serve` starts one")
    unfinished = _count_unfinished(context)
    os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while settings.service_pid == pid:
        if time.monotonic() > deadline:
            raise CliError(f"the service (process {pid}) has not ended after {STOP_TIMEOUT_S:.0f} s", f"kill {pid} ends it at once")
        time.sleep(POLL_S)
    jobs = "1 unfinished job continues" if unfinished == 1 else f"{unfinished} unfinished jobs continue"
    continued = f"; {jobs} at its next start" if unfinished else ""
    print_answer({"stopped": True, "pid": pid, "unfinished_jobs": unfinished}, as_json, f"stopped{continued}")


def _is_service(pid: int) -> bool:
    """Whether the process is a service: after a crash, another process may have the number that the service wrote down."""
    try:
        return "service" in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def _count_unfinished(context: typer.Context) -> int | None:
    """How many jobs wait or run; None if the service does not tell."""
    try:
        with create_client(context) as client:
            counts: dict[str, int] = client.get("/jobs", limit=1, counts="true")["counts"]
    except (ApiError, KeyError):
        return None
    return sum(counts.get(status, 0) for status in ("queued", "preparing", "training", "pausing", "cancelling"))
