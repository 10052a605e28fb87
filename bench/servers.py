"""Servers as child processes on loopback: the service as a user starts it, and what measuring needs to know of it."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
    """A server did not start or did not work; says why."""


@dataclass(frozen=True)
class Server:
    """A server at work."""

    url: str
    process: psutil.Process
    home: Path
    ready_s: float  # from its start to the first 200

    def rss_mb(self) -> float:
        """Memory of the server and of the workers that it is made of, in megabytes."""
        return sum(process.memory_info().rss for process in self.processes()) / 1e6

    def cpu_s(self) -> float:
        """Processor time that it has used."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        """The server and its workers; not the attempts that it has launched, which have groups of their own."""
        return [self.process, *(child for child in self.process.children(recursive=True) if _process_group(child.pid) == self.process.pid)]


def make_environment(home: Path, **more: str) -> dict[str, str]:
    """What a server sees of this process's environment: where programs are, and little else."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "SSL_CERT_FILE") if name in os.environ}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


@asynccontextmanager
async def run_server(
    command: Sequence[str | Path], home: Path, variables: dict[str, str], port: int, health: Request
) -> AsyncGenerator[Server]:
    """A server until the end of the block, once it is healthy. Raises ServerDown."""
    url = f"http://127.0.0.1:{port}"
    log = home / "server.log"
    with log.open("ab") as output:
        began = time.perf_counter()
        process = psutil.Popen(
            command, cwd=home, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        try:
            ready_s = await _wait_until_healthy(url, health, process, began)
        except ServerUnavailable as error:
            raise ServerUnavailable(f"{Path(command[0]).name} did not start: {error}; the end of its log: {_log_tail(log)}") from error
        yield Server(url, process, home, ready_s)
    finally:
        _stop(process)


@asynccontextmanager
async def run_service(
    home: Path, trainer_python: Path, slots: int = 1, settings: Mapping[str, str] = MappingProxyType({})
) -> AsyncGenerator[Server]:
    """`tunesmith serve` in a home, with its default settings but for where it trains and what is named."""
    home.mkdir(parents=True, exist_ok=True)
    port = find_free_port()
    variables = make_environment(
        home, TUNESMITH_HOME=str(home), TUNESMITH_TRAINER_PYTHON=str(trainer_python), TUNESMITH_MAX_CONCURRENT_JOBS=str(slots), **settings
    )
    async with run_server([TUNESMITH, "serve", "--port", str(port)], home, variables, port, HEALTH) as server:
        yield server


async def upload_dataset(server: Server) -> str:
    """A small dataset; returns its id."""
    boundary = "bench"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'.encode()
    body = head + ROWS + f"\r\n--{boundary}--\r\n".encode()
    request = Request("POST", "/datasets", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    return (await request_json(server.url, request))["processed_dataset_id"]


def find_free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _process_group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


async def _wait_until_healthy(url: str, health: Request, process: psutil.Popen, began: float) -> float:
    """Seconds from `began`. What the body says does not matter: not everybody's is JSON."""
    while time.perf_counter() - began < START_TIMEOUT_S:
        if process.poll() is not None:
            raise ServerUnavailable(f"it ended with {process.returncode} before it was ready")
        connection = Connection(url)
        try:
            if (await connection.send(health)).status == 200:
                return time.perf_counter() - began
        except (OSError, EOFError):
            pass  # not yet
        finally:
            connection.close()
        await asyncio.sleep(HEALTH_POLL_S)
    raise ServerUnavailable(f"it was not ready after {START_TIMEOUT_S} s")


def _log_tail(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def _stop(process: psutil.Popen) -> None:
    """End the server, then what is left of its own workers."""
    family = [process, *(process.children(recursive=True) if process.is_running() else [])]
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for stubborn in left:
        stubborn.kill()
    psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)
