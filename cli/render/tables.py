"""Lists as tables, and the capabilities of a deployment as lines."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from cli.http_client import Json
from cli.render.formats import format_size, format_status, format_time, humanize


def job_table(jobs: list[Json]) -> Table:
    """Jobs, one a row."""
    table = _table("job", "name", "base", "status", "created")
    for job in jobs:
        table.add_row(
            job["job_id"], escape(job["job_name"]), job["base_model_id"], format_status(job["status"]), format_time(job["created_at"])
        )
    return table


def dataset_table(datasets: list[Json]) -> Table:
    """Datasets, one a row."""
    table = _table("dataset", "name", "type", "rows", "splits", "created")
    for dataset in datasets:
        splits = ", ".join(f"{name} {rows}" for name, rows in dataset["splits"].items())
        cells = (dataset["processed_dataset_id"], escape(dataset["name"]), dataset["dataset_type"], str(dataset["rows"]), splits)
        table.add_row(*cells, format_time(dataset["created_at"]))
    return table


def checkpoint_table(checkpoints: list[Json]) -> Table:
    """Checkpoints, one a row; the one that counts first."""
    table = _table("step", "epoch", "attempt", "why", "eval loss", "size", "saved")
    for saved in checkpoints:
        place = f"{saved['step']}/{saved['total_steps']}"
        loss = "" if saved["eval_loss"] is None else f"{saved['eval_loss']:.3f}" + ("  [green]best[/]" if saved["is_best"] else "")
        cells = (f"{saved['epoch']:.2f}", str(saved["attempt"]), humanize(saved["reason"]), loss, format_size(saved["size_bytes"]))
        table.add_row(place, *cells, format_time(saved["created_at"]))
    return table


def orphan_table(orphans: list[Json]) -> Table:
    """Files that no job owns, one place a row."""
    table = _table("job that is not there", "files", "size", "where")
    for orphan in orphans:
        table.add_row(orphan["job_id"], str(orphan["objects"]), format_size(orphan["size_bytes"]), escape(orphan["url"]))
    return table


def _table(id_column: str, *columns: str) -> Table:
    """A table whose first column is never cut: it is there to be copied."""
    table = Table(box=None, header_style="bold")
    table.add_column(id_column, no_wrap=True, overflow="ignore")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def capability_lines(capabilities: Json) -> Iterator[str]:
    """What a deployment can do, one kind of thing a line."""
    hardware = capabilities["hardware"]
    yield f"launcher    {capabilities['launcher']} on {hardware['device_name']} ({hardware['device']})"
    for name, profile in capabilities["profiles"].items():
        yield f"hardware    {name}: {profile['device_name']}"
    for name, trainer in capabilities["trainer_types"].items():
        yield f"trainer     {name}: {', '.join(trainer['dataset_types'])}; {', '.join(trainer['modalities'])}"
    for label in ("methods", "providers", "graders", "trackers"):
        yield f"{label:11} {', '.join(capabilities[label])}"
    exports = capabilities["export"]
    yield f"exports     {', '.join(exports['formats'])}; GGUF {', '.join(exports['gguf_quantizations']) or 'no'}"
    yield f"to          {', '.join(exports['destinations'])}"
