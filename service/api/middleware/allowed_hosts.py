"""Refuses requests for a host that is not this service: a page in a browser reaches it under a name of its own (DNS rebinding)."""

from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import error_response

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
PROBE_PATH = "/docs"  # shows nothing of anyone; a platform's probes name an address of their own (infra/terraform/service.tf)


class AllowedHostsMiddleware:
    """ASGI middleware: 421 unless the header `Host` names loopback, the public URL, the configured host, or an allowed host.

    Also allowed is the address at which the connection arrived: a name can be pointed at another machine, an address cannot.
    """

    def __init__(self, app: ASGIApp, *, host: str, public_url: str | None, allowed: Sequence[str]) -> None:
        self._app = app
        names = (host, urlsplit(public_url).hostname or "" if public_url else "", *allowed)
        self._allowed = LOOPBACK_HOSTS | {name.lower().strip("[]") for name in names if name and not name.startswith("*.")}
        self._allowed_suffixes = tuple(name[1:].lower() for name in names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        refusal = error_response(
            421,
            "unknown_host",
            "this service does not answer for the host in the header Host",
            "use the URL that the service printed when it started, or add the host to TUNESMITH_ALLOWED_HOSTS",
        )
        await refusal(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        hosts = Headers(scope=scope).getlist("host")
        if not hosts:  # a health check by HTTP/1.0; browsers always send it
            return True
        name = read_hostname(hosts[0]) if len(hosts) == 1 else None
        server: tuple[str, int | None] | None = scope.get("server")
        if name is None:
            return False
        if scope["path"] == PROBE_PATH and scope["method"] in ("GET", "HEAD") and _is_address(name):
            return True
        return name in self._allowed or name.endswith(self._allowed_suffixes) or (server is not None and name == server[0])


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def read_hostname(authority: str) -> str | None:
    """The name in `name:port` or `[address]:port`, in lower case; None if it is malformed."""
    try:
        parts = urlsplit(f"//{authority}")
        parts.port  # noqa: B018  # raises for an invalid port
    except ValueError:
        return None
    return parts.hostname if parts.netloc == authority and parts.username is None else None
