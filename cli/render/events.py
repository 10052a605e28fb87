"""Renders a job that is being watched: the progress bar, and a line per event."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from cli.http_client import Json
from cli.render.formats import OUTCOME_LABELS, PAUSE_LABELS, format_fidelity, format_size, format_status, humanize
from cli.render.job import METRIC_LABELS, gate_lines
from cli.render.trackers import describe_tracker

MAX_SAMPLE_CHARS = 200  # longer prompts and answers are truncated


def progress_bar(console: Console) -> Progress:
    """A progress bar with phase, steps, loss, remaining time and cost."""
    return Progress(
        TextColumn("{task.fields[phase]:>12}"),
        BarColumn(bar_width=32),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[eta]}"),
        TextColumn("{task.fields[cost]}"),
        console=console,
        transient=True,
    )


def event_line(event: Json) -> str | None:
    """An event as a line of text; None for events that only move the progress bar."""
    body = event["event"]
    match body["type"]:
        case "status":
            return _status_line(body)
        case "evaluation":
            return _evaluation_line(body)
        case "samples":
            return "\n".join(_sample_lines(body))
        case "gate":
            verdict = "[green]gate passed[/]" if body["gate"]["passed"] else "[red]gate not passed: not published[/]"
            return "\n".join([*gate_lines(body["gate"]), verdict])
        case "warning":
            return f"[yellow]warning[/] {escape(body['message'])}"
        case "checkpoint_saved":
            return f"[dim]saved step {body['step']} ({format_size(body['size_bytes'])}, {humanize(body['reason'])})[/]"
        case "checkpoint_skipped":
            return f"[yellow]skipped[/] the checkpoint of attempt {body['attempt']} at step {body['step']}: {escape(body['reason'])}"
        case "checkpoint_restored":
            return f"continues from step {body['step']}, saved by attempt {body['from_attempt']}"
        case "artifact":
            artifact = body["artifact"]
            return f"created {artifact['name']} ({format_size(artifact['size_bytes'])}){format_fidelity(artifact)}"
        case "tracker":
            return escape(describe_tracker(body["tracker"], body["url"]))
        case "decision":
            return f"[dim]{escape(body['setting'])}: {escape(body['value'])} ({escape(body['reason'])})[/]"
        case _:
            return None


def _status_line(body: Json) -> str:
    """`preparing, attempt 2` or `queued (compute preempted)`. A reason that equals the status is left out."""
    attempt = f", attempt {body['attempt']}" if body["status"] == "preparing" and body["attempt"] > 1 else ""
    labels = OUTCOME_LABELS | PAUSE_LABELS
    reason = labels.get(body["reason"], "" if body["reason"] == body["status"] else body["reason"])
    return format_status(body["status"]) + attempt + (f" ({reason})" if reason else "")


def _evaluation_line(body: Json) -> str | None:
    metrics: Json = body["metrics"]
    common = [(label.removeprefix("eval "), metrics.get(name)) for name, label in METRIC_LABELS.items()]
    parts = [f"{name} {value:.3f}" for name, value in (*common, *sorted(metrics["values"].items())) if value is not None]
    return f"evaluated {body['when']} training: {escape(', '.join(parts))}" if parts else None


def _sample_lines(body: Json) -> Iterator[str]:
    """One line per sample."""
    for sample in body["samples"]:
        prompt, text = (" ".join(sample[part].split())[:MAX_SAMPLE_CHARS] for part in ("prompt", "text"))
        yield f"[dim]sample, {body['when']} training:[/] {escape(prompt)} [dim]→[/] {escape(text)}"
