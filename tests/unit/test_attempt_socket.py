"""The Unix socket between a service and its attempts: private, found by the launcher, and reopened by the next service."""

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.attempt_socket import find_attempt_socket, open_attempt_socket


@pytest.fixture
def home() -> Iterator[Path]:
    """A home folder whose path is short enough for a socket, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("suffix", ["", "/a-folder-with-a-long-name" * 6])
def test_socket_is_private_and_found_while_it_is_open(home: Path, suffix: str) -> None:
    home = Path(f"{home}{suffix}")
    home.mkdir(parents=True, exist_ok=True)
    assert find_attempt_socket(home) is None
    with open_attempt_socket(home):
        path = find_attempt_socket(home)
        assert path is not None
        assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
        connect(path)
    assert find_attempt_socket(home) is None
    path.parent.rmdir()


def test_socket_of_a_killed_service_is_replaced(home: Path) -> None:
    (home / "run").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(home / "run/service.sock"))
    with open_attempt_socket(home):
        path = find_attempt_socket(home)
        assert path is not None
        connect(path)


def test_folder_that_others_can_change_is_refused(home: Path) -> None:
    (home / "run").mkdir()
    (home / "run").chmod(0o777)
    with pytest.raises(PermissionError, match="not private"), open_attempt_socket(home):
        pass
    (home / "run").rmdir()
    (home / "elsewhere").mkdir(mode=0o700)
    os.symlink(home / "elsewhere", home / "run")
    with pytest.raises(PermissionError, match="not private"), open_attempt_socket(home):
        pass
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(home / "elsewhere/service.sock"))
        assert find_attempt_socket(home) is None
