"""The service as an ASGI app: `uvicorn service.main:create_app --factory`, or `tunesmith serve`."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime

from fastapi import FastAPI

from schema.version import VERSION
from service.api import datasets, errors, files, health, internal, jobs, train
from service.api.attempt_identity import AttemptIdentityMiddleware
from service.api.body_limits import BodyLimitMiddleware
from service.api.deadlines import RequestDeadlineMiddleware
from service.api.stream import Feeds, run_in_thread
from service.bootstrap import Services, build_services, check_adapters
from service.core.errors import Unavailable
from service.logs import configure_logging
from service.settings import Settings

log = logging.getLogger(__name__)

DESCRIPTION = "One HTTP request becomes a fine-tuned model."


def create_app(settings: Settings | None = None, clock: Callable[[], datetime] | None = None) -> FastAPI:
    """The app, with its own background task. Nothing runs before its lifespan begins. `clock` is the machine's if left out.

    Raises ValueError for a setting that names what there is not.
    """
    settings = settings or Settings()  # pyright: ignore[reportCallIssue]  # pydantic fills them from the environment
    check_adapters(settings)
    configure_logging(settings.log_format)
    app = FastAPI(title="Tunesmith", version=VERSION, description=DESCRIPTION, lifespan=_lifespan)
    app.state.settings = settings
    app.state.clock = clock
    app.add_middleware(RequestDeadlineMiddleware)
    app.add_middleware(BodyLimitMiddleware, max_upload_bytes=settings.max_upload_bytes)
    if settings.attempt_identity:
        app.add_middleware(AttemptIdentityMiddleware, email=settings.attempt_identity)
    errors.install(app)
    for part in (train, jobs, datasets, files, health, internal):
        app.include_router(part.router)
    app.include_router(internal.maintenance_router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    services = await run_in_thread(build_services, app.state.settings, app.state.clock)
    app.state.services = services
    app.state.feeds = Feeds(services.jobs.repository, services.settings.event_poll_s)
    if services.reconciler is not None:
        services.reconciler.start()
    asking = asyncio.create_task(_load_capabilities(services))  # seconds, which the first request need not wait for
    log.info("service is ready", extra={"url": services.settings.url, "home": str(services.settings.home_folder)})
    try:
        yield
    finally:
        asking.cancel()
        if services.reconciler is not None:
            await run_in_thread(services.reconciler.stop)
        await run_in_thread(services.launcher.close)
        services.hub.close()
        services.secrets.close()
        services.store.close()


async def _load_capabilities(services: Services) -> None:
    with suppress(Unavailable):  # it is in the log, and every request that needs the answer asks again
        await run_in_thread(services.launcher.get_capabilities)
        if services.reconciler is not None:  # this process is the only one: a secret without a job is nobody's
            await run_in_thread(lambda: services.jobs.deletion.delete_stale_secrets(orphans=True))
