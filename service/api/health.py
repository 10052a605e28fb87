"""Is the service alive, and does each part it needs answer?"""

from collections.abc import Callable

from fastapi import APIRouter, Response

from service.api.deps import UsesParts
from service.api.views import HealthAnswer
from service.bootstrap import Parts
from service.core.errors import Unavailable
from service.version import VERSION
from storage import StorageError

router = APIRouter(tags=["health"])


@router.get("/health")
def health(response: Response, parts: UsesParts) -> HealthAnswer:
    """200 when every part answers; 503 with the part that does not."""
    checks = {"job_store": _try(parts.store.ping), "object_store": _try(lambda: _look(parts))}
    ready = all(answer == "ok" for answer in checks.values())
    if not ready:
        response.status_code = 503
    return HealthAnswer(status="ok" if ready else "degraded", live=True, ready=ready, checks=checks, version=VERSION)


def _look(parts: Parts) -> None:
    parts.objects.stat("health/probe")


def _try(check: Callable[[], None]) -> str:
    try:
        check()
    except Unavailable as error:
        return error.message
    except StorageError as error:
        return str(error)
    return "ok"
