"""Runs a service on this machine: `python -m service`, which `tunesmith serve` starts."""

import argparse
import fcntl
import json
import os
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from pydantic import ValidationError

from service.adapters.identity.local import LocalToken
from service.core.access.rules import LOOPBACK_HOSTS
from service.main import create_app
from service.settings import Settings

SERVICE_FILE = "service.json"  # in the home folder; cli/settings.py reads it
BACKLOG = 2048
GRACEFUL_SHUTDOWN_S = 3  # for requests in flight; event streams would never end


class StartError(Exception):
    """The service cannot start."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def main(arguments: list[str] | None = None) -> None:
    """Run a service until a signal stops it. A start error is printed as one line and a hint, and the exit code is 1."""
    parser = argparse.ArgumentParser(prog="python -m service", description="Run a service. The first line printed is its URL.")
    parser.add_argument("--host", help="address to listen on; default: TUNESMITH_HOST")
    parser.add_argument("--port", type=_parse_port, help="port to listen on, 0 picks a free port; default: TUNESMITH_PORT")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    try:
        serve(_load_settings().model_copy(update=options))
    except StartError as error:
        print(f"error {error.message}\n  hint: {error.hint}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _parse_port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not between 0 and 65535")
    return port


def _load_settings() -> Settings:
    try:
        return Settings()  # pyright: ignore[reportCallIssue]  # pydantic fills them from the environment
    except ValidationError as error:
        first = error.errors()[0]
        setting = f"{first['loc'][0]}: " if first["loc"] else ""
        reason = first["msg"].removeprefix("Value error, ")
        raise StartError(f"invalid settings: {setting}{reason}", "docs/settings.md describes all settings") from error


def serve(settings: Settings) -> None:
    """Run a service until a signal stops it. Its URL is the first line on standard output. Raises StartError."""
    if settings.identity is None and settings.host not in LOOPBACK_HOSTS:
        raise StartError(
            f"listening on {settings.host} needs identities: everybody on the network could reach the service",
            "set TUNESMITH_IDENTITY to a rule file (docs/identity.md; `{}` admits API keys only), or listen on 127.0.0.1",
        )
    with _lock_home(settings.home_folder), _open_listener(settings.host, settings.port) as listener:
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        try:
            app = create_app(settings)
        except ValueError as error:
            raise StartError(f"invalid settings: {error}", "docs/settings.md describes all settings") from error
        LocalToken(settings.home_folder)  # exists before the line below, whose readers use both
        print(settings.url, flush=True)  # scripts read this line
        with _write_service_file(settings):
            config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S, access_log=False)
            uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _lock_home(home: Path) -> Generator[None]:
    """Hold a lock on the home folder: two services in one home would reconcile the same jobs."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "service.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            url = _read_service_url(home)
            raise StartError(
                f"another service already uses {home}" + (f": {url}" if url else ""), "use that service, or set TUNESMITH_HOME"
            ) from error
        yield


def _read_service_url(home: Path) -> str | None:
    try:
        return json.loads((home / SERVICE_FILE).read_text())["url"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


@contextmanager
def _open_listener(host: str, port: int) -> Generator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port}: {error.strerror}", "choose another --port; 0 picks a free port") from error
        listener.listen(BACKLOG)
        yield listener


@contextmanager
def _write_service_file(settings: Settings) -> Generator[None]:
    """Write service.json while the service runs, so that the command line finds it."""
    path = settings.home_folder / SERVICE_FILE
    path.write_text(json.dumps({"url": settings.url, "pid": os.getpid()}))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
