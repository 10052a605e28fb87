"""Renders the events of a job as lines of text."""

from rich.markup import escape

from cli.http_client import Json
from cli.render.formats import (
    OUTCOME_LABELS,
    PAUSE_LABELS,
    format_fidelity,
    format_loss,
    format_size,
    format_status,
    format_step,
    format_time_left,
    humanize,
)
from cli.render.job import METRIC_LABELS, gate_lines
from cli.render.trackers import describe_tracker


def event_line(event: Json) -> str | None:
    """An event as a line of text; None for steps, phases and samples, which are shown otherwise."""
    body = event["event"]
    match body["type"]:
        case "status":
            return _status_line(body)
        case "evaluation":
            return _evaluation_line(body)
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
            return f"created {escape(artifact['name'])} ({format_size(artifact['size_bytes'])}){format_fidelity(artifact)}"
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
    reason = labels.get(body["reason"], "" if body["reason"] == body["status"] else escape(humanize(body["reason"])))
    return format_status(body["status"]) + attempt + (f" ({reason})" if reason else "")


def _evaluation_line(body: Json) -> str | None:
    metrics: Json = body["metrics"]
    common = [(label.removeprefix("eval "), metrics.get(name)) for name, label in METRIC_LABELS.items()]
    parts = [f"{name} {value:.3f}" for name, value in (*common, *sorted(metrics["values"].items())) if value is not None]
    step = f" (step {body['step']})" if body["when"] == "during" else ""
    return f"evaluated {body['when']} training{step}: {escape(', '.join(parts))}" if parts else None


def step_line(progress: Json, loss: float | None, learning_rate: float | None) -> str:
    """The progress at one step as a line for a log."""
    parts = [format_step(progress)]
    parts += [f"loss {format_loss(loss)}"] if loss is not None else []
    parts += [f"lr {learning_rate:.3g}"] if learning_rate is not None else []
    parts += [left] if (left := format_time_left(progress)) else []
    return ", ".join(parts)
