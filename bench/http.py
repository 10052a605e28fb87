"""A small HTTP/1.1 client over asyncio streams, because on two cores a full-featured client would dominate the measurement.

It supports only what benchmarks need: requests with a complete body, keep-alive, responses with a length or in chunks.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from bench.figures import percentile

RESPONSE_TIMEOUT_S = 60  # a server that needs longer has failed the request
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
CONNECTION_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """A request. A `body` that is not bytes is sent as JSON."""

    method: str
    path: str
    body: object = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def render(self, host: str, default_headers: Mapping[str, str]) -> bytes:
        """The bytes on the wire."""
        headers = {"Host": host, **default_headers, **self.headers}
        match self.body:
            case None:
                body = b""
            case bytes():
                body = self.body
            case _:
                body = json.dumps(self.body).encode()
                headers["Content-Type"] = "application/json"
        if body:
            headers["Content-Length"] = str(len(body))
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass(frozen=True)
class Response:
    """A response with its complete body."""

    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is a success."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The parsed body. Any: each caller knows its shape. Raises ValueError with the body's text for an error status."""
        if not self.ok:
            raise ValueError(f"the server answered {self.status}: {self.body[:500].decode(errors='replace')}")
        return json.loads(self.body)


class Connection:
    """One connection to one server, opened when needed and again when the server has closed it.

    A token before the host (`http://token@host`) is sent with every request that has no Authorization of its own.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._headers = {"Authorization": f"Bearer {parts.username}"} if parts.username else {}
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, request: Request) -> Response:
        """The response to a request. Raises OSError or EOFError if the server disconnects, TimeoutError if it does not answer."""
        async with asyncio.timeout(RESPONSE_TIMEOUT_S):
            reader, head, status = await self._open(request)
            body = await self._body(reader, head)
        if CONNECTION_CLOSE.search(head):
            self.close()
        return Response(status, body)

    async def stream(self, request: Request) -> AsyncIterator[bytes]:
        """The chunks of a streaming response. Raises EOFError if the server disconnects, ValueError for an error status."""
        reader, head, status = await self._open(request)
        if status != 200:
            body = await self._body(reader, head)
            raise ValueError(f"the server answered {status}: {body[:500].decode(errors='replace')}")
        async for chunk in _chunks(reader):
            yield chunk

    def close(self) -> None:
        """Close the connection."""
        if self._writer:
            self._writer.close()
        self._reader = self._writer = None

    async def _open(self, request: Request) -> tuple[asyncio.StreamReader, bytes, int]:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        self._writer.write(request.render(f"{self._host}:{self._port}", self._headers))
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = STATUS.match(head)
        if not status:
            raise EOFError(f"not HTTP: {head[:80]!r}")
        return self._reader, head, int(status[1])

    async def _body(self, reader: asyncio.StreamReader, head: bytes) -> bytes:
        if length := LENGTH.search(head):
            return await reader.readexactly(int(length[1]))
        if CHUNKED.search(head):
            return b"".join([chunk async for chunk in _chunks(reader)])
        return b""


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)


@dataclass
class LoadResult:
    """The outcome of many requests."""

    latencies_s: list[float] = field(default_factory=list[float])  # of successful requests
    rejected: Counter[str] = field(default_factory=Counter[str])  # other requests, by status or exception
    responses: list[Response] = field(default_factory=list[Response])
    elapsed_s: float = 0.0

    @property
    def requests_per_s(self) -> float:
        """Successful requests per second."""
        return len(self.latencies_s) / self.elapsed_s if self.elapsed_s else 0.0

    def latency_ms(self, percent: float) -> float:
        """A percentile of the latencies."""
        return percentile(self.latencies_s, percent) * 1000


async def run_load(url: str, requests: Iterable[Request], clients: int, max_duration_s: float = 120.0) -> LoadResult:
    """Send requests from concurrent clients, each one request at a time, until none is left or the time is over."""
    result = LoadResult()
    shared = iter(requests)
    started_at = time.perf_counter()
    await asyncio.gather(*(_run_client(url, shared, result, started_at + max_duration_s) for _ in range(clients)))
    result.elapsed_s = time.perf_counter() - started_at
    return result


async def _run_client(url: str, requests: Iterator[Request], result: LoadResult, deadline: float) -> None:
    connection = Connection(url)
    for request in requests:
        sent_at = time.perf_counter()
        if sent_at > deadline:
            break
        try:
            response = await connection.send(request)
        except (OSError, EOFError, TimeoutError) as error:
            result.rejected[type(error).__name__] += 1
            connection.close()
            continue
        if response.ok:
            result.latencies_s.append(time.perf_counter() - sent_at)
            result.responses.append(response)
        else:
            result.rejected[str(response.status)] += 1
    connection.close()


async def request_json(url: str, request: Request) -> Any:
    """Send one request on a new connection; returns the response's JSON. Raises ValueError for an error status."""
    connection = Connection(url)
    try:
        return (await connection.send(request)).json()
    finally:
        connection.close()
