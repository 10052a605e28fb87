"""Pages of records, and the work lists. Each query is served by an index of infra/firestore.indexes.json."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

from google.cloud.firestore import CollectionReference, FieldFilter, Query

from schema.job import Job
from service.adapters.jobstores.cursors import decode_cursor, encode_cursor, invalid_cursor_error
from service.adapters.jobstores.firestore.database import Database, Snapshot
from service.adapters.jobstores.firestore.documents import SAFE_ID
from service.adapters.jobstores.records import RecordReader
from service.core.ports import Page

Record = TypeVar("Record")


def list_oldest_jobs(
    database: Database,
    jobs: CollectionReference,
    work_state: Literal["queued", "active"],
    launcher: str | None,
    limit: int,
    reader: RecordReader,
) -> list[Job]:
    """Jobs of all tenants in a list of work, oldest first; without a launcher, of every launcher."""
    work_list = f"{work_state}/{launcher}" if launcher else work_state
    selected = jobs.where(filter=FieldFilter("work_lists", "array_contains", work_list)).select(["created_at", "record"])
    snapshots = iter_pages(database, order_by_creation(selected, Query.ASCENDING), limit)
    return reader.load_readable(Job, ((snapshot.id, snapshot.get("record")) for snapshot in snapshots), limit)


def list_unlisted_jobs(database: Database, jobs: CollectionReference, limit: int) -> list[str]:
    """Ids of open jobs that a version before 0.2 wrote, which are in no list of work."""
    unlisted: list[str] = []
    for work_state in ("queued", "active"):
        query = jobs.where(filter=FieldFilter("work_state", "==", work_state)).select([])
        unlisted += [snapshot.id for snapshot in database.query(order_by_creation(query, Query.ASCENDING).limit(limit))]
    return unlisted


def fetch_page(
    database: Database,
    collection: CollectionReference,
    query: Query,
    limit: int,
    after: str | None,
    load: Callable[[Sequence[Snapshot]], list[Record]],
) -> Page[Record]:
    """A page of a query's records, newest first. Raises InvalidRequest for a cursor that the API did not issue."""
    newest_first = order_by_creation(query, Query.DESCENDING)
    if after:
        newest_first = newest_first.start_after(cursor_position(after, collection))
    snapshots = database.query(newest_first.limit(limit + 1))
    shown = snapshots[:limit]
    next_cursor = encode_cursor(shown[-1].get("created_at"), shown[-1].id) if len(snapshots) > limit else None
    return Page(load(shown), next_cursor)


def iter_pages(database: Database, query: Query, page_size: int) -> Iterator[Snapshot]:
    """All documents of a query, read page by page, so that a reader may stop before the last."""
    page = database.query(query.limit(page_size))
    yield from page
    while len(page) == page_size:
        page = database.query(query.start_after(page[-1]).limit(page_size))
        yield from page


def order_by_creation(query: Query, direction: str) -> Query:
    """A query in the order that lists have, by the time of creation and then by id."""
    return query.order_by("created_at", direction=direction).order_by("__name__", direction=direction)


def cursor_position(cursor: str, collection: CollectionReference) -> dict[str, object]:
    """A cursor as Firestore's position. It comes from a caller, so its parts are checked."""
    created_at, row_id = decode_cursor(cursor)
    if not SAFE_ID.fullmatch(row_id):
        raise invalid_cursor_error()
    return {"created_at": created_at, "__name__": collection.document(row_id)}
