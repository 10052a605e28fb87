"""Is the service alive, and does each part it needs answer?"""

from collections.abc import Callable

from fastapi import APIRouter, Response

from schema.version import VERSION
from service.api.dependencies import ServicesDep
from service.api.responses import HealthResponse
from service.core.errors import Unavailable
from storage import ObjectStore, StorageError

router = APIRouter(tags=["health"])


@router.get("/health")
def health(response: Response, services: ServicesDep) -> HealthResponse:
    """200 when every part answers; 503 with the part that does not."""
    buckets = {store.url: store for store in (services.buckets.configs, services.buckets.datasets, services.buckets.models)}
    checks = {"job_store": _run_check(services.store.ping)} | {
        _check_name(url, len(buckets)): _run_check(_make_store_check(store)) for url, store in buckets.items()
    }
    ready = all(answer == "ok" for answer in checks.values())
    if not ready:
        response.status_code = 503
    return HealthResponse(status="ok" if ready else "degraded", live=True, ready=ready, checks=checks, version=VERSION)


def _check_name(url: str, stores: int) -> str:
    return "object_store" if stores == 1 else f"object_store {url}"


def _make_store_check(store: ObjectStore) -> Callable[[], object]:
    return lambda: store.stat("health/probe")


def _run_check(check: Callable[[], object]) -> str:
    try:
        check()
    except Unavailable as error:
        return error.message
    except StorageError as error:
        return str(error)
    return "ok"
