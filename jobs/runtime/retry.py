"""Retries of object store operations while a store or the network is unavailable, with backoff and a limited number of tries."""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from jobs.runtime.errors import JobFailed
from schema.job import FailureCode
from storage import ChecksumMismatch, NoSuchObject, ObjectExists, ObjectStore, StorageError, StoreUnavailable, check_key, map_concurrently

log = logging.getLogger(__name__)

TRIES = 7
RETRY_INITIAL_S = 0.5
RETRY_MAX_S = 15.0  # 0.5 + 1 + 2 + 4 + 8 + 15: half a minute in total, enough for a store or a router to restart

HINT = "check the free space and the permissions of the store, then retry the job"

ReturnT = TypeVar("ReturnT")


def retry_store(
    message: str,
    operation: Callable[[], ReturnT],
    *,
    code: FailureCode = "upload_failed",
    sleep: Callable[[float], None] = time.sleep,
    tries: int = TRIES,
) -> ReturnT:
    """Run an operation and retry it while the store is unavailable or a checksum does not match.

    Raises JobFailed with `code` after the last try; ObjectExists and NoSuchObject at once, because they are definitive.
    """
    import tenacity

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type((StoreUnavailable, ChecksumMismatch)),
        wait=tenacity.wait_exponential(RETRY_INITIAL_S, RETRY_MAX_S),
        stop=tenacity.stop_after_attempt(tries),
        sleep=sleep,
        reraise=True,
    )
    try:
        return retrying(operation)
    except (ObjectExists, NoSuchObject):
        raise
    except (StorageError, OSError) as error:
        log.error("store failed", extra={"operation": message, "error": str(error)})
        raise JobFailed(code, f"{message}: {error}", HINT) from error


def upload_with_retry(
    message: str,
    store: ObjectStore,
    source: Path,
    key: str,
    sha256: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
    tries: int = TRIES,
) -> None:
    """Upload a file, verified on arrival, waiting while the store is unavailable. Raises JobFailed.

    For an upload, NoSuchObject means that the store lost the upload session, so it is retried too.
    """

    def upload() -> None:
        try:
            store.upload(source, key, sha256=sha256)
        except NoSuchObject as error:
            raise StoreUnavailable(f"{key} was lost during the upload: {error}") from error

    retry_store(message, upload, sleep=sleep, tries=tries)


def download_with_retry(store: ObjectStore, key: str, target: Path, *, sleep: Callable[[float], None] = time.sleep) -> Path:
    """Download an object, waiting while the store is unavailable. Raises NoSuchObject, JobFailed."""
    return retry_store(f"{store.url}/{key} cannot be read", lambda: store.download(key, target), code="internal", sleep=sleep)


def download_all_with_retry(
    store: ObjectStore, keys: Iterable[str], folder: Path, *, prefix: str = "", sleep: Callable[[float], None] = time.sleep
) -> list[Path]:
    """Download objects into a folder, each under its key without `prefix`. Raises NoSuchObject, JobFailed.

    Each object is retried by itself, so none is downloaded twice because of another.
    """
    return map_concurrently(
        lambda key: download_with_retry(store, key, folder / check_key(key).removeprefix(prefix), sleep=sleep), list(keys)
    )
