"""`POST /train` and `GET /capabilities`."""

from typing import Any

from fastapi import APIRouter

from schema.requests import TrainRequest
from service.api.deps import ForTenant, IdempotencyHeader, UsesParts
from service.api.views import TrainAnswer
from service.core.capabilities import describe

router = APIRouter(tags=["training"])


@router.post("/train", status_code=201)
def train(body: TrainRequest, parts: UsesParts, tenant_id: ForTenant, idempotency_key: IdempotencyHeader = None) -> TrainAnswer:
    """Start a training job. It is durable when this answers."""
    return TrainAnswer(job_id=parts.jobs.submit(body, tenant_id, idempotency_key).job_id)


# Any: the answer grows with the deployment; its shape is documented in docs/api.md.
@router.get("/capabilities")
def capabilities(parts: UsesParts) -> dict[str, Any]:
    """What this deployment can train, on what, and into what."""
    profiles = {name: parts.launcher.hardware(name) for name in parts.launcher.profiles}
    return describe(profiles, parts.launcher.name)
