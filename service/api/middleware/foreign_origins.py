"""Refuses what other websites make a browser send (CSRF), reads included: an event stream or an image needs no permission to be sent."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import error_response

# Pages that show nothing of anyone, and signed links: another website may link to them.
LINKABLE_PATHS = ("/", "/docs")
LINKABLE_PREFIX = "/files/"
OWN_SITES = ("", "same-origin", "none")  # Sec-Fetch-Site: no browser, our own page, or the person who typed the address


class ForeignOriginsMiddleware:
    """ASGI middleware: 403 for a request that a page of another origin made, unless that origin is allowed.

    Programs send neither `Origin` nor `Sec-Fetch-Site`. A browser sends the first with every request that is not a plain read, and the
    second with all requests to loopback and over HTTPS.
    """

    def __init__(self, app: ASGIApp, *, public_url: str | None, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = {origin.lower().rstrip("/") for origin in (*allowed, public_url or "") if origin}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        refusal = error_response(
            403,
            "foreign_origin",
            "a page of another website sent this request",
            "call the API from a program, from a page of this service, or from an origin in TUNESMITH_ALLOWED_ORIGINS",
        )
        await refusal(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        origins = headers.getlist("origin")
        if origins:
            own = f"{scope.get('scheme', 'http')}://{headers.get('host', '')}".lower()
            return len(origins) == 1 and (origins[0].lower() == own or origins[0].lower() in self._allowed)
        return headers.get("sec-fetch-site", "") in OWN_SITES or _is_link(scope, headers)


def _is_link(scope: Scope, headers: Headers) -> bool:
    """Whether a person followed a link in a window of their own: no page can read what it shows."""
    is_linkable = scope["path"] in LINKABLE_PATHS or scope["path"].startswith(LINKABLE_PREFIX)
    is_navigation = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return scope["method"] in ("GET", "HEAD") and is_linkable and is_navigation
