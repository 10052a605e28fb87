"""Connections and bodies that are made to hold the service: valid callers go on, quickly, and memory stays bounded.

Each flood runs beside a valid caller that submits, lists and asks for the health, one request after another.
"""

import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import httpx2

from tests.attack.campaign import Row, Size, make_row
from tests.attack.fixtures import World
from tests.attack.sockets import connect, make_head
from tests.attack.target import Caller, Target, run_target

P99_LIMIT_S = 1.0
MEMORY_LIMIT_BYTES = 400 << 20
SECONDS: dict[Size, float] = {"full": 20.0, "short": 3.0}
CONNECTIONS: dict[Size, int] = {"full": 1100, "short": 300}
LISTENERS: dict[Size, int] = {"full": 500, "short": 100}
BODIES: dict[Size, int] = {"full": 8, "short": 4}
BODY_BYTES = 16 << 20
HEADER_BYTES = 64 << 20
GARBAGE_RATE_PER_S = 2000
GARBAGE_CONNECTIONS = 32
# Requests that are answered on a connection that stays open, and bytes that end it.
GARBAGE = (
    b"GET /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer tsk_nobody\r\n\r\n",
    b"POST /train HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{]",
    b"GET /jobs/%00/../%ff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"DELETE /jobs/nothing?a=%ud800 HTTP/1.1\r\nHost: evil.example\r\nOrigin: null\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
)
NOISE = (
    b"BREW /pot HTCPCP/1.0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nzz\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)
NOISE_EVERY = 20  # requests


@dataclass
class Measured:
    """What the valid caller saw."""

    name: str
    answers_s: list[float] = field(default_factory=list[float])
    failures: list[str] = field(default_factory=list[str])
    peak_bytes: int = 0

    @property
    def p99_s(self) -> float:
        """The time that one answer in a hundred takes longer than."""
        ordered = sorted(self.answers_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] if ordered else 0.0

    def problems(self, size: Size) -> list[str]:
        """What was not as promised. The short form only asks for answers: other tests share its machine."""
        problems = [f"{self.name}: a valid request got {failure}" for failure in self.failures[:1]]
        problems += [] if self.answers_s else [f"{self.name}: no valid request was answered"]
        if size == "full" and self.p99_s > P99_LIMIT_S:
            problems.append(f"{self.name}: p99 of valid requests {self.p99_s:.2f} s")
        if size == "full" and self.peak_bytes > MEMORY_LIMIT_BYTES:
            problems.append(f"{self.name}: {self.peak_bytes >> 20} MB")
        return problems


def run(size: Size) -> Row:
    """Run each flood for a few seconds on one service."""
    sent_per_s: list[float] = []
    floods: tuple[tuple[str, Callable[[World, Size, threading.Event], None]], ...] = (
        ("slowloris", _open_slow_connections),
        ("endless headers", _send_endless_headers),
        ("16 MB bodies", _send_large_bodies),
        ("listeners", _open_listeners),
        ("garbage", partial(_send_garbage, sent_per_s)),
    )
    _raise_file_limit()
    measured: list[Measured] = []
    with run_target(slots=1) as target:
        world = World(target.owner())
        for name, flood in floods:
            measured.append(_measure(name, flood, world, size))
    problems = [problem for each in measured for problem in each.problems(size)]
    figures = ", ".join(f"{each.name}: {len(each.answers_s)} answered, p99 {each.p99_s * 1000:.0f} ms" for each in measured)
    peak_bytes = max(each.peak_bytes for each in measured)
    figure = f"valid requests answered, p99 < {P99_LIMIT_S:.0f} s, RSS < {MEMORY_LIMIT_BYTES >> 20} MB"
    return make_row(
        "floods of connections, headers, bodies, listeners, garbage",
        figure,
        f"{figures} at {sent_per_s[0]:.0f} requests/s; {peak_bytes >> 20} MB",
        problems,
    )


def _measure(name: str, flood: Callable[[World, Size, threading.Event], None], world: World, size: Size) -> Measured:
    """Run a flood in a thread, and a valid caller beside it."""
    measured = Measured(name)
    stopping = threading.Event()
    thread = threading.Thread(target=flood, args=(world, size, stopping), name=name, daemon=True)
    thread.start()
    until = time.monotonic() + SECONDS[size]
    with httpx2.Client(base_url=world.target.url, headers=world.owner.headers(), timeout=10, trust_env=False, verify=False) as client:
        while time.monotonic() < until:
            for send in _valid_requests(client, world):
                began = time.monotonic()
                try:
                    response = send()
                    if not response.is_success:
                        measured.failures.append(str(response.status_code))
                except httpx2.TransportError as error:
                    measured.failures.append(type(error).__name__)
                measured.answers_s.append(time.monotonic() - began)
                measured.peak_bytes = max(measured.peak_bytes, world.target.rss_bytes())
    stopping.set()
    thread.join(30)
    return measured


def _valid_requests(client: httpx2.Client, world: World) -> Iterator[Callable[[], httpx2.Response]]:
    yield lambda: client.post("/train", json=world.train_body())
    yield lambda: client.get("/jobs")
    yield lambda: client.get("/health")
    yield lambda: client.get(f"/jobs/{world.completed_job_id}", headers={"Connection": "close"})  # the next one connects anew


# --- floods


def _open_slow_connections(world: World, size: Size, stopping: threading.Event) -> None:
    """Hold connections open and send a header of a few bytes now and then; open those again that were closed."""
    with _many_connections(world.target, CONNECTIONS[size]) as connections:
        for connection in connections:
            with suppress(OSError):
                connection.sendall(make_head(world.target, "GET", "/jobs"))
        while not stopping.wait(0.5):
            for index, connection in enumerate(connections):
                try:
                    connection.sendall(b"X-A: b\r\n")
                except OSError:
                    connection.close()
                    with suppress(OSError):
                        connections[index] = connect(world.target, 1)


def _send_endless_headers(world: World, _: Size, stopping: threading.Event) -> None:
    """Send one header that does not end, and then headers that do not end, on four connections in turn."""
    while not stopping.is_set():
        for piece in (b"a" * (1 << 16), b"X-A: b\r\n" * 8192):
            sent = 0
            with suppress(OSError), connect(world.target) as connection:
                connection.sendall(make_head(world.target, "GET", "/jobs") + b"X-Long: ")
                while sent < HEADER_BYTES and not stopping.is_set():
                    connection.sendall(piece)
                    sent += len(piece)


def _send_large_bodies(world: World, size: Size, stopping: threading.Event) -> None:
    """Send bodies of 16 MB to every kind of route, without a token and with one, some of them without a length."""
    body = b'{"processed_dataset_id": "' + b"x" * BODY_BYTES + b'"}'
    attempt = world.running
    path = f"/internal/jobs/{attempt.job_id}/attempts/{attempt.number}/events"
    senders = [Caller(world.target, None), world.owner, Caller(world.target, attempt.token)]

    def send(index: int) -> None:
        caller = senders[index % len(senders)]
        while not stopping.is_set():
            with suppress(httpx2.TransportError):
                content = body if index % 2 else iter([body[at : at + (1 << 16)] for at in range(0, len(body), 1 << 16)])
                headers = {"Content-Type": "application/json"}
                caller.request("POST", (path, "/train")[index % 2], content=content, headers=headers, timeout=20)

    _run_together([lambda index=index: send(index) for index in range(BODIES[size])])


def _open_listeners(world: World, size: Size, stopping: threading.Event) -> None:
    """Follow the events of one job on many connections, with cursors at their extremes among them."""
    path = f"/jobs/{world.running.job_id}/events"
    cursors = ("", "?after=0", "?after=9007199254740992")
    with _many_connections(world.target, LISTENERS[size]) as connections:
        for index, connection in enumerate(connections):
            headers = {**world.owner.headers(), "Accept": "text/event-stream"}
            with suppress(OSError):
                connection.sendall(make_head(world.target, "GET", path + cursors[index % len(cursors)], **headers) + b"\r\n")
        while not stopping.wait(0.2):
            with suppress(httpx2.TransportError):
                world.running.report({"type": "warning", "code": "test", "message": "a line"}, first_seq=1)
            for connection in connections:
                connection.setblocking(False)
                with suppress(OSError):
                    connection.recv(1 << 16)


def _send_garbage(sent_per_s: list[float], world: World, _: Size, stopping: threading.Event) -> None:
    """Send requests that mean nothing at a fixed rate, on connections that are replaced when the service closes them.

    Adds the rate that was reached to `sent_per_s`.
    """
    connections: dict[int, socket.socket] = {}
    began = time.monotonic()
    sent = 0
    while not stopping.is_set():
        for index in range(GARBAGE_CONNECTIONS):
            is_noise = sent % NOISE_EVERY == 0
            content = NOISE[sent // NOISE_EVERY % len(NOISE)] if is_noise else GARBAGE[sent % len(GARBAGE)]
            sent += 1
            try:
                connection = connections.get(index) or _connect_without_waiting(world.target)
                connections[index] = connection
                connection.send(content)
                while connection.recv(1 << 16):
                    pass
                raise ConnectionResetError  # the service has closed it
            except BlockingIOError:  # the answer has not come yet
                continue
            except OSError:
                if closed := connections.pop(index, None):
                    closed.close()
        ahead_s = sent / GARBAGE_RATE_PER_S - (time.monotonic() - began)
        stopping.wait(max(0.0, ahead_s))
    sent_per_s.append(sent / (time.monotonic() - began))
    for connection in connections.values():
        connection.close()


def _connect_without_waiting(target: Target) -> socket.socket:
    connection = connect(target, 1)
    connection.setblocking(False)
    return connection


@contextmanager
def _many_connections(target: Target, count: int) -> Iterator[list[socket.socket]]:
    """Connections, as many of them as the service accepts."""
    connections: list[socket.socket] = []
    try:
        for _ in range(count):
            with suppress(OSError):
                connections.append(connect(target, 1))
        yield connections
    finally:
        for connection in connections:
            connection.close()


def _run_together(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
