"""The files that a tracker writes, in the model store at trackers/{job_id}/{tracker}/attempt-{n}/."""

from collections.abc import Iterable
from pathlib import Path

from jobs.runtime.context import JobContext
from jobs.runtime.files import sha256_of
from jobs.runtime.retry import upload_with_retry

UPLOAD_INTERVAL_S = 60  # what a killed attempt may lose of a tracker's files


def state_key(context: JobContext, tracker: str) -> str:
    """The key of a tracker's folder, which has a folder for each attempt."""
    return f"trackers/{context.spec.job_id}/{tracker}"


def state_url(context: JobContext, tracker: str) -> str:
    """The address of a tracker's folder, which its TrackerStarted event names."""
    return f"{context.stores.models.url}/{state_key(context, tracker)}"


def save_state(context: JobContext, tracker: str, folder: Path, files: Iterable[Path]) -> None:
    """Upload files below `folder` as they are now, waiting while the store is unavailable. Raises JobFailed."""
    for path in files:
        key = f"{state_key(context, tracker)}/attempt-{context.attempt}/{path.relative_to(folder).as_posix()}"
        upload_with_retry(f"the files of {tracker} could not be stored", context.stores.models, path, key, sha256_of(path))
