"""What Tunesmith stores, on the service and on this machine: the commands `du` and `prune`."""

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from cli.durations import EXAMPLES, read_duration
from cli.errors import ApiError, CliError
from cli.http_client import Client, Json
from cli.options import JsonOption, create_client
from cli.output import confirm, err, out, print_answer, print_json
from cli.settings import Settings

FINAL = ("completed", "failed", "cancelled")
KINDS = ("checkpoints", "artifacts", "logs")
MAX_JOBS = 1000  # with the most bytes; those beyond are left to the next call


def show_usage(
    context: typer.Context,
    limit: Annotated[int, typer.Option("--limit", min=1, max=MAX_JOBS, help="How many jobs to list, the largest first.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Show how much space datasets, jobs and this machine's copies take."""
    settings = Settings.from_environment()
    local = measure_local(settings)
    try:
        with create_client(context) as client:
            service: Json | None = client.get("/storage", limit=limit)
    except ApiError as error:
        if error.code != "unreachable":
            raise
        service = None
        err.print(f"{escape(error.message)}; only this machine is shown", style="dim", soft_wrap=True)
    tables = [_service_table(service)] if service else []
    tables += [_job_table(service["jobs"])] if service and service["jobs"] else []
    readable = Group(*tables, _local_table(local, settings))
    print_answer({"service": service, "local": local}, as_json, readable)
    if service and not service["complete"]:
        err.print("the service did not count everything in time", style="dim")


def prune(
    context: typer.Context,
    older_than: Annotated[
        str | None, typer.Option("--older-than", help="Only checkpoints of jobs that ended so long ago: 12h, 7d, 2w.")
    ] = None,
    downloads: Annotated[bool, typer.Option("--downloads", help="Also delete this machine's copies of jobs that still exist.")] = False,
    everything: Annotated[
        bool, typer.Option("--all-checkpoints", help="Keep no checkpoint: the jobs cannot be exported again, and a retry starts over.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Free space: checkpoints of ended jobs, and this machine's copies of jobs that no longer exist.

    Of a completed job the published checkpoint is kept, of another the one that a retry continues from.
    """
    settings, age = Settings.from_environment(), parse_age(older_than)
    keep = "none" if everything else "published"
    with create_client(context) as client:
        jobs = _find_prunable_jobs(client, age, keep)
        copies = _find_copies(client, settings, everything=downloads)
        freed_bytes = sum(jobs.values()) + sum(copies.values())
        if not freed_bytes:
            print_answer({"freed_bytes": 0, "jobs": {}, "local": {}}, as_json, "nothing to free")
            return
        if not as_json:
            out.print(_plan_table(jobs, copies, settings))
        confirm(f"Delete these files and free {format_bytes(freed_bytes)}?", yes=yes)
        freed = {job_id: client.delete(f"/jobs/{job_id}/checkpoints", keep=keep)["freed_bytes"] for job_id in jobs}
    for folder in copies:
        shutil.rmtree(folder, ignore_errors=True)
    local = {str(folder): size_bytes for folder, size_bytes in copies.items()}
    answer: Json = {"freed_bytes": sum(freed.values()) + sum(local.values()), "jobs": freed, "local": local}
    if as_json:
        print_json(answer)
    else:
        out.print(f"freed {format_bytes(answer['freed_bytes'])}")


def remove_local_copies(settings: Settings, job_id: str) -> int:
    """Delete this machine's copies of a job's files; returns how many bytes they had. 0 for a job that has none."""
    downloads = settings.home_folder / "downloads"
    folder = next((path for path in _list_folders(downloads) if path.name == job_id), None)  # an id never leads elsewhere
    if folder is None:
        return 0
    size_bytes = measure_folder(folder)
    shutil.rmtree(folder)
    return size_bytes


@dataclass(frozen=True)
class LocalFolders:
    """Where this machine keeps what can be downloaded or built again."""

    downloads: Path  # artifacts of jobs, a folder for each
    pulls: Path  # unfinished downloads of base models
    cached_models: Path  # base models that were built from packages

    @classmethod
    def of(cls, settings: Settings) -> "LocalFolders":
        """The folders of a home, and of the account's cache."""
        cache = settings.cache.expanduser() / "tunesmith/models"
        return cls(settings.home_folder / "downloads", settings.home_folder / "pulls", cache)


def measure_local(settings: Settings) -> Json:
    """Bytes of this machine's own copies, caches and logs, by kind."""
    folders = LocalFolders.of(settings)
    logs = settings.home_folder.glob("*.log*") if settings.home_folder.is_dir() else ()
    return {
        "downloads": measure_folder(folders.downloads),
        "unfinished_pulls": measure_folder(folders.pulls),
        "cached_models": measure_folder(folders.cached_models),
        "logs": sum(path.stat().st_size for path in logs if path.is_file()),
    }


def measure_folder(folder: Path) -> int:
    """The bytes of all files below a folder; 0 for one that does not exist. A file with several names counts once."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def parse_age(text: str | None) -> timedelta:
    """`7d` as a duration; None is none at all. Raises CliError."""
    if text is None:
        return timedelta()
    duration = read_duration(text)
    if duration is None:
        raise CliError(f"{text!r} is not a duration", f"write {EXAMPLES}", exit_code=2, param="--older-than")
    return duration


def format_bytes(size_bytes: int) -> str:
    """A size in its largest unit: `3.2 GB`, `536 MB`, `12 kB`."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= size:
            value = size_bytes / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{size_bytes} B"


def _find_prunable_jobs(client: Client, age: timedelta, keep: str) -> dict[str, int]:
    """The ended jobs with checkpoints that can be deleted, and the bytes that this frees."""
    rows = client.get("/storage", limit=MAX_JOBS)["jobs"]
    ended_before = datetime.now(UTC) - age
    candidates = [row["job_id"] for row in rows if row["bytes"]["checkpoints"] and _has_ended(row, ended_before)]
    found: dict[str, int] = {}
    for job_id in candidates:
        try:
            freed_bytes = client.delete(f"/jobs/{job_id}/checkpoints", keep=keep, dry_run="true")["freed_bytes"]
        except ApiError as error:
            if error.status != HTTPStatus.CONFLICT:  # an unfinished job exports one of them, or the job was retried
                raise
            err.print(f"skipped {job_id}: {escape(error.message)}", style="dim", soft_wrap=True)
            continue
        if freed_bytes:
            found[job_id] = freed_bytes
    return found


def _has_ended(row: Json, time: datetime) -> bool:
    """Whether the job had ended by that time. When is not known of a job that an earlier version listed: then it is long ago."""
    return row["status"] in FINAL and (row["finished_at"] is None or datetime.fromisoformat(row["finished_at"]) <= time)


def _find_copies(client: Client, settings: Settings, *, everything: bool) -> dict[Path, int]:
    """This machine's folders that can go: copies of jobs that do not exist, or of all jobs, and unfinished downloads of base models."""
    folders = LocalFolders.of(settings)
    copies = [folder for folder in _list_folders(folders.downloads) if everything or not _exists(client, folder.name)]
    measured = {folder: measure_folder(folder) for folder in [*copies, *_list_folders(folders.pulls)]}
    return {folder: size_bytes for folder, size_bytes in measured.items() if size_bytes}


def _exists(client: Client, job_id: str) -> bool:
    """Whether the service has a job of that id. What is no id is no copy of a job, and is kept."""
    try:
        client.get(f"/jobs/{quote(job_id)}")
    except ApiError as error:
        return error.status != HTTPStatus.NOT_FOUND
    return True


def _list_folders(parent: Path) -> list[Path]:
    """The folders in a folder, which may not exist."""
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()) if parent.is_dir() else []


def _service_table(service: Json) -> Table:
    table = _make_table("on the service", "size")
    for kind in ("datasets", *KINDS):
        table.add_row(kind, format_bytes(service["bytes"][kind]))
    for label, name in (("base models", "base_model_bytes"), ("files of no job", "orphan_bytes")):
        if service[name] is not None:
            table.add_row(label, format_bytes(service[name]))
    return table


def _job_table(jobs: list[Json]) -> Table:
    table = _make_table("\nlargest jobs", "\nstatus", *(f"\n{kind}" for kind in KINDS), "\ntotal")
    for job in jobs:
        sizes = [format_bytes(job["bytes"][kind]) for kind in KINDS]
        table.add_row(escape(job["job_id"]), job["status"], *sizes, format_bytes(job["total_bytes"]))
    return table


def _local_table(local: Json, settings: Settings) -> Table:
    table = _make_table(f"\non this machine ({escape(str(settings.home))})", "\nsize")
    for kind, size_bytes in local.items():
        table.add_row(kind.replace("_", " "), format_bytes(size_bytes))
    return table


def _plan_table(jobs: dict[str, int], copies: dict[Path, int], settings: Settings) -> Table:
    table = _make_table("to delete", "size")
    for job_id, size_bytes in jobs.items():
        table.add_row(f"checkpoints of {escape(job_id)}", format_bytes(size_bytes))
    for folder, size_bytes in copies.items():
        shown = folder.relative_to(settings.home_folder) if folder.is_relative_to(settings.home_folder) else folder
        table.add_row(f"{escape(str(settings.home / shown))} on this machine", format_bytes(size_bytes))
    return table


def _make_table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column.strip() == "status" else "right")
    return table
