"""Every request is answered within five seconds, or told to come again: whatever it calls gets what is left of that."""

from starlette.types import ASGIApp, Receive, Scope, Send

from storage.deadline import deadline

REQUEST_TIMEOUT_S = 4.0  # of the five that are promised: a busy instance needs some for itself
MAINTENANCE_TIMEOUT_S = 55.0  # a scheduler comes every minute
# Moving a dataset takes as long as it takes, and a deletion may have thousands of files to remove; their single calls are bounded.
UNBOUNDED_PREFIXES = ("/datasets", "/files")


class RequestDeadlineMiddleware:
    """ASGI middleware that sets how long a request may wait for what is behind the service. Streams last."""

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
    moves_files = path.startswith(UNBOUNDED_PREFIXES) and method in ("POST", "DELETE")
    deletes_job = path.startswith("/jobs/") and method == "DELETE"
    follows = b"follow=true" in scope["query_string"] or any(
        b"text/event-stream" in value for name, value in scope["headers"] if name == b"accept"
    )
    return MAINTENANCE_TIMEOUT_S if deletes_job else None if moves_files or follows else REQUEST_TIMEOUT_S
