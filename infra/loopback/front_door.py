"""Cloud Run's authentication in front of a service: a request needs a Google identity token for the service.

`uvicorn infra.loopback.front_door:create_app --factory` runs the service behind it. The token is verified with the public key of the
loopback metadata server, so a client must fetch a signed token for this service from there.
"""

import os

import jwt
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.main import create_app as create_service
from service.settings import Settings

# The first header present is used; the attempt's own token is in the second.
TOKEN_HEADERS = (b"x-serverless-authorization", b"authorization")
REMOVED_SIGNATURE = b"SIGNATURE_REMOVED_BY_GOOGLE"  # so that the service cannot use the token elsewhere


class IdentityTokenMiddleware:
    """ASGI middleware: 403 for a request without a valid identity token, as in Cloud Run."""

    def __init__(self, app: ASGIApp, audience: str, keys_url: str) -> None:
        self._app = app
        self._audience = audience
        self._keys = jwt.PyJWKClient(keys_url)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            name = next((name for name in TOKEN_HEADERS if name in headers), None)
            if name is None or not self._is_valid_token(headers[name].decode()):
                forbidden = PlainTextResponse("Error: Forbidden. Your client does not have permission to get this URL.", 403)
                await forbidden(scope, receive, send)
                return
            unsigned = headers[name].rpartition(b".")[0] + b"." + REMOVED_SIGNATURE
            scope = {**scope, "headers": [(header, unsigned if header == name else value) for header, value in scope["headers"]]}
        await self._app(scope, receive, send)

    def _is_valid_token(self, header: str) -> bool:
        token = header.removeprefix("Bearer ")
        try:
            key = self._keys.get_signing_key_from_jwt(token)
            jwt.decode(token, key, algorithms=["RS256"], audience=self._audience, options={"require": ["exp", "email"]})
        except jwt.PyJWTError:
            return False
        return True


def create_app() -> ASGIApp:
    """The service behind the middleware. The environment is that of `make cloud-local`."""
    settings = Settings()  # pyright: ignore[reportCallIssue]
    app = create_service(settings)
    keys_url = f"http://{os.environ['GCE_METADATA_HOST']}/oauth2/v3/certs"
    app.add_middleware(IdentityTokenMiddleware, audience=settings.identity_audience or settings.url, keys_url=keys_url)
    return app
