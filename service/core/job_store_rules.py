"""Rules that every job store adapter shares."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from schema.events import Event, EventBatch, WarningRaised
from schema.job import Job, Status
from service.core.event_store import Heartbeat
from service.core.stored_json import make_storable

IDEMPOTENCY_TTL = timedelta(hours=24)

# What is stored of one job. A training that logs every step for a week stays below both.
MAX_JOB_EVENTS = 200_000
MAX_JOB_EVENT_BYTES = 128 << 20
LIMIT_RESERVE = 0.25  # for the events that tell how the job went, which are few
KEPT_EVENT_TYPES = frozenset(
    {"status", "phase", "evaluation", "gate", "artifact", "checkpoint_saved", "checkpoint_skipped", "checkpoint_restored"}
)
TOO_MANY_EVENTS = WarningRaised(
    code="too_many_events",
    message=f"the job has reached {MAX_JOB_EVENTS} events or {MAX_JOB_EVENT_BYTES >> 20} MiB of them; later metrics are not stored",
)


def work_state_of(job: Job) -> Literal["queued", "active"] | None:
    """In which of the lists of work a job is; None for one that waits for nobody."""
    return "queued" if job.status is Status.QUEUED else "active" if job.status.is_active else None


@dataclass(frozen=True)
class NewEvent:
    """An event to be stored, and its JSON."""

    seq: int
    at: datetime
    event: Event
    text: str


def select_new_events(heartbeat: Heartbeat | None, attempt: int, batch: EventBatch, now: datetime) -> tuple[list[NewEvent], Heartbeat]:
    """The events of a batch to store, and the heartbeat after them. Raises InvalidRequest for one that could not be read back.

    A gap in the numbers is accepted: an attempt may lose events. A batch of an older attempt changes nothing. Beyond the limits of a job,
    one warning is stored instead of the first event that is dropped.
    """
    if heartbeat and heartbeat.attempt > attempt:
        return [], heartbeat
    last = heartbeat if heartbeat and heartbeat.attempt == attempt else None
    next_seq = last.next_seq if last else 0
    stored, stored_bytes, dropped = (
        (heartbeat.stored_events, heartbeat.stored_event_bytes, heartbeat.dropped_events) if heartbeat else (0, 0, 0)
    )
    new_events: list[NewEvent] = []
    for seq, reported in enumerate(batch.events, start=batch.first_seq):
        if seq < next_seq:
            continue
        next_seq = seq + 1
        event, text = make_storable(reported.event)
        if not _has_room_for(event, stored, stored_bytes + len(text)):
            dropped += 1
            if dropped > 1:
                continue
            event, text = make_storable(TOO_MANY_EVENTS)
        new_events.append(NewEvent(seq, reported.at, event, text))
        stored, stored_bytes = stored + 1, stored_bytes + len(text)
    return new_events, Heartbeat(
        attempt=attempt,
        received_at=now,
        next_seq=next_seq,
        phase=batch.phase or (last.phase if last else None),
        progress=batch.progress or (last.progress if last else None),
        stored_events=stored,
        stored_event_bytes=stored_bytes,
        dropped_events=dropped,
    )


def _has_room_for(event: Event, stored: int, stored_bytes: int) -> bool:
    reserve = 1.0 + LIMIT_RESERVE * (event.type in KEPT_EVENT_TYPES)
    return stored < MAX_JOB_EVENTS * reserve and stored_bytes <= MAX_JOB_EVENT_BYTES * reserve
