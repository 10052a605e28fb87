"""How answers look in a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

Json = dict[str, Any]
COLOURS = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "yellow",
    "training": "cyan",
    "preparing": "cyan",
}
# How an attempt ended, where its outcome alone does not say it.
ENDS = {
    "yielded": "its time was up",
    "preempted": "its compute was taken away",
    "lost": "its process vanished",
    "launch_failed": "it could not be launched",
}
ATTEMPTS_SHOWN = 5  # of a job of many slices, the latest


def job_table(jobs: list[Json]) -> Table:
    """Jobs, one a row."""
    table = _table("job", "name", "base", "status", "created")
    for job in jobs:
        table.add_row(job["job_id"], escape(job["job_name"]), job["base_model_id"], coloured(job["status"]), when(job["created_at"]))
    return table


def dataset_table(datasets: list[Json]) -> Table:
    """Datasets, one a row."""
    table = _table("dataset", "name", "type", "rows", "splits", "created")
    for dataset in datasets:
        splits = ", ".join(f"{name} {rows}" for name, rows in dataset["splits"].items())
        cells = (dataset["processed_dataset_id"], escape(dataset["name"]), dataset["dataset_type"], str(dataset["rows"]), splits)
        table.add_row(*cells, when(dataset["created_at"]))
    return table


def checkpoint_table(checkpoints: list[Json]) -> Table:
    """Checkpoints, one a row; the one that counts first."""
    table = _table("step", "epoch", "attempt", "why", "eval loss", "size", "saved")
    for saved in checkpoints:
        place = f"{saved['step']}/{saved['total_steps']}"
        loss = "" if saved["eval_loss"] is None else f"{saved['eval_loss']:.3f}" + ("  [green]best[/]" if saved["is_best"] else "")
        cells = (f"{saved['epoch']:.2f}", str(saved["attempt"]), words(saved["reason"]), loss, size(saved["size_bytes"]))
        table.add_row(place, *cells, when(saved["created_at"]))
    return table


def orphan_table(orphans: list[Json]) -> Table:
    """Files that no job owns, one place a row."""
    table = _table("job that is not there", "files", "size", "where")
    for orphan in orphans:
        table.add_row(orphan["job_id"], str(orphan["objects"]), size(orphan["size_bytes"]), escape(orphan["url"]))
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
    console.print(f"[bold]{job['job_id']}[/]  {coloured(job['status'])}  {escape(job['job_name'])}")
    if job["failure"]:
        console.print(f"  [red]{job['failure']['code']}[/]: {escape(job['failure']['message'])}", highlight=False)
        if job["failure"]["hint"]:
            console.print(f"  hint: {escape(job['failure']['hint'])}", highlight=False)
    if why := delay(job):
        console.print(f"  waiting: {escape(why)}", highlight=False)
    for line in (*place_lines(job), *attempt_lines(job["attempts"]), *metric_lines(job)):
        console.print(f"  {line}", highlight=False)
    for artifact in job["artifacts"]:
        console.print(
            f"  {artifact['name']:14} {size(artifact['size_bytes']):>9}  {artifact['uri']}{fidelity(artifact)}",
            highlight=False,
            soft_wrap=True,
        )
    if job["wandb_url"]:
        console.print(f"  W&B: {job['wandb_url']}")
    if command := way_on(job):
        console.print(f"  to go on: {command}", highlight=False, soft_wrap=True)


def place_lines(job: Json) -> Iterator[str]:
    """How far the job is, and where it could go on."""
    if job["export_of"]:
        yield f"exports     step {job['export_of']['step']} of {job['export_of']['job_id']}"
    if job["progress"] and job["status"] != "completed":
        place = job["progress"]
        left = f", {duration(place['eta_s'])}" if place["eta_s"] is not None and job["status"] == "training" else ""
        yield f"progress    step {place['step']}/{place['total_steps']}, epoch {place['epoch']:.2f}/{place['total_epochs']:g}{left}"
    if job["checkpoint"]:
        yield f"checkpoint  step {job['checkpoint']['step']}, {when(job['checkpoint']['at'])}"


def attempt_lines(attempts: list[Json]) -> Iterator[str]:
    """How each attempt went; nothing where there was but one."""
    if len(attempts) < 2:
        return
    if len(attempts) > ATTEMPTS_SHOWN:
        yield f"[dim]{len(attempts) - ATTEMPTS_SHOWN} earlier attempts[/]"
    for attempt in attempts[-ATTEMPTS_SHOWN:]:
        began = "from the start" if attempt["resumed_step"] is None else f"from step {attempt['resumed_step']}"
        saved = [] if attempt["saved_step"] is None else [f"saved step {attempt['saved_step']}"]
        yield f"attempt {attempt['number']:<3} {', '.join([began, *saved, _end_of(attempt)])}"


def _end_of(attempt: Json) -> str:
    if attempt["ended_at"] is None:
        return "at work" if attempt["claimed_at"] else "being launched"
    outcome: str = attempt["outcome"]
    return ENDS.get(outcome, outcome)


def delay(job: Json) -> str | None:
    """Why the current attempt is not launched yet, if it is not."""
    return job["attempts"][-1]["delay"] if job["attempts"] else None


def way_on(job: Json) -> str | None:
    """The command that continues a job from its checkpoint, where nothing else will."""
    match job["status"]:
        case "paused":
            return f"tunesmith resume {job['job_id']}"
        case "failed" | "cancelled" if job["checkpoint"]:
            return f"tunesmith retry {job['job_id']}"
        case _:
            return None


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
            return _status_line(body)
        case "evaluation":
            numbers = body["metrics"]
            if numbers["eval_loss"] is None:
                return None
            return f"evaluated {body['when']} training: loss {numbers['eval_loss']:.3f}, perplexity {numbers['perplexity']:.2f}"
        case "warning":
            return f"[yellow]warning[/] {escape(body['message'])}"
        case "checkpoint":
            return f"[dim]saved step {body['step']} ({size(body['size_bytes'])}, {words(body['reason'])})[/]"
        case "checkpoint_skipped":
            return f"[yellow]skipped[/] the checkpoint of attempt {body['attempt']} at step {body['step']}: {escape(body['why'])}"
        case "resumed":
            return f"goes on from step {body['step']}, saved by attempt {body['from_attempt']}"
        case "artifact":
            artifact = body["artifact"]
            return f"made {artifact['name']} ({size(artifact['size_bytes'])}){fidelity(artifact)}"
        case "tracker":
            return f"{body['tracker']}: {body['url'] or 'offline'}"
        case "decision":
            return f"[dim]{escape(body['what'])}: {escape(body['value'])} ({escape(body['why'])})[/]"
        case _:
            return None


def _status_line(body: Json) -> str:
    """`preparing, attempt 2` or `queued (its compute was taken away)`; what the status says itself is not said twice."""
    again = f", attempt {body['attempt']}" if body["status"] == "preparing" and body["attempt"] > 1 else ""
    why = ENDS.get(body["reason"], "" if body["reason"] == body["status"] else body["reason"])
    return coloured(body["status"]) + again + (f" ({why})" if why else "")


def coloured(status: str) -> str:
    """A status in its colour."""
    return f"[{COLOURS.get(status, 'white')}]{status}[/]"


def words(name: str) -> str:
    """A name of the API, for people."""
    return name.replace("_", " ")


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
