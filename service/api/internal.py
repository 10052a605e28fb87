"""What attempts call: claim, report, finish; each call carries the attempt's own token. And what a scheduler calls.

The scheduler's calls may be made by anybody who may call the service at all, at any time, and as often as one likes.
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
    """The attempt that the caller may speak for. Raises Unauthorized."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthorized("an attempt shows its token: Authorization: Bearer …")
    services.tokens.verify_attempt_token(token, job_id, attempt)
    return job_id, attempt


class CleanupRequest(Strict):
    """What to clean besides secrets."""

    orphans: bool = False


router = APIRouter(prefix="/internal/jobs/{job_id}/attempts/{attempt}", tags=["internal"], include_in_schema=False)
maintenance_router = APIRouter(prefix="/internal", tags=["internal"], include_in_schema=False)
AttemptDep = Annotated[tuple[str, int], Depends(authenticate_attempt)]


@router.post("/claim")
def claim(body: ClaimRequest, attempt_key: AttemptDep, services: ServicesDep) -> ClaimResponse:
    """Take possession of the attempt, once."""
    return services.jobs.attempts.claim(*attempt_key, body.claimant)


@router.post("/events")
def report(body: EventBatch, attempt_key: AttemptDep, services: ServicesDep) -> EventBatchResponse:
    """Take events, answer with a directive."""
    return services.jobs.attempts.report(*attempt_key, body)


@router.post("/result", status_code=204)
def finish(body: Result, attempt_key: AttemptDep, services: ServicesDep) -> None:
    """Take the attempt's last word."""
    if (body.job_id, body.attempt) != attempt_key:
        raise InvalidRequest("the result is of another attempt than the address", param="attempt")
    services.jobs.attempts.finish(body.job_id, body)


@maintenance_router.post("/reconcile")
def reconcile(services: ServicesDep) -> dict[str, int]:
    """Bring every open job a step nearer to where it should be."""
    return {"changed": services.jobs.reconciliation.reconcile()}


@maintenance_router.post("/cleanup")
def clean_up(services: ServicesDep, body: Annotated[CleanupRequest | None, Body()] = None) -> dict[str, Any]:
    """Destroy secrets that outlived their job; if asked, remove files of jobs that there are not."""
    swept = services.jobs.deletion.delete_stale_secrets()
    return {"secrets_deleted": swept} | (_render_orphans(services.jobs.deletion.delete_orphans()) if body and body.orphans else {})


@maintenance_router.get("/orphans")
def list_orphans(services: ServicesDep) -> dict[str, Any]:
    """Files of jobs that there are not. `complete`: everything was looked at in the time there was."""
    return _render_orphans(services.jobs.deletion.list_orphans())


def _render_orphans(scan: OrphanScan) -> dict[str, Any]:
    rows = [
        {"job_id": orphan.job_id, "url": f"{orphan.url}/{orphan.prefix}", "objects": orphan.objects, "size_bytes": orphan.size_bytes}
        for orphan in scan.orphans
    ]
    return {"orphans": rows, "complete": scan.complete}
