"""HTTP by hand, for requests that a client library would not send."""

import socket
from contextlib import suppress

from tests.attack.target import Caller, Target

TIMEOUT_S = 10.0


def connect(target: Target, timeout_s: float = TIMEOUT_S) -> socket.socket:
    """A connection to the service."""
    return socket.create_connection(("127.0.0.1", target.port), timeout=timeout_s)


def make_head(target: Target, method: str, path: str, **headers: str) -> bytes:
    """The start of a request, without the empty line that ends its headers."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{target.port}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n"


def exchange(caller: Caller, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """Send a request whose path is not normalized; return the status and the whole answer. Status 0: closed without an answer."""
    length = {"Content-Length": str(len(body))} if body else {}
    head = make_head(caller.target, method, path, **caller.headers(), **headers, **length, Connection="close")
    answer = b""
    with connect(caller.target) as connection, suppress(ConnectionError):
        connection.sendall(head + b"\r\n" + body)
        while chunk := connection.recv(1 << 16):
            answer += chunk
    return parse_status(answer), answer


def parse_status(answer: bytes) -> int:
    """The status in the first line of an answer; 0 without one."""
    parts = answer.split(b" ", 2)
    return int(parts[1]) if len(parts) > 2 and parts[1].isdigit() else 0
