"""Statuses, sizes, times and comparisons as short texts."""

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


def format_fidelity(artifact: Json) -> str:
    """How a file compares with the model that was trained, in a few words."""
    found = artifact["fidelity"]
    if not found:
        return ""
    known = [f"{found[name]:.2f} {whose}" for name, whose in PERPLEXITY_LABELS if found[name] is not None]
    perplexity = f", perplexity {' / '.join(known)}" if known else ""
    warning = "  [red]erased the tuning[/]" if found["closer_to_base"] else ""
    return f"  agrees {found['argmax_agreement']:.1%}, KL {found['mean_kl_to_merged']:.4f}{perplexity}{warning}"
