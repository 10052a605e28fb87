"""The Unix socket at which attempts on this machine reach the service.

When a service ends, any other user of the machine can listen on its port; an attempt that goes on would send its token there. Nobody
else can put a socket into a folder that belongs to the service's user, so attempts use this one. Callers use the port.
"""

import hashlib
import os
import socket
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

SOCKET_FOLDER = "run"  # in the home folder
SOCKET_FILE = "service.sock"
MAX_PATH_BYTES = 100  # the system's limit is 108 on Linux and 104 on macOS
BACKLOG = 2048


def find_attempt_socket(home: Path) -> Path | None:
    """The socket of the service that uses this home folder; None if it has none, as under another ASGI server."""
    path = _socket_path(home)
    return path if path.is_socket() and _is_private(path.parent) else None


@contextmanager
def open_attempt_socket(home: Path) -> Generator[socket.socket]:
    """Listen at the socket of a home folder, whose lock the caller holds. Raises OSError, PermissionError for a folder of others."""
    path = _socket_path(home)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(path.parent):
        raise PermissionError(f"{path.parent} is not private to this user; delete it, or set TUNESMITH_HOME to a shorter path")
    path.unlink(missing_ok=True)  # of a service that was killed
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _socket_path(home: Path) -> Path:
    """In the home folder, or in a private folder for temporary files if that path is too long for a socket."""
    path = home / SOCKET_FOLDER / SOCKET_FILE
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"tunesmith-{os.getuid()}-{digest}", SOCKET_FILE)


def _is_private(folder: Path) -> bool:
    """Whether only this user can change the folder's content. A link to a folder is not private."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
