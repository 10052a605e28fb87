"""Finds the job that a person means by an id, the end of an id, a name, or @last."""

import re
from datetime import UTC, datetime
from difflib import get_close_matches

from cli.errors import CliError
from cli.http_client import Client, Json

LAST = "@last"
FULL_ID = re.compile(r"training_(.+_)?[0-9a-f]{12}")
MAX_FOUND = 200  # among which a name may be one of many that contain it
MAX_LISTED = 20  # for a person to choose from
NEAR_NAMES = 50  # of the newest jobs, among which a misspelled name is looked for


def find_job_id(client: Client, job: str) -> str:
    """The id of the job that these words mean. A full id costs no request.

    Raises CliError: with exit code 2 and a list if several jobs match, and with near names if none does.
    """
    if FULL_ID.fullmatch(job):
        return job
    if job == LAST:
        return _find_last(client)
    words = job.removeprefix("…").removeprefix("...")
    if not words:
        raise CliError("the job's id is empty", "`tunesmith jobs` lists them", exit_code=2)
    rows: list[Json] = client.get("/jobs", search=words, limit=MAX_FOUND)["jobs"]
    matches = [row for row in rows if row["job_id"].endswith(words) or row["job_name"].casefold() == words.casefold()]
    if len(matches) == 1:
        return matches[0]["job_id"]
    if matches:
        raise CliError(f"{job!r} means {len(matches)} jobs:\n{_list_jobs(matches)}", "name one by the end of its id", exit_code=2)
    raise CliError(f"there is no job {job!r}", _suggest(words, rows or client.get("/jobs", limit=NEAR_NAMES)["jobs"]))


def shorten_job_id(job_id: str, length: int = 4) -> str:
    """The end of an id, which stands for the whole while no other job ends like it: `…2d21`."""
    return f"…{job_id[-length:]}"


def format_age(timestamp: str, now: datetime) -> str:
    """The time since an ISO timestamp in its largest unit: `40 s`, `5 min`, `3 h`, `12 d`."""
    seconds = max(0.0, (now - datetime.fromisoformat(timestamp)).total_seconds())
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _find_last(client: Client) -> str:
    rows: list[Json] = client.get("/jobs", created_by="me", limit=1)["jobs"]
    if not rows:
        raise CliError("there is no last job: you have not created any", "`tunesmith train` submits one; `tunesmith jobs` lists all jobs")
    return rows[0]["job_id"]


def _list_jobs(rows: list[Json]) -> str:
    """A line per job to choose from: as much of the end of its id as tells the jobs apart, name, status and age."""
    length = next(size for size in range(4, 200) if len({row["job_id"][-size:] for row in rows}) == len(rows))
    now = datetime.now(UTC)
    lines = [
        f"  {shorten_job_id(row['job_id'], length)}  {row['job_name']}  {row['status']}, {format_age(row['created_at'], now)} ago"
        for row in rows[:MAX_LISTED]
    ]
    return "\n".join([*lines, *([f"  and {len(rows) - MAX_LISTED} older ones"] if len(rows) > MAX_LISTED else [])])


def _suggest(words: str, rows: list[Json]) -> str:
    """A hint with names of jobs that contain these words, or are spelled nearly like them."""
    names = list(dict.fromkeys(row["job_name"] for row in rows))
    containing = [name for name in names if words.casefold() in name.casefold()]
    near = containing[:3] or get_close_matches(words, names)
    return f"did you mean {' or '.join(repr(name) for name in near)}?" if near else "`tunesmith jobs` lists them"
