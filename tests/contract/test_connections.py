"""What a connection may cost a real server: slow, silent, endless and too many ones never keep a valid caller out."""

import os
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from tests.real_server import FILES, SOURCE, Server, read_to_end, run_server

REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with short timeouts."""
    home = tmp_path_factory.mktemp("home")
    with run_server(home, header_timeout_s=1, keep_alive_s=1, body_timeout_s=1) as server:
        yield server


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process holds more connections than it may open files by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_more_idle_connections_than_files_keep_nobody_out(tmp_path: Path, many_files: None, sent: bytes) -> None:
    with run_server(tmp_path, header_timeout_s=300) as server, ExitStack() as stack:
        for _ in range(FILES + 76):
            connection = stack.enter_context(server.connect())
            connection.sendall(sent)
        for _ in range(10):
            begun = time.monotonic()
            assert httpx2.get(f"{server.url}/health", timeout=5).status_code == 200
            assert time.monotonic() - begun < 1
        with server.connect() as valid:
            valid.sendall(REQUEST)
            assert valid.recv(100).startswith(b"HTTP/1.1 200")


def test_endless_header_is_refused_at_once(server: Server) -> None:
    begun = time.monotonic()
    answer = server.exchange(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * (64 * MIB))
    assert time.monotonic() - begun < 2
    assert not answer or answer.startswith(b"HTTP/1.1 431 ")  # the end of what was sent may have reset the connection first


@pytest.mark.parametrize("header", [b"X: " + b"a" * 40_000, b"\r\n".join(b"X-%d: %s" % (n, b"a" * 100) for n in range(400))])
def test_large_header_is_431(server: Server, header: bytes) -> None:
    assert server.exchange(REQUEST[:-2] + header + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")


def test_header_below_the_limit_is_read(server: Server) -> None:
    header = REQUEST[:-2] + b"Connection: close\r\nX: " + b"a" * 30_000
    assert server.exchange(header + b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_malformed_request_gets_an_error_of_the_usual_shape(server: Server) -> None:
    answer = server.exchange(b"\0\1\2\3\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b'"errors":[{"message":"this is not a valid HTTP request","hint":"","param":null}]}}')


@pytest.mark.parametrize("dripped", [b"a", b"\r\nX: a", b""])
def test_slow_header_ends_the_connection(server: Server, dripped: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a")
        assert drip(connection, dripped).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("dripped", [b"\r\n", b""])
def test_connection_without_another_request_ends(server: Server, dripped: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(REQUEST)
        answer = drip(connection, dripped)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1 or b"HTTP/1.1 408 " in answer


def drip(connection: socket.socket, content: bytes, seconds: float = 6) -> bytes:
    """What the server answers until it closes the connection, while `content` is sent again and again."""
    received, connection_end = b"", time.monotonic() + seconds
    connection.settimeout(0.1)
    while time.monotonic() < connection_end:
        try:
            chunk = connection.recv(1 << 16)
        except TimeoutError:
            try:
                connection.sendall(content)
            except OSError:
                return received
            continue
        except ConnectionResetError:
            return received
        if not chunk:
            return received
        received += chunk
    raise AssertionError(f"the connection is still open; received {received!r}")


@pytest.mark.parametrize("dripped", [b"a", b""])
def test_body_that_does_not_grow_ends_the_connection(server: Server, dripped: bytes) -> None:
    header = b"POST /train HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(header)
        assert drip(connection, dripped).startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 401 "))


def test_body_that_nobody_reads_ends_the_connection(server: Server) -> None:
    header = b"POST /train HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(header)
        assert drip(connection, b"a" * 10_000, seconds=9).startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 401 "))


def test_slow_body_that_grows_is_read(server: Server) -> None:
    """Longer than the timeout, at more than the least rate."""
    body = b'{"processed_dataset_id": "' + b"x" * 9_000 + b'"}'
    header = b"POST /train HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(header % len(body))
        for start in range(0, len(body), 1000):
            time.sleep(0.25)
            try:
                connection.sendall(body[start : start + 1000])
            except OSError:
                break
        assert read_to_end(connection).startswith((b"HTTP/1.1 422 ", b"HTTP/1.1 401 "))


def test_pipelined_requests_are_all_answered(server: Server) -> None:
    answer = server.exchange(REQUEST * 2 + REQUEST[:-2] + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 3


def test_keep_alive_and_continue_still_work(server: Server) -> None:
    with httpx2.Client(base_url=server.url) as client:
        for _ in range(5):
            assert client.get("/").status_code == 200
            time.sleep(0.3)
    with server.connect() as connection:
        header = b"POST /train HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
        connection.sendall(header + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(100).startswith((b"HTTP/1.1 100 ", b"HTTP/1.1 401 "))


def test_existing_home_is_closed_to_other_users(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    (home / "tunesmith.db").touch(mode=0o644)
    (home / "attempts").mkdir(mode=0o755)
    with run_server(home):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (home, *home.iterdir())}
    assert {"home", "tunesmith.db", "attempts", "service.json", "signing-key"} <= set(modes)
    assert not [name for name, mode in modes.items() if mode & 0o077]


def test_any_way_to_start_takes_the_lock_of_the_home(tmp_path: Path) -> None:
    with run_server(tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "uvicorn", "service.main:create_app", "--factory", "--port", "0"],
            env={**os.environ, "TUNESMITH_HOME": str(tmp_path)},
            cwd=SOURCE,
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert done.returncode != 0
    assert "another service already uses" in done.stderr
