"""Events in Firestore: the events of one report share a document (a chunk), named by the cursor of its last event."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from google.cloud.firestore import DocumentReference, FieldFilter, WriteBatch
from pydantic import TypeAdapter

from schema.events import ReportedEvent
from service.adapters.jobstores.firestore.database import Database, Snapshot
from service.core.ports import StoredEvent

EVENTS_TTL = timedelta(days=400)  # a year of metrics, and a month to look back at it
MAX_CHUNK_BYTES = 900_000  # a document's limit is 1 MiB
CHUNKS_PER_COMMIT = 4  # a commit's limit is 10 MiB, the emulator's 4
CHUNKS_PER_READ = 50
DELETES_PER_COMMIT = 400  # below 500, the limit that Firestore once had and emulators may have


class SequencedEvent(ReportedEvent):
    """An event as stored in its chunk."""

    seq: int


_EVENTS: TypeAdapter[list[SequencedEvent]] = TypeAdapter(list[SequencedEvent])


def split_into_chunks(events: Sequence[SequencedEvent]) -> Iterator[list[SequencedEvent]]:
    """The events in chunks that each fit into a document."""
    chunk: list[SequencedEvent] = []
    size_bytes = 0
    for event in events:
        event_bytes = len(event.model_dump_json().encode()) + 1
        if chunk and size_bytes + event_bytes > MAX_CHUNK_BYTES:
            yield chunk
            chunk, size_bytes = [], 0
        chunk.append(event)
        size_bytes += event_bytes
    if chunk:
        yield chunk


def add_events(
    batch: WriteBatch, job: DocumentReference, attempt: int, cursor: int, events: Sequence[SequencedEvent], now: datetime
) -> int:
    """Add to a batch the events that follow a cursor; returns the cursor of the last."""
    for chunk in split_into_chunks(events):
        cursor += len(chunk)
        fields = {"events": _EVENTS.dump_json(chunk).decode(), "attempt": attempt, "expire_at": now + EVENTS_TTL}
        batch.set(job.collection("events").document(_chunk_name(cursor)), fields)
    return cursor


def fetch_events(database: Database, job: DocumentReference, after: int, limit: int) -> list[StoredEvent]:
    """At most `limit` events after a cursor, oldest first."""
    events: list[StoredEvent] = []
    for chunk in _iter_chunks(database, job, _chunk_name(after), min(limit, CHUNKS_PER_READ)):
        events += [stored for stored in _load_chunk(chunk) if stored.cursor > after]
        if len(events) >= limit:
            break
    return events[:limit]


def delete_events(database: Database, job: DocumentReference) -> None:
    """Delete all events of a job. An interrupted deletion can be repeated."""
    collection = job.collection("events")
    last = _chunk_name(0)
    while True:
        # Starts after the last deleted chunk: Firestore would otherwise scan over what was deleted.
        following = collection.where(filter=FieldFilter("__name__", ">", collection.document(last)))
        chunks = database.query(following.order_by("__name__").select([]).limit(DELETES_PER_COMMIT))
        if not chunks:
            return
        database.delete(chunk.reference for chunk in chunks)
        last = chunks[-1].id


def _iter_chunks(database: Database, job: DocumentReference, after: str, page_size: int) -> Iterator[Snapshot]:
    """The chunks whose names follow `after`, read page by page."""
    collection = job.collection("events")
    while True:
        following = collection.where(filter=FieldFilter("__name__", ">", collection.document(after)))
        page = database.query(following.order_by("__name__").limit(page_size))
        yield from page
        if len(page) < page_size:
            return
        after = page[-1].id


def _chunk_name(cursor: int) -> str:
    """A document name that sorts like the cursor."""
    return f"{min(max(cursor, 0), 10**18):019d}"


def _load_chunk(chunk: Snapshot) -> list[StoredEvent]:
    events = _EVENTS.validate_json(chunk.get("events"))
    first_cursor = int(chunk.id) - len(events) + 1
    attempt = chunk.get("attempt")
    return [StoredEvent(cursor, attempt, event.seq, event.at, event.event) for cursor, event in enumerate(events, start=first_cursor)]
