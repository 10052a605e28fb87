"""Attempts run untrusted code and models. Cloud Run lets their service account call the service; this limits it to reporting.

Cloud Run has verified the identity token and passes it on without its signature. It reads X-Serverless-Authorization first, and so
does this module: the other header is unverified then.
See https://cloud.google.com/run/docs/authenticating/service-to-service.
"""

import jwt
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import error_response

ATTEMPT_PATH_PREFIX = "/internal/jobs/"


class AttemptIdentityMiddleware:
    """ASGI middleware: 403 for the service account `email` at every path except those for attempts."""

    def __init__(self, app: ASGIApp, email: str) -> None:
        self._app = app
        self._email = email

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith(ATTEMPT_PATH_PREFIX) and _caller_email(scope) == self._email:
            rejection = error_response(403, "forbidden", f"{self._email} is the service account of attempts; it may only report")
            await rejection(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _caller_email(scope: Scope) -> str | None:
    """The email in the caller's identity token; None without a token, or for a token that has no email."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    header = headers.get(b"x-serverless-authorization") or headers.get(b"authorization") or b""
    token = header.decode("latin-1").partition(" ")[2]
    try:
        return jwt.decode(token, options={"verify_signature": False}).get("email")
    except jwt.InvalidTokenError:
        return None
