"""Endpoints for attempts (claim, report, finish), each with the attempt's own token, and for a scheduler (reconcile, cleanup).

An attempt claims itself with the token that it was launched with. Every later call needs the secret of the process that made the claim
as well, so a token alone is of no use to anyone else on the machine or in the logs of a proxy.

The scheduler's endpoints are for a caller with the role `scheduler` or `operator`. They may be called at any time and repeatedly.
"""

from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Query, Request
from pydantic import Field

from schema.base import Id, Strict
from schema.events import EventBatch, EventBatchResponse
from schema.result import Result
from schema.spec import CLAIMANT_HEADER, AttemptCredentials, ClaimRequest, ClaimResponse, TokenResponse, claimant_id
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.route import MAINTENANCE_TIMEOUT_S, REPORT_BODY_BYTES, LimitedRoute, limits
from service.core.errors import InvalidRequest, Unauthorized
from service.core.jobs.deletion import ORPHAN_MIN_AGE
from service.core.jobs.orphans import OrphanScan

ORPHAN_MIN_AGE_HOURS = ORPHAN_MIN_AGE / timedelta(hours=1)
MAX_AGE_HOURS = 24 * 366 * 10


async def read_claimant(secret: Annotated[str, Header(alias=CLAIMANT_HEADER, max_length=200)] = "") -> str:
    """The id of the process that calls. Raises Unauthorized without its secret."""
    if not secret:
        raise Unauthorized(f"the process that claimed the attempt must send its secret: {CLAIMANT_HEADER}: …")
    return claimant_id(secret)


async def get_token_lifetime(request: Request) -> timedelta:
    """How long the attempt's token, which the route has verified, is still valid."""
    return request.state.token_lifetime


class CleanupRequest(Strict):
    """What to clean up besides secrets."""

    orphans: bool = False
    min_age_hours: float = Field(ORPHAN_MIN_AGE_HOURS, ge=0, le=MAX_AGE_HOURS)  # of orphans, since their job was last launched


router = APIRouter(
    route_class=LimitedRoute, prefix="/internal/jobs/{job_id}/attempts/{attempt}", tags=["internal"], include_in_schema=False
)
maintenance_router = APIRouter(route_class=LimitedRoute, prefix="/internal", tags=["internal"], include_in_schema=False)
ClaimantDep = Annotated[str, Depends(read_claimant)]
TokenLifetimeDep = Annotated[timedelta, Depends(get_token_lifetime)]


@router.post("/claim")
@limits(body_bytes=REPORT_BODY_BYTES, access="launch")
def claim(job_id: Id, attempt: int, body: ClaimRequest, principal: PrincipalDep, services: ServicesDep) -> ClaimResponse:
    """Claim the attempt for one process."""
    return services.jobs.attempts.claim(principal, job_id, attempt, claimant_id(body.claimant))


@router.post("/token")
@limits(access="launch")
def renew_token(job_id: Id, attempt: int, principal: PrincipalDep, claimant: ClaimantDep, services: ServicesDep) -> TokenResponse:
    """A new token for the process that owns the attempt, which was silent until the last one expired."""
    return TokenResponse(token=services.jobs.attempts.renew_token(principal, job_id, attempt, claimant))


@router.post("/credentials")
@limits(access="attempt")
def issue_credentials(
    job_id: Id, attempt: int, principal: PrincipalDep, claimant: ClaimantDep, services: ServicesDep
) -> AttemptCredentials:
    """What the attempt uses to reach the object stores. Ask again before it expires."""
    return services.jobs.attempts.issue_credentials(principal, job_id, attempt, claimant)


@router.post("/events")
@limits(body_bytes=REPORT_BODY_BYTES, access="attempt")
def report(
    job_id: Id,
    attempt: int,
    body: EventBatch,
    principal: PrincipalDep,
    claimant: ClaimantDep,
    token_lifetime: TokenLifetimeDep,
    services: ServicesDep,
) -> EventBatchResponse:
    """Store events; the response has the directive, and a new token when the one in use expires soon."""
    response = services.jobs.attempts.report(principal, job_id, attempt, body, claimant)
    token = services.tokens.renew_attempt_token(job_id, attempt, token_lifetime)
    return response.model_copy(update={"token": token}) if token else response


@router.post("/result", status_code=204)
@limits(body_bytes=REPORT_BODY_BYTES, access="attempt")
def finish(job_id: Id, attempt: int, body: Result, principal: PrincipalDep, claimant: ClaimantDep, services: ServicesDep) -> None:
    """Apply the attempt's result."""
    if (body.job_id, body.attempt) != (job_id, attempt):
        raise InvalidRequest("the result is for another attempt than the URL", param="attempt")
    if body.claimant != claimant:
        raise InvalidRequest("the result is of another process than the one that sends it", param="claimant")
    services.jobs.attempts.finish(principal, body)


@maintenance_router.post("/reconcile")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S, audited=False)  # every minute
def reconcile(services: ServicesDep, principal: PrincipalDep) -> dict[str, int]:
    """Take one step with every open job."""
    return {"changed": services.jobs.reconciliation.reconcile(principal)}


@maintenance_router.post("/cleanup")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S)
def clean_up(services: ServicesDep, principal: PrincipalDep, body: Annotated[CleanupRequest | None, Body()] = None) -> dict[str, Any]:
    """Destroy secrets that outlived their job, end silent attempts of removed launchers, delete checkpoints of jobs that were completed
    long ago, and delete orphans if requested."""
    services.jobs.reconciliation.reconcile_removed_launchers(principal)
    services.audit_log.delete_old_entries(principal)
    answer: dict[str, Any] = {"secrets_deleted": services.jobs.deletion.delete_stale_secrets(principal)}
    answer["checkpoints_pruned"] = asdict(services.jobs.retention.prune_expired(principal))
    if not body or not body.orphans:
        return answer
    return answer | _render_orphans(services.jobs.deletion.delete_orphans(principal, min_age=timedelta(hours=body.min_age_hours)))


@maintenance_router.get("/orphans")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S)
def list_orphans(
    services: ServicesDep, principal: PrincipalDep, min_age_hours: Annotated[float, Query(ge=0, le=MAX_AGE_HOURS)] = ORPHAN_MIN_AGE_HOURS
) -> dict[str, Any]:
    """Files of this deployment's jobs that do not exist. `complete`: the scan finished within its timeout."""
    return _render_orphans(services.jobs.deletion.list_orphans(principal, min_age=timedelta(hours=min_age_hours)))


def _render_orphans(scan: OrphanScan) -> dict[str, Any]:
    rows = [
        {"job_id": orphan.job_id, "url": f"{orphan.url}/{orphan.prefix}", "objects": orphan.objects, "size_bytes": orphan.size_bytes}
        for orphan in scan.orphans
    ]
    return {"orphans": rows, "complete": scan.complete}
