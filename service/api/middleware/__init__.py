"""What every request passes before the app, as plain ASGI middleware: one small file each, none of which reads a body.

The order, from the outside, with the reason for each place:

1. `telemetry` (service/telemetry.py), only if a collector is configured: its span covers everything else.
2. uvicorn's ProxyHeadersMiddleware, only for trusted proxies: all others see the caller's address and scheme.
3. `request_context`: the request id and the access log cover refused requests, too.
4. `security_headers`: every answer has them, also a refusal and an unexpected error.
5. `allowed_hosts`: a request for another host's name is not for this service.
6. `foreign_origins`: compares the origin with the host, which is now known to be ours.
7. Starlette's CORSMiddleware, only if origins are allowed: it answers their preflight requests.
8. The app, beginning with Starlette's ServerErrorMiddleware.
"""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service.api.middleware.allowed_hosts import AllowedHostsMiddleware
from service.api.middleware.foreign_origins import ForeignOriginsMiddleware
from service.api.middleware.request_context import RequestContextMiddleware
from service.api.middleware.security_headers import SecurityHeadersMiddleware
from service.settings import Settings

CORS_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
CORS_HEADERS = ("Accept", "Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Traceparent", "X-HF-Token", "X-Request-ID")
CORS_EXPOSED_HEADERS = ("Retry-After", "X-Request-ID")


def install_front_door(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The app behind the middlewares that the settings ask for, in the order above (the first of them, telemetry, is not added here)."""
    if settings.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.allowed_origins,
            allow_methods=CORS_METHODS,
            allow_headers=CORS_HEADERS,
            expose_headers=CORS_EXPOSED_HEADERS,
        )
    app = ForeignOriginsMiddleware(app, public_url=settings.public_url, allowed=settings.allowed_origins)
    app = AllowedHostsMiddleware(app, host=settings.host, public_url=settings.public_url, allowed=settings.allowed_hosts)
    app = SecurityHeadersMiddleware(app, is_https=(settings.public_url or "").startswith("https://"))
    app = RequestContextMiddleware(app)
    if settings.trusted_proxies:
        app = ProxyHeadersMiddleware(app, list(settings.trusted_proxies))  # type: ignore[arg-type,assignment]  # uvicorn has types of its own
    return app
