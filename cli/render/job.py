"""Renders one job in full."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cli.hints import translate_hint
from cli.http_client import Json
from cli.job_names import shorten_job_id
from cli.render.formats import (
    OUTCOME_LABELS,
    PAUSE_LABELS,
    format_cost,
    format_duration,
    format_fidelity,
    format_loss,
    format_size,
    format_status,
    format_step,
    format_time,
    format_time_left,
    humanize,
)
from cli.render.trackers import describe_tracker

# A service of an earlier version sends no content_perplexity.
METRIC_LABELS = {
    "eval_loss": "eval loss",
    "perplexity": "perplexity",
    "content_perplexity": "content perplexity",
    "accuracy": "accuracy",
}
NO_DATASETS: Mapping[str, Json] = MappingProxyType({})
LABEL = 12  # columns of a field's name
TALKING_KINDS = {"gguf", "merged", "adapter"}
MAX_ATTEMPTS_SHOWN = 5  # the latest ones: a job with a time limit per attempt can have hundreds


def print_job(
    console: Console,
    job: Json,
    *,
    with_setup: bool = True,
    datasets: Mapping[str, Json] = NO_DATASETS,
    decisions: Sequence[Json] = (),
) -> None:
    """Print a job: with its setup what it was made from, then how it is going, what it achieved and made, and the next commands.

    `datasets` has the records of its datasets by id, as far as they exist; `decisions` the settings that its attempts chose.
    """
    word = shorten_job_id(job["job_id"]) if console.is_terminal else job["job_id"]
    console.print(f"[bold]{job['job_id']}[/]  {format_status(job['status'])}  {escape(job['job_name'])}", highlight=False, soft_wrap=True)
    if job["failure"]:
        console.print(f"  [red]{job['failure']['code']}[/]: {escape(job['failure']['message'])}", highlight=False)
        if job["failure"]["hint"]:
            console.print(f"  hint: {escape(translate_hint(job['failure']['hint']))}", highlight=False)
    lines = [*(setup_lines(job, datasets) if with_setup else ()), *progress_lines(job), *attempt_lines(job["attempts"])]
    lines += [*metric_lines(job), *gate_lines(job["gate"])]
    lines += [f"{'decided':{LABEL}}{decision_line(decision)}" for decision in decisions]
    for line in lines:
        _print_field(console, line)
    for line in (*tracker_lines(job), *artifact_lines(job, word)):  # with addresses and commands to copy
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    for number, command in enumerate(next_commands(job, word)):
        console.print(f"  {'next step:' if not number else '':10} {command}", highlight=False, soft_wrap=True)


def _print_field(console: Console, markup: str) -> None:
    """Print a label and its value; a long value continues below its beginning."""
    text = Text.from_markup(markup)
    if len(text) + 2 <= console.width:
        console.print(Text("  ") + text)
        return
    grid = Table.grid()
    grid.add_row(Text("  ") + text[:LABEL], text[LABEL:])
    console.print(grid)


def setup_lines(job: Json, datasets: Mapping[str, Json]) -> Iterator[str]:
    """The base, the data, the trainer and the hardware of a job."""
    yield from _field("base", job["base_model_id"])
    if earlier := job.get("earlier_model"):  # a service of an earlier version sends none
        yield from _field("starts from", f"the {earlier['kind']} of {earlier['job_id']}")
    shares: list[Json] = job.get("datasets") or [{"processed_dataset_id": job["processed_dataset_id"], "weight": 1.0}]
    for number, share in enumerate(shares):
        weight = f", weight {share['weight']:g}" if len(shares) > 1 else ""
        yield from _field("dataset" if not number else "", _describe_dataset(share["processed_dataset_id"], datasets) + weight)
    yield from _field("trainer", ", ".join(filter(None, (job["trainer_type"], job["method"]))))  # ingestion has no method
    yield from _field("hardware", f"{job['launcher']}/{job['hardware']}")
    yield from _field("project", job["project_id"])
    yield from _field("metadata", ", ".join(f"{name}={value}" for name, value in job.get("metadata", {}).items()))
    yield from _field("clone of", job["cloned_from"])
    if job["export_of"]:
        yield from _field("exports", f"step {job['export_of']['step']} of {job['export_of']['job_id']}")
    creator = f" by {job['created_by']}" if job.get("created_by") else ""
    yield from _field("created", format_time(job["created_at"]) + creator)


def _field(label: str, value: str | None) -> Iterator[str]:
    if value:
        yield f"{label:{LABEL}}{escape(value)}"


def _describe_dataset(dataset_id: str, datasets: Mapping[str, Json]) -> str:
    if (dataset := datasets.get(dataset_id)) is None:
        return dataset_id
    if dataset.get("status", "ready") != "ready":  # a service of an earlier version sends none
        return f"{dataset['name']}, {dataset['status']}, {dataset_id}"
    splits = ", ".join(f"{rows} {name}" for name, rows in dataset["splits"].items())
    return f"{dataset['name']}, {dataset['rows']} rows ({splits}), {dataset_id}"


def progress_lines(job: Json) -> Iterator[str]:
    """What the job waits for, how long it has run, its progress, its latest checkpoint and its cost."""
    if reason := job["pending_reason"]:
        yield f"{'waiting:':{LABEL}}{escape(reason)}"
    if job["pause_reason"] in PAUSE_LABELS:
        yield f"{'paused:':{LABEL}}{PAUSE_LABELS[job['pause_reason']]}"
    if job.get("started_at"):
        duration_s = job.get("duration_s")  # a service of an earlier version sends none
        took = f"{', took' if job.get('finished_at') else ', for'} {format_duration(duration_s)}" if duration_s is not None else ""
        yield from _field("started", format_time(job["started_at"]) + took)
    if progress := job["progress"]:
        phase = job.get("phase")
        is_running = job["status"] in ("preparing", "training")
        details = [humanize(phase)] if is_running and phase and phase != "training" else []
        details += [left] if is_running and (left := format_time_left(progress)) else []
        yield from _field("progress", ", ".join([format_step(progress), *details]))
        if (loss := job.get("train_loss", progress.get("loss"))) is not None:
            yield from _field("train loss", f"{format_loss(loss)} (at step {progress['step']})")
    if job["checkpoint"]:
        yield from _field("checkpoint", f"step {job['checkpoint']['step']}, {format_time(job['checkpoint']['at'])}")
    yield from _field("cost", format_cost(job["cost"]))


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
    """Metrics on the held-out rows: of the base, and of the trained model."""
    before: Json = job["base_metrics"] or {}
    after: Json = job["metrics"] or {}
    rows: int | None = after.get("eval_rows") or before.get("eval_rows")
    names = [(label, before.get(name), after.get(name)) for name, label in METRIC_LABELS.items()]
    names += [(name, before.get("values", {}).get(name), after.get("values", {}).get(name)) for name in _value_names(before, after)]
    for number, (label, base, tuned) in enumerate((label, base, tuned) for label, base, tuned in names if (base, tuned) != (None, None)):
        meaning = _describe_comparison(base, tuned, rows if not number else None)
        values = " → ".join(f"{value:.3f}" for value in (base, tuned) if value is not None)
        yield f"{escape(label):{LABEL}}{values}{meaning}" if len(label) < LABEL else f"{escape(label)} {values}{meaning}"


def _value_names(before: Json, after: Json) -> list[str]:
    return sorted({*before.get("values", {}), *after.get("values", {})})


def _describe_comparison(base: float | None, tuned: float | None, rows: int | None) -> str:
    """Which models the values are of, and on how many rows if that is to be said."""
    models = "base → tuned" if base is not None and tuned is not None else "base" if tuned is None else "tuned"
    where = "" if rows is None else f", on the same {rows} held-out rows" if "→" in models else f", on {rows} held-out rows"
    return f"  [dim]({models}{where})[/]"


def gate_lines(gate: Json | None) -> Iterator[str]:
    """One line per check of the promotion gate."""
    for check in gate["checks"] if gate else ():
        bounds = [
            f"{label} {check[name]:.4g}" for name, label in (("at_least", "at least"), ("at_most", "at most")) if check[name] is not None
        ]
        outcome = "passed" if check["passed"] else f"[red]not passed[/]: {escape(check['reason'])}"
        yield f"gate        {escape(check['metric'])} {' and '.join(bounds)}: {outcome}"


def tracker_lines(job: Json) -> Iterator[str]:
    """Where each tracker has the metrics, with a command for what it keeps in files."""
    yield from (escape(describe_tracker(name, url)) for name, url in job["tracker_urls"].items())


def decision_line(decision: Json) -> str:
    """A setting that an attempt chose, its value and the reason."""
    return f"{escape(decision['setting'])} = {escape(decision['value'])} [dim]({escape(decision['reason'])})[/]"


def artifact_lines(job: Json, word: str) -> Iterator[str]:
    """Per artifact its size, its fidelity, its URI and how to get it; and the Hub repositories."""
    artifacts: list[Json] = job["artifacts"]
    width = max((len(artifact["name"]) for artifact in artifacts), default=0)
    for artifact in artifacts:
        yield f"{escape(artifact['name']):{width}} {format_size(artifact['size_bytes']):>9}{format_fidelity(artifact)}"
        yield f"{'':{width}} [dim]{escape(artifact['uri'])}[/]"
        fidelity = artifact["fidelity"]
        if fidelity and fidelity.get("advice"):
            yield f"{'':{width}} advice: {escape(translate_hint(fidelity['advice']))}"
    for url in dict.fromkeys(artifact["hub"]["url"] for artifact in artifacts if artifact["hub"]):
        yield f"on the Hub: {escape(url)}"
    if len(artifacts) > 1 and job["gate_passed"] is not False:
        yield f"[dim]to get one: tunesmith download {word} --artifact NAME[/]"


def next_commands(job: Json, word: str) -> list[str]:
    """What a person may want to do next with a job; `word` names it in the commands."""
    match job["status"]:
        case "queued" | "preparing" | "training" | "pausing" | "cancelling":
            return [f"tunesmith watch {word}"]
        case "paused":
            caps = {"cost_cap": " --max-cost-usd MORE", "gpu_seconds_cap": " --max-gpu-seconds MORE"}
            return [f"tunesmith resume {word}{caps.get(job['pause_reason'], '')}"]
        case "failed" | "cancelled":
            logs = [f"tunesmith logs {word}"] if job["status"] == "failed" and job["attempts"] else []
            return ([f"tunesmith retry {word}"] if job["checkpoint"] else []) + logs
        case "completed" if job["gate_passed"] is False:
            return [f"tunesmith export {word}  (publishes it anyway)"]
        case "completed":
            kinds = {artifact["kind"] for artifact in job["artifacts"]}
            can_talk = kinds & TALKING_KINDS and job.get("trainer_type") != "reward"
            return ([f"tunesmith chat {word}"] if can_talk else []) + ([f"tunesmith download {word}"] if kinds else [])
        case _:
            return []
