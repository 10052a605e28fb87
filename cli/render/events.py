"""A job that is followed: the progress bar, and a line for each event."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from cli.http_client import Json
from cli.render.formats import OUTCOME_LABELS, format_fidelity, format_size, format_status, humanize
from cli.render.job import gate_lines

MAX_SAMPLE_CHARS = 200  # of an answer in a terminal


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
            return _evaluation_line(body)
        case "samples":
            return "\n".join(_sample_lines(body))
        case "gate":
            lines = [*gate_lines(body["gate"])]
            return "\n".join([*lines, "[green]the gate is passed[/]" if body["gate"]["passed"] else "[red]not published[/]"])
        case "warning":
            return f"[yellow]warning[/] {escape(body['message'])}"
        case "checkpoint_saved":
            return f"[dim]saved step {body['step']} ({format_size(body['size_bytes'])}, {humanize(body['reason'])})[/]"
        case "checkpoint_skipped":
            return f"[yellow]skipped[/] the checkpoint of attempt {body['attempt']} at step {body['step']}: {escape(body['reason'])}"
        case "checkpoint_restored":
            return f"goes on from step {body['step']}, saved by attempt {body['from_attempt']}"
        case "artifact":
            artifact = body["artifact"]
            return f"made {artifact['name']} ({format_size(artifact['size_bytes'])}){format_fidelity(artifact)}"
        case "tracker":
            return f"{body['tracker']}: {body['url'] or 'offline'}"
        case "decision":
            return f"[dim]{escape(body['setting'])}: {escape(body['value'])} ({escape(body['reason'])})[/]"
        case _:
            return None


def _status_line(body: Json) -> str:
    """`preparing, attempt 2` or `queued (its compute was taken away)`; what the status says itself is not said twice."""
    again = f", attempt {body['attempt']}" if body["status"] == "preparing" and body["attempt"] > 1 else ""
    why = OUTCOME_LABELS.get(body["reason"], "" if body["reason"] == body["status"] else body["reason"])
    return format_status(body["status"]) + again + (f" ({why})" if why else "")


def _evaluation_line(body: Json) -> str | None:
    numbers: Json = body["metrics"]
    told = [("loss", numbers["eval_loss"]), ("perplexity", numbers["perplexity"]), ("accuracy", numbers["accuracy"])]
    known = [f"{name} {value:.3f}" for name, value in (*told, *sorted(numbers["values"].items())) if value is not None]
    return f"evaluated {body['when']} training: {escape(', '.join(known))}" if known else None


def _sample_lines(body: Json) -> Iterator[str]:
    """What the model answers, each in a line."""
    for sample in body["samples"]:
        prompt, text = (" ".join(sample[part].split())[:MAX_SAMPLE_CHARS] for part in ("prompt", "text"))
        yield f"[dim]sample, {body['when']} training:[/] {escape(prompt)} [dim]→[/] {escape(text)}"
