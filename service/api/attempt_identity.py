"""Attempts run code and models that came from outside. Their identity opens the service's front door, and here no other one.

Cloud Run's front door has checked the token and hands it on, without its signature. It looks at X-Serverless-Authorization first, and so
do we: what stands in the other header then is whatever the caller likes.
See https://cloud.google.com/run/docs/authenticating/service-to-service.
"""

import jwt
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import error_response

ATTEMPT_PATH_PREFIX = "/internal/jobs/"


class AttemptIdentityMiddleware:
    """ASGI middleware: 403 for the service account `email` at every address but those for attempts."""

    def __init__(self, app: ASGIApp, email: str) -> None:
        self._app = app
        self._email = email

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith(ATTEMPT_PATH_PREFIX) and _caller_email(scope) == self._email:
            refusal = error_response(403, "forbidden", f"{self._email} is the identity of attempts: it may report, and nothing else")
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _caller_email(scope: Scope) -> str | None:
    """The account that the front door let in; None where there is no such door, or its token names nobody."""
    shown: dict[bytes, bytes] = dict(scope["headers"])
    header = shown.get(b"x-serverless-authorization") or shown.get(b"authorization") or b""
    token = header.decode("latin-1").partition(" ")[2]
    try:
        return jwt.decode(token, options={"verify_signature": False}).get("email")
    except jwt.InvalidTokenError:
        return None
