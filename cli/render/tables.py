"""Renders lists as tables, and the capabilities of a deployment as lines."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from cli.http_client import Json
from cli.render.formats import format_rows, format_size, format_status, format_time, humanize


def job_table(jobs: list[Json]) -> Table:
    """One row per job."""
    table = _table("job", "name", "base", "status", "cost", "created")
    for job in jobs:
        cost = "" if job["cost_usd"] is None else f"${job['cost_usd']:.2f}"
        table.add_row(
            job["job_id"], escape(job["job_name"]), job["base_model_id"], format_status(job["status"]), cost, format_time(job["created_at"])
        )
    return table


def dataset_table(datasets: list[Json]) -> Table:
    """One row per dataset."""
    table = _table("dataset", "name", "type", "rows", "splits", "created")
    for dataset in datasets:
        splits = ", ".join(f"{name} {rows}" for name, rows in dataset["splits"].items())
        table.add_row(
            dataset["processed_dataset_id"],
            escape(dataset["name"]),
            format_rows(dataset),
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
