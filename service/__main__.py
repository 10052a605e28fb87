"""Starting a service on this machine."""

import fcntl
import json
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from cli.http_client import ApiError
from service.main import create_app
from service.settings import Settings

BACKLOG = 2048
GRACEFUL_SHUTDOWN_S = 3  # for requests under way; streams would go on for ever


def serve(settings: Settings) -> None:
    """Run a service until it is told to stop. Its url is the first line on standard output."""
    with _lock_home(settings.home_folder), _open_listener(settings.host, settings.port) as listener:
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        print(settings.url, flush=True)  # scripts read it
        with _write_service_file(settings):
            config = uvicorn.Config(_create_app(settings), log_config=None, timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S, access_log=False)
            uvicorn.Server(config).run(sockets=[listener])


def _create_app(settings: Settings) -> FastAPI:
    try:
        return create_app(settings)
    except ValueError as error:
        raise ApiError(f"the settings do not work: {error}", "docs/settings.md lists them") from error


def find_service_url(home: Path) -> str | None:
    """The url of the service that works in this home, if one said so."""
    try:
        return json.loads(_service_file_path(home).read_text())["url"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


@contextmanager
def _lock_home(home: Path) -> Generator[None]:
    """Two services in one home would look after the same jobs."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "service.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            where = find_service_url(home)
            raise ApiError(
                f"a service is at work in {home} already" + (f": {where}" if where else ""), "use it, or set TUNESMITH_HOME"
            ) from error
        yield


@contextmanager
def _open_listener(host: str, port: int) -> Generator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ApiError(f"cannot listen on {host}:{port}: {error.strerror}", "take another --port; 0 takes a free one") from error
        listener.listen(BACKLOG)
        yield listener


@contextmanager
def _write_service_file(settings: Settings) -> Generator[None]:
    """Lets the command line find the service while it runs."""
    path = _service_file_path(settings.home_folder)
    path.write_text(json.dumps({"url": settings.url, "pid": os.getpid()}))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _service_file_path(home: Path) -> Path:
    return home / "service.json"
