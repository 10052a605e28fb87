"""The commands that start the service as a process on this machine."""

import os
import subprocess
import sys
from typing import Annotated

import typer


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free port.")] = None,
) -> None:
    """Start a service on this machine. The first line printed is its URL."""
    # -P: do not import a package named `service` from the current directory.
    command = [sys.executable, "-P", "-m", "service"]
    command += ["--host", host] if host is not None else []
    command += ["--port", str(port)] if port is not None else []
    os.execv(sys.executable, command)  # noqa: S606  # replaces this process, so signals reach the service


def rotate_signing_key() -> None:
    """Replace the key with which the service of TUNESMITH_HOME signs tokens and links, from its next start on. What runs goes on."""
    raise typer.Exit(subprocess.run([sys.executable, "-P", "-m", "service", "--rotate-signing-key"], check=False).returncode)
