"""Formats statuses, sizes, times and fidelity as short texts."""

from cli.http_client import Json

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
    """A size in MB, or in kB if it is small."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 100_000 else f"{size_bytes / 1e3:.1f} kB"


def format_time_left(seconds: float | None) -> str:
    """A duration such as `2m05s left`; empty if it is unknown."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s left" if minutes else f"{rest}s left"


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
