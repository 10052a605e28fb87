"""The service as an ASGI app: `uvicorn service.main:create_app --factory`, or `tunesmith serve`."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime

from fastapi import FastAPI

from schema.version import VERSION
from service.api import datasets, errors, files, health, internal, jobs, train
from service.api.identities import KeepAttemptsApart
from service.api.limits import LimitBodies
from service.api.patience import Patience
from service.api.stream import Feeds, in_thread
from service.bootstrap import Parts, assemble, check_adapters
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
    app.add_middleware(Patience)
    app.add_middleware(LimitBodies, max_upload_bytes=settings.max_upload_bytes)
    if settings.attempt_identity:
        app.add_middleware(KeepAttemptsApart, email=settings.attempt_identity)
    errors.install(app)
    for part in (train, jobs, datasets, files, health, internal):
        app.include_router(part.router)
    app.include_router(internal.upkeep)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    parts = await in_thread(assemble, app.state.settings, app.state.clock)
    app.state.parts = parts
    app.state.feeds = Feeds(parts.jobs, parts.settings.event_poll_s)
    if parts.reconciler is not None:
        parts.reconciler.start()
    asking = asyncio.create_task(_ask_hardware(parts))  # seconds, which the first request need not wait for
    log.info("service is ready", extra={"url": parts.settings.url, "home": str(parts.settings.home_folder)})
    try:
        yield
    finally:
        asking.cancel()
        if parts.reconciler is not None:
            await in_thread(parts.reconciler.stop)
        await in_thread(parts.launcher.close)
        parts.hub.close()
        parts.secrets.close()
        parts.store.close()


async def _ask_hardware(parts: Parts) -> None:
    with suppress(Unavailable):  # it is in the log, and every request that needs the answer asks again
        await in_thread(parts.launcher.hardware)
        if parts.reconciler is not None:  # this process is the only one: a secret without a job is nobody's
            await in_thread(lambda: parts.jobs.sweep_secrets(orphans=True))
