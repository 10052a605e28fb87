"""A job in full."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

from cli.http_client import Json
from cli.render.formats import OUTCOME_LABELS, format_fidelity, format_size, format_status, format_time, format_time_left

MAX_ATTEMPTS_SHOWN = 5  # of a job of many slices, the latest


def print_job(console: Console, job: Json) -> None:
    """A job in full: where it stands, what was measured, what it made."""
    console.print(f"[bold]{job['job_id']}[/]  {format_status(job['status'])}  {escape(job['job_name'])}")
    if job["failure"]:
        console.print(f"  [red]{job['failure']['code']}[/]: {escape(job['failure']['message'])}", highlight=False)
        if job["failure"]["hint"]:
            console.print(f"  hint: {escape(job['failure']['hint'])}", highlight=False)
    if why := get_pending_reason(job):
        console.print(f"  waiting: {escape(why)}", highlight=False)
    for line in (*progress_lines(job), *attempt_lines(job["attempts"]), *metric_lines(job), *gate_lines(job["gate"])):
        console.print(f"  {line}", highlight=False)
    for line in artifact_lines(job["artifacts"]):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    for name, url in job["tracker_urls"].items():
        console.print(f"  {name}: {escape(url)}", highlight=False, soft_wrap=True)
    if command := continue_command(job):
        console.print(f"  to go on: {command}", highlight=False, soft_wrap=True)


def get_pending_reason(job: Json) -> str | None:
    """Why the current attempt is not launched yet, if it is not."""
    return job["attempts"][-1]["pending_reason"] if job["attempts"] else None


def progress_lines(job: Json) -> Iterator[str]:
    """How far the job is, and where it could go on."""
    if job["cloned_from"]:
        yield f"clone of    {job['cloned_from']}"
    if job["export_of"]:
        yield f"exports     step {job['export_of']['step']} of {job['export_of']['job_id']}"
    if job["progress"] and job["status"] != "completed":
        place = job["progress"]
        left = f", {format_time_left(place['eta_s'])}" if place["eta_s"] is not None and job["status"] == "training" else ""
        yield f"progress    step {place['step']}/{place['total_steps']}, epoch {place['epoch']:.2f}/{place['total_epochs']:g}{left}"
    if job["checkpoint"]:
        yield f"checkpoint  step {job['checkpoint']['step']}, {format_time(job['checkpoint']['at'])}"


def attempt_lines(attempts: list[Json]) -> Iterator[str]:
    """How each attempt went; nothing where there was but one."""
    if len(attempts) < 2:
        return
    if len(attempts) > MAX_ATTEMPTS_SHOWN:
        yield f"[dim]{len(attempts) - MAX_ATTEMPTS_SHOWN} earlier attempts[/]"
    for attempt in attempts[-MAX_ATTEMPTS_SHOWN:]:
        began = "from the start" if attempt["resumed_step"] is None else f"from step {attempt['resumed_step']}"
        saved = [] if attempt["last_checkpoint_step"] is None else [f"saved step {attempt['last_checkpoint_step']}"]
        yield f"attempt {attempt['number']:<3} {', '.join([began, *saved, _outcome_label(attempt)])}"


def _outcome_label(attempt: Json) -> str:
    if attempt["ended_at"] is None:
        return "at work" if attempt["claimed_at"] else "being launched"
    outcome: str = attempt["outcome"]
    return OUTCOME_LABELS.get(outcome, outcome)


def metric_lines(job: Json) -> Iterator[str]:
    """Base and tuned, side by side."""
    before: Json = job["base_metrics"] or {}
    after: Json = job["metrics"] or {}
    for name, label in (("eval_loss", "eval loss"), ("perplexity", "perplexity"), ("accuracy", "accuracy")):
        yield from _comparison_lines(label, before.get(name), after.get(name))
    for name in sorted(after.get("values", {})):
        yield from _comparison_lines(name, before.get("values", {}).get(name), after["values"][name])


def _comparison_lines(label: str, before: float | None, after: float | None) -> Iterator[str]:
    if after is not None:
        arrow = f"{before:.3f} → " if before is not None else ""
        yield f"{escape(label):11} {arrow}{after:.3f}"


def gate_lines(gate: Json | None) -> Iterator[str]:
    """What the promotion gate found, check by check."""
    for check in gate["checks"] if gate else ():
        bounds = [
            f"{words} {check[name]:.4g}" for name, words in (("at_least", "at least"), ("at_most", "at most")) if check[name] is not None
        ]
        found = "passed" if check["passed"] else f"[red]not passed[/]: {escape(check['reason'])}"
        yield f"gate        {escape(check['metric'])} {' and '.join(bounds)}: {found}"


def artifact_lines(artifacts: list[Json]) -> Iterator[str]:
    """What a job made: where it is, and how it speaks."""
    for artifact in artifacts:
        yield f"{artifact['name']:14} {format_size(artifact['size_bytes']):>9}  {artifact['uri']}{format_fidelity(artifact)}"
        found = artifact["fidelity"]
        if found and found["advice"]:
            yield f"{'':14} advice: {escape(found['advice'])}"
    for url in dict.fromkeys(artifact["hub"]["url"] for artifact in artifacts if artifact["hub"]):
        yield f"{'on the Hub':14} {escape(url)}"


def continue_command(job: Json) -> str | None:
    """The command that continues a job from its checkpoint, or publishes what the gate held back."""
    match job["status"]:
        case "paused":
            return f"tunesmith resume {job['job_id']}"
        case "failed" | "cancelled" if job["checkpoint"]:
            return f"tunesmith retry {job['job_id']}"
        case "completed" if job["gate_passed"] is False:
            return f"tunesmith export {job['job_id']}  (publishes it all the same)"
        case _:
            return None
