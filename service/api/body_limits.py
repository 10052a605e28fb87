"""Bodies that are too large are refused while they arrive, before anything holds them in memory."""

from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_response

JSON_BODY_BYTES = 1 << 20  # a training request is some kilobytes
REPORT_BODY_BYTES = 16 << 20  # a batch of a thousand events
MULTIPART_SLACK_BYTES = 1 << 16  # boundaries and form fields around a file

UPLOAD_HINT = "put the file below incoming/ of the dataset store, and send its key as `incoming`"


class BodyTooLarge(Exception):
    """The body is larger than its path allows."""


class BodyLimitMiddleware:
    """ASGI middleware: 413 for a body whose Content-Length or actual size is too large."""

    def __init__(self, app: ASGIApp, max_upload_bytes: int) -> None:
        self._app = app
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_bytes(scope["path"])
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        hint = UPLOAD_HINT if scope["path"].rstrip("/") == "/datasets" else ""
        rejection = error_response(413, "too_large", f"the body is larger than {limit} bytes, the limit of this path", hint)
        if declared.isdigit() and int(declared) > limit:
            await rejection(scope, receive, send)
            return
        body = _Body(receive, limit)
        response_started = False

        async def send_unless_too_large(message: Message) -> None:
            nonlocal response_started
            if not body.too_large:  # the app's response to a truncated body is dropped
                response_started = True
                await send(message)

        with suppress(BodyTooLarge):
            await self._app(scope, body.receive, send_unless_too_large)
        if body.too_large and not response_started:
            await rejection(scope, receive, send)

    def _limit_bytes(self, path: str) -> int:
        if path.rstrip("/") == "/datasets":
            return self._max_upload_bytes + MULTIPART_SLACK_BYTES
        return REPORT_BODY_BYTES if path.startswith("/internal/") else JSON_BODY_BYTES


class _Body:
    """A request's body, counted as it arrives."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._remaining_bytes = limit

    @property
    def too_large(self) -> bool:
        return self._remaining_bytes < 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._remaining_bytes -= len(message.get("body", b""))
        if self.too_large:
            raise BodyTooLarge
        return message
