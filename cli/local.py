"""The commands that start another package as a process on this machine: `serve` and `chat`."""

import os
import subprocess
import sys
from typing import Annotated

import typer

from cli.download import download_artifact
from cli.errors import CliError
from cli.job_names import find_job_id
from cli.options import JobArgument, create_client
from cli.settings import SOURCE_ROOT, Settings


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


def chat(
    context: typer.Context,
    job: JobArgument,
    artifact: Annotated[str | None, typer.Option(help="Name of the GGUF artifact. Default: the first.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask one question. Default: an interactive chat.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Sampling temperature.")] = 0.7,
) -> None:
    """Chat with the GGUF model of a job on this machine."""
    settings = Settings.from_environment()
    with create_client(context) as client:
        job_id = find_job_id(client, job)
        answer = client.get(f"/jobs/{job_id}")
        ggufs = [artifact["name"] for artifact in answer["artifacts"] if artifact["kind"] == "gguf"]
        if not ggufs:
            hint = f"tunesmith export {job_id} --gguf q8_0" if answer["status"] == "completed" else f"the job is {answer['status']}"
            raise CliError(f"{job_id} has no GGUF file to chat with", hint)
        folder = settings.home_folder / "downloads" / job_id
        gguf = download_artifact(client, job_id, artifact or ggufs[0], folder, skip_existing=True)[0]  # its Modelfile is beside it
    command = [str(settings.trainer_python), "-m", "jobs.llm.chat", "--gguf", str(gguf)]
    command += ["--max-tokens", str(max_tokens), "--temperature", str(temperature)]
    command += ["--prompt", prompt] if prompt else []
    raise typer.Exit(subprocess.run(command, cwd=SOURCE_ROOT, check=False).returncode)
