"""A service in a process of its own, without the trainer: for tests of what happens before an endpoint."""

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2

SOURCE = Path(__file__).resolve().parents[1]
LOG_FILE = "service.log"  # in the home folder
FILES = 1024  # that the server may open


class Server:
    """A running service."""

    def __init__(self, url: str, process: "subprocess.Popen[str]") -> None:
        self.url = url
        self.port = int(url.rpartition(":")[2])
        self.process = process

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def exchange(self, content: bytes) -> bytes:
        """Everything that the server answers until it closes the connection."""
        with self.connect() as connection:
            with suppress(OSError):  # it closed the connection meanwhile; what it said can still be read
                connection.sendall(content)
            return read_to_end(connection)


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            received += chunk
    return received


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES // 2, FILES))


@contextmanager
def run_server(home: Path, **settings: Any) -> Iterator[Server]:
    """`settings` are variables without their prefix, in lower case."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    environment |= {"TUNESMITH_HOME": str(home), "HF_HUB_OFFLINE": "1"} | {
        f"TUNESMITH_{name.upper()}": str(value) for name, value in settings.items()
    }
    command = [sys.executable, "-m", "service", "--port", "0"]
    with (home / LOG_FILE).open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=SOURCE, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=limit_files
        )
    try:
        assert process.stdout is not None
        server = Server(process.stdout.readline().strip(), process)
        wait_until_healthy(server)
        yield server
    finally:
        process.terminate()
        process.communicate(timeout=20)


def wait_until_healthy(server: Server) -> None:
    for _ in range(200):
        try:
            httpx2.get(f"{server.url}/health", timeout=5)
            return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise AssertionError("the server does not answer")
