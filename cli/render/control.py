"""Says in words what happens next with a job that was paused, canceled, resumed or retried."""

from cli.http_client import Json


def describe_next(job: Json, word: str) -> str:
    """What the job does now, and the command that a person needs next; `word` names it there. Empty for a job that has ended otherwise."""
    step: int | None = job["checkpoint"]["step"] if job["checkpoint"] else None
    match job["status"]:
        case "pausing":
            return f"it finishes the current step and saves a checkpoint; tunesmith resume {word} continues it"
        case "paused":
            return f"no compute is held; tunesmith resume {word} " + (f"continues it from step {step}" if step else "starts it")
        case "cancelling":
            return f"it stops; its checkpoints are kept, and tunesmith retry {word} continues it"
        case "cancelled" if step:
            return f"its checkpoints are kept; tunesmith retry {word} continues it from step {step}"
        case "cancelled":
            return f"it has no checkpoint; tunesmith retry {word} starts it over"
        case "queued":
            start = f"continues from step {step}" if step else "starts"
            return f"it {start} as soon as compute is free; tunesmith watch {word} follows it"
        case "completed":
            return f"it had finished before; tunesmith show {word} has what it made"
        case _:
            return ""
