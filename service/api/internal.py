"""Endpoints for attempts (claim, report, finish), each with the attempt's own token, and for a scheduler (reconcile, cleanup).

The scheduler's endpoints are for a caller with the role `scheduler` or `operator`. They may be called at any time and repeatedly.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Body

from schema.base import Id, Strict
from schema.events import EventBatch, EventBatchResponse
from schema.result import Result
from schema.spec import ClaimRequest, ClaimResponse
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.route import MAINTENANCE_TIMEOUT_S, REPORT_BODY_BYTES, LimitedRoute, limits
from service.core.errors import InvalidRequest
from service.core.jobs.orphans import OrphanScan


class CleanupRequest(Strict):
    """What to clean up besides secrets."""

    orphans: bool = False


router = APIRouter(
    route_class=LimitedRoute, prefix="/internal/jobs/{job_id}/attempts/{attempt}", tags=["internal"], include_in_schema=False
)
maintenance_router = APIRouter(route_class=LimitedRoute, prefix="/internal", tags=["internal"], include_in_schema=False)


@router.post("/claim")
@limits(body_bytes=REPORT_BODY_BYTES, access="attempt")
def claim(job_id: Id, attempt: int, body: ClaimRequest, principal: PrincipalDep, services: ServicesDep) -> ClaimResponse:
    """Claim the attempt for one process."""
    return services.jobs.attempts.claim(principal, job_id, attempt, body.claimant)


@router.post("/events")
@limits(body_bytes=REPORT_BODY_BYTES, access="attempt")
def report(job_id: Id, attempt: int, body: EventBatch, principal: PrincipalDep, services: ServicesDep) -> EventBatchResponse:
    """Store events; the response has the directive."""
    return services.jobs.attempts.report(principal, job_id, attempt, body)


@router.post("/result", status_code=204)
@limits(body_bytes=REPORT_BODY_BYTES, access="attempt")
def finish(job_id: Id, attempt: int, body: Result, principal: PrincipalDep, services: ServicesDep) -> None:
    """Apply the attempt's result."""
    if (body.job_id, body.attempt) != (job_id, attempt):
        raise InvalidRequest("the result is for another attempt than the URL", param="attempt")
    services.jobs.attempts.finish(principal, body)


@maintenance_router.post("/reconcile")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S, audited=False)  # every minute
def reconcile(services: ServicesDep, principal: PrincipalDep) -> dict[str, int]:
    """Take one step with every open job."""
    return {"changed": services.jobs.reconciliation.reconcile(principal)}


@maintenance_router.post("/cleanup")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S)
def clean_up(services: ServicesDep, principal: PrincipalDep, body: Annotated[CleanupRequest | None, Body()] = None) -> dict[str, Any]:
    """Destroy secrets that outlived their job, end silent attempts of removed launchers, and delete orphans if requested."""
    services.jobs.reconciliation.reconcile_removed_launchers(principal)
    services.audit_log.delete_old_entries(principal)
    answer: dict[str, Any] = {"secrets_deleted": services.jobs.deletion.delete_stale_secrets(principal)}
    return answer | (_render_orphans(services.jobs.deletion.delete_orphans(principal)) if body and body.orphans else {})


@maintenance_router.get("/orphans")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S)
def list_orphans(services: ServicesDep, principal: PrincipalDep) -> dict[str, Any]:
    """Files whose job does not exist. `complete`: the scan finished within its timeout."""
    return _render_orphans(services.jobs.deletion.list_orphans(principal))


def _render_orphans(scan: OrphanScan) -> dict[str, Any]:
    rows = [
        {"job_id": orphan.job_id, "url": f"{orphan.url}/{orphan.prefix}", "objects": orphan.objects, "size_bytes": orphan.size_bytes}
        for orphan in scan.orphans
    ]
    return {"orphans": rows, "complete": scan.complete}
