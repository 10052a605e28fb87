"""An HTTP front before another server, which does wrong just what it is told to: for tests of what a client makes of it."""

import http.client
import socket
import struct
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Literal
from urllib.parse import urlsplit

FaultKind = Literal[
    "reject",  # `status`, and the server hears nothing of it
    "reset",  # the connection breaks before the server hears of it
    "truncate request",  # half of the body has come when the connection breaks
    "corrupt request",  # a byte of the body is another one when the server gets it
    "drop response",  # the server carries it out, and the connection breaks
    "truncate response",  # half of the answer's body, then the connection breaks
    "corrupt response",  # a byte of the answer's body is another one
    "wrong checksum",  # the answer tells a checksum that is not the body's
    "hang",  # nothing happens until the front is stopped
]
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass(frozen=True)
class Fault:
    """What goes wrong, with which requests, and how often."""

    kind: FaultKind
    method: str = ""  # any
    path: str = ""  # a part of the path with its query
    times: int = 1
    status: int = 503
    body: str = "{}"  # of the refusal
    skip_first: int = 0  # so many requests that fit are left in peace first


@dataclass(frozen=True)
class RecordedRequest:
    """A request that came, whatever became of it."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class HttpFaultProxy:
    """The front. `target` is set when the server behind it is known, which may want to know the front's url first."""

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.requests: list[RecordedRequest] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def start(self) -> None:
        """Passes on from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Passes on no more."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def set_faults(self, *faults: Fault) -> None:
        """What goes wrong from now on, in place of what was planned before; forgets the requests that came."""
        with self._lock:
            self._faults = [fault for fault in faults for _ in range(fault.times)]
            self.requests.clear()
            self._skips = {id(fault): fault.skip_first for fault in self._faults}

    def next_fault(self, request: RecordedRequest) -> Fault | None:
        """What goes wrong with a request."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.method in ("", request.method) and fault.path in request.path:
                    if self._skips[id(fault)] > 0:
                        self._skips[id(fault)] -= 1
                        return None
                    self._faults.remove(fault)
                    return fault
        return None

    def wait_until_stopped(self) -> None:
        """Returns when the front is stopped."""
        self._released.wait(60)


@contextmanager
def run_http_fault_proxy(target: str = "") -> Generator[HttpFaultProxy]:
    """A front for as long as the block lasts."""
    front = HttpFaultProxy(target)
    front.start()
    try:
        yield front
    finally:
        front.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # whoever hangs there is let go, not waited for

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    """One connection; `front` is set on the class of each server."""

    proxy: ClassVar[HttpFaultProxy]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms for every answer otherwise

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length", 0))
        # Looked at before the body has come, as half of it is all that may come; what is noted has it all.
        half = self.rfile.read(length // 2)
        fault = self.proxy.next_fault(RecordedRequest(self.command, self.path, dict(self.headers), b""))
        if fault and fault.kind == "truncate request":
            self._reset()
            return
        body = half + self.rfile.read(length - len(half))
        self.proxy.requests[-1] = RecordedRequest(self.command, self.path, dict(self.headers), body)
        self._handle_body(body, fault)

    def _handle_body(self, body: bytes, fault: Fault | None) -> None:
        wrong = fault.kind if fault else None
        if fault and wrong == "reject":
            self._send_response(fault.status, {"Content-Type": "application/json"}, fault.body.encode())
        elif wrong == "reset":
            self._reset()
        elif wrong == "hang":
            self.proxy.wait_until_stopped()
            self.close_connection = True
        else:
            status, headers, content = self._forward(_corrupt(body) if wrong == "corrupt request" else body)
            self._send_upstream_response(status, headers, content, wrong)

    def _send_upstream_response(self, status: int, headers: dict[str, str], content: bytes, kind: FaultKind | None) -> None:
        if kind == "drop response":
            self._reset()
            return
        if kind == "wrong checksum":
            headers = {name: "crc32c=AAAAAA==" if name.lower() == "x-goog-hash" else value for name, value in headers.items()}
        self._send_response(
            status, headers, _corrupt(content) if kind == "corrupt response" else content, truncate=kind == "truncate response"
        )

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The server's own answer."""
        target = urlsplit(self.proxy.target)
        connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            with suppress(ConnectionError):  # it may answer, and hang up, before it has heard everything
                connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _send_response(self, status: int, headers: Mapping[str, str], content: bytes, *, truncate: bool = False) -> None:
        length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if truncate else content)
        if truncate:
            self._reset()

    def _reset(self) -> None:
        """Break the connection so that the other side notices, rather than close it."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


def _corrupt(content: bytes) -> bytes:
    """One byte in the middle is another one."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else content
