"""Trying again while a store or a network is away: with back-off, and not for ever."""

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
RETRY_MAX_S = 15.0  # 0.5 + 1 + 2 + 4 + 8 + 15: half a minute in all, a store's restart or a router's

HINT = "check the room and the permissions of the store, then retry the job"

ReturnT = TypeVar("ReturnT")


def retry_store(
    message: str,
    operation: Callable[[], ReturnT],
    *,
    code: FailureCode = "upload_failed",
    sleep: Callable[[float], None] = time.sleep,
    tries: int = TRIES,
) -> ReturnT:
    """Do it, again while the store is away or what arrives is not what was sent.

    Raises JobFailed with `code` in the end; ObjectExists and NoSuchObject as they are, for they are answers.
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
    """Store a file, checked on arrival, waiting for a store that is away. Raises JobFailed.

    A store that has lost what it was just being sent, or its session, is one that stumbles: to an upload "no such object" is no answer.
    """

    def upload() -> None:
        try:
            store.upload(source, key, sha256=sha256)
        except NoSuchObject as error:
            raise StoreUnavailable(f"{key} was lost on its way: {error}") from error

    retry_store(message, upload, sleep=sleep, tries=tries)


def download_with_retry(store: ObjectStore, key: str, target: Path, *, sleep: Callable[[float], None] = time.sleep) -> Path:
    """An object as a file, waiting for a store that is away. Raises NoSuchObject, JobFailed."""
    return retry_store(f"{store.url}/{key} cannot be read", lambda: store.download(key, target), code="internal", sleep=sleep)


def download_all_with_retry(
    store: ObjectStore, keys: Iterable[str], folder: Path, *, prefix: str = "", sleep: Callable[[float], None] = time.sleep
) -> list[Path]:
    """Objects as files in a folder, each under its key without the prefix `below`. Raises NoSuchObject, JobFailed.

    Each is asked for again by itself: what has arrived is not fetched twice for the sake of another.
    """
    return map_concurrently(
        lambda key: download_with_retry(store, key, folder / check_key(key).removeprefix(prefix), sleep=sleep), list(keys)
    )
