"""Servers as child processes on loopback, among them the service as a user starts it, and their time and memory."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import psutil

from bench.http import Connection, Request, request_json

SOURCE = Path(__file__).resolve().parent.parent
TUNESMITH = Path(sys.executable).with_name("tunesmith")
STOP_TIMEOUT_S = 20
START_TIMEOUT_S = 120
HEALTH_POLL_S = 0.005
HEALTH = Request("GET", "/health")
ROWS = b"".join(
    b'{"messages": [{"role": "user", "content": "what is %d"}, {"role": "assistant", "content": "it is %d"}]}\n' % (n, n) for n in range(60)
)


class ServerUnavailable(Exception):
    """A server cannot be measured: it was not installed, did not start or did not work. The message is the reason."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: psutil.Process
    home: Path
    ready_s: float  # from its start to the first 200 of its health endpoint

    def rss_mb(self) -> float:
        """Memory of the server and its workers, in megabytes."""
        return sum(process.memory_info().rss for process in self.processes()) / 1e6

    def cpu_s(self) -> float:
        """CPU time that the server and its workers have used."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        """The server and its workers, without the attempts that it launched, which have their own process groups."""
        return [self.process, *(child for child in self.process.children(recursive=True) if _process_group(child.pid) == self.process.pid)]


def make_environment(home: Path, **variables: str) -> dict[str, str]:
    """The environment of a server: a few variables of this process, and those given."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "SSL_CERT_FILE") if name in os.environ}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


@asynccontextmanager
async def run_server(
    command: Sequence[str | Path], home: Path, variables: dict[str, str], port: int, health: Request
) -> AsyncGenerator[Server]:
    """Run a server for the length of the block; yields it once it is healthy. Raises ServerUnavailable."""
    url = f"http://127.0.0.1:{port}"
    log = home / "server.log"
    with log.open("ab") as output:
        started_at = time.perf_counter()
        process = psutil.Popen(
            command, cwd=home, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        try:
            ready_s = await _wait_until_healthy(url, health, process, started_at)
        except ServerUnavailable as error:
            raise ServerUnavailable(
                f"{Path(command[0]).name} did not start: {error}; the last line of its log: {_last_line(log)}"
            ) from error
        yield Server(url, process, home, ready_s)
    finally:
        _stop(process)


@asynccontextmanager
async def run_service(
    home: Path, trainer: Mapping[str, str], slots: int = 1, settings: Mapping[str, str] = MappingProxyType({})
) -> AsyncGenerator[Server]:
    """Run `tunesmith serve` with this home, the settings of a trainer, number of slots and these settings; others are the defaults."""
    home.mkdir(parents=True, exist_ok=True)
    port = find_free_port()
    variables = make_environment(home, TUNESMITH_HOME=str(home), TUNESMITH_LOCAL_MAX_CONCURRENT_JOBS=str(slots), **trainer, **settings)
    async with run_server([TUNESMITH, "serve", "--port", str(port)], home, variables, port, HEALTH) as server:
        token = (home / "token").read_text()
        yield replace(server, url=server.url.replace("://", f"://{token}@"))


async def upload_dataset(server: Server) -> str:
    """Upload a small dataset; returns its id."""
    boundary = "bench"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'.encode()
    body = head + ROWS + f"\r\n--{boundary}--\r\n".encode()
    request = Request("POST", "/datasets", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    return (await request_json(server.url, request))["processed_dataset_id"]


def find_free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _process_group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


async def _wait_until_healthy(url: str, health: Request, process: psutil.Popen, started_at: float) -> float:
    """Seconds from `started_at` until the first 200. Ignores the body, which not every server sends as JSON."""
    while time.perf_counter() - started_at < START_TIMEOUT_S:
        if process.poll() is not None:
            raise ServerUnavailable(f"it exited with {process.returncode} before it was ready")
        connection = Connection(url)
        try:
            if (await connection.send(health)).status == 200:
                return time.perf_counter() - started_at
        except (OSError, EOFError):
            pass  # not yet
        finally:
            connection.close()
        await asyncio.sleep(HEALTH_POLL_S)
    raise ServerUnavailable(f"it was not ready after {START_TIMEOUT_S} s")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def _stop(process: psutil.Popen) -> None:
    """Terminate the server, then kill what is left of its children."""
    processes = [process, *(process.children(recursive=True) if process.is_running() else [])]
    with suppress(psutil.NoSuchProcess):  # it ended by itself
        process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
    for survivor in alive:
        survivor.kill()
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
