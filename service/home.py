"""The home folder: owned by one user, and used by one service at a time."""

import fcntl
import json
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

SERVICE_FILE = "service.json"  # in the home folder; cli/settings.py reads it
LOCK_FILE = "service.lock"
OWNER_ONLY_UMASK = 0o077  # files that the service and its attempts create can be read by their owner only


class HomeInUse(Exception):
    """Another service already uses the home folder."""


@contextmanager
def lock_home(home: Path) -> Generator[None]:
    """Create the home folder or close it to other users, and hold a lock on it: two services in one home would reconcile the same jobs.

    Raises HomeInUse.
    """
    os.umask(OWNER_ONLY_UMASK)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    _close_to_others(home)
    with (home / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            url = _read_service_url(home)
            raise HomeInUse(f"another service already uses {home}" + (f": {url}" if url else "")) from error
        yield


def _close_to_others(home: Path) -> None:
    """Remove the permissions of other users from the folder and from what lies directly in it: the records, the keys, the logs."""
    for path in (home, *home.iterdir()):
        with suppress(FileNotFoundError):  # a file of a service that is just stopping
            mode = path.lstat().st_mode & 0o7777
            if path.is_symlink() or not mode & 0o077:
                continue
            try:
                path.chmod(mode & ~0o077)
            except PermissionError:
                log.warning("other users may read a file of the service", extra={"file": str(path), "mode": oct(mode)})


def _read_service_url(home: Path) -> str | None:
    try:
        return json.loads((home / SERVICE_FILE).read_text())["url"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
