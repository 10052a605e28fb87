"""The limits of a route, declared beside it: how long a request may take, and how large its body may be.

A request is answered within its deadline, if need be with 503 and Retry-After; calls made for it get the remaining time. A body that is
too large is refused while it arrives, before anything holds it in memory. A route without `@limits` has the default limits.
"""

from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive

from service.api.errors import error_response
from storage.deadline import deadline

REQUEST_TIMEOUT_S = 4.0  # of the promised five; the rest is for a busy instance itself
MAINTENANCE_TIMEOUT_S = 55.0  # the scheduler calls every minute, and a deletion may remove thousands of files
JSON_BODY_BYTES = 1 << 20  # a training request is some kilobytes
REPORT_BODY_BYTES = 16 << 20  # a batch of a thousand events
MULTIPART_SLACK_BYTES = 1 << 16  # boundaries and form fields around a file

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


@dataclass(frozen=True)
class RouteLimits:
    """The limits of one route, and which errors it cannot answer with."""

    timeout_s: float | None = REQUEST_TIMEOUT_S  # None: moving a file may take long; each single call is bounded. A stream has no deadline
    body_bytes: int | None = JSON_BODY_BYTES  # None: the setting max_upload_bytes
    body_hint: str = ""  # what would help when the body is too large
    never_conflicts: bool = False
    needs_token: bool = False  # the path has a signed token


DEFAULT_LIMITS = RouteLimits()
_declared: dict[Callable[..., Any], RouteLimits] = {}


def limits(
    *,
    timeout_s: float | None = REQUEST_TIMEOUT_S,
    body_bytes: int | None = JSON_BODY_BYTES,
    body_hint: str = "",
    never_conflicts: bool = False,
    needs_token: bool = False,
) -> Callable[[Endpoint], Endpoint]:
    """Declare the limits of the endpoint below; goes under the route's decorator."""
    route_limits = RouteLimits(timeout_s, body_bytes, body_hint, never_conflicts, needs_token)

    def declare(endpoint: Endpoint) -> Endpoint:
        _declared[endpoint] = route_limits
        return endpoint

    return declare


class BodyTooLarge(Exception):
    """The body is larger than its route allows."""


class LimitedRoute(APIRoute):
    """A route that keeps its limits."""

    @property
    def limits(self) -> RouteLimits:
        """The limits that are declared beside the endpoint."""
        return _declared.get(self.endpoint, DEFAULT_LIMITS)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, route_limits = super().get_route_handler(), self.limits

        async def handle_within_limits(request: Request) -> Response:
            max_bytes = route_limits.body_bytes
            if max_bytes is None:
                max_bytes = request.app.state.settings.max_upload_bytes + MULTIPART_SLACK_BYTES
            rejection = error_response(
                413, "too_large", f"the body is larger than {max_bytes} bytes, the limit of this path", route_limits.body_hint
            )
            declared = request.headers.get("content-length", "0")
            if declared.isdigit() and int(declared) > max_bytes:
                return rejection
            body = _Body(request.receive, max_bytes)
            with deadline(route_limits.timeout_s) if route_limits.timeout_s is not None else nullcontext():
                try:
                    response = await handle(Request(request.scope, body.receive))
                except Exception:
                    if body.too_large:  # whatever the reader of a truncated body made of it
                        return rejection
                    raise
            return rejection if body.too_large else response

        return handle_within_limits


class _Body:
    """A request's body, counted as it arrives."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._remaining_bytes = max_bytes

    @property
    def too_large(self) -> bool:
        return self._remaining_bytes < 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._remaining_bytes -= len(message.get("body", b""))
        if self.too_large:
            raise BodyTooLarge
        return message
