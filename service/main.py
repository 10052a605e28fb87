"""The service as an ASGI app: `uvicorn service.main:create_app --factory`, or `tunesmith serve`."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import datetime
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from schema.version import VERSION
from service.api import (
    access,
    capabilities,
    datasets,
    docs,
    errors,
    files,
    health,
    internal,
    jobs,
    login,
    metrics,
    models,
    openapi,
    root,
    storage,
    train,
)
from service.api.audit import AuditWriter
from service.api.authentication import Authenticator
from service.api.health import make_health_checks
from service.api.ingestion import IngestionSlots
from service.api.middleware import install_front_door
from service.api.rate_limits import RateLimiter
from service.api.stream import Feeds, FollowerLimits, run_in_thread
from service.bootstrap import Services, build_services, check_adapters
from service.core.errors import Unavailable
from service.core.principals import UPKEEP_PRINCIPAL
from service.core.rate_limits import parse_rate_limits
from service.home import lock_home
from service.logs import configure_logging
from service.settings import Settings

if TYPE_CHECKING:
    from service.telemetry import Telemetry

log = logging.getLogger(__name__)

ROUTERS = (
    *(
        part.router
        for part in (root, docs, train, capabilities, jobs, metrics, datasets, models, storage, access, login, files, health, internal)
    ),
    internal.maintenance_router,
)
DESCRIPTION = "One HTTP request becomes a fine-tuned model."


def create_app(settings: Settings | None = None, clock: Callable[[], datetime] | None = None, *, holds_home_lock: bool = False) -> FastAPI:
    """The ASGI app. Nothing runs before its lifespan begins. `clock` defaults to the machine's clock.

    The lifespan locks the home folder, unless the caller holds the lock for as long as the app runs. Raises ValueError for a setting
    that names an unknown adapter.
    """
    settings = settings or Settings()  # pyright: ignore[reportCallIssue]  # pydantic fills them from the environment
    check_adapters(settings)
    configure_logging(settings.log_format)
    telemetry = _create_telemetry(settings)
    # Only the files of Swagger UI are served by FastAPIOffline; the page is service/api/docs.py. Redoc loads its logo from a CDN.
    app = FastAPIOffline(
        title="Tunesmith",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        static_url=docs.ASSETS_URL,
        telemetry=telemetry.config if telemetry else {"auto_configure": False},
        generate_unique_id_function=_make_operation_id,
    )
    app.state.settings = settings
    app.state.clock = clock
    app.state.rate_limiter = RateLimiter(parse_rate_limits(settings.rate_limits))
    app.state.telemetry = telemetry
    app.state.holds_home_lock = holds_home_lock
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    openapi.document_errors(app, ROUTERS)
    _install_front_door(app, settings)
    return app


def _create_telemetry(settings: Settings) -> "Telemetry | None":
    if settings.otlp_endpoint is None:
        return None
    from service.telemetry import Telemetry  # 60 modules of the SDK and its exporters

    return Telemetry(settings.otlp_endpoint)


def _install_front_door(app: FastAPI, settings: Settings) -> None:
    """Put the middlewares outside of Starlette's own, whose answers to unexpected errors would lack their headers otherwise."""
    build = app.build_middleware_stack

    def build_behind_front_door() -> ASGIApp:
        return install_front_door(build(), settings)

    app.build_middleware_stack = build_behind_front_door


def _make_operation_id(route: APIRoute) -> str:
    """The name of the route's function. FastAPI derives the summary from the same name."""
    return route.name


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    with nullcontext() if app.state.holds_home_lock else lock_home(app.state.settings.home_folder):
        async with _run_services(app):
            yield


@asynccontextmanager
async def _run_services(app: FastAPI) -> AsyncGenerator[None]:
    services = await run_in_thread(build_services, app.state.settings, app.state.clock)
    app.state.services = services
    app.state.authenticator = Authenticator(
        keys=services.keys,
        logins=services.logins,
        local_token=services.local_token,
        rules=services.identity_rules,
        verifier=services.identity_verifier,
        tokens=services.tokens,
        attempt_identity=services.settings.attempt_identity,
    )
    app.state.feeds = Feeds(
        services.jobs.repository,
        services.settings.event_poll_s,
        FollowerLimits(services.settings.max_followers, services.settings.max_followers_per_job),
    )
    app.state.audit_writer = AuditWriter(services.audit_log)
    app.state.health_checks = make_health_checks(services)
    app.state.ingestion_slots = IngestionSlots(services.settings.max_concurrent_uploads)
    telemetry: Telemetry | None = app.state.telemetry
    if telemetry is not None:
        telemetry.start(services.store)
    if services.reconciler is not None:
        services.reconciler.start()
    if services.upkeep is not None:
        services.upkeep.start()
    loading = asyncio.create_task(_prepare(services))  # takes seconds; the first request need not wait for it
    log.info("service is ready", extra={"url": services.settings.url, "home": str(services.settings.home_folder)})
    try:
        yield
    finally:
        loading.cancel()
        if services.reconciler is not None:
            await run_in_thread(services.reconciler.stop)
        if services.upkeep is not None:
            await run_in_thread(services.upkeep.stop)
        app.state.health_checks.close()
        if telemetry is not None:
            await run_in_thread(telemetry.stop)
        for launcher in services.launchers:
            await run_in_thread(launcher.close)
        services.hub.close()
        services.secrets.close()
        services.identity_verifier.close()
        services.access_store.close()
        services.store.close()


async def _prepare(services: Services) -> None:
    for launcher in services.launchers:
        with suppress(Unavailable):  # the launcher logged it, and each request that needs the capabilities tries again
            await run_in_thread(launcher.list_environments)
    with suppress(Unavailable):
        await run_in_thread(services.jobs.reconciliation.reconcile_removed_launchers, UPKEEP_PRINCIPAL)
        if services.reconciler is not None:  # no other process writes: a secret without a job is left over
            await run_in_thread(lambda: services.jobs.deletion.delete_stale_secrets(UPKEEP_PRINCIPAL, orphans=True))
