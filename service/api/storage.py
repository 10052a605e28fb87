"""`/storage`, and deleting the checkpoints of a job: what is stored, and freeing what nobody needs any more."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel

from schema.base import Id
from schema.job import Status
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.route import MAINTENANCE_TIMEOUT_S, LimitedRoute, limits
from service.core.jobs.retention import Keep
from service.core.jobs.storage_usage import UsageBytes

router = APIRouter(route_class=LimitedRoute, tags=["storage"])


class JobBytes(BaseModel):
    """Bytes of a job by kind."""

    checkpoints: int
    artifacts: int  # with the files of trackers
    logs: int  # with the working folders of attempts


class KindBytes(JobBytes):
    """Bytes of a tenant by kind."""

    datasets: int


class JobStorage(BaseModel):
    """What one job stores."""

    job_id: str
    job_name: str
    status: Status
    finished_at: datetime | None
    total_bytes: int
    bytes: JobBytes


class StorageResponse(BaseModel):
    """What the caller's tenant stores."""

    total_bytes: int
    bytes: KindBytes
    jobs: list[JobStorage]  # the largest first
    complete: bool  # false: not everything was counted in time
    checkpoint_retention_days: float | None  # how long a completed job keeps its checkpoints; null: forever
    base_model_bytes: int | None  # of all tenants; null: the caller is no operator
    orphan_bytes: int | None  # of files whose job does not exist; likewise


class PruneResponse(BaseModel):
    """What was deleted."""

    job_id: str
    freed_bytes: int
    deleted_steps: list[int]
    kept_step: int | None  # the checkpoint that is still there


@router.get("/storage")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S)
def get_storage(
    services: ServicesDep,
    principal: PrincipalDep,
    limit: Annotated[int, Query(ge=0, le=1000, description="How many jobs to list; all are counted.")] = 20,
) -> StorageResponse:
    """Bytes that the caller's datasets and jobs take, by kind and by job."""
    usage = services.jobs.storage.measure(principal)
    jobs = [
        JobStorage(
            job_id=job.job_id,
            job_name=job.job_name,
            status=job.status,
            finished_at=job.finished_at,
            total_bytes=job.stored.total,
            bytes=_job_bytes(job.stored),
        )
        for job in usage.jobs[:limit]
    ]
    return StorageResponse(
        total_bytes=usage.dataset_bytes + usage.by_kind.total,
        bytes=KindBytes(datasets=usage.dataset_bytes, **_job_bytes(usage.by_kind).model_dump()),
        jobs=jobs,
        complete=usage.complete,
        checkpoint_retention_days=services.settings.checkpoint_retention_days,
        base_model_bytes=usage.base_model_bytes,
        orphan_bytes=usage.orphan_bytes,
    )


@router.delete("/jobs/{job_id}/checkpoints")
@limits(timeout_s=MAINTENANCE_TIMEOUT_S)
def delete_checkpoints(
    job_id: Id,
    services: ServicesDep,
    principal: PrincipalDep,
    keep: Annotated[
        Keep,
        Query(
            description="`published`: keep the one that is of use: of a completed job the published one, reduced to what an export reads, "
            "else the one that a retry continues from. `none`: delete all."
        ),
    ] = "published",
    dry_run: Annotated[bool, Query(description="Delete nothing, and answer what would be deleted.")] = False,
) -> PruneResponse:
    """Delete the checkpoints of a job that has ended. Can be repeated."""
    pruned = services.jobs.retention.prune(principal, job_id, keep, dry_run=dry_run)
    return PruneResponse(
        job_id=job_id, freed_bytes=pruned.freed_bytes, deleted_steps=list(pruned.deleted_steps), kept_step=pruned.kept_step
    )


def _job_bytes(stored: UsageBytes) -> JobBytes:
    return JobBytes(checkpoints=stored.checkpoints, artifacts=stored.artifacts, logs=stored.logs)
