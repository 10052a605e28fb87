"""Endpoints for attempts (claim, report, finish), each with the attempt's own token, and for a scheduler (reconcile, cleanup).

An attempt claims itself with the token that it was launched with. Every later call needs the secret of the process that made the claim
as well, so a token alone is of no use to anyone else on the machine or in the logs of a proxy.

The scheduler's endpoints have no token of their own: every caller of the service may call them, at any time and repeatedly.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Query
from pydantic import Field

from schema.base import Id, Strict
from schema.events import EventBatch, EventBatchResponse
from schema.result import Result
from schema.spec import CLAIMANT_HEADER, ClaimRequest, ClaimResponse, TokenResponse, claimant_id
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.route import MAINTENANCE_TIMEOUT_S, REPORT_BODY_BYTES, LimitedRoute, limits
from service.core.errors import InvalidRequest, Unauthorized
from service.core.jobs.deletion import ORPHAN_MIN_AGE
from service.core.jobs.orphans import OrphanScan
from service.core.principals import Principal, attempt_principal

ORPHAN_MIN_AGE_HOURS = ORPHAN_MIN_AGE / timedelta(hours=1)
MAX_AGE_HOURS = 24 * 366 * 10


@dataclass(frozen=True)
class Caller:
    """The attempt whose token was sent, and for how long the token is still valid."""

    principal: Principal
    token_lifetime: timedelta


async def authenticate_launch(job_id: Id, attempt: int, services: ServicesDep, authorization: Annotated[str, Header()] = "") -> Principal:
    """The attempt that was launched with the token. Raises Unauthorized."""
    services.tokens.verify_launch_token(_read_bearer(authorization), job_id, attempt)
    return attempt_principal(job_id, attempt)


async def authenticate_attempt(job_id: Id, attempt: int, services: ServicesDep, authorization: Annotated[str, Header()] = "") -> Caller:
    """The attempt that the token is for. Raises Unauthorized."""
    token_lifetime = services.tokens.verify_attempt_token(_read_bearer(authorization), job_id, attempt)
    return Caller(attempt_principal(job_id, attempt), token_lifetime)


async def read_claimant(secret: Annotated[str, Header(alias=CLAIMANT_HEADER, max_length=200)] = "") -> str:
    """The id of the process that calls. Raises Unauthorized without its secret."""
    if not secret:
        raise Unauthorized(f"the process that claimed the attempt must send its secret: {CLAIMANT_HEADER}: …")
    return claimant_id(secret)


def _read_bearer(authorization: str) -> str:
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthorized("an attempt must send its token: Authorization: Bearer …")
    return token


class CleanupRequest(Strict):
    """What to clean up besides secrets."""

    orphans: bool = False
    min_age_hours: float = Field(ORPHAN_MIN_AGE_HOURS, ge=0, le=MAX_AGE_HOURS)  # of orphans, since their job was last launched


router = APIRouter(
    route_class=LimitedRoute, prefix="/internal/jobs/{job_id}/attempts/{attempt}", tags=["internal"], include_in_schema=False
)
maintenance_router = APIRouter(route_class=LimitedRoute, prefix="/internal", tags=["internal"], include_in_schema=False)
LaunchDep = Annotated[Principal, Depends(authenticate_launch)]
AttemptDep = Annotated[Caller, Depends(authenticate_attempt)]
ClaimantDep = Annotated[str, Depends(read_claimant)]


@router.post("/claim")
@limits(body_bytes=REPORT_BODY_BYTES)
def claim(job_id: Id, attempt: int, body: ClaimRequest, principal: LaunchDep, services: ServicesDep) -> ClaimResponse:
    """Claim the attempt for one process."""
    return services.jobs.attempts.claim(principal, job_id, attempt, claimant_id(body.claimant))


@router.post("/token")
def renew_token(job_id: Id, attempt: int, principal: LaunchDep, claimant: ClaimantDep, services: ServicesDep) -> TokenResponse:
    """A new token for the process that owns the attempt, which was silent until the last one expired."""
    return TokenResponse(token=services.jobs.attempts.renew_token(principal, job_id, attempt, claimant))


@router.post("/events")
@limits(body_bytes=REPORT_BODY_BYTES)
def report(
    job_id: Id, attempt: int, body: EventBatch, caller: AttemptDep, claimant: ClaimantDep, services: ServicesDep
) -> EventBatchResponse:
    """Store events; the response has the directive, and a new token when the one in use expires soon."""
    response = services.jobs.attempts.report(caller.principal, job_id, attempt, body, claimant)
    token = services.tokens.renew_attempt_token(job_id, attempt, caller.token_lifetime)
    return response.model_copy(update={"token": token}) if token else response


@router.post("/result", status_code=204)
@limits(body_bytes=REPORT_BODY_BYTES)
def finish(job_id: Id, attempt: int, body: Result, caller: AttemptDep, claimant: ClaimantDep, services: ServicesDep) -> None:
    """Apply the attempt's result."""
    if (body.job_id, body.attempt) != (job_id, attempt):
        raise InvalidRequest("the result is for another attempt than the URL", param="attempt")
    if body.claimant != claimant:
        raise InvalidRequest("the result is of another process than the one that sends it", param="claimant")
    services.jobs.attempts.finish(caller.principal, body)


@maintenance_router.post("/reconcile")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S)
def reconcile(services: ServicesDep, principal: PrincipalDep) -> dict[str, int]:
    """Take one step with every open job."""
    return {"changed": services.jobs.reconciliation.reconcile(principal)}


@maintenance_router.post("/cleanup")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S)
def clean_up(services: ServicesDep, principal: PrincipalDep, body: Annotated[CleanupRequest | None, Body()] = None) -> dict[str, Any]:
    """Destroy secrets that outlived their job, end silent attempts of removed launchers, and delete orphans if requested."""
    services.jobs.reconciliation.reconcile_removed_launchers(principal)
    answer: dict[str, Any] = {"secrets_deleted": services.jobs.deletion.delete_stale_secrets(principal)}
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
