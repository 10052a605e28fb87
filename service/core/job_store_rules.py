"""Rules that every job store follows, so that they are written once."""

from datetime import datetime, timedelta

from schema.events import EventBatch, ReportedEvent
from schema.job import Job
from service.core.ports import Heartbeat, JobSummary

IDEMPOTENCY_TTL = timedelta(hours=24)


def summarize_job(job: Job) -> JobSummary:
    """What a list shows of a job."""
    config = job.training_config
    return JobSummary(
        job_id=job.job_id,
        job_name=job.job_name,
        base_model_id=config.base_model_id,
        status=job.status,
        modality=config.modality,
        trainer_type=config.trainer_type,
        project_id=job.project_id,
        created_at=job.created_at,
    )


def select_new_events(
    heartbeat: Heartbeat | None, attempt: int, batch: EventBatch, now: datetime
) -> tuple[list[tuple[int, ReportedEvent]], Heartbeat]:
    """The events of a batch that were not seen before, with their numbers, and the sign of life they leave.

    A gap is accepted: events may be lost. A batch of an older attempt changes nothing.
    """
    if heartbeat and heartbeat.attempt > attempt:
        return [], heartbeat
    seen = heartbeat.next_seq if heartbeat and heartbeat.attempt == attempt else 0
    fresh = [(seq, event) for seq, event in enumerate(batch.events, start=batch.first_seq) if seq >= seen]
    kept = heartbeat if heartbeat and heartbeat.attempt == attempt else None
    liveness = Heartbeat(
        attempt=attempt,
        received_at=now,
        next_seq=fresh[-1][0] + 1 if fresh else seen,
        phase=batch.phase or (kept.phase if kept else None),
        progress=batch.progress or (kept.progress if kept else None),
    )
    return fresh, liveness
