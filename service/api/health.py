"""`GET /health`: is the service alive, and does each part that it needs answer?"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

from fastapi import APIRouter, Request, Response

from schema.version import VERSION
from service.api.responses import HealthResponse
from service.api.route import LimitedRoute, limits
from service.bootstrap import Services
from service.core.errors import Unavailable
from storage import StorageError
from storage.deadline import remaining_s

router = APIRouter(route_class=LimitedRoute, tags=["health"])

CHECK_TIMEOUT_S = 4.0  # if the caller set no shorter deadline


@limits(access="public")
@router.get("/health", responses={503: {"model": HealthResponse, "description": "A part does not answer."}})
async def get_health(request: Request, response: Response) -> HealthResponse:
    """200 when every part answers that requests need; 503 with the part that does not. `live` only says that the process runs."""
    health_checks: HealthChecks = request.app.state.health_checks
    answers = await health_checks.run()
    checks = {name: answer for name, answer in answers.items() if name not in health_checks.launchers}
    launchers = {launcher: answers[name] for name, launcher in health_checks.launchers.items()}
    ready = all(answer == "ok" for answer in checks.values())
    if not ready:
        response.status_code = 503
    return HealthResponse(status="ok" if ready else "degraded", live=True, ready=ready, checks=checks, launchers=launchers, version=VERSION)


class HealthChecks:
    """Named checks, each in a thread of its own.

    `GET /health` therefore answers while requests occupy every thread of the pool that endpoints share. Requests that arrive while a
    check runs wait for that same check, so that a dependency that hangs never occupies more than one thread.
    """

    def __init__(
        self,
        checks: Mapping[str, Callable[[], object]],
        launchers: Mapping[str, str] | None = None,
        timeout_s: float = CHECK_TIMEOUT_S,
    ) -> None:
        """`launchers` gives the names of those checks that ask a launcher, each with the launcher's name."""
        self.launchers = dict(launchers or {})
        self._checks = checks
        self._timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(len(checks), thread_name_prefix="health")
        self._running: dict[str, Future[str]] = {}

    async def run(self) -> dict[str, str]:
        """Each check's result: "ok", or what is wrong with that part."""
        for name, check in self._checks.items():
            if name not in self._running or self._running[name].done():
                # The copied context carries the request's deadline, which bounds the calls of the store's client.
                self._running[name] = self._executor.submit(copy_context().run, _run_check, check)
        futures = {name: asyncio.wrap_future(running) for name, running in self._running.items()}
        timeout_s = remaining_s(self._timeout_s)
        await asyncio.wait([asyncio.shield(future) for future in futures.values()], timeout=timeout_s)
        return {name: future.result() if future.done() else f"no answer within {timeout_s:.1f} s" for name, future in futures.items()}

    def close(self) -> None:
        """Start no more checks. Does not wait for those that run."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def make_health_checks(services: Services) -> HealthChecks:
    """One check of the job store, one of each object store, and one of each launcher."""
    stores = {store.url: store for store in (services.buckets.configs, services.buckets.datasets, services.buckets.models)}
    checks: dict[str, Callable[[], object]] = {"job_store": lambda: services.store.ping()}
    for url, store in stores.items():
        checks["object_store" if len(stores) == 1 else f"object_store {url}"] = partial(store.stat, "health/probe")
    launchers = {f"launcher {launcher.name}": launcher for launcher in services.launchers}
    checks |= {name: launcher.ping for name, launcher in launchers.items()}
    return HealthChecks(checks, {name: launcher.name for name, launcher in launchers.items()})


def _run_check(check: Callable[[], object]) -> str:
    try:
        check()
    except Unavailable as error:
        return f"{error.message} {error.hint}".strip()
    except StorageError as error:
        return str(error)
    return "ok"
