"""`POST /train`."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from schema.dry_run import DryRunResponse
from schema.requests import TrainRequest
from service.api.dependencies import IdempotencyHeader, PrincipalDep, ServicesDep
from service.api.responses import TrainResponse
from service.api.route import LimitedRoute

router = APIRouter(route_class=LimitedRoute, tags=["training"])

DryRunQuery = Annotated[
    bool, Query(description="Only say what the job would do, need, take and cost. Nothing is stored, launched or charged.")
]


@router.post(
    "/train",
    status_code=201,
    response_model=TrainResponse,
    responses={200: {"model": DryRunResponse, "description": "With `dry_run`: what the job would do."}},
)
def create_training_job(
    body: TrainRequest,
    services: ServicesDep,
    principal: PrincipalDep,
    idempotency_key: IdempotencyHeader = None,
    dry_run: DryRunQuery = False,  # a query parameter
) -> Response:
    """Create a training job. Its record is durable when this responds."""
    if dry_run:
        plan = services.jobs.submission.dry_run(principal, body)
        return Response(plan.model_dump_json(), media_type="application/json")
    job = services.jobs.submission.submit(principal, body, idempotency_key)
    # A rendered response saves FastAPI's second trip to a thread, which validates other answers.
    return JSONResponse(TrainResponse(job_id=job.job_id).model_dump(), status_code=201)
