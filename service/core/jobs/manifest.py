"""The publish manifest: lists a completed job's artifacts in the model bucket, for readers that see the bucket alone."""

import logging
from datetime import datetime

from schema.job import Job, Status
from schema.result import PublishManifest
from schema.spec import manifest_key
from service.core import lifecycle
from service.core.errors import NotFound, Unavailable
from service.core.jobs.repository import JobRepository
from storage import ObjectStore, StorageError

log = logging.getLogger(__name__)


def write_manifest(repository: JobRepository, models: ObjectStore, job: Job) -> Job:
    """Write the manifest of a completed job unless it is written already. A failure is logged: the next reader of the job tries again.

    Only completed jobs get one: an attempt that was given up cannot complete its job, so it can never publish.
    """
    if job.status is not Status.COMPLETED or job.manifest_written or not job.artifacts:
        return job
    now = repository.clock()

    def mark_written(job: Job, _: datetime) -> Job:
        return lifecycle.mark_manifest_written(job, now)

    manifest = PublishManifest(job_id=job.job_id, attempt=len(job.attempts), artifacts=job.artifacts, created_at=job.finished_at or now)
    try:
        models.write(manifest_key(job.job_id), manifest.model_dump_json(indent=1).encode())
        return repository.change(job.job_id, mark_written)
    except (StorageError, Unavailable, NotFound) as error:
        log.warning("manifest not written yet", extra={"job_id": job.job_id, "error": str(error)})
        return job
