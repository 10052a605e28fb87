"""Formats ids, statuses, sizes, times and fidelity as short texts."""

import math
from collections.abc import Sequence

from cli.http_client import Json

MIN_SHORT_ID_CHARS = 4

STATUS_COLORS = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "yellow",
    "training": "cyan",
    "preparing": "cyan",
}
# Descriptions of the outcomes whose names do not explain themselves.
OUTCOME_LABELS = {
    "yielded": "time limit reached",
    "preempted": "compute preempted",
    "lost": "process disappeared",
    "launch_failed": "launch failed",
}
# Why a job is paused, where that was not a caller's request.
PAUSE_LABELS = {
    "cost_cap": "its max_cost_usd is reached",
    "gpu_seconds_cap": "its max_gpu_seconds is reached",
    "cost_quota": "the tenant's cost of this month is used up",
    "gpu_hours_quota": "the tenant's GPU hours of this month are used up",
}
PERPLEXITY_LABELS = (("perplexity", "this file"), ("perplexity_merged", "tuned"), ("perplexity_base", "base"))


def format_status(status: str) -> str:
    """A status in its color, as rich markup."""
    return f"[{STATUS_COLORS.get(status, 'white')}]{status}[/]"


def humanize(name: str) -> str:
    """An API name with spaces."""
    return name.replace("_", " ")


def format_size(size_bytes: int) -> str:
    """A size in GB, MB or kB."""
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.1f} GB"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 100_000 else f"{size_bytes / 1e3:.1f} kB"


def shorten_ids(job_ids: Sequence[str]) -> dict[str, str]:
    """The end of each id, such as `…2d21`, as long as it takes to differ from every other one of the list."""
    length = MIN_SHORT_ID_CHARS
    while length < max(map(len, job_ids), default=0) and len({job_id[-length:] for job_id in job_ids}) < len(set(job_ids)):
        length += 1
    return {job_id: job_id if len(job_id) <= length else f"…{job_id[-length:]}" for job_id in job_ids}


def format_duration(seconds: float) -> str:
    """A duration such as `41 s`, `3 min 20 s` or `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_time_left(progress: Json | None, elapsed_s: float = 0.0) -> str:
    """The estimated time until the job ends, coarsely, `elapsed_s` after the estimate; empty if nobody knows.

    While something remains it never says that nothing does: what takes longer than estimated has a few seconds left.
    """
    remaining_s: float | None = (progress or {}).get("remaining_s")  # a service of an earlier version sends none
    if remaining_s is None:
        return ""
    left_s = remaining_s - elapsed_s
    if left_s < 10:
        return "a few seconds left"
    if left_s < 55:
        return f"about {math.ceil(left_s / 10) * 10} s left"
    minutes = round(left_s / 60)
    return f"about {minutes} min left" if minutes < 60 else f"about {minutes // 60} h {minutes % 60} min left"


def format_step(progress: Json) -> str:
    """The optimizer step and the epoch, each of how many."""
    step = f"step {progress['step']}/{progress['total_steps']}"
    return f"{step}, epoch {progress['epoch']:.2f}/{progress['total_epochs']:g}"


def format_loss(loss: float | None) -> str:
    """A loss with four digits, and a dash for none."""
    return "–" if loss is None else f"{loss:.3f}" if 1e-3 <= abs(loss) < 1e4 or loss == 0 else f"{loss:.2e}"


def format_cost(cost: Json) -> str:
    """Dollars and GPU time so far, with caps, such as `$0.45 of at most $2.00, 0.32 GPU hours`; empty for compute without both."""
    parts: list[str] = []
    if cost["usd"] is not None:
        cap = f" of at most ${cost['max_cost_usd']:.2f}" if cost["max_cost_usd"] is not None else ""
        rate = f" at ${cost['usd_per_hour']:.2f} an hour" if cost["usd_per_hour"] is not None else ""
        parts.append(f"${cost['usd']:.2f}{cap}{rate}")
    if cost["gpu_seconds"] or cost["max_gpu_seconds"] is not None:
        cap = f" of at most {cost['max_gpu_seconds']:g}" if cost["max_gpu_seconds"] is not None else ""
        parts.append(f"{cost['gpu_seconds']:.0f}{cap} GPU seconds")
    return ", ".join(parts)


def format_time(timestamp: str) -> str:
    """An ISO timestamp to the minute."""
    return timestamp[:16].replace("T", " ")


def format_rows(dataset: Json) -> str:
    """The type of a dataset's rows, and what some of them have besides text."""
    extras = [
        name for name, has in (("images", dataset["images"]), ("tools", dataset["has_tools"]), ("weights", dataset["has_weights"])) if has
    ]
    return dataset["dataset_type"] + (f" with {' and '.join(extras)}" if extras else "")


def format_fidelity(artifact: Json) -> str:
    """How closely an exported file matches the tuned model."""
    fidelity = artifact["fidelity"]
    if not fidelity or "argmax_agreement" not in fidelity:  # another family measures something else
        return ""
    values = [f"{fidelity[name]:.2f} ({label})" for name, label in PERPLEXITY_LABELS if fidelity[name] is not None]
    perplexity = f", perplexity {' / '.join(values)}" if values else ""
    warning = "  [red]closer to the base model than to the tuned one[/]" if fidelity["closer_to_base"] else ""
    return f"  agreement {fidelity['argmax_agreement']:.1%}, KL {fidelity['mean_kl_to_merged']:.4f}{perplexity}{warning}"
