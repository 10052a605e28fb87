"""Rules that every job store adapter shares."""

from datetime import datetime, timedelta
from typing import Literal

from schema.events import EventBatch, ReportedEvent
from schema.job import Job, Status
from service.core.accrual import summarize_cost
from service.core.ports import Heartbeat, JobSummary

IDEMPOTENCY_TTL = timedelta(hours=24)


def summarize_job(job: Job) -> JobSummary:
    """The fields of a job that a list shows."""
    summary = job.training_config.summarize()
    return JobSummary(
        job_id=job.job_id,
        job_name=job.job_name,
        base_model_id=summary.base_model_id,
        status=job.status,
        modality=summary.modality,
        trainer_type=job.training_config.trainer_type,
        project_id=job.project_id,
        created_at=job.created_at,
        cost=summarize_cost(job),
    )


def work_state_of(job: Job) -> Literal["queued", "active"] | None:
    """In which of the lists of work a job is; None for one that waits for nobody."""
    return "queued" if job.status is Status.QUEUED else "active" if job.status.is_active else None


def select_new_events(
    heartbeat: Heartbeat | None, attempt: int, batch: EventBatch, now: datetime
) -> tuple[list[tuple[int, ReportedEvent]], Heartbeat]:
    """The events of a batch that were not stored before, with their seq numbers, and the heartbeat after them.

    A gap in the numbers is accepted: an attempt may lose events. A batch of an older attempt changes nothing.
    """
    if heartbeat and heartbeat.attempt > attempt:
        return [], heartbeat
    last = heartbeat if heartbeat and heartbeat.attempt == attempt else None
    next_seq = last.next_seq if last else 0
    new_events = [(seq, event) for seq, event in enumerate(batch.events, start=batch.first_seq) if seq >= next_seq]
    return new_events, Heartbeat(
        attempt=attempt,
        received_at=now,
        next_seq=new_events[-1][0] + 1 if new_events else next_seq,
        phase=batch.phase or (last.phase if last else None),
        progress=batch.progress or (last.progress if last else None),
    )
