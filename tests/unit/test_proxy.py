"""The line that fault tests break: it must break as it says."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from infra.loopback.proxy import Proxy

SEVERAL_MB = bytes(range(256)) * 20_000


class Echo:
    """Answers every piece with the same piece, and remembers what came; says goodbye to who has said all."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.listens = threading.Event()
        self.listens.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.threads.append(threading.Thread(target=self._answer, args=(client,)))
            self.threads[-1].start()

    def _answer(self, client: socket.socket) -> None:
        with client:
            try:
                while self.listens.wait() and (heard := client.recv(1 << 16)):
                    self.heard.append(heard)
                    client.sendall(heard)
                client.sendall(b"bye")
            except OSError:
                return

    def close(self) -> None:
        self.listens.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def line(echo: Echo) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo.port) as line:
        yield line


@pytest.fixture
def client(line: Proxy) -> Iterator[socket.socket]:
    with connected(line) as client:
        assert said(client, b"hello") == b"hello"
        yield client


def connected(line: Proxy) -> socket.socket:
    host, _, port = line.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def said(client: socket.socket, text: bytes) -> bytes:
    client.sendall(text)
    return client.recv(1000)


def fill(client: socket.socket) -> None:
    """Send until nobody takes any more."""
    client.settimeout(0.05)
    with suppress(TimeoutError):
        while True:
            client.send(SEVERAL_MB)
    client.settimeout(5)


def test_much_arrives_as_it_was_sent_and_so_does_the_end(line: Proxy) -> None:
    with connected(line) as client:
        sender = threading.Thread(target=lambda: (client.sendall(SEVERAL_MB), client.shutdown(socket.SHUT_WR)))
        sender.start()
        came = b"".join(iter(lambda: client.recv(1 << 16), b""))
        sender.join()
    assert hashlib.sha256(came).digest() == hashlib.sha256(SEVERAL_MB + b"bye").digest()


def test_many_speak_at_once(line: Proxy) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(connected(line)) for _ in range(30)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        assert [client.recv(1000) for client in clients] == [b"%d" % number for number in range(30)]


def test_a_line_to_nobody_closes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Proxy("127.0.0.1", port) as line, connected(line) as client:
        assert client.recv(1) == b""


def test_a_line_that_is_cut_closes_and_takes_nobody_until_it_is_restored(line: Proxy, client: socket.socket) -> None:
    line.cut()
    assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connected(line)
    line.restore()
    with connected(line) as again:
        assert said(again, b"back") == b"back"


def test_a_line_that_resets_does_so_to_everybody(line: Proxy, client: socket.socket) -> None:
    line.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionResetError), connected(line) as another:
        another.recv(1)


def test_a_line_that_hangs_keeps_what_it_has_until_it_is_restored(line: Proxy, client: socket.socket, echo: Echo) -> None:
    line.hang()
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        said(client, b"later")
    assert echo.heard == [b"hello"]
    line.restore()
    client.settimeout(5)
    assert client.recv(1000) == b"later"


def test_a_line_that_drops_answers_carries_requests_out(line: Proxy, client: socket.socket, echo: Echo) -> None:
    line.drop_answers()
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        said(client, b"do it")
    assert echo.heard == [b"hello", b"do it"]
    line.restore()  # and what lost something is of no use any more
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_line_that_drops_answers_drops_a_goodbye_too(line: Proxy, client: socket.socket) -> None:
    line.drop_answers()
    client.shutdown(socket.SHUT_WR)
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.recv(1)


def test_who_lost_nothing_goes_on_after_answers_were_dropped(line: Proxy, client: socket.socket) -> None:
    line.drop_answers()
    line.restore()
    assert said(client, b"still here") == b"still here"


def test_a_slow_line_is_slow_both_ways_until_it_is_restored(line: Proxy, client: socket.socket) -> None:
    line.delay(0.05)
    began = time.monotonic()
    assert said(client, b"slowly") == b"slowly"
    assert time.monotonic() - began >= 0.1
    line.delay(60)
    line.restore()
    assert said(client, b"fast") == b"fast"


@pytest.mark.parametrize("verb", ["hang", "drop_answers"])
def test_what_follows_a_cut_takes_connections_again(line: Proxy, verb: str) -> None:
    line.cut()
    getattr(line, verb)()
    connected(line).close()
    line.restore()
    with connected(line) as client:
        assert said(client, b"back") == b"back"


def test_a_line_can_be_reset_after_it_was_cut(line: Proxy) -> None:
    line.cut()
    line.reset()
    with pytest.raises(ConnectionResetError), connected(line) as client:
        client.recv(1)


@pytest.mark.parametrize("verb", ["cut", "reset"])
def test_who_sends_to_somebody_who_does_not_listen_is_broken_off_as_well(line: Proxy, echo: Echo, verb: str) -> None:
    echo.listens.clear()
    with connected(line) as client:
        fill(client)
        getattr(line, verb)()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.sendall(SEVERAL_MB)


def test_nothing_is_left_behind(echo: Echo) -> None:
    before = set(threading.enumerate())
    with Proxy("127.0.0.1", echo.port) as line, connected(line) as stalled, connected(line) as waiting, connected(line) as gone:
        said(gone, b"x")
        line.hang()
        stalled.sendall(b"never to arrive")
        echo.listens.clear()
        line.restore()
        fill(waiting)
        line.delay(60)
    assert {thread.name for thread in set(threading.enumerate()) - before} & {"proxy"} == set()
    with pytest.raises(ConnectionRefusedError):
        connected(line)
