"""The HTTP server of the loopback Hub: turns connections into `HubRequest`s and sends the `HubResponse`s."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Protocol
from urllib.parse import parse_qs, urlsplit

from infra.loopback.hub_repository import HubError


@dataclass(frozen=True)
class HubRequest:
    """An HTTP request to the Hub."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> Any:  # noqa: ANN401  # JSON
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    @property
    def host(self) -> str:
        return f"http://{self.headers['host']}"


@dataclass(frozen=True)
class HubResponse:
    """An HTTP response of the Hub: JSON, or `content` if it is given."""

    json: Any = None
    content: bytes | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class RequestHandler(Protocol):
    """What answers the requests."""

    def handle(self, request: HubRequest) -> HubResponse:
        """Raises HubError."""
        ...


def create_server(hub: RequestHandler, port: int) -> ThreadingHTTPServer:
    """A server on loopback that passes every request to the hub; port 0 takes a free one."""
    return _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": hub}))


def content_response(content: bytes, request: HubRequest, headers: Mapping[str, str]) -> HubResponse:
    """The content, or the range of it that the request asks for."""
    range_header = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not range_header:
        return HubResponse(content=content, headers=headers)
    first, last = int(range_header[1]), min(int(range_header[2] or len(content)), len(content) - 1)
    if first > last:
        return HubResponse(content=b"", status=416, headers={**headers, "Content-Range": f"bytes */{len(content)}"})
    partial = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
    return HubResponse(content=content[first : last + 1], status=206, headers=partial)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore it: clients of tests disconnect on purpose."""


class _Handler(BaseHTTPRequestHandler):
    """One connection; `hub` is set on the class of each server."""

    hub: ClassVar[RequestHandler]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        body = self._body()
        request = HubRequest(self.command, url.path, query, {name.lower(): value for name, value in self.headers.items()}, body)
        try:
            response = self.hub.handle(request)
        except HubError as error:
            response = _error_response(error)
        self._send(response)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # the names that http.server calls

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        length = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(length)
        if len(content) < length:
            self.close_connection = True
            raise ConnectionError("the client disconnected")
        return content

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, response: HubResponse) -> None:
        content = json.dumps(response.json).encode() if response.content is None else response.content
        self.send_response(response.status)
        kind = "application/json" if response.content is None else "application/octet-stream"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def _error_response(error: HubError) -> HubResponse:
    """An error as the Hub sends it: in the body for people, in two headers for clients."""
    details = dict(error.details)
    headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
    headers |= details.pop("headers", {})  # type: ignore[arg-type]  # hub_routes.py passes a dict
    return HubResponse({"error": error.message, **details}, status=error.status, headers=headers)
