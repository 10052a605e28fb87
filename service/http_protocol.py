"""The HTTP protocol of the server, with limits on what a connection may cost before the app sees a request.

uvicorn's parser keeps a header of any length and waits for it, and for a body, without end. Here a connection is always in one of four
phases, each with a limit:

- waiting for a header, or receiving it: `max_header_bytes`, and `header_timeout_s` or `keep_alive_s`;
- receiving a body that the app reads: `body_timeout_s`, in which it must grow by 1 KiB a second;
- receiving a body that nobody reads, because the answer was sent: `DRAIN_S`;
- waiting for the app: the route's own deadline; if the caller does not read the answer, `STALLED_WRITE_S`.

At `max_connections`, a new connection takes the place of the one that has waited longest for a header, so that idle connections keep
nobody out.
"""

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.api.errors import error_body
from service.api.validation_errors import Problem

log = logging.getLogger(__name__)

MIN_BODY_BYTES_PER_S = 1024
DRAIN_S = 5.0  # for a caller that sends its whole body before it reads the answer
STALLED_WRITE_S = 60.0  # a laptop that sleeps may come back; a stream then continues from its last event
CHECK_INTERVAL_S = 0.5


@dataclass(frozen=True)
class ConnectionLimits:
    """The limits of all connections."""

    max_header_bytes: int
    header_timeout_s: float
    keep_alive_s: float
    body_timeout_s: float
    max_connections: int


class GuardedConfig(Config):
    """uvicorn's configuration, with the limits of connections and those of them that wait for a header, oldest first."""

    def __init__(self, app: ASGIApp, connection_limits: ConnectionLimits, *, backlog: int, graceful_shutdown_s: int) -> None:
        super().__init__(
            app,  # type: ignore[arg-type]  # uvicorn has types of its own
            http=GuardedProtocol,
            ws="none",
            backlog=backlog,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # uvicorn would trust every connection from loopback; service/api/middleware does it by a setting
            timeout_keep_alive=math.ceil(connection_limits.keep_alive_s),
            timeout_graceful_shutdown=graceful_shutdown_s,
        )
        self.connection_limits = connection_limits
        self.waiting: dict[GuardedProtocol, None] = {}


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    config: GuardedConfig

    def __init__(
        self, config: GuardedConfig, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = config.connection_limits
        self._reads_header = True
        self._header_bytes = 0
        self._is_header_too_large = False
        self._has_body_to_come = False
        self._deadline: float | None = None  # on the loop's clock; of the header, or of a body that nobody reads
        self._window_end = 0.0  # by then, the body must have grown enough
        self._window_bytes = 0
        self._unread_bytes = 0  # of the answer, when the caller last read something
        self._unread_since = self.loop.time()
        self._check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        if len(self.connections) >= self._limits.max_connections and not self._close_oldest_waiting():
            self.transport = transport
            self._refuse(503, "unavailable", "too many connections are open; try again")
            return
        super().connection_made(transport)
        self._await_header(self._limits.header_timeout_s)
        self._check = self.loop.call_later(CHECK_INTERVAL_S, self._check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        self.config.waiting.pop(self, None)
        if self._check is not None:
            self._check.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._reads_header:
            self._header_bytes += len(data)
        else:
            self._window_bytes += len(data)
        super().data_received(data)
        if self._reads_header and self._header_bytes > self._limits.max_header_bytes:
            self._is_header_too_large = True
            self.send_400_response("")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_bytes, self._unread_since = self.transport.get_write_buffer_size(), self.loop.time()

    # The parser calls the methods below from within data_received.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reads_header = True
        self._deadline = self.loop.time() + self._limits.header_timeout_s
        self.config.waiting.setdefault(self)

    def on_headers_complete(self) -> None:
        size_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size_bytes > self._limits.max_header_bytes:
            self._is_header_too_large = True
            raise ValueError("header too large")  # the parser stops, and uvicorn calls send_400_response
        self._reads_header, self._header_bytes, self._deadline = False, 0, None
        self.config.waiting.pop(self, None)
        self._has_body_to_come = True
        self._begin_window()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._has_body_to_come = False
        if self.cycle.response_complete:
            self._await_header(self._limits.keep_alive_s)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.cycle.response_complete:  # the caller sent another request already
            return
        if self._has_body_to_come:
            self._deadline = self.loop.time() + DRAIN_S
        else:
            self._await_header(self._limits.keep_alive_s)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's message; ours is below
        if self._is_header_too_large:
            self._refuse(431, "header_too_large", f"the header is larger than {self._limits.max_header_bytes} bytes")
        else:
            self._refuse(400, "invalid_request", "this is not a valid HTTP request")

    def _await_header(self, timeout_s: float) -> None:
        self._reads_header, self._header_bytes = True, 0
        self._deadline = self.loop.time() + timeout_s
        self.config.waiting[self] = None

    def _begin_window(self) -> None:
        self._window_end, self._window_bytes = self.loop.time() + self._limits.body_timeout_s, 0

    def _close_oldest_waiting(self) -> bool:
        """Make room for a connection; False when all connections are busy."""
        oldest = next(iter(self.config.waiting), None)
        if oldest is None:
            return False
        self.config.waiting.pop(oldest)
        oldest.transport.close()
        return True

    def _check_progress(self) -> None:
        """Close the connection if its phase has lasted too long; else check again soon."""
        now = self.loop.time()
        if self.transport.is_closing():
            self._check_reader(now, DRAIN_S)
        elif self._deadline is not None:
            if now >= self._deadline:
                self._end_late_request()
        elif self._has_body_to_come:
            self._check_body(now)
        elif self.flow.write_paused:
            self._check_reader(now, STALLED_WRITE_S)
        self._check = self.loop.call_later(CHECK_INTERVAL_S, self._check_progress)

    def _end_late_request(self) -> None:
        if self._reads_header and self._header_bytes:
            self._refuse(408, "timeout", f"the header did not arrive within {self._limits.header_timeout_s:g} s")
        else:
            self.transport.close()

    def _check_body(self, now: float) -> None:
        if self.flow.read_paused or self.cycle.waiting_for_100_continue:  # the app is not ready for more
            self._begin_window()
        elif now >= self._window_end:
            if self._window_bytes >= MIN_BODY_BYTES_PER_S * self._limits.body_timeout_s:
                self._begin_window()
            elif self.cycle.response_started:
                self.transport.close()
            else:
                self._refuse(408, "timeout", f"the body grew by less than {MIN_BODY_BYTES_PER_S} bytes a second")

    def _check_reader(self, now: float, timeout_s: float) -> None:
        unread_bytes = self.transport.get_write_buffer_size()
        if unread_bytes != self._unread_bytes:
            self._unread_bytes, self._unread_since = unread_bytes, now
        elif now - self._unread_since > timeout_s:
            self.transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer without the app, in the shape of every error, and close the connection."""
        if self.transport.is_closing():
            return
        body = error_body(code, [Problem(message, "", None)]).model_dump_json().encode()
        lines = [
            STATUS_LINE[status],
            b"content-type: application/json\r\n",
            b"content-length: %d\r\n" % len(body),
            b"cache-control: no-store\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n",
            body,
        ]
        self.transport.write(b"".join(lines))
        self.transport.close()
        log.info("connection refused", extra={"status": status, "code": code, "client": self.client[0] if self.client else None})
