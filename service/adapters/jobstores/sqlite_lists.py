"""Lists of jobs in SQLite: the tables that they are read from, and the statements that read them.

A statement first finds the keys of a page, from the narrowest table, index and order that its filters allow, and then reads the rows.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from schema.job import Job, Status
from service.adapters.jobstores.cursors import decode_cursor
from service.adapters.jobstores.records import RecordReader, format_timestamp, load_progress
from service.core.event_store import Heartbeat
from service.core.job_lists import (
    JobEntry,
    JobQuery,
    JobSummary,
    ListedJob,
    creator_term,
    fold_text,
    iter_exact_terms,
    make_listed_job,
    pair_term,
    split_search,
    summarize_job,
)

RECORDS_PER_READ = 500  # while a file of an earlier version is upgraded

# job_names is narrow, so that a search without other filters reads little: about 0.1 GB among a million jobs.
LIST_TABLES = """
CREATE TABLE job_summaries (job_id TEXT PRIMARY KEY, summary TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE job_names (
    tenant_id TEXT NOT NULL, created_at TEXT NOT NULL, job_id TEXT NOT NULL, name TEXT NOT NULL,
    PRIMARY KEY (tenant_id, created_at, job_id)) WITHOUT ROWID;
CREATE TABLE job_terms (
    tenant_id TEXT NOT NULL, term TEXT NOT NULL, created_at TEXT NOT NULL, job_id TEXT NOT NULL,
    PRIMARY KEY (tenant_id, term, created_at, job_id)) WITHOUT ROWID;
CREATE INDEX job_terms_of_job ON job_terms (job_id);
"""
# The columns that stand for a summary that is missing or damaged.
_COLUMNS = "jobs.job_name, jobs.base_model_id, jobs.status, jobs.modality, jobs.trainer_type, jobs.project_id, jobs.dataset_id"
ENTRY = f"SELECT tenant_id, job_id, created_at, summary, {_COLUMNS} FROM jobs LEFT JOIN job_summaries USING (job_id) WHERE job_id = ?"  # noqa: S608
_ROWS_OF_PAGE = f"""
SELECT page.job_id, page.created_at, summary, {_COLUMNS}, attempt, received_at, next_seq, phase, progress
FROM page CROSS JOIN jobs ON jobs.job_id = page.job_id
LEFT JOIN job_summaries ON job_summaries.job_id = page.job_id LEFT JOIN heartbeats ON heartbeats.job_id = page.job_id
"""  # noqa: S608


@dataclass(frozen=True)
class Statement:
    """A statement and the values of its question marks."""

    sql: str
    values: tuple[object, ...]


def write_job(db: sqlite3.Connection, job: Job) -> None:
    """Write what lists show of a job, and what they find it by."""
    created_at = format_timestamp(job.created_at)
    summary = summarize_job(job).model_dump_json(exclude_defaults=True)
    db.execute("INSERT OR REPLACE INTO job_summaries VALUES (?, ?)", (job.job_id, summary))
    db.execute("INSERT OR REPLACE INTO job_names VALUES (?, ?, ?, ?)", (job.tenant_id, created_at, job.job_id, fold_text(job.job_name)))
    db.execute("DELETE FROM job_terms WHERE job_id = ?", (job.job_id,))
    terms = [(job.tenant_id, term, created_at, job.job_id) for term in iter_exact_terms(job.metadata, job.created_by)]
    db.executemany("INSERT INTO job_terms VALUES (?, ?, ?, ?)", terms)


def delete_job(db: sqlite3.Connection, job_id: str) -> None:
    """Delete what `write_job` wrote, before the job itself is deleted."""
    key = "SELECT tenant_id, created_at, job_id FROM jobs WHERE job_id = ?"
    db.execute(f"DELETE FROM job_names WHERE (tenant_id, created_at, job_id) IN ({key})", (job_id,))  # noqa: S608  # a constant
    db.execute("DELETE FROM job_terms WHERE job_id = ?", (job_id,))
    db.execute("DELETE FROM job_summaries WHERE job_id = ?", (job_id,))


def fill_lists(db: sqlite3.Connection) -> None:
    """Write the entries of all jobs, for a file of an earlier version. A job whose record cannot be read is found by its name only."""
    db.create_function("fold_text", 1, fold_text, deterministic=True)
    db.execute("INSERT INTO job_names SELECT tenant_id, created_at, job_id, fold_text(job_name) FROM jobs")
    reader, rows = RecordReader(), db.execute("SELECT job_id, record FROM jobs")
    while some := rows.fetchmany(RECORDS_PER_READ):
        for job in reader.load_readable(Job, some):
            write_job(db, job)


def select_page(query: JobQuery) -> Statement:
    """The statement that reads a page and one row more, for `load_rows`. Raises InvalidRequest for a malformed cursor."""
    groups = [(status,) for status in query.statuses] if _reads_jobs_first(query) else [query.statuses]
    # Several statuses are read side by side and merged: one index orders the jobs of one status only.
    selections = [_select(query, group, query.after) for group in groups or [()]]
    keys = " UNION ALL ".join(
        f"SELECT {each.first}.created_at AS created_at, {each.first}.job_id AS job_id FROM {each.source} WHERE {each.condition}"  # noqa: S608
        for each in selections
    )
    page = f"WITH page AS ({keys} ORDER BY created_at DESC, job_id DESC LIMIT ?)"
    return Statement(page + _ROWS_OF_PAGE, (*(value for each in selections for value in each.values), query.limit + 1))


def select_counts(query: JobQuery) -> Statement:
    """The statement that counts the jobs of each status, whatever the statuses of the query."""
    selection = _select(query, (), None)
    sql = f"SELECT jobs.status, count(*) FROM {selection.source} WHERE {selection.condition} GROUP BY jobs.status"  # noqa: S608
    return Statement(sql, tuple(selection.values))


def load_rows(rows: Iterable[tuple[Any, ...]]) -> list[ListedJob]:
    """The jobs of a page, newest first."""
    newest_first = sorted(rows, key=lambda row: (row[1], row[0]), reverse=True)
    return [make_listed_job(_load_summary(*row[:10]), _load_heartbeat(*row[10:])) for row in newest_first]


def load_entry(row: tuple[Any, ...]) -> JobEntry:
    """A row of ENTRY."""
    return JobEntry(row[0], _load_summary(*row[1:]))


@dataclass(frozen=True)
class _Selection:
    """The keys of the jobs that match: a source, the table in it whose order they are read in, and a condition."""

    source: str
    first: str
    condition: str
    values: list[object]


def _reads_jobs_first(query: JobQuery) -> bool:
    """Whether the jobs are found by the indexes of their own table, and not by a term or a name."""
    if query.metadata:
        return False
    narrows = bool(query.project_id or query.statuses or query.trainer_type)
    return narrows or (query.created_by is None and (query.search is None or query.modality is not None))


def _select(query: JobQuery, statuses: Sequence[Status], after: str | None) -> _Selection:
    terms = [pair_term(key, value) for key, value in query.metadata]
    if query.created_by is not None:
        terms.append(creator_term(query.created_by))
    source, first = "jobs", "jobs"
    clauses, values = ["jobs.tenant_id = ?"], [query.tenant_id]
    if not _reads_jobs_first(query):
        table = "job_terms" if terms else "job_names"
        source, first = f"{table} AS found CROSS JOIN jobs ON jobs.job_id = found.job_id", "found"
        clauses = ["found.tenant_id = ?"]
        if terms:
            clauses.append("found.term = ?")
            values.append(terms.pop(0))
    for name in ("project_id", "modality", "trainer_type"):
        if (value := getattr(query, name)) is not None:
            clauses.append(f"{'+' if name in _unselective_filters(query, statuses) else ''}jobs.{name} = ?")
            values.append(value)
    if statuses:
        clauses.append(f"jobs.status IN ({', '.join('?' * len(statuses))})")
        values += statuses
    for term in terms:
        same_job = f"t.tenant_id = {first}.tenant_id AND t.term = ? AND t.created_at = {first}.created_at AND t.job_id = {first}.job_id"
        clauses.append(f"EXISTS (SELECT 1 FROM job_terms AS t WHERE {same_job})")  # noqa: S608
        values.append(term)
    if query.search is not None:
        clause, texts = _search_clause(query.search, is_first="job_names" in source)
        clauses.append(clause)
        values += texts
    clauses_of_time, times = _time_clauses(query, first, after)
    return _Selection(source, first, " AND ".join([*clauses, *clauses_of_time]), [*values, *times])


def _search_clause(search: str, *, is_first: bool) -> tuple[str, list[str]]:
    part, ending = split_search(search)
    found = {"instr({names}.name, ?)": part, f"lower(substr({{names}}.job_id, {-len(ending or '')})) = ?": ending}
    texts = {condition: text for condition, text in found.items() if text is not None}
    condition = f"({' OR '.join(texts) or '0'})"
    if is_first:
        return condition.format(names="found"), list(texts.values())
    same_job = "n.tenant_id = jobs.tenant_id AND n.created_at = jobs.created_at AND n.job_id = jobs.job_id"
    return f"EXISTS (SELECT 1 FROM job_names AS n WHERE {same_job} AND {condition.format(names='n')})", list(texts.values())  # noqa: S608


def _time_clauses(query: JobQuery, first: str, after: str | None) -> tuple[list[str], list[str]]:
    clauses: list[str] = []
    values: list[str] = []
    position = decode_cursor(after) if after else None
    if position:
        clauses.append(f"({first}.created_at, {first}.job_id) < (?, ?)")
        values += position
    if query.created_from:
        clauses.append(f"{first}.created_at >= ?")
        values.append(format_timestamp(query.created_from))
    end = format_timestamp(query.created_before) if query.created_before else None
    # SQLite uses one upper bound: beside a later page's cursor, this one would make it read all earlier pages again.
    if end and not (position and position[0] < end):
        clauses.append(f"{first}.created_at < ?")
        values.append(end)
    return clauses, values


def _unselective_filters(query: JobQuery, statuses: Sequence[Status]) -> set[str]:
    """Filters that most jobs pass. A `+` keeps SQLite, which has no statistics here, from using their index when a better one applies."""
    if query.project_id is not None:
        return {"modality", "trainer_type"}
    return {"modality"} if statuses or query.trainer_type is not None else set()


def _load_summary(job_id: str, created_at: str, text: str | None, *columns: str) -> JobSummary:
    try:
        if text:
            return JobSummary.load(text)
    except ValidationError:
        pass
    job_name, base_model_id, status, modality, trainer_type, project_id, dataset_id = columns
    return JobSummary(
        job_id=job_id,
        job_name=job_name,
        base_model_id=base_model_id,
        status=Status(status),
        modality=modality,
        trainer_type=trainer_type,
        project_id=project_id,
        processed_dataset_id=dataset_id,
        created_at=datetime.fromisoformat(created_at),
    )


def _load_heartbeat(attempt: int | None, received_at: str, next_seq: int, phase: Any, progress: str | None) -> Heartbeat | None:  # noqa: ANN401  # a Phase
    if attempt is None:
        return None
    return Heartbeat(attempt, datetime.fromisoformat(received_at), next_seq, phase, load_progress(progress))
