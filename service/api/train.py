"""`POST /train`."""

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from schema.requests import TrainRequest
from service.api.dependencies import IdempotencyHeader, PrincipalDep, ServicesDep
from service.api.responses import TrainResponse
from service.api.route import LimitedRoute

router = APIRouter(route_class=LimitedRoute, tags=["training"])


@router.post("/train", status_code=201, response_model=TrainResponse)
def create_training_job(
    body: TrainRequest, services: ServicesDep, principal: PrincipalDep, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Create a training job. Its record is durable when this responds."""
    job = services.jobs.submission.submit(principal, body, idempotency_key)
    # A rendered response saves FastAPI's second trip to a thread, which validates other answers.
    return JSONResponse(TrainResponse(job_id=job.job_id).model_dump(), status_code=201)
