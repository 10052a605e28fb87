"""API keys and the audit log in a SQLite file of their own, which deleting or replacing the job database leaves alone."""

import sqlite3
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from service.adapters.access import MAX_LISTED_KEYS
from service.adapters.jobstores.cursors import decode_cursor, encode_cursor
from service.adapters.jobstores.records import RecordReader, format_timestamp, load_record
from service.core.access.ports import AuditQuery
from service.core.access.records import ApiKey, AuditEntry
from service.core.errors import Conflict, DiskFull, NotFound, Unavailable
from service.core.ports import Page

BUSY_TIMEOUT_S = 4
TABLES_VERSION = 1
TABLES = (
    "CREATE TABLE api_keys (key_id TEXT PRIMARY KEY, digest TEXT NOT NULL UNIQUE, tenant_id TEXT NOT NULL, created_at TEXT NOT NULL, "
    "record TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX api_keys_newest ON api_keys (tenant_id, created_at DESC)",
    "CREATE TABLE audit_entries (at TEXT NOT NULL, entry_id TEXT NOT NULL, tenant_id TEXT NOT NULL, subject TEXT NOT NULL, "
    "action TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (at, entry_id)) WITHOUT ROWID",
    "CREATE INDEX audit_entries_of_tenant ON audit_entries (tenant_id, at DESC, entry_id DESC)",
)


class SqliteAccessStore:
    """One file in write-ahead mode, with two writing connections.

    A key is on disk when its transaction ends. An audit entry is in the file, which outlives this process, and on disk a moment later:
    waiting for the disk would halve how many jobs a second can be submitted.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._reader = RecordReader()
        self._lock = threading.Lock()
        self._durable = self._connect("FULL")
        self._fast = self._connect("NORMAL")
        with self._write(self._durable) as db:
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in TABLES:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {TABLES_VERSION}")

    def create_key(self, key: ApiKey) -> None:
        values = (key.key_id, key.digest, key.tenant_id, format_timestamp(key.created_at), key.model_dump_json())
        try:
            with self._write(self._durable) as db:
                db.execute("INSERT INTO api_keys VALUES (?, ?, ?, ?, ?)", values)
        except sqlite3.IntegrityError as error:
            raise Conflict(f"{key.key_id} already exists") from error

    def find_key_by_digest(self, digest: str) -> ApiKey | None:
        rows = self._read("SELECT record FROM api_keys WHERE digest = ?", digest)
        return load_record(ApiKey, rows[0][0]) if rows else None

    def find_key(self, key_id: str) -> ApiKey | None:
        rows = self._read("SELECT record FROM api_keys WHERE key_id = ?", key_id)
        return load_record(ApiKey, rows[0][0]) if rows else None

    def list_keys(self, tenant_id: str | None) -> list[ApiKey]:
        rows = self._read(
            "SELECT key_id, record FROM api_keys WHERE ?1 IS NULL OR tenant_id = ?1 ORDER BY created_at DESC, key_id DESC LIMIT ?2",
            tenant_id,
            MAX_LISTED_KEYS,
        )
        return self._reader.load_readable(ApiKey, rows)

    def replace_key(self, key: ApiKey) -> None:
        with self._write(self._durable) as db:
            if db.execute("UPDATE api_keys SET record = ? WHERE key_id = ?", (key.model_dump_json(), key.key_id)).rowcount == 0:
                raise NotFound(f"no key {key.key_id!r}")

    def append_audit_entries(self, entries: Sequence[AuditEntry]) -> None:
        rows = [
            (format_timestamp(entry.at), entry.entry_id, entry.tenant_id, entry.subject, entry.action, entry.model_dump_json())
            for entry in entries
        ]
        with self._write(self._fast) as db:
            db.executemany("INSERT OR IGNORE INTO audit_entries VALUES (?, ?, ?, ?, ?, ?)", rows)

    def list_audit_entries(self, query: AuditQuery) -> Page[AuditEntry]:
        clauses: list[str] = []
        values: list[object] = []
        for name in ("tenant_id", "subject", "action"):
            if (value := getattr(query, name)) is not None:
                clauses.append(f"{name} = ?")
                values.append(value)
        if query.after:
            clauses.append("(at, entry_id) < (?, ?)")
            values += decode_cursor(query.after)
        where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
        rows = self._read(
            f"SELECT at, entry_id, record FROM audit_entries {where} ORDER BY at DESC, entry_id DESC LIMIT ?",  # noqa: S608  # clauses are constants
            *values,
            query.limit + 1,
        )
        shown = rows[: query.limit]
        cursor = encode_cursor(shown[-1][0], shown[-1][1]) if len(rows) > query.limit else None
        return Page(self._reader.load_readable(AuditEntry, ((row[1], row[2]) for row in shown)), cursor)

    def delete_old_audit_entries(self, before: datetime) -> int:
        with self._write(self._fast) as db:
            return db.execute("DELETE FROM audit_entries WHERE at < ?", (format_timestamp(before),)).rowcount

    def ping(self) -> None:
        self._read("SELECT 1 FROM api_keys LIMIT 1")

    def close(self) -> None:
        with self._lock:
            self._durable.close()
            self._fast.close()

    # Any: SQLite's values have the types of their columns, which each query knows.
    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._fast.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise Unavailable(f"the access database does not answer: {error}") from error

    @contextmanager
    def _write(self, db: sqlite3.Connection) -> Generator[sqlite3.Connection]:
        """A transaction: all or nothing. Raises Unavailable, DiskFull."""
        with self._lock:
            try:
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                    raise DiskFull("there is no space left for the access database", hint="free some space below TUNESMITH_HOME") from error
                raise Unavailable(f"the access database does not accept writes now: {error}") from error

    def _connect(self, synchronous: Literal["FULL", "NORMAL"]) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        return db
