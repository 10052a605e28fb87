"""Renders lists as tables, and the capabilities of a deployment as lines."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cli.http_client import Json
from cli.job_names import format_age
from cli.render.formats import format_loss, format_rows, format_size, format_status, format_time, humanize, shorten_ids


def job_table(jobs: list[Json], *, now: datetime, width: int, with_short_ids: bool) -> Table:
    """One line per job. A narrow terminal gets fewer columns, whatever is not read by a person all of them, with whole ids."""
    ids = shorten_ids([job["job_id"] for job in jobs]) if with_short_ids else {job["job_id"]: job["job_id"] for job in jobs}
    columns = [column for column in JOB_COLUMNS if not with_short_ids or width >= column.min_width]
    rows = [_describe_job(job, now) | {"job": ids[job["job_id"]]} for job in jobs]
    cells = [{column.header: column.header for column in columns}, *rows]
    widths = {column: max(Text.from_markup(row[column.header]).cell_len for row in cells) for column in columns}
    if with_short_ids:
        widths = _narrow(widths, width)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.header, no_wrap=True, width=widths[column], overflow="ellipsis", justify=column.justify)
    for row in rows:
        table.add_row(*(row[column.header] for column in columns))
    return table


MIN_CUT_WIDTH = 8  # of a column whose long values may be cut
COLUMN_GAP = 2


@dataclass(frozen=True)
class JobColumn:
    """A column of the list of jobs."""

    header: str
    min_width: int = 0  # of a terminal that has room for it
    may_be_cut: bool = False
    justify: Literal["left", "right"] = "left"


JOB_COLUMNS = (
    JobColumn("job"),
    JobColumn("name", may_be_cut=True),
    JobColumn("trainer", min_width=80),
    JobColumn("base", min_width=100, may_be_cut=True),
    JobColumn("status"),
    JobColumn("done", justify="right"),
    JobColumn("loss", min_width=50, justify="right"),
    JobColumn("eval loss", min_width=110),
    JobColumn("age", justify="right"),
    JobColumn("cost", min_width=80, justify="right"),
)


def _narrow(widths: Mapping[JobColumn, int], width: int) -> dict[JobColumn, int]:
    """The widths, with long names cut as far as it takes for a line to fit."""
    narrowed = dict(widths)
    too_wide = sum(widths.values()) + COLUMN_GAP * (len(widths) - 1) - width
    for column in sorted((column for column in widths if column.may_be_cut), key=lambda column: -widths[column]):
        cut = min(max(too_wide, 0), max(widths[column] - MIN_CUT_WIDTH, 0))
        narrowed[column] -= cut
        too_wide -= cut
    return narrowed


def _describe_job(job: Json, now: datetime) -> dict[str, str]:
    """The cells of a job, as markup. A service of an earlier version sends no phase, progress and eval_loss."""
    progress: Json = job.get("progress") or {}
    phase, total = job.get("phase"), progress.get("total_steps")
    status = f"[cyan]{escape(humanize(phase))}[/]" if phase and job["status"] in ("preparing", "training") else format_status(job["status"])
    losses = [job.get("base_eval_loss"), job.get("eval_loss")]
    return {
        "name": escape(job["job_name"]),
        "trainer": job["trainer_type"],
        "base": escape(job["base_model_id"]),
        "status": status,
        "done": f"{progress['step'] / total:.0%}" if total else "",
        "loss": "" if progress.get("loss") is None else format_loss(progress["loss"]),
        "eval loss": " → ".join(format_loss(loss) for loss in losses if loss is not None),
        "age": format_age(job["created_at"], now),
        "cost": "" if job["cost_usd"] is None else f"${job['cost_usd']:.2f}",
    }


def count_line(counts: Mapping[str, int]) -> str:
    """How many jobs have each status, as one line."""
    parts = [f"{count} {format_status(status)}" for status, count in counts.items() if count]
    return ", ".join(parts) or "no jobs"


def dataset_table(datasets: list[Json]) -> Table:
    """One row per dataset."""
    table = _table("dataset", "name", "type", "rows", "splits", "created")
    for dataset in datasets:
        splits = ", ".join(f"{name} {rows}" for name, rows in dataset["splits"].items())
        status = dataset.get("status", "ready")  # a service of an earlier version sends none
        table.add_row(
            dataset["processed_dataset_id"],
            escape(dataset["name"]),
            format_rows(dataset) if status == "ready" else format_status(status),
            str(dataset["rows"]),
            splits,
            format_time(dataset["created_at"]),
        )
    return table


def checkpoint_table(checkpoints: list[Json]) -> Table:
    """One row per checkpoint; the next attempt uses the first."""
    table = _table("step", "epoch", "attempt", "reason", "eval loss", "size", "saved")
    for checkpoint in checkpoints:
        loss = "" if checkpoint["eval_loss"] is None else f"{checkpoint['eval_loss']:.3f}"
        table.add_row(
            f"{checkpoint['step']}/{checkpoint['total_steps']}",
            f"{checkpoint['epoch']:.2f}",
            str(checkpoint["attempt"]),
            humanize(checkpoint["reason"]),
            loss + ("  [green]best[/]" if checkpoint["is_best"] else ""),
            format_size(checkpoint["size_bytes"]),
            format_time(checkpoint["created_at"]),
        )
    return table


def key_table(keys: list[Json]) -> Table:
    """One row per API key."""
    table = _table("key", "name", "tenant", "scopes", "created by", "expires", "state")
    for key in keys:
        state = "[red]revoked[/]" if key["revoked_at"] else ""
        scopes = ", ".join(key["scopes"])
        table.add_row(
            key["key_id"], escape(key["name"]), key["tenant_id"], scopes, escape(key["created_by"]), format_time(key["expires_at"]), state
        )
    return table


def audit_table(entries: list[Json]) -> Table:
    """One row per entry of the audit log."""
    table = _table("at", "tenant", "who", "action", "about", "outcome", "from")
    for entry in entries:
        outcome = str(entry["status"]) + (f" {entry['code']}" if entry["code"] else "")
        table.add_row(
            format_time(entry["at"]),
            entry["tenant_id"],
            escape(entry["subject"]),
            entry["action"],
            escape(entry["resource"] or ""),
            outcome,
            entry["address"] or "",
        )
    return table


def orphan_table(orphans: list[Json]) -> Table:
    """One row per folder whose job does not exist."""
    table = _table("missing job", "files", "size", "location")
    for orphan in orphans:
        table.add_row(orphan["job_id"], str(orphan["objects"]), format_size(orphan["size_bytes"]), escape(orphan["url"]))
    return table


def _table(id_column: str, *columns: str) -> Table:
    """A table whose first column is never truncated, because users copy ids from it."""
    table = Table(box=None, header_style="bold")
    table.add_column(id_column, no_wrap=True, overflow="ignore")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def capability_lines(capabilities: Json) -> Iterator[str]:
    """One line per hardware profile, trainer and kind of option."""
    for launcher_name, launcher in capabilities["launchers"].items():
        for name, profile in launcher["profiles"].items():
            default = ", the default" if f"{launcher_name}/{name}" == capabilities["default_hardware"] else ""
            price = f", ${profile['price']['usd_per_hour']:.2f} an hour" if profile["price"] else ""
            yield f"hardware    {launcher_name}/{name}: {profile['device_name']}{price}{default}"
        if launcher["environments"]:
            yield f"environment {launcher_name}: {', '.join(launcher['environments'])}"
        if launcher["problem"]:
            yield f"[red]problem     {launcher_name}: {escape(launcher['problem'])}[/]"
    for name, trainer in capabilities["trainer_types"].items():
        yield f"trainer     {name}: {', '.join(trainer['dataset_types'])}; {', '.join(trainer['modalities'])}"
    for label in ("methods", "providers", "graders", "trackers"):
        yield f"{label:11} {', '.join(capabilities[label])}"
    exports = capabilities["export"]
    yield f"exports     {', '.join(exports['formats'])}; GGUF {', '.join(exports['gguf_quantizations']) or 'no'}"
    yield f"to          {', '.join(exports['destinations'])}"
