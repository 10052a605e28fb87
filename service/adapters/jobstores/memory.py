"""Records in memory, stored as JSON like in every other store. For tests, and to read as the simplest implementation of the port."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from threading import RLock
from typing import Literal

from schema.dataset import Dataset
from schema.events import Event, EventBatch
from schema.job import Job, Status
from service.adapters.jobstores.cursors import decode_cursor, encode_cursor
from service.adapters.jobstores.records import RecordReader, load_record
from service.core.errors import Conflict, IdempotencyConflict, NotFound, StaleRevision
from service.core.event_store import Heartbeat, StoredEvent
from service.core.job_lists import JobEntry, JobQuery, JobSummary, ListedJob, make_entry, make_listed_job, matches_query
from service.core.job_store_rules import IDEMPOTENCY_TTL, select_new_events, work_state_of
from service.core.ports import IdempotencyKey, Page, Row
from service.core.stored_json import dump_record, load_event, make_storable
from service.core.usage import (
    STORED,
    JobState,
    Usage,
    UsageEntry,
    dataset_bytes_key,
    dataset_entry,
    iter_job_entries,
    job_bytes_key,
    statuses_of,
)

IdempotencyEntry = tuple[IdempotencyKey, str, datetime]  # the key, the id of its job, and when it was created


@dataclass(frozen=True)
class _JobIndex:
    """What is kept beside a job's JSON, and used without reading it."""

    entry: JobEntry
    work_state: Literal["queued", "active"] | None
    launchers: tuple[str, ...]
    unfinished_dataset_ids: tuple[str, ...]  # of a job that is not final


@dataclass(frozen=True)
class _EventRow:
    cursor: int
    attempt: int
    seq: int
    at: datetime
    text: str


class MemoryJobStore:
    """One process's memory under one lock."""

    def __init__(self) -> None:
        self._jobs: dict[str, str] = {}  # by id: the job's JSON
        self._index: dict[str, _JobIndex] = {}  # by the job's id
        self._events: dict[str, list[_EventRow]] = {}
        self._heartbeats: dict[str, Heartbeat] = {}
        self._datasets: dict[str, str] = {}  # by id: the dataset's JSON
        self._dataset_keys: dict[str, tuple[str, str]] = {}  # by id: the dataset's tenant, and when it was created
        self._idempotency_entries: dict[tuple[str, str], IdempotencyEntry] = {}
        self._usage: dict[tuple[str, str], UsageEntry] = {}  # by period and key
        self._cursor = 0
        self._reader = RecordReader()
        self._lock = RLock()

    # --- jobs --------------------------------------------------------------------------------------------------------

    def create_job(self, job: Job, idempotency: IdempotencyKey | None = None) -> Job:
        text = dump_record(job)
        with self._lock:
            if idempotency:
                entry = self._idempotency_entries.get((job.tenant_id, idempotency.key))
                if entry and job.created_at - entry[2] < IDEMPOTENCY_TTL:
                    if entry[0].body_digest != idempotency.body_digest:
                        raise IdempotencyConflict(param="Idempotency-Key")
                    if earlier := self.find_job(entry[1]):
                        return earlier
                self._idempotency_entries[job.tenant_id, idempotency.key] = (idempotency, job.job_id, job.created_at)
            if job.job_id in self._jobs:
                raise Conflict(f"{job.job_id} already exists")
            self._jobs[job.job_id] = text
            self._index[job.job_id] = _index_job(job)
            return job

    def find_job(self, job_id: str) -> Job | None:
        text = self._jobs.get(job_id)
        return load_record(Job, text) if text is not None else None

    def find_job_entry(self, job_id: str) -> JobEntry | None:
        index = self._index.get(job_id)
        return index.entry if index else None

    def replace_job(self, job: Job, events: Sequence[Event] = ()) -> Job:
        with self._lock:
            stored = self.find_job(job.job_id)
            if stored is None:
                raise NotFound(f"no job {job.job_id!r}")
            if stored.revision != job.revision:
                raise StaleRevision(f"{job.job_id} was changed by another writer")
            updated = job.model_copy(update={"revision": job.revision + 1})
            self._jobs[job.job_id] = dump_record(updated)
            self._index[job.job_id] = _index_job(updated)
            self._usage |= {(entry.period, entry.key): entry for entry in iter_job_entries(updated)}
            for event in events:
                self._append(job.job_id, 0, updated.revision, updated.updated_at, make_storable(event)[1])
            return updated

    def list_jobs(self, query: JobQuery) -> Page[ListedJob]:
        rows = [make_listed_job(summary, self._heartbeats.get(summary.job_id)) for summary in self._find_summaries(query)]
        sort_keys = [(row.summary.created_at.isoformat(), row.job_id) for row in rows]
        return _page(rows, sort_keys, query.limit, query.after)

    def count_jobs_by_status(self, query: JobQuery) -> dict[Status, int]:
        return dict(Counter(summary.status for summary in self._find_summaries(replace(query, statuses=()))))

    def _find_summaries(self, query: JobQuery) -> list[JobSummary]:
        entries = [index.entry for index in list(self._index.values())]
        return [each.summary for each in entries if each.tenant_id == query.tenant_id and matches_query(query, each.summary)]

    def list_queued_jobs(self, launcher: str | None, limit: int) -> list[Job]:
        return self._oldest_work("queued", launcher, limit)

    def list_active_jobs(self, launcher: str | None, limit: int) -> list[Job]:
        return self._oldest_work("active", launcher, limit)

    def list_jobs_using_dataset(self, dataset_id: str) -> list[str]:
        return sorted(job_id for job_id, index in list(self._index.items()) if dataset_id in index.unfinished_dataset_ids)

    def delete_job(self, job_id: str) -> bool:
        with self._lock:
            self._events.pop(job_id, None)
            self._heartbeats.pop(job_id, None)
            self._usage.pop((STORED, job_bytes_key(job_id)), None)
            self._index.pop(job_id, None)
            return self._jobs.pop(job_id, None) is not None

    # --- events ------------------------------------------------------------------------------------------------------

    def append_events(self, job_id: str, attempt: int, batch: EventBatch, now: datetime) -> int:
        with self._lock:
            new_events, heartbeat = select_new_events(self._heartbeats.get(job_id), attempt, batch, now)
            for new in new_events:
                self._append(job_id, attempt, new.seq, new.at, new.text)
            self._heartbeats[job_id] = heartbeat
            return heartbeat.next_seq

    def list_events(self, job_id: str, after: int = 0, limit: int = 500, max_bytes: int | None = None) -> list[StoredEvent]:
        events: list[StoredEvent] = []
        size_bytes = 0
        for row in list(self._events.get(job_id, [])):
            if len(events) >= limit or (max_bytes is not None and size_bytes >= max_bytes):
                break
            if row.cursor > after:
                try:
                    events.append(StoredEvent(row.cursor, row.attempt, row.seq, row.at, load_event(row.text)))
                except ValueError as error:
                    self._reader.report(f"{job_id}/events/{row.cursor}", str(error))
                size_bytes += len(row.text)
        return events

    def find_last_cursor(self, job_id: str) -> int:
        return max((row.cursor for row in self._events.get(job_id, [])), default=0)

    def find_heartbeat(self, job_id: str) -> Heartbeat | None:
        return self._heartbeats.get(job_id)

    # --- datasets ----------------------------------------------------------------------------------------------------

    def create_dataset(self, dataset: Dataset) -> None:
        with self._lock:
            self._datasets[dataset.processed_dataset_id] = dump_record(dataset)
            self._dataset_keys[dataset.processed_dataset_id] = (dataset.tenant_id, dataset.created_at.isoformat())
            self._usage[STORED, dataset_bytes_key(dataset.processed_dataset_id)] = dataset_entry(dataset)

    def replace_dataset(self, dataset: Dataset) -> None:
        with self._lock:
            if self.find_dataset_tenant(dataset.processed_dataset_id) != dataset.tenant_id:
                raise NotFound(f"no dataset {dataset.processed_dataset_id!r}")
            self.create_dataset(dataset)

    def find_dataset(self, dataset_id: str) -> Dataset | None:
        text = self._datasets.get(dataset_id)
        return load_record(Dataset, text) if text is not None else None

    def find_dataset_tenant(self, dataset_id: str) -> str | None:
        return self._dataset_keys[dataset_id][0] if dataset_id in self._dataset_keys else None

    def list_datasets(self, tenant_id: str, limit: int = 50, after: str | None = None) -> Page[Dataset]:
        keys = [(created_at, dataset_id) for dataset_id, (tenant, created_at) in list(self._dataset_keys.items()) if tenant == tenant_id]
        page = _page(keys, keys, limit, after)
        return Page(self._reader.load_readable(Dataset, ((key[1], self._datasets[key[1]]) for key in page.rows)), page.next_cursor)

    def delete_dataset(self, dataset_id: str) -> bool:
        self._usage.pop((STORED, dataset_bytes_key(dataset_id)), None)
        with self._lock:
            self._dataset_keys.pop(dataset_id, None)
            return self._datasets.pop(dataset_id, None) is not None

    # --- usage -------------------------------------------------------------------------------------------------------

    def count_jobs(self, tenant_id: str, state: JobState) -> int:
        entries = [index.entry for index in list(self._index.values())]
        return sum(entry.tenant_id == tenant_id and entry.summary.status in statuses_of(state) for entry in entries)

    def sum_usage(self, tenant_id: str, period: str) -> Usage:
        entries = list(self._usage.values())
        return sum((entry.usage for entry in entries if (entry.tenant_id, entry.period) == (tenant_id, period)), Usage())

    def find_job_by_key(self, tenant_id: str, idempotency_key: str, body_digest: str) -> Job | None:
        entry = self._idempotency_entries.get((tenant_id, idempotency_key))
        return self.find_job(entry[1]) if entry and entry[0].body_digest == body_digest else None

    # --- the store ---------------------------------------------------------------------------------------------------

    def ping(self) -> None:
        return None

    def close(self) -> None:
        return None

    def _oldest_work(self, work_state: Literal["queued", "active"], launcher: str | None, limit: int) -> list[Job]:
        found = [
            (index.entry.summary.created_at, job_id)
            for job_id, index in list(self._index.items())
            if index.work_state == work_state and launcher in (None, *index.launchers)
        ]
        rows = ((job_id, text) for _, job_id in sorted(found) if (text := self._jobs.get(job_id)) is not None)
        return self._reader.load_readable(Job, rows, limit)

    def _append(self, job_id: str, attempt: int, seq: int, at: datetime, text: str) -> None:
        self._cursor += 1
        self._events.setdefault(job_id, []).append(_EventRow(self._cursor, attempt, seq, at, text))


def _index_job(job: Job) -> _JobIndex:
    unfinished_dataset_ids = () if job.status.is_final else job.dataset_ids
    return _JobIndex(make_entry(job), work_state_of(job), job.launchers, unfinished_dataset_ids)


def _page(rows: list[Row], sort_keys: list[tuple[str, str]], limit: int, after: str | None) -> Page[Row]:
    """One page of rows, largest key first, after the cursor `after`."""
    position = decode_cursor(after) if after else None
    newest_first = sorted(zip(sort_keys, rows, strict=True), key=lambda pair: pair[0], reverse=True)
    following = [(key, row) for key, row in newest_first if position is None or key < position]
    shown = following[:limit]
    return Page([row for _, row in shown], encode_cursor(*shown[-1][0]) if len(following) > limit else None)
