"""Response headers that tell a browser to load nothing else, to show nothing inside other pages and to keep nothing."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.docs import ASSETS_URL

# What an answer may do that is no page: nothing. A page brings its own policy (service/api/docs.py).
CONTENT_SECURITY_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",  # a signed link is a secret
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # for browsers that do not know frame-ancestors
}
ONE_YEAR_S = 31_536_000


class SecurityHeadersMiddleware:
    """ASGI middleware: adds the headers to each answer that does not have them already."""

    def __init__(self, app: ASGIApp, *, is_https: bool) -> None:
        self._app = app
        headers = HEADERS | ({"Strict-Transport-Security": f"max-age={ONE_YEAR_S}"} if is_https else {})
        self._cacheable = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self._not_cacheable = [*self._cacheable, (b"cache-control", b"no-store")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        added = self._cacheable if scope["path"].startswith(f"{ASSETS_URL}/") else self._not_cacheable

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                present = {name.lower() for name, _ in headers}
                message = {**message, "headers": [*headers, *(header for header in added if header[0] not in present)]}
            await send(message)

        await self._app(scope, receive, send_with_headers)
