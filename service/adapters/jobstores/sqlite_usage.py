"""The table of usage: what each attempt, job and dataset adds to its tenant's usage of a period, which quotas sum."""

import sqlite3
from collections.abc import Iterable
from typing import Any

from schema.dataset import Dataset
from schema.job import Job
from service.adapters.jobstores.records import RecordReader
from service.core.usage import STORED, Usage, UsageEntry, dataset_entry, iter_job_entries, job_bytes_key

USAGE_TABLE = """
CREATE TABLE usage (
    tenant_id TEXT NOT NULL, period TEXT NOT NULL, key TEXT NOT NULL, gpu_seconds REAL NOT NULL, usd REAL NOT NULL,
    stored_bytes INTEGER NOT NULL, PRIMARY KEY (tenant_id, period, key)) WITHOUT ROWID;
"""
SUM_OF_PERIOD = "SELECT total(gpu_seconds), total(usd), coalesce(sum(stored_bytes), 0) FROM usage WHERE tenant_id = ? AND period = ?"


def write_usage(db: sqlite3.Connection, entries: Iterable[UsageEntry]) -> None:
    """Write entries over earlier ones of the same key."""
    rows = [(each.tenant_id, each.period, each.key, each.usage.gpu_seconds, each.usage.usd, each.usage.stored_bytes) for each in entries]
    db.executemany("INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?, ?, ?)", rows)


def delete_stored_bytes(db: sqlite3.Connection, job_id: str) -> None:
    """Delete a job's stored bytes; what its attempts used stays."""
    for (tenant_id,) in db.execute("SELECT tenant_id FROM jobs WHERE job_id = ?", (job_id,)).fetchall():
        delete_usage(db, tenant_id, STORED, job_bytes_key(job_id))


def delete_usage(db: sqlite3.Connection, tenant_id: str, period: str, key: str) -> None:
    """Delete one entry, if there is one."""
    db.execute("DELETE FROM usage WHERE tenant_id = ? AND period = ? AND key = ?", (tenant_id, period, key))


# Any: the columns are known to the query.
def load_sum(rows: list[tuple[Any, ...]]) -> Usage:
    """The answer to SUM_OF_PERIOD."""
    return Usage(*rows[0])


def fill_usage(db: sqlite3.Connection) -> None:
    """Write the entries of all records, for a database that has none yet."""
    reader = RecordReader()
    for job in reader.load_readable(Job, db.execute("SELECT job_id, record FROM jobs").fetchall()):
        write_usage(db, iter_job_entries(job))
    for dataset in reader.load_readable(Dataset, db.execute("SELECT dataset_id, record FROM datasets").fetchall()):
        write_usage(db, [dataset_entry(dataset)])
