"""The events and heartbeats of jobs, and the part of the JobStore port that keeps them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from schema.events import Event, EventBatch
from schema.job import Progress
from schema.types import Phase


@dataclass(frozen=True)
class StoredEvent:
    """An event with its position in the job's history. `cursor` grows within the job."""

    cursor: int
    attempt: int  # 0: written by the service
    seq: int
    at: datetime
    event: Event


@dataclass(frozen=True)
class Heartbeat:
    """When an attempt last reported, and what: a record of its own, because it is written so often."""

    attempt: int
    received_at: datetime  # the service's clock
    next_seq: int
    phase: Phase | None = None
    progress: Progress | None = None
    stored_events: int = 0  # of all attempts of the job
    stored_event_bytes: int = 0
    dropped_events: int = 0  # beyond the limits of a job


class EventStore(Protocol):
    """What attempts report: append-only, apart from the records. Raises Unavailable when the database does not answer."""

    def append_events(self, job_id: str, attempt: int, batch: EventBatch, now: datetime) -> int:
        """Store the events of the batch that are new, and the heartbeat; returns the next seq expected. Can be repeated."""
        ...

    def list_events(self, job_id: str, after: int = 0, limit: int = 500, max_bytes: int | None = None) -> list[StoredEvent]:
        """Events after a cursor, oldest first: at most `limit`, and no more once `max_bytes` are reached. Empty only after the last."""
        ...

    def find_last_cursor(self, job_id: str) -> int:
        """The cursor of the job's newest event; 0 before the first."""
        ...

    def find_heartbeat(self, job_id: str) -> Heartbeat | None:
        """The last heartbeat of the job's attempts, or None."""
        ...
