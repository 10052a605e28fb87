"""Records in memory, stored as JSON like in every other store. For tests, and to read as the simplest implementation of the port."""

from collections.abc import Callable, Sequence
from datetime import datetime
from threading import RLock

from schema.dataset import Dataset
from schema.events import Event, EventBatch
from schema.job import Job, Status
from service.adapters.jobstores.cursors import decode_cursor, encode_cursor
from service.adapters.jobstores.records import load_readable_records, load_record
from service.core.errors import Conflict, IdempotencyConflict, NotFound, StaleRevision
from service.core.job_store_rules import IDEMPOTENCY_TTL, select_new_events, summarize_job
from service.core.ports import Heartbeat, IdempotencyKey, JobQuery, JobSummary, Page, Row, StoredEvent
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


class MemoryJobStore:
    """One process's memory under one lock."""

    def __init__(self) -> None:
        self._jobs: dict[str, str] = {}  # by id: the job's JSON
        self._events: dict[str, list[StoredEvent]] = {}
        self._heartbeats: dict[str, Heartbeat] = {}
        self._datasets: dict[str, str] = {}  # by id: the dataset's JSON
        self._idempotency_entries: dict[tuple[str, str], IdempotencyEntry] = {}
        self._usage: dict[tuple[str, str], UsageEntry] = {}  # by period and key
        self._cursor = 0
        self._lock = RLock()

    # --- jobs --------------------------------------------------------------------------------------------------------

    def create_job(self, job: Job, idempotency: IdempotencyKey | None = None) -> Job:
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
            self._jobs[job.job_id] = job.model_dump_json()
            return job

    def find_job(self, job_id: str) -> Job | None:
        text = self._jobs.get(job_id)
        return load_record(Job, text) if text is not None else None

    def replace_job(self, job: Job, events: Sequence[Event] = ()) -> Job:
        with self._lock:
            stored = self.find_job(job.job_id)
            if stored is None:
                raise NotFound(f"no job {job.job_id!r}")
            if stored.revision != job.revision:
                raise StaleRevision(f"{job.job_id} was changed by another writer")
            updated = job.model_copy(update={"revision": job.revision + 1})
            self._jobs[job.job_id] = updated.model_dump_json()
            self._usage |= {(entry.period, entry.key): entry for entry in iter_job_entries(updated)}
            for event in events:
                self._append(job.job_id, 0, updated.revision, updated.updated_at, event)
            return updated

    def list_jobs(self, query: JobQuery) -> Page[JobSummary]:
        rows = [summarize_job(job) for job in self._load_jobs() if job.tenant_id == query.tenant_id]
        for name in ("status", "project_id", "modality", "trainer_type"):
            if (value := getattr(query, name)) is not None:
                rows = [row for row in rows if getattr(row, name) == value]
        sort_keys = [(row.created_at.isoformat(), row.job_id) for row in rows]
        return _page(rows, sort_keys, query.limit, query.after)

    def list_queued_jobs(self, launcher: str | None, limit: int) -> list[Job]:
        return self._oldest_matching(lambda job: job.status is Status.QUEUED and launcher in (None, *job.launchers), limit)

    def list_active_jobs(self, launcher: str | None, limit: int) -> list[Job]:
        return self._oldest_matching(lambda job: job.status.is_active and launcher in (None, *job.launchers), limit)

    def list_jobs_using_dataset(self, dataset_id: str) -> list[str]:
        return sorted(job.job_id for job in self._load_jobs() if job.processed_dataset_id == dataset_id and not job.status.is_final)

    def delete_job(self, job_id: str) -> bool:
        with self._lock:
            self._events.pop(job_id, None)
            self._heartbeats.pop(job_id, None)
            self._usage.pop((STORED, job_bytes_key(job_id)), None)
            return self._jobs.pop(job_id, None) is not None

    # --- events ------------------------------------------------------------------------------------------------------

    def append_events(self, job_id: str, attempt: int, batch: EventBatch, now: datetime) -> int:
        with self._lock:
            new_events, heartbeat = select_new_events(self._heartbeats.get(job_id), attempt, batch, now)
            for seq, reported in new_events:
                self._append(job_id, attempt, seq, reported.at, reported.event)
            self._heartbeats[job_id] = heartbeat
            return heartbeat.next_seq

    def list_events(self, job_id: str, after: int = 0, limit: int = 500) -> list[StoredEvent]:
        return [stored for stored in list(self._events.get(job_id, [])) if stored.cursor > after][:limit]

    def find_heartbeat(self, job_id: str) -> Heartbeat | None:
        return self._heartbeats.get(job_id)

    # --- datasets ----------------------------------------------------------------------------------------------------

    def create_dataset(self, dataset: Dataset) -> None:
        self._datasets[dataset.processed_dataset_id] = dataset.model_dump_json()
        self._usage[STORED, dataset_bytes_key(dataset.processed_dataset_id)] = dataset_entry(dataset)

    def find_dataset(self, dataset_id: str) -> Dataset | None:
        text = self._datasets.get(dataset_id)
        return load_record(Dataset, text) if text is not None else None

    def list_datasets(self, tenant_id: str, limit: int = 50, after: str | None = None) -> Page[Dataset]:
        datasets = [load_record(Dataset, text) for text in list(self._datasets.values())]
        rows = [dataset for dataset in datasets if dataset.tenant_id == tenant_id]
        sort_keys = [(row.created_at.isoformat(), row.processed_dataset_id) for row in rows]
        return _page(rows, sort_keys, limit, after)

    def delete_dataset(self, dataset_id: str) -> bool:
        self._usage.pop((STORED, dataset_bytes_key(dataset_id)), None)
        return self._datasets.pop(dataset_id, None) is not None

    # --- usage -------------------------------------------------------------------------------------------------------

    def count_jobs(self, tenant_id: str, state: JobState) -> int:
        return sum(job.tenant_id == tenant_id and job.status in statuses_of(state) for job in self._load_jobs())

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

    def _load_jobs(self) -> list[Job]:
        return load_readable_records(Job, list(self._jobs.values()))

    def _oldest_matching(self, predicate: Callable[[Job], bool], limit: int) -> list[Job]:
        jobs = [job for job in self._load_jobs() if predicate(job)]
        return sorted(jobs, key=lambda job: (job.created_at, job.job_id))[:limit]

    def _append(self, job_id: str, attempt: int, seq: int, at: datetime, event: Event) -> None:
        self._cursor += 1
        stored = StoredEvent(cursor=self._cursor, attempt=attempt, seq=seq, at=at, event=event)
        self._events.setdefault(job_id, []).append(stored)


def _page(rows: list[Row], sort_keys: list[tuple[str, str]], limit: int, after: str | None) -> Page[Row]:
    """One page of rows, largest key first, after the cursor `after`."""
    position = decode_cursor(after) if after else None
    newest_first = sorted(zip(sort_keys, rows, strict=True), key=lambda pair: pair[0], reverse=True)
    following = [(key, row) for key, row in newest_first if position is None or key < position]
    shown = following[:limit]
    return Page([row for _, row in shown], encode_cursor(*shown[-1][0]) if len(following) > limit else None)
