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


def format_time(timestamp: str) -> str:
    """An ISO timestamp to the minute."""
    return timestamp[:16].replace("T", " ")


def format_fidelity(artifact: Json) -> str:
    """How closely an exported file matches the tuned model."""
    fidelity = artifact["fidelity"]
    if not fidelity or "argmax_agreement" not in fidelity:  # another family measures something else
        return ""
    values = [f"{fidelity[name]:.2f} ({label})" for name, label in PERPLEXITY_LABELS if fidelity[name] is not None]
    perplexity = f", perplexity {' / '.join(values)}" if values else ""
    warning = "  [red]closer to the base model than to the tuned one[/]" if fidelity["closer_to_base"] else ""
    return f"  agreement {fidelity['argmax_agreement']:.1%}, KL {fidelity['mean_kl_to_merged']:.4f}{perplexity}{warning}"
