"""Renders one job in full."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

from cli.http_client import Json
from cli.render.formats import (
    OUTCOME_LABELS,
    PAUSE_LABELS,
    format_cost,
    format_fidelity,
    format_size,
    format_status,
    format_time,
    format_time_left,
)
from cli.render.trackers import describe_tracker

# A service of an earlier version sends no content_perplexity.
METRIC_LABELS = {
    "eval_loss": "eval loss",
    "perplexity": "perplexity",
    "content_perplexity": "content perplexity",
    "accuracy": "accuracy",
}
MAX_ATTEMPTS_SHOWN = 5  # the latest ones: a job with a time limit per attempt can have hundreds


def print_job(console: Console, job: Json) -> None:
    """Print the status, progress, attempts, metrics and artifacts of a job, and the command that continues it."""
    console.print(f"[bold]{job['job_id']}[/]  {format_status(job['status'])}  {escape(job['job_name'])}")
    if job["failure"]:
        console.print(f"  [red]{job['failure']['code']}[/]: {escape(job['failure']['message'])}", highlight=False)
        if job["failure"]["hint"]:
            console.print(f"  hint: {escape(job['failure']['hint'])}", highlight=False)
    if reason := get_pending_reason(job):
        console.print(f"  waiting: {escape(reason)}", highlight=False)
    if job["pause_reason"] in PAUSE_LABELS:
        console.print(f"  paused: {PAUSE_LABELS[job['pause_reason']]}", highlight=False)
    for line in (*progress_lines(job), *attempt_lines(job["attempts"]), *metric_lines(job), *gate_lines(job["gate"])):
        console.print(f"  {line}", highlight=False)
    for line in artifact_lines(job["artifacts"]):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    for name, url in job["tracker_urls"].items():
        console.print(f"  {escape(describe_tracker(name, url))}", highlight=False, soft_wrap=True)
    if command := continue_command(job):
        console.print(f"  next step: {command}", highlight=False, soft_wrap=True)


def get_pending_reason(job: Json) -> str | None:
    """The reason that the current attempt is not launched yet, or None."""
    return job["pending_reason"]


def progress_lines(job: Json) -> Iterator[str]:
    """The source of the job, its progress, its latest checkpoint and its cost."""
    if job["cloned_from"]:
        yield f"clone of    {job['cloned_from']}"
    if earlier := job.get("earlier_model"):  # a service of an earlier version sends none
        yield f"starts from the {earlier['kind']} of {earlier['job_id']}"
    if len(datasets := job.get("datasets", [])) > 1:
        shares = [f"{each['processed_dataset_id']} (weight {each['weight']:g})" for each in datasets]
        yield f"mixes       {', '.join(shares)}"
    if job["export_of"]:
        yield f"exports     step {job['export_of']['step']} of {job['export_of']['job_id']}"
    if job["progress"] and job["status"] != "completed":
        progress = job["progress"]
        time_left = f", {format_time_left(progress['eta_s'])}" if progress["eta_s"] is not None and job["status"] == "training" else ""
        step, epoch = f"{progress['step']}/{progress['total_steps']}", f"{progress['epoch']:.2f}/{progress['total_epochs']:g}"
        yield f"progress    step {step}, epoch {epoch}{time_left}"
    if job["checkpoint"]:
        yield f"checkpoint  step {job['checkpoint']['step']}, {format_time(job['checkpoint']['at'])}"
    if cost := format_cost(job["cost"]):
        yield f"cost        {cost}"


def attempt_lines(attempts: list[Json]) -> Iterator[str]:
    """One line per attempt; none for a job with a single attempt."""
    if len(attempts) < 2:
        return
    if len(attempts) > MAX_ATTEMPTS_SHOWN:
        yield f"[dim]{len(attempts) - MAX_ATTEMPTS_SHOWN} earlier attempts[/]"
    for attempt in attempts[-MAX_ATTEMPTS_SHOWN:]:
        start = "from the start" if attempt["resumed_step"] is None else f"from step {attempt['resumed_step']}"
        saved = [] if attempt["last_checkpoint_step"] is None else [f"saved step {attempt['last_checkpoint_step']}"]
        yield f"attempt {attempt['number']:<3} {', '.join([start, *saved, _outcome_label(attempt)])}"


def _outcome_label(attempt: Json) -> str:
    if attempt["ended_at"] is None:
        return "running" if attempt["claimed_at"] else "launching"
    outcome: str = attempt["outcome"]
    return OUTCOME_LABELS.get(outcome, outcome)


def metric_lines(job: Json) -> Iterator[str]:
    """Metrics of the base model and of the tuned model."""
    before: Json = job["base_metrics"] or {}
    after: Json = job["metrics"] or {}
    for name, label in METRIC_LABELS.items():
        yield from _comparison_lines(label, before.get(name), after.get(name))
    for name in sorted(after.get("values", {})):
        yield from _comparison_lines(name, before.get("values", {}).get(name), after["values"][name])


def _comparison_lines(label: str, before: float | None, after: float | None) -> Iterator[str]:
    if after is not None:
        arrow = f"{before:.3f} → " if before is not None else ""
        yield f"{escape(label):11} {arrow}{after:.3f}"


def gate_lines(gate: Json | None) -> Iterator[str]:
    """One line per check of the promotion gate."""
    for check in gate["checks"] if gate else ():
        bounds = [
            f"{label} {check[name]:.4g}" for name, label in (("at_least", "at least"), ("at_most", "at most")) if check[name] is not None
        ]
        outcome = "passed" if check["passed"] else f"[red]not passed[/]: {escape(check['reason'])}"
        yield f"gate        {escape(check['metric'])} {' and '.join(bounds)}: {outcome}"


def artifact_lines(artifacts: list[Json]) -> Iterator[str]:
    """One line per artifact with its URI and fidelity, and the Hub repositories."""
    for artifact in artifacts:
        yield f"{artifact['name']:14} {format_size(artifact['size_bytes']):>9}  {artifact['uri']}{format_fidelity(artifact)}"
        fidelity = artifact["fidelity"]
        if fidelity and fidelity.get("advice"):
            yield f"{'':14} advice: {escape(fidelity['advice'])}"
    for url in dict.fromkeys(artifact["hub"]["url"] for artifact in artifacts if artifact["hub"]):
        yield f"{'on the Hub':14} {escape(url)}"


def continue_command(job: Json) -> str | None:
    """The command that continues a job from its checkpoint, or exports a model that did not pass its gate."""
    match job["status"]:
        case "paused":
            caps = {"cost_cap": " --max-cost-usd MORE", "gpu_seconds_cap": " --max-gpu-seconds MORE"}
            return f"tunesmith resume {job['job_id']}{caps.get(job['pause_reason'], '')}"
        case "failed" | "cancelled" if job["checkpoint"]:
            return f"tunesmith retry {job['job_id']}"
        case "completed" if job["gate_passed"] is False:
            return f"tunesmith export {job['job_id']}  (publishes it anyway)"
        case _:
            return None
