"""Is the service alive, and does each part it needs answer?"""

from collections.abc import Callable

from fastapi import APIRouter, Response

from schema.version import VERSION
from service.api.deps import UsesParts
from service.api.views import HealthAnswer
from service.core.errors import Unavailable
from storage import ObjectStore, StorageError

router = APIRouter(tags=["health"])


@router.get("/health")
def health(response: Response, parts: UsesParts) -> HealthAnswer:
    """200 when every part answers; 503 with the part that does not."""
    buckets = {store.url: store for store in (parts.objects.configs, parts.objects.datasets, parts.objects.models)}
    checks = {"job_store": _try(parts.store.ping)} | {_name(url, len(buckets)): _try(_look(store)) for url, store in buckets.items()}
    ready = all(answer == "ok" for answer in checks.values())
    if not ready:
        response.status_code = 503
    return HealthAnswer(status="ok" if ready else "degraded", live=True, ready=ready, checks=checks, version=VERSION)


def _name(url: str, stores: int) -> str:
    return "object_store" if stores == 1 else f"object_store {url}"


def _look(store: ObjectStore) -> Callable[[], object]:
    return lambda: store.stat("health/probe")


def _try(check: Callable[[], object]) -> str:
    try:
        check()
    except Unavailable as error:
        return error.message
    except StorageError as error:
        return str(error)
    return "ok"
