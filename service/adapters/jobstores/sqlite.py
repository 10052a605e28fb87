"""Records in one SQLite file: the job store of a laptop. One service process writes it; any process may read it.

Readers never wait, because the file is in write-ahead mode. With synchronous=FULL, a committed write survives a power cut.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from schema.dataset import Dataset
from schema.events import Event, EventBatch
from schema.job import Job, Status
from service.adapters.jobstores import sqlite_lists
from service.adapters.jobstores.cursors import decode_cursor, encode_cursor
from service.adapters.jobstores.records import Record, RecordReader, format_timestamp, load_progress, load_record
from service.adapters.jobstores.sqlite_database import SqliteDatabase, index_launchers
from service.adapters.jobstores.sqlite_usage import SUM_OF_PERIOD, delete_stored_bytes, delete_usage, load_sum, write_usage
from service.core.errors import Conflict, IdempotencyConflict, NotFound, StaleRevision
from service.core.event_store import Heartbeat, StoredEvent
from service.core.job_lists import JobEntry, JobQuery, ListedJob
from service.core.job_store_rules import IDEMPOTENCY_TTL, select_new_events
from service.core.ports import IdempotencyKey, Page
from service.core.stored_json import dump_record, load_event, make_storable
from service.core.usage import STORED, JobState, Usage, dataset_bytes_key, dataset_entry, iter_job_entries, statuses_of

JOB_BY_ID = "SELECT record FROM jobs WHERE job_id = ?"
WORK_OF_LAUNCHER = (
    "SELECT job_id, record FROM job_launchers AS work JOIN jobs USING (job_id) WHERE launcher = ? AND work_state = ? "
    "ORDER BY work.created_at, work.job_id"
)
JOBS_USING_DATASET = (
    "SELECT job_id FROM jobs WHERE dataset_id = ? AND is_final = 0",
    "SELECT job_id FROM mixed_datasets AS mixed JOIN jobs USING (job_id) WHERE mixed.dataset_id = ? AND is_final = 0",
)
HEARTBEAT_BY_JOB = (
    "SELECT attempt, received_at, next_seq, phase, progress, COALESCE(stored, 0), COALESCE(stored_bytes, 0), COALESCE(dropped, 0) "
    "FROM heartbeats LEFT JOIN event_totals USING (job_id) WHERE job_id = ?"
)


class SqliteJobStore:
    """The records in a SQLite database."""

    def __init__(self, path: Path) -> None:
        self._database = SqliteDatabase(path)
        self._reader = RecordReader()

    # --- jobs --------------------------------------------------------------------------------------------------------

    def create_job(self, job: Job, idempotency: IdempotencyKey | None = None) -> Job:
        record = dump_record(job)
        with self._database.transaction() as db:
            earlier = self._find_idempotent_job(db, job, idempotency) if idempotency else None
            if earlier is not None:
                return earlier
            try:
                db.execute(
                    "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        job.job_id,
                        job.tenant_id,
                        job.project_id,
                        job.job_name,
                        job.training_config.summarize().base_model_id,
                        job.status,
                        job.training_config.summarize().modality,
                        job.training_config.trainer_type,
                        job.processed_dataset_id,
                        format_timestamp(job.created_at),
                        job.status.is_active,
                        job.status.is_final,
                        job.revision,
                        record,
                    ),
                )
            except sqlite3.IntegrityError as error:
                raise Conflict(f"{job.job_id} already exists") from error
            db.executemany("INSERT INTO mixed_datasets VALUES (?, ?)", [(dataset_id, job.job_id) for dataset_id in job.dataset_ids[1:]])
            index_launchers(db, job)
            write_usage(db, iter_job_entries(job))
            sqlite_lists.write_job(db, job)
        return job

    def find_job(self, job_id: str) -> Job | None:
        return _load_first(self._database.read(JOB_BY_ID, job_id), Job)

    def find_job_entry(self, job_id: str) -> JobEntry | None:
        rows = self._database.read(sqlite_lists.ENTRY, job_id)
        return sqlite_lists.load_entry(rows[0]) if rows else None

    def replace_job(self, job: Job, events: Sequence[Event] = ()) -> Job:
        updated = job.model_copy(update={"revision": job.revision + 1})
        record = dump_record(updated)
        with self._database.transaction() as db:
            cursor = db.execute(
                "UPDATE jobs SET status = ?, is_active = ?, is_final = ?, revision = ?, record = ? WHERE job_id = ? AND revision = ?",
                (updated.status, updated.status.is_active, updated.status.is_final, updated.revision, record, updated.job_id, job.revision),
            )
            if cursor.rowcount == 0:
                if db.execute("SELECT 1 FROM jobs WHERE job_id = ?", (job.job_id,)).fetchone():
                    raise StaleRevision(f"{job.job_id} was changed by another writer")
                raise NotFound(f"no job {job.job_id!r}")
            index_launchers(db, updated)
            write_usage(db, iter_job_entries(updated))
            sqlite_lists.write_job(db, updated)
            for event in events:
                _append_event(db, updated.job_id, 0, updated.revision, updated.updated_at, make_storable(event)[1])
        return updated

    def list_jobs(self, query: JobQuery) -> Page[ListedJob]:
        statement = sqlite_lists.select_page(query)
        rows = sqlite_lists.load_rows(self._database.read(statement.sql, *statement.values))
        shown = rows[: query.limit]
        last = shown[-1].summary if len(rows) > query.limit else None
        return Page(shown, encode_cursor(format_timestamp(last.created_at), last.job_id) if last else None)

    def count_jobs_by_status(self, query: JobQuery) -> dict[Status, int]:
        statement = sqlite_lists.select_counts(query)
        return {Status(status): count for status, count in self._database.read(statement.sql, *statement.values)}

    def list_queued_jobs(self, launcher: str | None, limit: int) -> list[Job]:
        if launcher is not None:
            return self._list_work(launcher, "queued", limit)
        rows = self._database.iter_rows("SELECT job_id, record FROM jobs WHERE status = 'queued' ORDER BY created_at, job_id")
        return self._reader.load_readable(Job, _pairs(rows), limit)

    def list_active_jobs(self, launcher: str | None, limit: int) -> list[Job]:
        if launcher is not None:
            return self._list_work(launcher, "active", limit)
        rows = self._database.iter_rows("SELECT job_id, record FROM jobs WHERE is_active = 1 ORDER BY created_at, job_id")
        return self._reader.load_readable(Job, _pairs(rows), limit)

    def _list_work(self, launcher: str, work_state: str, limit: int) -> list[Job]:
        rows = self._database.iter_rows(WORK_OF_LAUNCHER, launcher, work_state)
        return self._reader.load_readable(Job, _pairs(rows), limit)

    def list_jobs_using_dataset(self, dataset_id: str) -> list[str]:
        return sorted(row[0] for query in JOBS_USING_DATASET for row in self._database.read(query, dataset_id))

    def delete_job(self, job_id: str) -> bool:
        with self._database.transaction() as db:
            db.execute("DELETE FROM events WHERE job_id = ?", (job_id,))
            db.execute("DELETE FROM heartbeats WHERE job_id = ?", (job_id,))
            db.execute("DELETE FROM event_totals WHERE job_id = ?", (job_id,))
            db.execute("DELETE FROM job_launchers WHERE job_id = ?", (job_id,))
            db.execute("DELETE FROM mixed_datasets WHERE job_id = ?", (job_id,))
            delete_stored_bytes(db, job_id)
            sqlite_lists.delete_job(db, job_id)
            return db.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,)).rowcount > 0

    # --- events ------------------------------------------------------------------------------------------------------

    def append_events(self, job_id: str, attempt: int, batch: EventBatch, now: datetime) -> int:
        with self._database.transaction() as db:
            previous = _load_heartbeat(db.execute(HEARTBEAT_BY_JOB, (job_id,)).fetchall())
            new_events, heartbeat = select_new_events(previous, attempt, batch, now)
            for new in new_events:
                _append_event(db, job_id, attempt, new.seq, new.at, new.text)
            progress = dump_record(heartbeat.progress) if heartbeat.progress else None
            db.execute(
                "INSERT OR REPLACE INTO heartbeats VALUES (?, ?, ?, ?, ?, ?)",
                (job_id, heartbeat.attempt, format_timestamp(heartbeat.received_at), heartbeat.next_seq, heartbeat.phase, progress),
            )
            totals = (heartbeat.stored_events, heartbeat.stored_event_bytes, heartbeat.dropped_events)
            if batch.events:
                db.execute("INSERT OR REPLACE INTO event_totals VALUES (?, ?, ?, ?)", (job_id, *totals))
        return heartbeat.next_seq

    def list_events(self, job_id: str, after: int = 0, limit: int = 500, max_bytes: int | None = None) -> list[StoredEvent]:
        rows = self._database.iter_rows(
            "SELECT cursor, attempt, seq, at, event FROM events WHERE job_id = ? AND cursor > ? ORDER BY cursor", job_id, after
        )
        events: list[StoredEvent] = []
        size_bytes = 0
        for cursor, attempt, seq, at, text in rows:
            if len(events) >= limit or (max_bytes is not None and size_bytes >= max_bytes):
                break
            try:
                events.append(StoredEvent(cursor, attempt, seq, datetime.fromisoformat(at), load_event(text)))
            except ValueError as error:
                self._reader.report(f"{job_id}/events/{cursor}", str(error))
            size_bytes += len(text)
        return events

    def find_last_cursor(self, job_id: str) -> int:
        return self._database.read("SELECT COALESCE(MAX(cursor), 0) FROM events WHERE job_id = ?", job_id)[0][0]

    def find_heartbeat(self, job_id: str) -> Heartbeat | None:
        return _load_heartbeat(self._database.read(HEARTBEAT_BY_JOB, job_id))

    # --- datasets ----------------------------------------------------------------------------------------------------

    def create_dataset(self, dataset: Dataset) -> None:
        with self._database.transaction() as db:
            values = (dataset.processed_dataset_id, dataset.tenant_id, format_timestamp(dataset.created_at), dump_record(dataset))
            db.execute("INSERT INTO datasets VALUES (?, ?, ?, ?)", values)
            write_usage(db, [dataset_entry(dataset)])

    def replace_dataset(self, dataset: Dataset) -> None:
        values = (dump_record(dataset), dataset.processed_dataset_id, dataset.tenant_id)
        with self._database.transaction() as db:
            if db.execute("UPDATE datasets SET record = ? WHERE dataset_id = ? AND tenant_id = ?", values).rowcount == 0:
                raise NotFound(f"no dataset {dataset.processed_dataset_id!r}")
            write_usage(db, [dataset_entry(dataset)])

    def find_dataset(self, dataset_id: str) -> Dataset | None:
        return _load_first(self._database.read("SELECT record FROM datasets WHERE dataset_id = ?", dataset_id), Dataset)

    def find_dataset_tenant(self, dataset_id: str) -> str | None:
        rows = self._database.read("SELECT tenant_id FROM datasets WHERE dataset_id = ?", dataset_id)
        return rows[0][0] if rows else None

    def list_datasets(self, tenant_id: str, limit: int = 50, after: str | None = None) -> Page[Dataset]:
        condition = "AND (created_at, dataset_id) < (?, ?)" if after else ""
        position = decode_cursor(after) if after else ()
        rows = self._database.read(
            "SELECT dataset_id, created_at, record FROM datasets "  # noqa: S608  # the clause is a constant
            f"WHERE tenant_id = ? {condition} ORDER BY created_at DESC, dataset_id DESC LIMIT ?",
            tenant_id,
            *position,
            limit + 1,
        )
        datasets = self._reader.load_readable(Dataset, ((row[0], row[2]) for row in rows[:limit]))
        return Page(datasets, encode_cursor(rows[limit - 1][1], rows[limit - 1][0]) if len(rows) > limit else None)

    def delete_dataset(self, dataset_id: str) -> bool:
        with self._database.transaction() as db:
            for (tenant_id,) in db.execute("SELECT tenant_id FROM datasets WHERE dataset_id = ?", (dataset_id,)).fetchall():
                delete_usage(db, tenant_id, STORED, dataset_bytes_key(dataset_id))
            return db.execute("DELETE FROM datasets WHERE dataset_id = ?", (dataset_id,)).rowcount > 0

    # --- usage -------------------------------------------------------------------------------------------------------

    def count_jobs(self, tenant_id: str, state: JobState) -> int:
        statuses = statuses_of(state)
        marks = ", ".join("?" * len(statuses))
        return self._database.read(f"SELECT count(*) FROM jobs WHERE tenant_id = ? AND status IN ({marks})", tenant_id, *statuses)[0][0]  # noqa: S608  # question marks

    def sum_usage(self, tenant_id: str, period: str) -> Usage:
        return load_sum(self._database.read(SUM_OF_PERIOD, tenant_id, period))

    def find_job_by_key(self, tenant_id: str, idempotency_key: str, body_digest: str) -> Job | None:
        query = "SELECT job_id FROM idempotency WHERE tenant_id = ? AND key = ? AND body_digest = ?"
        rows = self._database.read(query, tenant_id, idempotency_key, body_digest)
        return self.find_job(rows[0][0]) if rows else None

    # --- the database ------------------------------------------------------------------------------------------------

    def ping(self) -> None:
        self._database.read("SELECT 1 FROM jobs LIMIT 1")

    def close(self) -> None:
        self._database.close()

    def _find_idempotent_job(self, db: sqlite3.Connection, job: Job, idempotency: IdempotencyKey) -> Job | None:
        """The job created under the same key less than a day ago; without one, reserve the key for this job."""
        expired_at = format_timestamp(job.created_at - IDEMPOTENCY_TTL)
        db.execute("DELETE FROM idempotency WHERE created_at <= ?", (expired_at,))
        row = db.execute(
            "SELECT body_digest, job_id FROM idempotency WHERE tenant_id = ? AND key = ?", (job.tenant_id, idempotency.key)
        ).fetchone()
        if row and row[0] != idempotency.body_digest:
            raise IdempotencyConflict(param="Idempotency-Key")
        if row and (earlier := _load_first(db.execute(JOB_BY_ID, (row[1],)).fetchall(), Job)):
            return earlier
        values = (job.tenant_id, idempotency.key, idempotency.body_digest, job.job_id, format_timestamp(job.created_at))
        db.execute("INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?)", values)
        return None


def _append_event(db: sqlite3.Connection, job_id: str, attempt: int, seq: int, at: datetime, text: str) -> None:
    db.execute(
        "INSERT OR IGNORE INTO events (job_id, attempt, seq, at, event) VALUES (?, ?, ?, ?, ?)",
        (job_id, attempt, seq, format_timestamp(at), text),
    )


def _pairs(rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[str, str]]:
    return ((row[0], row[1]) for row in rows)


def _load_first(rows: list[tuple[Any, ...]], model: type[Record]) -> Record | None:
    return load_record(model, rows[0][0]) if rows else None


def _load_heartbeat(rows: list[tuple[Any, ...]]) -> Heartbeat | None:
    if not rows:
        return None
    attempt, received_at, next_seq, phase, progress, *totals = rows[0]
    return Heartbeat(attempt, datetime.fromisoformat(received_at), next_seq, phase, load_progress(progress), *totals)
