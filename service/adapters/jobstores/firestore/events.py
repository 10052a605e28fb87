"""Events in Firestore: the events of one report share a document (a chunk), named by the cursor of its last event."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta

from google.cloud.firestore import DocumentReference, FieldFilter, WriteBatch
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from schema.events import ReportedEvent
from service.adapters.jobstores.firestore.database import Database, Snapshot
from service.core.event_store import StoredEvent
from service.core.stored_json import load_event

EVENTS_TTL = timedelta(days=400)  # a year of metrics, and a month to look back at it
MAX_CHUNK_BYTES = 900_000  # a document's limit is 1 MiB
CHUNKS_PER_COMMIT = 4  # a commit's limit is 10 MiB, the emulator's 4
CHUNKS_PER_READ = 50
FIRST_CHUNKS_PER_READ = 4  # each may be as large as MAX_CHUNK_BYTES, and a page of events ends at a number of bytes
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


def fetch_events(
    database: Database, job: DocumentReference, after: int, limit: int, max_bytes: int | None, report: Callable[[str, str], None]
) -> list[StoredEvent]:
    """At most `limit` events after a cursor, oldest first, and no more once `max_bytes` are reached.

    `report` is called with the place of an event that cannot be read, which is skipped, and the reason.
    """
    events: list[StoredEvent] = []
    size_bytes = 0
    for chunk in _iter_chunks(database, job, _chunk_name(after), min(limit, CHUNKS_PER_READ)):
        for text_bytes, stored in _load_chunk(chunk, report):
            if stored.cursor > after:
                if len(events) >= limit or (max_bytes is not None and size_bytes >= max_bytes):
                    return events
                events.append(stored)
                size_bytes += text_bytes
    return events


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
    count = min(page_size, FIRST_CHUNKS_PER_READ)
    while True:
        following = collection.where(filter=FieldFilter("__name__", ">", collection.document(after)))
        page = database.query(following.order_by("__name__").limit(count))
        yield from page
        if len(page) < count:
            return
        after, count = page[-1].id, min(2 * count, page_size)


def _chunk_name(cursor: int) -> str:
    """A document name that sorts like the cursor."""
    return f"{min(max(cursor, 0), 10**18):019d}"


def _load_chunk(chunk: Snapshot, report: Callable[[str, str], None]) -> Iterator[tuple[int, StoredEvent]]:
    """The readable events of a chunk, each with its size in bytes."""
    text, attempt = chunk.get("events"), chunk.get("attempt")
    try:
        rows: list[object] = from_json(text)
    except ValueError as error:
        report(f"{chunk.reference.path}", str(error))
        return
    first_cursor = int(chunk.id) - len(rows) + 1
    for cursor, row in enumerate(rows, start=first_cursor):
        try:
            stored, event_text = SequencedEvent.model_validate(row), to_json(row["event"])  # pyright: ignore[reportIndexIssue]
            yield len(event_text), StoredEvent(cursor, attempt, stored.seq, stored.at, load_event(event_text.decode()))
        except (ValidationError, ValueError, TypeError, LookupError) as error:
            report(f"{chunk.reference.path}/{cursor}", str(error))
