"""The service as an ASGI app: `uvicorn service.main:create_app --factory`, or `tunesmith serve`."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

from schema.version import VERSION
from service.api import access, capabilities, datasets, errors, files, health, internal, jobs, openapi, root, train
from service.api.authentication import Authenticator
from service.api.health import make_health_checks
from service.api.stream import Feeds, run_in_thread
from service.bootstrap import Services, build_services, check_adapters
from service.core.errors import Unavailable
from service.core.principals import UPKEEP_PRINCIPAL
from service.logs import configure_logging
from service.settings import Settings

log = logging.getLogger(__name__)

ROUTERS = (
    *(part.router for part in (root, train, capabilities, jobs, datasets, access, files, health, internal)),
    internal.maintenance_router,
)
DESCRIPTION = "One HTTP request becomes a fine-tuned model."


def create_app(settings: Settings | None = None, clock: Callable[[], datetime] | None = None) -> FastAPI:
    """The ASGI app. Nothing runs before its lifespan begins. `clock` defaults to the machine's clock.

    Raises ValueError for a setting that names an unknown adapter.
    """
    settings = settings or Settings()  # pyright: ignore[reportCallIssue]  # pydantic fills them from the environment
    check_adapters(settings)
    configure_logging(settings.log_format)
    # GET /docs loads Swagger UI from this service, so that it works without internet access. Redoc is off: it loads its logo from a CDN.
    app = FastAPIOffline(
        title="Tunesmith",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=_lifespan,
        redoc_url=None,
        static_url="/docs/assets",
        generate_unique_id_function=_make_operation_id,
        swagger_ui_parameters={"validatorUrl": None},  # or Swagger UI would send the schema to a validator on the internet
    )
    app.state.settings = settings
    app.state.clock = clock
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    openapi.document_errors(app, ROUTERS)
    return app


def _make_operation_id(route: APIRoute) -> str:
    """The name of the route's function. FastAPI derives the summary from the same name."""
    return route.name


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    services = await run_in_thread(build_services, app.state.settings, app.state.clock)
    app.state.services = services
    app.state.authenticator = Authenticator(
        keys=services.keys,
        local_token=services.local_token,
        rules=services.identity_rules,
        verifier=services.identity_verifier,
        tokens=services.tokens,
        attempt_identity=services.settings.attempt_identity,
    )
    app.state.feeds = Feeds(services.jobs.repository, services.settings.event_poll_s)
    app.state.health_checks = make_health_checks(services)
    if services.reconciler is not None:
        services.reconciler.start()
    loading = asyncio.create_task(_prepare(services))  # takes seconds; the first request need not wait for it
    log.info("service is ready", extra={"url": services.settings.url, "home": str(services.settings.home_folder)})
    try:
        yield
    finally:
        loading.cancel()
        if services.reconciler is not None:
            await run_in_thread(services.reconciler.stop)
        app.state.health_checks.close()
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
