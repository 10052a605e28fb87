"""How answers look in a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

Json = dict[str, Any]
COLOURS = {"completed": "green", "failed": "red", "cancelled": "yellow", "training": "cyan", "preparing": "cyan"}


def job_table(jobs: list[Json]) -> Table:
    """Jobs, one a row."""
    table = _table("job", "name", "base", "status", "created")
    for job in jobs:
        table.add_row(job["job_id"], job["job_name"], job["base_model_id"], coloured(job["status"]), when(job["created_at"]))
    return table


def dataset_table(datasets: list[Json]) -> Table:
    """Datasets, one a row."""
    table = _table("dataset", "name", "type", "rows", "splits", "created")
    for dataset in datasets:
        splits = ", ".join(f"{name} {rows}" for name, rows in dataset["splits"].items())
        cells = (dataset["processed_dataset_id"], dataset["name"], dataset["dataset_type"], str(dataset["rows"]), splits)
        table.add_row(*cells, when(dataset["created_at"]))
    return table


def _table(id_column: str, *columns: str) -> Table:
    """A table whose first column is never cut: it is there to be copied."""
    table = Table(box=None, header_style="bold")
    table.add_column(id_column, no_wrap=True, overflow="ignore")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def job_summary(console: Console, job: Json) -> None:
    """A job in full: where it stands, what was measured, what it made."""
    console.print(f"[bold]{job['job_id']}[/]  {coloured(job['status'])}  {job['job_name']}")
    if job["failure"]:
        console.print(f"  [red]{job['failure']['code']}[/]: {job['failure']['message']}", highlight=False)
        if job["failure"]["hint"]:
            console.print(f"  hint: {job['failure']['hint']}", highlight=False)
    if job["attempts"] and job["attempts"][-1]["delay"]:
        console.print(f"  waiting: {job['attempts'][-1]['delay']}", highlight=False)
    for line in metric_lines(job):
        console.print(f"  {line}")
    for artifact in job["artifacts"]:
        console.print(
            f"  {artifact['name']:14} {size(artifact['size_bytes']):>9}  {artifact['uri']}{fidelity(artifact)}",
            highlight=False,
            soft_wrap=True,
        )
    if job["wandb_url"]:
        console.print(f"  W&B: {job['wandb_url']}")


def metric_lines(job: Json) -> Iterator[str]:
    """Base and tuned, side by side."""
    before: Json = job["base_metrics"] or {}
    after: Json = job["metrics"] or {}
    for name, label in (("eval_loss", "eval loss"), ("perplexity", "perplexity"), ("accuracy", "accuracy")):
        if after.get(name) is not None:
            arrow = f"{before[name]:.3f} → " if before.get(name) is not None else ""
            yield f"{label:11} {arrow}{after[name]:.3f}"


def fidelity(artifact: Json) -> str:
    """How a file compares with the model that was trained, in a few words."""
    found = artifact["fidelity"]
    if not found:
        return ""
    warning = "  [red]erased the tuning[/]" if found["erased_tuning"] else ""
    return f"  agrees {found['argmax_agreement']:.1%}, KL {found['mean_kl_to_merged']:.4f}{warning}"


def progress_bar(console: Console) -> Progress:
    """A bar for a training: steps, loss, what is going on, and how long it will take."""
    return Progress(
        TextColumn("{task.fields[phase]:>12}"),
        BarColumn(bar_width=32),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[eta]}"),
        console=console,
        transient=True,
    )


def event_line(event: Json) -> str | None:
    """An event as a line for a person; None for what the bar shows."""
    body = event["event"]
    match body["type"]:
        case "status":
            return f"{coloured(body['status'])}" + (f" ({body['reason']})" if body["reason"] else "")
        case "evaluation":
            numbers = body["metrics"]
            if numbers["eval_loss"] is None:
                return None
            return f"evaluated {body['when']} training: loss {numbers['eval_loss']:.3f}, perplexity {numbers['perplexity']:.2f}"
        case "warning":
            return f"[yellow]warning[/] {body['message']}"
        case "artifact":
            artifact = body["artifact"]
            return f"made {artifact['name']} ({size(artifact['size_bytes'])}){fidelity(artifact)}"
        case "tracker":
            return f"{body['tracker']}: {body['url'] or 'offline'}"
        case "decision":
            return f"[dim]{body['what']}: {body['value']} ({body['why']})[/]"
        case _:
            return None


def coloured(status: str) -> str:
    """A status in its colour."""
    return f"[{COLOURS.get(status, 'white')}]{status}[/]"


def size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def duration(seconds: float | None) -> str:
    """Seconds, for people."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s left" if minutes else f"{rest}s left"


def when(text: str) -> str:
    """A moment, for people."""
    return text[:16].replace("T", " ")
