"""The SQLite file of the job store: tables, connections, reads and transactions."""

import sqlite3
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from schema.job import Job
from service.adapters.jobstores.records import RecordReader, format_timestamp
from service.adapters.jobstores.sqlite_lists import LIST_TABLES, fill_lists
from service.adapters.jobstores.sqlite_usage import USAGE_TABLE, fill_usage
from service.core.errors import DiskFull, Unavailable
from service.core.job_store_rules import work_state_of
from storage.deadline import remaining_s

BUSY_TIMEOUT_S = 4  # a request may wait this long for another writer before it gets Unavailable
TABLES_VERSION = 5

# The launchers that have a job's next step. A job is in it while it is queued or active.
LAUNCHER_TABLE = """
CREATE TABLE job_launchers (
    launcher TEXT NOT NULL, work_state TEXT NOT NULL, created_at TEXT NOT NULL, job_id TEXT NOT NULL,
    PRIMARY KEY (launcher, work_state, created_at, job_id)) WITHOUT ROWID;
CREATE INDEX job_launchers_of_job ON job_launchers (job_id);
"""
# What the events of a job take. A file of an earlier version gets the table when it is opened, and counts from there.
EVENT_TOTALS_TABLE = """
CREATE TABLE IF NOT EXISTS event_totals (
    job_id TEXT PRIMARY KEY, stored INTEGER NOT NULL, stored_bytes INTEGER NOT NULL, dropped INTEGER NOT NULL) WITHOUT ROWID;
"""
# The datasets of a job that mixes several, besides the first. Likewise added to files of earlier versions.
MIXED_DATASETS_TABLE = """
CREATE TABLE IF NOT EXISTS mixed_datasets (dataset_id TEXT NOT NULL, job_id TEXT NOT NULL, PRIMARY KEY (dataset_id, job_id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS mixed_datasets_of_job ON mixed_datasets (job_id);
"""
# is_active and is_final repeat Job.status in the form that the partial indexes need: most jobs are final and in none of them.
TABLES = """
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
CREATE TABLE heartbeats (
    job_id TEXT PRIMARY KEY, attempt INTEGER NOT NULL, received_at TEXT NOT NULL, next_seq INTEGER NOT NULL, phase TEXT, progress TEXT
    ) WITHOUT ROWID;
CREATE TABLE datasets (
    dataset_id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL, created_at TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX datasets_newest ON datasets (tenant_id, created_at DESC, dataset_id DESC);
"""


class SqliteDatabase:
    """One file in write-ahead mode. Each thread reads through its own connection; writers take turns on one."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._thread_local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._write_lock = threading.Lock()
        self._writer = self._connect()
        self._create_tables()

    # Any: SQLite's values have the types of their columns, which each query knows.
    def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows, through this thread's own connection. Raises Unavailable."""
        return list(self.iter_rows(query, *values))

    def iter_rows(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """Rows as they are read, for a reader that may stop before the last. Raises Unavailable."""
        try:
            db: sqlite3.Connection | None = getattr(self._thread_local, "db", None)
            if db is None:
                db = self._thread_local.db = self._connect()
            with closing(db.execute(query, values)) as rows:
                yield from rows
        except sqlite3.Error as error:
            raise Unavailable(f"the job database does not answer: {error}") from error

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """A write transaction: all or nothing, on disk when the block ends. Raises Unavailable, DiskFull."""
        with self._acquire_writer() as timeout_s:
            db = self._writer
            try:
                db.execute(f"PRAGMA busy_timeout = {int(timeout_s * 1000)}")
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
                    raise DiskFull("there is no space left for the job database", hint="free some space below TUNESMITH_HOME") from error
                raise Unavailable(f"the job database does not accept writes now: {error}") from error

    def close(self) -> None:
        """Close every connection."""
        for connection in self._connections:
            connection.close()

    @contextmanager
    def _acquire_writer(self) -> Generator[float]:
        """Take this thread's turn; yields the seconds it may then wait for other processes. Raises Unavailable."""
        deadline_at = time.monotonic() + remaining_s(BUSY_TIMEOUT_S)
        if not self._write_lock.acquire(timeout=remaining_s(BUSY_TIMEOUT_S)):
            raise Unavailable("the job database does not accept writes now: it is busy")
        try:
            yield max(0.0, deadline_at - time.monotonic())
        finally:
            self._write_lock.release()

    def _connect(self) -> sqlite3.Connection:
        # check_same_thread: the thread that stops the service closes the connections of all threads.
        db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA temp_store = MEMORY")
        self._connections.append(db)
        return db

    def _create_tables(self) -> None:
        with self.transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                _execute_all(db, TABLES + LAUNCHER_TABLE + USAGE_TABLE + LIST_TABLES)
            elif version in (2, 3, 4):
                _upgrade(db, version)
            elif version != TABLES_VERSION:
                raise Unavailable(
                    f"{self._path} was written by another version of Tunesmith (tables {version}, this one reads {TABLES_VERSION})",
                    hint="run that version, or move the file away to start with an empty database",
                )
            _execute_all(db, EVENT_TOTALS_TABLE + MIXED_DATASETS_TABLE)
            db.execute(f"PRAGMA user_version = {TABLES_VERSION}")


def _upgrade(db: sqlite3.Connection, version: int) -> None:
    """Add the tables that a later version has, and fill them from the records."""
    if version < 3:
        _execute_all(db, LAUNCHER_TABLE)
        rows = db.execute("SELECT job_id, record FROM jobs WHERE is_final = 0").fetchall()
        for job in RecordReader().load_readable(Job, rows):
            index_launchers(db, job)
    if version < 4:
        _execute_all(db, USAGE_TABLE)
        fill_usage(db)
    _execute_all(db, LIST_TABLES + "DROP TABLE IF EXISTS job_costs;")
    fill_lists(db)


def index_launchers(db: sqlite3.Connection, job: Job) -> None:
    """Put a job into the work lists of its launchers, and out of all others."""
    db.execute("DELETE FROM job_launchers WHERE job_id = ?", (job.job_id,))
    work_state, created_at = work_state_of(job), format_timestamp(job.created_at)
    rows = [(launcher, work_state, created_at, job.job_id) for launcher in job.launchers]
    db.executemany("INSERT INTO job_launchers VALUES (?, ?, ?, ?)", rows)


def _execute_all(db: sqlite3.Connection, statements: str) -> None:
    for statement in filter(str.strip, statements.split(";")):
        db.execute(statement)
