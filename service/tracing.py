"""The identity of the request that is being handled: its id and its W3C trace context, for log lines and for calls made on its behalf.

See https://www.w3.org/TR/trace-context/.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from secrets import token_hex

TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
QUIET_PATHS = ("/health",)  # called every few seconds by monitoring
SECRET_PATH_PREFIX = "/files/"  # of signed links
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # safe in a header, in a log line and in a shell


@dataclass(frozen=True)
class RequestTrace:
    """A request's id, and its place in a trace."""

    request_id: str
    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16 hexadecimal digits; of the service's own span
    is_sampled: bool

    @property
    def traceparent(self) -> str:
        """The value of the header `traceparent` for calls made on behalf of the request."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"


_current: ContextVar[RequestTrace | None] = ContextVar("request_trace", default=None)


def current_trace() -> RequestTrace | None:
    """The request that is being handled; None outside of requests."""
    return _current.get()


def current_traceparent() -> str | None:
    """The header `traceparent`, or the variable TRACEPARENT, of what continues the request's trace; None outside of requests."""
    trace = _current.get()
    return trace.traceparent if trace else None


@contextmanager
def tracing(trace: RequestTrace) -> Generator[None]:
    """Make `trace` the current one, in this task and in the threads that it starts."""
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)


def read_trace(request_id: str, traceparent: str) -> RequestTrace:
    """The trace of a request with these headers, each of which may be absent or invalid: then it begins here."""
    chosen_id = request_id if REQUEST_ID.fullmatch(request_id) else token_hex(8)
    match = TRACEPARENT.fullmatch(traceparent)
    is_valid = match is not None and match[1] != "ff" and (match[1] != "00" or not match[5]) and int(match[2], 16) and int(match[3], 16)
    if match is None or not is_valid:
        return RequestTrace(chosen_id, token_hex(16), token_hex(8), is_sampled=False)
    return RequestTrace(chosen_id, match[2], token_hex(8), is_sampled=bool(int(match[4], 16) & 1))
