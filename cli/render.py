"""How answers look in a terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from cli.http_client import Json

STATUS_COLORS = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "yellow",
    "training": "cyan",
    "preparing": "cyan",
}
# How an attempt ended, where its outcome alone does not say it.
OUTCOME_LABELS = {
    "yielded": "its time was up",
    "preempted": "its compute was taken away",
    "lost": "its process vanished",
    "launch_failed": "it could not be launched",
}
PERPLEXITY_LABELS = (("perplexity", "of the file"), ("perplexity_merged", "trained"), ("perplexity_base", "base"))
MAX_SAMPLE_CHARS = 200  # of an answer in a terminal
MAX_ATTEMPTS_SHOWN = 5  # of a job of many slices, the latest


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


def get_pending_reason(job: Json) -> str | None:
    """Why the current attempt is not launched yet, if it is not."""
    return job["attempts"][-1]["pending_reason"] if job["attempts"] else None


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


def format_fidelity(artifact: Json) -> str:
    """How a file compares with the model that was trained, in a few words."""
    found = artifact["fidelity"]
    if not found:
        return ""
    known = [f"{found[name]:.2f} {whose}" for name, whose in PERPLEXITY_LABELS if found[name] is not None]
    perplexity = f", perplexity {' / '.join(known)}" if known else ""
    warning = "  [red]erased the tuning[/]" if found["closer_to_base"] else ""
    return f"  agrees {found['argmax_agreement']:.1%}, KL {found['mean_kl_to_merged']:.4f}{perplexity}{warning}"


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


def _status_line(body: Json) -> str:
    """`preparing, attempt 2` or `queued (its compute was taken away)`; what the status says itself is not said twice."""
    again = f", attempt {body['attempt']}" if body["status"] == "preparing" and body["attempt"] > 1 else ""
    why = OUTCOME_LABELS.get(body["reason"], "" if body["reason"] == body["status"] else body["reason"])
    return format_status(body["status"]) + again + (f" ({why})" if why else "")


def format_status(status: str) -> str:
    """A status in its colour."""
    return f"[{STATUS_COLORS.get(status, 'white')}]{status}[/]"


def humanize(name: str) -> str:
    """A name of the API, for people."""
    return name.replace("_", " ")


def format_size(size_bytes: int) -> str:
    """Bytes, for people."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 100_000 else f"{size_bytes / 1e3:.1f} kB"


def format_time_left(seconds: float | None) -> str:
    """Seconds, for people."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s left" if minutes else f"{rest}s left"


def format_time(timestamp: str) -> str:
    """A moment, for people."""
    return timestamp[:16].replace("T", " ")
