"""Gives each request an id and a place in a trace, and logs one line about it when it ends."""

import logging
import time
from typing import Any

from opentelemetry.trace import SpanContext, get_current_span
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.tracing import QUIET_PATHS, read_trace, tracing

log = logging.getLogger("service.access")


class RequestContextMiddleware:
    """ASGI middleware: sets the current trace, answers with `X-Request-ID`, and writes the access log.

    A log line has the route, never the path, which may hold a signed link, nor the query or any header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        span = get_current_span().get_span_context()  # valid only if the deployment has a collector
        traceparent = _format_traceparent(span) if span.is_valid else headers.get("traceparent", "")
        trace = read_trace(headers.get("x-request-id", ""), traceparent)
        begun = time.perf_counter()
        status, size_bytes = 0, 0

        async def send_with_id(message: Message) -> None:
            nonlocal status, size_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = trace.request_id
            elif message["type"] == "http.response.body":
                size_bytes += len(message.get("body", b""))
            await send(message)

        with tracing(trace):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                _log_request(scope, status, size_bytes, time.perf_counter() - begun)


def _log_request(scope: Scope, status: int, size_bytes: int, duration_s: float) -> None:
    route = _route_of(scope)
    level = logging.DEBUG if route in QUIET_PATHS and status == 200 else logging.INFO
    if not log.isEnabledFor(level):
        return
    client: tuple[str, int] | None = scope.get("client")
    principal = scope.get("state", {}).get("principal")
    fields: dict[str, Any] = {
        "method": scope["method"],
        "route": route,
        "status": status,  # 0: the caller left before there was an answer
        "duration_ms": round(duration_s * 1000, 1),
        "bytes": size_bytes,
        "client": client[0] if client else None,
    }
    if principal is not None:
        fields |= {"tenant_id": principal.tenant_id, "subject": principal.subject}
    log.info("request", extra=fields) if level == logging.INFO else log.debug("request", extra=fields)


def _route_of(scope: Scope) -> str:
    """The path of the route with its parameters' names; "unknown" where no route matched."""
    route = scope.get("route")
    return getattr(route, "path", None) or "unknown"


def _format_traceparent(span: SpanContext) -> str:
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
