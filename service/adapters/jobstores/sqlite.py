"""Records in one SQLite file: the laptop's store. One service process writes it; any may read it.

Write-ahead log, so readers never wait; synchronous=FULL, so what was answered survives a power cut.
"""

import sqlite3
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from schema.dataset import Dataset
from schema.events import Event, EventBatch
from schema.job import Job, Progress, Status
from service.adapters.jobstores.cursors import decode_cursor, encode_cursor
from service.core.errors import Conflict, DiskFull, IdempotencyConflict, NotFound, StaleRevision, Unavailable
from service.core.job_store_rules import IDEMPOTENCY_TTL, select_new_events
from service.core.ports import Heartbeat, IdempotencyKey, JobQuery, JobSummary, Page, StoredEvent
from storage.deadline import remaining_s

BUSY_TIMEOUT_S = 4  # a request may wait this long for another writer before it is told to try again
SCHEMA_VERSION = 1

# is_active and is_final repeat Job.status in the form that the partial indexes need: most jobs are final, and in none of them.
SCHEMA = """
CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL, project_id TEXT, job_name TEXT NOT NULL, base_model_id TEXT NOT NULL,
    status TEXT NOT NULL, modality TEXT NOT NULL, trainer_type TEXT NOT NULL, dataset_id TEXT NOT NULL, created_at TEXT NOT NULL,
    is_active INTEGER NOT NULL, is_final INTEGER NOT NULL, revision INTEGER NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX jobs_newest ON jobs (tenant_id, created_at DESC, job_id DESC);
CREATE INDEX jobs_by_status ON jobs (tenant_id, status, created_at DESC, job_id DESC);
CREATE INDEX jobs_by_project ON jobs (tenant_id, project_id, created_at DESC, job_id DESC) WHERE project_id IS NOT NULL;
CREATE INDEX jobs_by_project_and_status ON jobs (tenant_id, project_id, status, created_at DESC, job_id DESC) WHERE project_id IS NOT NULL;
CREATE INDEX jobs_by_modality ON jobs (tenant_id, modality, created_at DESC, job_id DESC);
CREATE INDEX jobs_by_trainer ON jobs (tenant_id, trainer_type, created_at DESC, job_id DESC);
CREATE INDEX jobs_by_trainer_and_status ON jobs (tenant_id, trainer_type, status, created_at DESC, job_id DESC);
CREATE INDEX jobs_queued ON jobs (created_at, job_id) WHERE status = 'queued';
CREATE INDEX jobs_active ON jobs (created_at, job_id) WHERE is_active = 1;
CREATE INDEX jobs_unfinished ON jobs (dataset_id, job_id) WHERE is_final = 0;
CREATE TABLE idempotency (
    tenant_id TEXT NOT NULL, key TEXT NOT NULL, body_digest TEXT NOT NULL, job_id TEXT NOT NULL, created_at TEXT NOT NULL,
    PRIMARY KEY (tenant_id, key)) WITHOUT ROWID;
CREATE INDEX idempotency_oldest ON idempotency (created_at);
CREATE TABLE events (
    cursor INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, attempt INTEGER NOT NULL, seq INTEGER NOT NULL,
    at TEXT NOT NULL, event TEXT NOT NULL, UNIQUE (job_id, attempt, seq));
CREATE INDEX events_of_job ON events (job_id, cursor);
CREATE TABLE liveness (
    job_id TEXT PRIMARY KEY, attempt INTEGER NOT NULL, seen_at TEXT NOT NULL, next_seq INTEGER NOT NULL, phase TEXT, progress TEXT
    ) WITHOUT ROWID;
CREATE TABLE datasets (
    dataset_id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL, created_at TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX datasets_newest ON datasets (tenant_id, created_at DESC, dataset_id DESC);
"""

JOB_BY_ID = "SELECT record FROM jobs WHERE job_id = ?"
HEARTBEAT_BY_JOB = "SELECT attempt, seen_at, next_seq, phase, progress FROM liveness WHERE job_id = ?"
EVENT_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)


Record = TypeVar("Record", Job, Dataset)


class SqliteJobStore:
    """A file. Each thread reads through a connection of its own; writes take turns on one."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._thread_local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._write_lock = threading.Lock()
        self._writer = self._connect()
        self._create_tables()

    # --- jobs --------------------------------------------------------------------------------------------------------

    def create_job(self, job: Job, idempotency: IdempotencyKey | None = None) -> Job:
        record = job.model_dump_json()
        with self._transaction() as db:
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
                        job.training_config.base_model_id,
                        job.status,
                        job.training_config.modality,
                        job.training_config.trainer_type,
                        job.processed_dataset_id,
                        _format_timestamp(job.created_at),
                        job.status.is_active,
                        job.status.is_final,
                        job.revision,
                        record,
                    ),
                )
            except sqlite3.IntegrityError as error:
                raise Conflict(f"{job.job_id} is there already") from error
        return job

    def find_job(self, job_id: str) -> Job | None:
        return _load_first(self._read(JOB_BY_ID, job_id), Job)

    def replace_job(self, job: Job, events: Sequence[Event] = ()) -> Job:
        kept = job.model_copy(update={"revision": job.revision + 1})
        record = kept.model_dump_json()
        with self._transaction() as db:
            cursor = db.execute(
                "UPDATE jobs SET status = ?, is_active = ?, is_final = ?, revision = ?, record = ? WHERE job_id = ? AND revision = ?",
                (kept.status, kept.status.is_active, kept.status.is_final, kept.revision, record, kept.job_id, job.revision),
            )
            if cursor.rowcount == 0:
                if db.execute("SELECT 1 FROM jobs WHERE job_id = ?", (job.job_id,)).fetchone():
                    raise StaleRevision(f"{job.job_id} was changed by somebody else")
                raise NotFound(f"no job {job.job_id!r}")
            for event in events:
                self._append(db, kept.job_id, 0, kept.revision, kept.updated_at, event)
        return kept

    def list_jobs(self, query: JobQuery) -> Page[JobSummary]:
        clauses, values = ["tenant_id = ?"], [query.tenant_id]
        for name in ("status", "project_id", "modality", "trainer_type"):
            if (wanted := getattr(query, name)) is not None:
                clauses.append(f"{'+' if name in _unselective_filters(query) else ''}{name} = ?")
                values.append(wanted)
        if query.after:
            clauses.append("(created_at, job_id) < (?, ?)")
            values += decode_cursor(query.after)
        rows = self._read(
            "SELECT job_id, job_name, base_model_id, status, modality, trainer_type, project_id, created_at FROM jobs "  # noqa: S608  # our own clauses
            f"WHERE {' AND '.join(clauses)} ORDER BY created_at DESC, job_id DESC LIMIT ?",
            *values,
            query.limit + 1,
        )
        found = [_load_summary(*row) for row in rows]
        shown = found[: query.limit]
        last = shown[-1] if len(found) > query.limit else None
        return Page(shown, encode_cursor(_format_timestamp(last.created_at), last.job_id) if last else None)

    def list_queued_jobs(self, limit: int) -> list[Job]:
        rows = self._read("SELECT record FROM jobs WHERE status = 'queued' ORDER BY created_at, job_id LIMIT ?", limit)
        return [Job.load(row[0]) for row in rows]

    def list_active_jobs(self, limit: int) -> list[Job]:
        rows = self._read("SELECT record FROM jobs WHERE is_active = 1 ORDER BY created_at, job_id LIMIT ?", limit)
        return [Job.load(row[0]) for row in rows]

    def list_jobs_using_dataset(self, dataset_id: str) -> list[str]:
        return [row[0] for row in self._read("SELECT job_id FROM jobs WHERE dataset_id = ? AND is_final = 0 ORDER BY job_id", dataset_id)]

    def delete_job(self, job_id: str) -> bool:
        with self._transaction() as db:
            db.execute("DELETE FROM events WHERE job_id = ?", (job_id,))
            db.execute("DELETE FROM liveness WHERE job_id = ?", (job_id,))
            return db.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,)).rowcount > 0

    # --- events ------------------------------------------------------------------------------------------------------

    def append_events(self, job_id: str, attempt: int, batch: EventBatch, now: datetime) -> int:
        with self._transaction() as db:
            fresh, alive = select_new_events(_load_heartbeat(db.execute(HEARTBEAT_BY_JOB, (job_id,)).fetchall()), attempt, batch, now)
            for seq, reported in fresh:
                self._append(db, job_id, attempt, seq, reported.at, reported.event)
            progress = alive.progress.model_dump_json() if alive.progress else None
            db.execute(
                "INSERT OR REPLACE INTO liveness VALUES (?, ?, ?, ?, ?, ?)",
                (job_id, alive.attempt, _format_timestamp(alive.received_at), alive.next_seq, alive.phase, progress),
            )
        return alive.next_seq

    def list_events(self, job_id: str, after: int = 0, limit: int = 500) -> list[StoredEvent]:
        rows = self._read(
            "SELECT cursor, attempt, seq, at, event FROM events WHERE job_id = ? AND cursor > ? ORDER BY cursor LIMIT ?",
            job_id,
            after,
            limit,
        )
        return [
            StoredEvent(cursor, attempt, seq, datetime.fromisoformat(at), EVENT_ADAPTER.validate_json(event))
            for cursor, attempt, seq, at, event in rows
        ]

    def find_heartbeat(self, job_id: str) -> Heartbeat | None:
        return _load_heartbeat(self._read(HEARTBEAT_BY_JOB, job_id))

    # --- datasets ----------------------------------------------------------------------------------------------------

    def create_dataset(self, dataset: Dataset) -> None:
        with self._transaction() as db:
            values = (dataset.processed_dataset_id, dataset.tenant_id, _format_timestamp(dataset.created_at), dataset.model_dump_json())
            db.execute("INSERT INTO datasets VALUES (?, ?, ?, ?)", values)

    def find_dataset(self, dataset_id: str) -> Dataset | None:
        return _load_first(self._read("SELECT record FROM datasets WHERE dataset_id = ?", dataset_id), Dataset)

    def list_datasets(self, tenant_id: str, limit: int = 50, after: str | None = None) -> Page[Dataset]:
        behind = "AND (created_at, dataset_id) < (?, ?)" if after else ""
        place = decode_cursor(after) if after else ()
        rows = self._read(
            f"SELECT record FROM datasets WHERE tenant_id = ? {behind} ORDER BY created_at DESC, dataset_id DESC LIMIT ?",  # noqa: S608  # our own clause
            tenant_id,
            *place,
            limit + 1,
        )
        found = [Dataset.load(row[0]) for row in rows]
        last = found[limit - 1] if len(found) > limit else None
        return Page(found[:limit], encode_cursor(_format_timestamp(last.created_at), last.processed_dataset_id) if last else None)

    def delete_dataset(self, dataset_id: str) -> bool:
        with self._transaction() as db:
            return db.execute("DELETE FROM datasets WHERE dataset_id = ?", (dataset_id,)).rowcount > 0

    # --- the file ----------------------------------------------------------------------------------------------------

    def ping(self) -> None:
        self._read("SELECT 1 FROM jobs LIMIT 1")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        # Connections are made in the thread that uses them, and closed by the one that ends the service.
        db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA temp_store = MEMORY")
        self._connections.append(db)
        return db

    def _create_tables(self) -> None:
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in filter(str.strip, SCHEMA.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise Unavailable(
                    f"{self._path} was written by another version of Tunesmith (schema {version}, this one reads {SCHEMA_VERSION})"
                )

    # Any: SQLite's values have the types of their columns, which each query knows.
    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows, through this thread's own connection."""
        try:
            db: sqlite3.Connection | None = getattr(self._thread_local, "db", None)
            if db is None:
                db = self._thread_local.db = self._connect()
            return db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise Unavailable(f"the job database does not answer: {error}") from error

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        """All or nothing, on disk when it ends."""
        with self._acquire_writer() as wait_s:
            db = self._writer
            try:
                db.execute(f"PRAGMA busy_timeout = {int(wait_s * 1000)}")
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
            except sqlite3.OperationalError as error:  # busy, full, read-only
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                    raise DiskFull("there is no room left for the job database", hint="free some space below TUNESMITH_HOME") from error
                raise Unavailable(f"the job database does not take writes now: {error}") from error

    @contextmanager
    def _acquire_writer(self) -> Generator[float]:
        """The writer, when it is this thread's turn; how long it may then wait for other processes. Raises Unavailable."""
        until = time.monotonic() + remaining_s(BUSY_TIMEOUT_S)
        if not self._write_lock.acquire(timeout=remaining_s(BUSY_TIMEOUT_S)):
            raise Unavailable("the job database does not take writes now: it is busy")
        try:
            yield max(0.0, until - time.monotonic())
        finally:
            self._write_lock.release()

    # --- rows --------------------------------------------------------------------------------------------------------

    def _find_idempotent_job(self, db: sqlite3.Connection, job: Job, idempotency: IdempotencyKey) -> Job | None:
        """The job made under the same key less than a day ago; otherwise the key is this job's from now on."""
        still_kept = _format_timestamp(job.created_at - IDEMPOTENCY_TTL)
        db.execute("DELETE FROM idempotency WHERE created_at <= ?", (still_kept,))
        row = db.execute(
            "SELECT body_digest, job_id FROM idempotency WHERE tenant_id = ? AND key = ?", (job.tenant_id, idempotency.key)
        ).fetchone()
        if row and row[0] != idempotency.body_digest:
            raise IdempotencyConflict(param="Idempotency-Key")
        if row and (earlier := _load_first(db.execute(JOB_BY_ID, (row[1],)).fetchall(), Job)):
            return earlier
        values = (job.tenant_id, idempotency.key, idempotency.body_digest, job.job_id, _format_timestamp(job.created_at))
        db.execute("INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, ?)", values)
        return None

    def _append(self, db: sqlite3.Connection, job_id: str, attempt: int, seq: int, at: datetime, event: Event) -> None:
        db.execute(
            "INSERT OR IGNORE INTO events (job_id, attempt, seq, at, event) VALUES (?, ?, ?, ?, ?)",
            (job_id, attempt, seq, _format_timestamp(at), event.model_dump_json()),
        )


def _unselective_filters(query: JobQuery) -> set[str]:
    """Filters that nearly every job passes: SQLite, which keeps no statistics here, is kept (by a `+`) from reading along their
    index when another filter is there to go by."""
    guides = {name for name in ("project_id", "status", "trainer_type") if getattr(query, name) is not None}
    if "project_id" in guides:
        return {"modality", "trainer_type"}
    return {"modality"} if guides else set()


def _load_first(rows: list[tuple[Any, ...]], model: type[Record]) -> Record | None:
    return model.load(rows[0][0]) if rows else None


def _load_heartbeat(rows: list[tuple[Any, ...]]) -> Heartbeat | None:
    if not rows:
        return None
    attempt, seen_at, next_seq, phase, progress = rows[0]
    return Heartbeat(attempt, datetime.fromisoformat(seen_at), next_seq, phase, Progress.load(progress) if progress else None)


def _load_summary(*row: str) -> JobSummary:
    job_id, job_name, base_model_id, status, modality, trainer_type, project_id, created_at = row
    return JobSummary(
        job_id, job_name, base_model_id, Status(status), modality, trainer_type, project_id, datetime.fromisoformat(created_at)
    )


def _format_timestamp(moment: datetime) -> str:
    """A form whose order as text is its order in time."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
