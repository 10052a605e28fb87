"""Endpoints for attempts (claim, report, finish), each with the attempt's own token, and for a scheduler (reconcile, cleanup).

The scheduler's endpoints have no token of their own: every caller of the service may call them, at any time and repeatedly.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header

from schema.base import Id, Strict
from schema.events import EventBatch, EventBatchResponse
from schema.result import Result
from schema.spec import ClaimRequest, ClaimResponse
from service.api.dependencies import ServicesDep
from service.core.errors import InvalidRequest, Unauthorized
from service.core.jobs.orphans import OrphanScan


async def authenticate_attempt(
    job_id: Id, attempt: int, services: ServicesDep, authorization: Annotated[str, Header()] = ""
) -> tuple[str, int]:
    """The job id and number of the attempt that the token is for. Raises Unauthorized."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthorized("an attempt must send its token: Authorization: Bearer …")
    services.tokens.verify_attempt_token(token, job_id, attempt)
    return job_id, attempt


class CleanupRequest(Strict):
    """What to clean up besides secrets."""

    orphans: bool = False


router = APIRouter(prefix="/internal/jobs/{job_id}/attempts/{attempt}", tags=["internal"], include_in_schema=False)
maintenance_router = APIRouter(prefix="/internal", tags=["internal"], include_in_schema=False)
AttemptDep = Annotated[tuple[str, int], Depends(authenticate_attempt)]


@router.post("/claim")
def claim(body: ClaimRequest, attempt_key: AttemptDep, services: ServicesDep) -> ClaimResponse:
    """Claim the attempt for one process."""
    return services.jobs.attempts.claim(*attempt_key, body.claimant)


@router.post("/events")
def report(body: EventBatch, attempt_key: AttemptDep, services: ServicesDep) -> EventBatchResponse:
    """Store events; the response has the directive."""
    return services.jobs.attempts.report(*attempt_key, body)


@router.post("/result", status_code=204)
def finish(body: Result, attempt_key: AttemptDep, services: ServicesDep) -> None:
    """Apply the attempt's result."""
    if (body.job_id, body.attempt) != attempt_key:
        raise InvalidRequest("the result is for another attempt than the URL", param="attempt")
    services.jobs.attempts.finish(body.job_id, body)


@maintenance_router.post("/reconcile")
def reconcile(services: ServicesDep) -> dict[str, int]:
    """Take one step with every open job."""
    return {"changed": services.jobs.reconciliation.reconcile()}


@maintenance_router.post("/cleanup")
def clean_up(services: ServicesDep, body: Annotated[CleanupRequest | None, Body()] = None) -> dict[str, Any]:
    """Destroy secrets that outlived their job and, if requested, delete files whose job does not exist."""
    destroyed = services.jobs.deletion.delete_stale_secrets()
    return {"secrets_deleted": destroyed} | (_render_orphans(services.jobs.deletion.delete_orphans()) if body and body.orphans else {})


@maintenance_router.get("/orphans")
def list_orphans(services: ServicesDep) -> dict[str, Any]:
    """Files whose job does not exist. `complete`: the scan finished within its timeout."""
    return _render_orphans(services.jobs.deletion.list_orphans())


def _render_orphans(scan: OrphanScan) -> dict[str, Any]:
    rows = [
        {"job_id": orphan.job_id, "url": f"{orphan.url}/{orphan.prefix}", "objects": orphan.objects, "size_bytes": orphan.size_bytes}
        for orphan in scan.orphans
    ]
    return {"orphans": rows, "complete": scan.complete}
