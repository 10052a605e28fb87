"""`POST /train`."""

from fastapi import APIRouter

from schema.requests import TrainRequest
from service.api.dependencies import IdempotencyHeader, PrincipalDep, ServicesDep
from service.api.responses import TrainResponse
from service.api.route import LimitedRoute

router = APIRouter(route_class=LimitedRoute, tags=["training"])


@router.post("/train", status_code=201)
def create_training_job(
    body: TrainRequest, services: ServicesDep, principal: PrincipalDep, idempotency_key: IdempotencyHeader = None
) -> TrainResponse:
    """Create a training job. Its record is durable when this responds."""
    return TrainResponse(job_id=services.jobs.submission.submit(principal, body, idempotency_key).job_id)
