"""The proxy of the fault tests."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from infra.loopback.proxy import Proxy

SEVERAL_MB = bytes(range(256)) * 20_000


class EchoServer:
    """Echoes every chunk and records it; sends a final message at the end of the stream."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.is_reading = threading.Event()
        self.is_reading.set()
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
            self.threads.append(threading.Thread(target=self._echo, args=(client,)))
            self.threads[-1].start()

    def _echo(self, client: socket.socket) -> None:
        with client:
            try:
                while self.is_reading.wait() and (chunk := client.recv(1 << 16)):
                    self.received.append(chunk)
                    client.sendall(chunk)
                client.sendall(b"bye")
            except OSError:
                return

    def close(self) -> None:
        self.is_reading.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    echo = EchoServer()
    yield echo
    echo.close()


@pytest.fixture
def proxy(echo: EchoServer) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connect(proxy) as client:
        assert send_and_receive(client, b"hello") == b"hello"
        yield client


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def send_and_receive(client: socket.socket, text: bytes) -> bytes:
    client.sendall(text)
    return client.recv(1000)


def fill_send_buffer(client: socket.socket) -> None:
    """Send until the peer accepts no more."""
    client.settimeout(0.05)
    with suppress(TimeoutError):
        while True:
            client.send(SEVERAL_MB)
    client.settimeout(5)


def test_large_data_and_eof_pass_through(proxy: Proxy) -> None:
    with connect(proxy) as client:
        sender = threading.Thread(target=lambda: (client.sendall(SEVERAL_MB), client.shutdown(socket.SHUT_WR)))
        sender.start()
        received = b"".join(iter(lambda: client.recv(1 << 16), b""))
        sender.join()
    assert hashlib.sha256(received).digest() == hashlib.sha256(SEVERAL_MB + b"bye").digest()


def test_many_concurrent_connections(proxy: Proxy) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(proxy)) for _ in range(30)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        assert [client.recv(1000) for client in clients] == [b"%d" % number for number in range(30)]


def test_unreachable_target_closes_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Proxy("127.0.0.1", port) as proxy, connect(proxy) as client:
        assert client.recv(1) == b""


def test_cut_closes_and_refuses_connections_until_restored(proxy: Proxy, client: socket.socket) -> None:
    proxy.cut()
    assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.restore()
    with connect(proxy) as again:
        assert send_and_receive(again, b"back") == b"back"


def test_reset_applies_to_all_connections(proxy: Proxy, client: socket.socket) -> None:
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionResetError), connect(proxy) as another:
        another.recv(1)


def test_hang_holds_data_until_restored(proxy: Proxy, client: socket.socket, echo: EchoServer) -> None:
    proxy.hang()
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        send_and_receive(client, b"later")
    assert echo.received == [b"hello"]
    proxy.restore()
    client.settimeout(5)
    assert client.recv(1000) == b"later"


def test_drop_responses_still_delivers_requests(proxy: Proxy, client: socket.socket, echo: EchoServer) -> None:
    proxy.drop_responses()
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        send_and_receive(client, b"do it")
    assert echo.received == [b"hello", b"do it"]
    proxy.restore()  # resets the connections that lost data
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_drop_responses_also_drops_eof(proxy: Proxy, client: socket.socket) -> None:
    proxy.drop_responses()
    client.shutdown(socket.SHUT_WR)
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.recv(1)


def test_unaffected_connection_survives_drop_responses(proxy: Proxy, client: socket.socket) -> None:
    proxy.drop_responses()
    proxy.restore()
    assert send_and_receive(client, b"still here") == b"still here"


def test_delay_applies_in_both_directions_until_restored(proxy: Proxy, client: socket.socket) -> None:
    proxy.delay(0.05)
    started_at_s = time.monotonic()
    assert send_and_receive(client, b"slowly") == b"slowly"
    assert time.monotonic() - started_at_s >= 0.1
    proxy.delay(60)
    proxy.restore()
    assert send_and_receive(client, b"fast") == b"fast"


@pytest.mark.parametrize("verb", ["hang", "drop_responses"])
def test_connections_are_accepted_again_after_cut(proxy: Proxy, verb: str) -> None:
    proxy.cut()
    getattr(proxy, verb)()
    connect(proxy).close()
    proxy.restore()
    with connect(proxy) as client:
        assert send_and_receive(client, b"back") == b"back"


def test_reset_after_cut(proxy: Proxy) -> None:
    proxy.cut()
    proxy.reset()
    with pytest.raises(ConnectionResetError), connect(proxy) as client:
        client.recv(1)


@pytest.mark.parametrize("verb", ["cut", "reset"])
def test_blocked_sender_is_disconnected(proxy: Proxy, echo: EchoServer, verb: str) -> None:
    echo.is_reading.clear()
    with connect(proxy) as client:
        fill_send_buffer(client)
        getattr(proxy, verb)()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.sendall(SEVERAL_MB)


def test_proxy_cleans_up_threads_and_sockets(echo: EchoServer) -> None:
    before = set(threading.enumerate())
    with Proxy("127.0.0.1", echo.port) as proxy, connect(proxy) as stalled, connect(proxy) as blocked, connect(proxy) as idle:
        send_and_receive(idle, b"x")
        proxy.hang()
        stalled.sendall(b"never delivered")
        echo.is_reading.clear()
        proxy.restore()
        fill_send_buffer(blocked)
        proxy.delay(60)
    assert {thread.name for thread in set(threading.enumerate()) - before} & {"proxy"} == set()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
