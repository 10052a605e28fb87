"""Turns a SQLite file of jobs into one of an earlier version."""

import sqlite3
from pathlib import Path


def downgrade(path: Path, version: int) -> None:
    """Remove the tables that a file of that version does not have. No store may have it open."""
    with sqlite3.connect(path) as db:
        for table in ("job_summaries", "job_names", "job_terms"):
            db.execute(f"DROP TABLE {table}")
        if version == 4:
            db.execute("CREATE TABLE job_costs (job_id TEXT PRIMARY KEY, cost TEXT NOT NULL) WITHOUT ROWID")
        else:
            db.execute("DROP TABLE usage")
        if version == 2:
            db.execute("DROP TABLE job_launchers")
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
