"""What a route demands, declared beside it: who may call, how long a request may take, how large its body may be.

A caller is known before the body is read: a request without an identity costs as little as possible. A request is answered within its
deadline, if need be with 503 and Retry-After; calls made for it get the remaining time. A body that is too large is refused while it
arrives, before anything holds it in memory. A route without `@limits` has the default limits. What a caller changes, and the links to
models that it takes, are entries of the audit log.
"""

from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from service.api.audit import record_in_audit_log
from service.api.authentication import Authenticator
from service.api.errors import error_response
from service.api.json_body import JsonRequest
from service.api.rate_limits import RateLimiter, kind_of
from service.core.errors import Unauthorized
from storage.deadline import deadline

REQUEST_TIMEOUT_S = 4.0  # of the promised five; the rest is for a busy instance itself
MAINTENANCE_TIMEOUT_S = 55.0  # the scheduler calls every minute, and a deletion may remove thousands of files
JSON_BODY_BYTES = 1 << 20  # a training request is some kilobytes
REPORT_BODY_BYTES = 4 << 20  # a batch of some hundred events; an attempt sends at most 3 MiB at a time
MULTIPART_SLACK_BYTES = 1 << 16  # boundaries and form fields around a file

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
# launch: an attempt that is to claim itself; public: everybody, or a caller with a signed link
Access = Literal["caller", "launch", "attempt", "public"]


@dataclass(frozen=True)
class RouteLimits:
    """The limits of one route, and the errors that OpenAPI cannot derive from its parameters."""

    timeout_s: float | None = REQUEST_TIMEOUT_S  # None: moving a file may take long; each single call is bounded. A stream has no deadline
    body_bytes: int | None = JSON_BODY_BYTES  # None: the setting max_upload_bytes
    body_hint: str = ""  # what would help when the body is too large
    can_conflict: bool | None = None  # None: unless it is a GET
    needs_token: bool = False  # the path has a signed token
    access: Access = "caller"
    audited: bool | None = None  # None: if it is for callers, and not a GET


DEFAULT_LIMITS = RouteLimits()
_declared: dict[Callable[..., Any], RouteLimits] = {}


def limits(
    *,
    timeout_s: float | None = REQUEST_TIMEOUT_S,
    body_bytes: int | None = JSON_BODY_BYTES,
    body_hint: str = "",
    can_conflict: bool | None = None,
    needs_token: bool = False,
    access: Access = "caller",
    audited: bool | None = None,
) -> Callable[[Endpoint], Endpoint]:
    """Declare the limits of an endpoint, below or above the decorator of its router."""
    route_limits = RouteLimits(timeout_s, body_bytes, body_hint, can_conflict, needs_token, access, audited)

    def declare(endpoint: Endpoint) -> Endpoint:
        _declared[endpoint] = route_limits
        return endpoint

    return declare


class BodyTooLarge(HTTPException):
    """The body is larger than its route allows. An HTTPException, because FastAPI makes a 400 of every other error of reading a body."""

    def __init__(self) -> None:
        super().__init__(413)


class LimitedRoute(APIRoute):
    """A route that keeps its limits."""

    @property
    def limits(self) -> RouteLimits:
        """The limits that are declared beside the endpoint."""
        return _declared.get(self.endpoint, DEFAULT_LIMITS)

    @property
    def is_audited(self) -> bool:
        """Whether its requests are entries of the audit log."""
        audited, changes_something = self.limits.audited, not {"GET", "HEAD"}.issuperset(self.methods or ())
        return (self.limits.access == "caller" and changes_something) if audited is None else audited

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_within_limits(request: Request) -> Response:
            route_limits = self.limits
            max_bytes = route_limits.body_bytes
            if max_bytes is None:
                max_bytes = request.app.state.settings.max_upload_bytes + MULTIPART_SLACK_BYTES
            with deadline(route_limits.timeout_s) if route_limits.timeout_s is not None else nullcontext():
                rate_headers = await _admit(request, route_limits)
                try:
                    declared_bytes = request.headers.get("content-length", "")
                    if declared_bytes.isdecimal() and int(declared_bytes) > max_bytes:
                        raise BodyTooLarge
                    response = await handle(JsonRequest(request.scope, _Body(request.receive, max_bytes).receive))
                    response.headers.update(rate_headers)
                    return response
                except BodyTooLarge:
                    message = f"the body is larger than {max_bytes} bytes, the limit of this path"
                    return error_response(413, "too_large", message, route_limits.body_hint)

        handle_and_record = record_in_audit_log(handle_within_limits, self.name)

        async def handle_request(request: Request) -> Response:
            return await (handle_and_record if self.is_audited else handle_within_limits)(request)

        return handle_request


async def _admit(request: Request, limits: RouteLimits) -> dict[str, str]:
    """Put the principal into the request's state; returns headers about its rate limit.

    A request beyond the limit leaves no principal, so it writes no entry of the audit log: refusing it costs nothing.
    Raises Unauthorized, Forbidden, TooManyRequests, Unavailable.
    """
    authenticator: Authenticator = request.app.state.authenticator
    limiter: RateLimiter = request.app.state.rate_limiter
    headers: dict[str, str] = {}
    match limits.access:
        case "caller":
            try:
                principal = await authenticator.authenticate_caller(request)
            except Unauthorized:
                limiter.count_failed_authentication(request.client.host if request.client else "")
                raise
            headers = limiter.check(principal, kind_of(request.method, is_upload=limits.body_bytes is None))
            request.state.principal = principal
        case "attempt":
            request.state.principal, request.state.token_lifetime = authenticator.authenticate_attempt(request)
        case "launch":
            request.state.principal = authenticator.authenticate_launch(request)
        case "public":
            pass
    return headers


class _Body:
    """A request's body, counted as it arrives."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._remaining_bytes = max_bytes

    async def receive(self) -> Message:
        message = await self._receive()
        self._remaining_bytes -= len(message.get("body", b""))
        if self._remaining_bytes < 0:
            raise BodyTooLarge
        return message
