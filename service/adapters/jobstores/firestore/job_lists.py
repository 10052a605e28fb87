"""Lists and counts of jobs.

Firestore finds a job by its exact fields and by one search term. What a query asks beyond that is checked when a document is read, so a
page may have to read more documents than it shows.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from google.cloud.firestore import CollectionReference, FieldFilter, Query
from google.cloud.firestore_v1.aggregation import AggregationQuery
from pydantic import ValidationError

from schema.job import Status
from service.adapters.jobstores.cursors import encode_cursor
from service.adapters.jobstores.firestore.database import CALL_TIMEOUT_S, Database, Snapshot
from service.adapters.jobstores.firestore.documents import FILTERS, build_filter_values, doc_ref_by_id, load_heartbeat, load_summary
from service.adapters.jobstores.firestore.queries import cursor_position, iter_pages, order_by_creation
from service.adapters.jobstores.firestore.search_terms import find_search_terms, needs_check
from service.adapters.jobstores.firestore.usage import run_aggregation
from service.adapters.jobstores.records import RecordReader, format_timestamp
from service.core.job_lists import JobQuery, JobSummary, ListedJob, make_listed_job, matches_query
from service.core.ports import Page
from storage.deadline import deadline

MAX_SCANNED = 500  # documents that a page reads before it ends with fewer jobs than asked for; each is billed
SCANNED_PER_READ = 100
MAX_COUNTED = 1000  # documents that a count reads where Firestore cannot count them itself


def list_jobs(
    database: Database, jobs: CollectionReference, heartbeats: CollectionReference, query: JobQuery, reader: RecordReader
) -> Page[ListedJob]:
    """A page of a tenant's jobs, newest first. It has fewer than the limit, and a cursor, if MAX_SCANNED documents have no more."""
    ordered = order_by_creation(_select(jobs, query), Query.DESCENDING)
    if query.after:
        ordered = ordered.start_after(cursor_position(query.after, jobs))
    page_size = max(query.limit + 1, SCANNED_PER_READ) if needs_check(query) else query.limit + 1
    found: list[JobSummary] = []
    with deadline(CALL_TIMEOUT_S):
        last: Snapshot | None = None
        next_cursor: str | None = None
        for scanned, snapshot in enumerate(iter_pages(database, ordered, page_size)):
            if last is not None and scanned >= max(MAX_SCANNED, page_size):
                next_cursor = encode_cursor(last.get("created_at"), last.id)
                break
            last = snapshot
            summary = _read_summary(snapshot, reader)
            if summary is None or not matches_query(query, summary):
                continue
            if len(found) == query.limit:
                next_cursor = encode_cursor(format_timestamp(found[-1].created_at), found[-1].job_id)
                break
            found.append(summary)
        return Page(list(_with_heartbeats(database, heartbeats, found)), next_cursor)


def count_jobs_by_status(database: Database, jobs: CollectionReference, query: JobQuery, reader: RecordReader) -> dict[Status, int] | None:
    """How many matching jobs have each status, whatever the statuses of the query; None if more than MAX_COUNTED would have to be read."""
    any_status = replace(query, statuses=())
    with deadline(CALL_TIMEOUT_S):
        if not needs_check(query):
            matching = {status: _select(jobs, replace(query, statuses=(status,))) for status in Status}
            return {
                status: round(run_aggregation(database, AggregationQuery(_order_as_listed(each)).count()))
                for status, each in matching.items()
            }
        snapshots = database.query(_order_as_listed(_select(jobs, any_status)).limit(MAX_COUNTED + 1))
    if len(snapshots) > MAX_COUNTED:
        return None
    summaries = (_read_summary(snapshot, reader) for snapshot in snapshots)
    return dict(Counter(summary.status for summary in summaries if summary is not None and matches_query(any_status, summary)))


def _order_as_listed(query: Query) -> Query:
    return order_by_creation(query, Query.DESCENDING)


def _select(jobs: CollectionReference, query: JobQuery) -> Query:
    """The documents that may match: all filters of a query, except for what `needs_check` names."""
    selected = jobs.select(["created_at", "summary"])
    exact = {name: value for name in FILTERS if name != "status" and (value := getattr(query, name)) is not None}
    for name, value in build_filter_values(query.tenant_id, exact).items():
        selected = selected.where(filter=FieldFilter(f"list_filters.{name}", "==", value))
    if query.statuses:
        values = [f"{query.tenant_id}/{status}" for status in query.statuses]
        operator, operand = ("==", values[0]) if len(values) == 1 else ("in", values)
        selected = selected.where(filter=FieldFilter("list_filters.status", operator, operand))
    terms = find_search_terms(query)
    if terms:
        operator, operand = ("array_contains", terms[0]) if len(terms) == 1 else ("array_contains_any", terms)
        selected = selected.where(filter=FieldFilter("search_terms", operator, operand))
    # Each of these values contains the tenant, so a filter for the tenant alone is needed only where there is none of them.
    if not (exact or query.statuses or terms):
        selected = selected.where(filter=FieldFilter("list_filters.tenant_id", "==", query.tenant_id))
    if query.created_from:
        selected = selected.where(filter=FieldFilter("created_at", ">=", format_timestamp(query.created_from)))
    if query.created_before:
        selected = selected.where(filter=FieldFilter("created_at", "<", format_timestamp(query.created_before)))
    return selected


def _read_summary(snapshot: Snapshot, reader: RecordReader) -> JobSummary | None:
    try:
        return load_summary(snapshot)
    except ValidationError as error:
        reader.report(snapshot.id, str(error).partition("\n")[0])
        return None


def _with_heartbeats(database: Database, heartbeats: CollectionReference, summaries: list[JobSummary]) -> Iterator[ListedJob]:
    """The jobs with their heartbeats, in one read. A job without an attempt has none."""
    started = [summary.job_id for summary in summaries if summary.attempts]
    doc_refs = [doc_ref_by_id(heartbeats, job_id) for job_id in started]
    snapshots = database.run_with_retry(lambda: database.get_all(doc_refs, "heartbeat")) if doc_refs else []
    by_job = dict(zip(started, map(load_heartbeat, snapshots), strict=True))
    return (make_listed_job(summary, by_job.get(summary.job_id)) for summary in summaries)
