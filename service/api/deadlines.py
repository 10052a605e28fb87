"""Every request is answered within five seconds, if need be with 503 and Retry-After. Calls made for it get the remaining time."""

from starlette.types import ASGIApp, Receive, Scope, Send

from storage.deadline import deadline

REQUEST_TIMEOUT_S = 4.0  # of the promised five; the rest is for a busy instance itself
MAINTENANCE_TIMEOUT_S = 55.0  # the scheduler calls every minute
# Uploading or downloading a dataset may take long, and a deletion may remove thousands of files; each single call is bounded.
UNBOUNDED_PREFIXES = ("/datasets", "/files")


class RequestDeadlineMiddleware:
    """ASGI middleware that sets a deadline for the calls of each request. Streams have none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = _timeout_s(scope) if scope["type"] == "http" else None
        if seconds is None:
            await self._app(scope, receive, send)
            return
        with deadline(seconds):
            await self._app(scope, receive, send)


def _timeout_s(scope: Scope) -> float | None:
    path, method = scope["path"], scope["method"]
    if path in ("/internal/reconcile", "/internal/cleanup", "/internal/orphans"):
        return MAINTENANCE_TIMEOUT_S
    if path.startswith("/jobs/") and method == "DELETE":
        return MAINTENANCE_TIMEOUT_S
    moves_files = path.startswith(UNBOUNDED_PREFIXES) and method in ("POST", "DELETE")
    is_stream = b"follow=true" in scope["query_string"] or any(
        b"text/event-stream" in value for name, value in scope["headers"] if name == b"accept"
    )
    return None if moves_files or is_stream else REQUEST_TIMEOUT_S
