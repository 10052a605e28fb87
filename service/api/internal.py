"""What attempts call: claim, report, finish; each call carries the attempt's own token. And what a scheduler calls.

The scheduler's calls may be made by anybody who may call the service at all, at any time, and as often as one likes.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header

from schema.base import Id, Strict
from schema.events import BatchAnswer, EventBatch
from schema.result import Result
from schema.spec import ClaimAnswer, ClaimRequest
from service.api.deps import UsesParts
from service.core.errors import InvalidRequest, Unauthorized
from service.core.orphans import Orphans


async def attempt_of(job_id: Id, attempt: int, parts: UsesParts, authorization: Annotated[str, Header()] = "") -> tuple[str, int]:
    """The attempt that the caller may speak for. Raises Unauthorized."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthorized("an attempt shows its token: Authorization: Bearer …")
    parts.tokens.check_attempt(token, job_id, attempt)
    return job_id, attempt


class SweepRequest(Strict):
    """What to clean besides secrets."""

    orphans: bool = False


router = APIRouter(prefix="/internal/jobs/{job_id}/attempts/{attempt}", tags=["internal"], include_in_schema=False)
upkeep = APIRouter(prefix="/internal", tags=["internal"], include_in_schema=False)
ByAttempt = Annotated[tuple[str, int], Depends(attempt_of)]


@router.post("/claim")
def claim(body: ClaimRequest, who: ByAttempt, parts: UsesParts) -> ClaimAnswer:
    """Take possession of the attempt, once."""
    return parts.jobs.claim(*who, body.claimant)


@router.post("/events")
def report(body: EventBatch, who: ByAttempt, parts: UsesParts) -> BatchAnswer:
    """Take events, answer with a directive."""
    return parts.jobs.report(*who, body)


@router.post("/result", status_code=204)
def finish(body: Result, who: ByAttempt, parts: UsesParts) -> None:
    """Take the attempt's last word."""
    if (body.job_id, body.attempt) != who:
        raise InvalidRequest("the result is of another attempt than the address", param="attempt")
    parts.jobs.finish(body.job_id, body)


@upkeep.post("/reconcile")
def reconcile(parts: UsesParts) -> dict[str, int]:
    """Bring every open job a step nearer to where it should be."""
    return {"changed": parts.jobs.reconcile()}


@upkeep.post("/sweep")
def sweep(parts: UsesParts, body: Annotated[SweepRequest | None, Body()] = None) -> dict[str, Any]:
    """Destroy secrets that outlived their job; if asked, remove files of jobs that there are not."""
    swept = parts.jobs.sweep_secrets()
    return {"swept": swept} | (_orphans(parts.jobs.sweep_orphans()) if body and body.orphans else {})


@upkeep.get("/orphans")
def orphans(parts: UsesParts) -> dict[str, Any]:
    """Files of jobs that there are not. `complete`: everything was looked at in the time there was."""
    return _orphans(parts.jobs.orphans())


def _orphans(found: Orphans) -> dict[str, Any]:
    rows = [
        {"job_id": orphan.job_id, "url": f"{orphan.url}/{orphan.prefix}", "objects": orphan.objects, "size_bytes": orphan.size_bytes}
        for orphan in found.found
    ]
    return {"orphans": rows, "complete": found.complete}
