"""Runs a service on this machine: `python -m service`, which `tunesmith serve` starts."""

import argparse
import json
import os
import resource
import socket
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from service.adapters.identity.local import LocalToken
from service.adapters.secrets.signing_keys import rotate_signing_key
from service.attempt_socket import open_attempt_socket
from service.core.access.rules import LOOPBACK_HOSTS
from service.home import SERVICE_FILE, HomeInUse, lock_home
from service.http_protocol import ConnectionLimits, GuardedConfig
from service.main import create_app
from service.server import INTERRUPTED_EXIT_CODE, Server
from service.settings import Settings

MAX_FILES = 65_536
RESERVED_FILES = 256  # for the database, objects, logs and attempts
MAX_CONNECTIONS = 16_384
MAX_BACKLOG = 2048
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
    parser.add_argument(
        "--rotate-signing-key",
        action="store_true",
        help="replace the key that signs tokens and links, and exit; what it signed stays valid",
    )
    parser.add_argument(
        "--exit-when-idle",
        type=_parse_seconds,
        metavar="SECONDS",
        help="stop once no request has come for so long and no job is queued or active; default: run until a signal",
    )
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    rotates, exit_when_idle_s = options.pop("rotate_signing_key"), options.pop("exit_when_idle", None)
    try:
        settings = _load_settings().model_copy(update=options)
        if rotates:
            _rotate_signing_key(settings)
        else:
            serve(settings, exit_when_idle_s)
    except StartError as error:
        print(f"error {error.message}\n  hint: {error.hint}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None


def _parse_port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not between 0 and 65535")
    return port


def _parse_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return seconds


def _load_settings() -> Settings:
    try:
        return Settings()  # pyright: ignore[reportCallIssue]  # pydantic fills them from the environment
    except ValidationError as error:
        first = error.errors()[0]
        setting = f"{first['loc'][0]}: " if first["loc"] else ""
        reason = first["msg"].removeprefix("Value error, ")
        raise StartError(f"invalid settings: {setting}{reason}", "docs/settings.md describes all settings") from error


def _rotate_signing_key(settings: Settings) -> None:
    if settings.signing_key is not None:
        raise StartError(
            "the signing key is in TUNESMITH_SIGNING_KEY", "replace it there; TUNESMITH_SIGNING_KEY_PREVIOUS keeps the old one"
        )
    settings.home_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    rotate_signing_key(settings.home_folder, datetime.now(UTC))
    print("the signing key is replaced; the service uses the new one from its next start")


def serve(settings: Settings, exit_when_idle_s: float | None = None) -> None:
    """Run a service until a signal stops it, or until it was idle for that long. Its URL is the first line on standard output.

    Raises StartError.
    """
    if settings.identity is None and settings.host not in LOOPBACK_HOSTS:
        raise StartError(
            f"listening on {settings.host} needs identities: everybody on the network could reach the service",
            "set TUNESMITH_IDENTITY to a rule file (docs/identity.md; `{}` admits API keys only), or listen on 127.0.0.1",
        )
    try:
        with lock_home(settings.home_folder):
            _serve_in_home(settings, exit_when_idle_s)
    except HomeInUse as error:
        raise StartError(str(error), "use that service, or set TUNESMITH_HOME") from error


def _serve_in_home(settings: Settings, exit_when_idle_s: float | None) -> None:
    files = _raise_file_limit()
    # A burst of connections may use the reserve for a moment: the oldest are closed only after the new ones were accepted.
    backlog = min(MAX_BACKLOG, files // 8)
    with (
        _open_listener(settings.host, settings.port, backlog) as listener,
        _open_attempt_socket(settings.home_folder) as attempt_socket,
    ):
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        try:
            app = create_app(settings, holds_home_lock=True)
        except ValueError as error:
            raise StartError(f"invalid settings: {error}", "docs/settings.md describes all settings") from error
        LocalToken(settings.home_folder)  # exists before the line below, whose readers use both
        print(settings.url, flush=True)  # scripts read this line
        with _write_service_file(settings) as service_file:
            config = GuardedConfig(app, _connection_limits(settings, files), backlog=backlog, graceful_shutdown_s=GRACEFUL_SHUTDOWN_S)
            server = Server(config, app, exit_when_idle_s=exit_when_idle_s, service_file=service_file)
            server.run(sockets=[listener, attempt_socket])


def _raise_file_limit() -> int:
    """Allow this process as many open files as it may have; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return files


def _connection_limits(settings: Settings, files: int) -> ConnectionLimits:
    return ConnectionLimits(
        max_header_bytes=settings.max_header_bytes,
        header_timeout_s=settings.header_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        body_timeout_s=settings.body_timeout_s,
        max_connections=settings.max_connections or max(8, min(MAX_CONNECTIONS, files - RESERVED_FILES)),
    )


@contextmanager
def _open_listener(host: str, port: int, backlog: int) -> Generator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port}: {error.strerror}", "choose another --port; 0 picks a free port") from error
        listener.listen(backlog)
        yield listener


@contextmanager
def _open_attempt_socket(home: Path) -> Generator[socket.socket]:
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(open_attempt_socket(home))
        except OSError as error:
            raise StartError(f"cannot listen at the socket for attempts: {error}", "set TUNESMITH_HOME to a folder of your own") from error
        yield listener


@contextmanager
def _write_service_file(settings: Settings) -> Generator[Path]:
    """Write service.json while the service runs, so that the command line finds it."""
    path = settings.home_folder / SERVICE_FILE
    path.write_text(json.dumps({"url": settings.url, "pid": os.getpid()}))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
