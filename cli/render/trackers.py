"""Where a tracker shows a job's metrics, and the command that opens or sends what it keeps in files."""

import shlex
from urllib.parse import unquote, urlsplit

COMMANDS = {
    "wandb": "wandb sync {folder}/attempt-*/offline-run-*",
    "tensorboard": "tensorboard --logdir {folder}",
}


def describe_tracker(tracker: str, url: str | None) -> str:
    """`wandb: file:///…/trackers/ID/wandb (wandb sync …)`: the run's address and, for files on this machine, the command for them."""
    if url is None:
        return f"{tracker}: no page of the run"
    parts = urlsplit(url)
    if parts.scheme != "file" or tracker not in COMMANDS:
        return f"{tracker}: {url}"
    return f"{tracker}: {url} ({COMMANDS[tracker].format(folder=shlex.quote(unquote(parts.path)))})"
