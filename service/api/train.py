"""`POST /train` and `GET /capabilities`."""

from typing import Any

from fastapi import APIRouter

from schema.requests import TrainRequest
from service.api.dependencies import IdempotencyHeader, ServicesDep, TenantDep
from service.api.responses import TrainResponse
from service.core.capabilities import capabilities_response

router = APIRouter(tags=["training"])


@router.post("/train", status_code=201)
def train(body: TrainRequest, services: ServicesDep, tenant_id: TenantDep, idempotency_key: IdempotencyHeader = None) -> TrainResponse:
    """Start a training job. It is durable when this answers."""
    return TrainResponse(job_id=services.jobs.submit(body, tenant_id, idempotency_key).job_id)


# Any: the answer grows with the deployment; its shape is documented in docs/api.md.
@router.get("/capabilities")
def get_capabilities(services: ServicesDep) -> dict[str, Any]:
    """What this deployment can train, on what, and into what."""
    profiles = {name: services.launcher.get_capabilities(name) for name in services.launcher.profiles}
    return capabilities_response(profiles, services.launcher.name)
