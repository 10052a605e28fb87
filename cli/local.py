"""Commands that start another package on this machine as a process: serve, chat."""

import os
import subprocess
import sys
from typing import Annotated

import typer

from cli.download import download_artifact
from cli.errors import CliError
from cli.options import JobIdArgument, create_client
from cli.settings import SOURCE_ROOT, Settings


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.")] = None,
) -> None:
    """Start a service here; the first line printed is its url."""
    # -P: a folder named `service` where the user stands is not ours.
    command = [sys.executable, "-P", "-m", "service"]
    command += ["--host", host] if host is not None else []
    command += ["--port", str(port)] if port is not None else []
    os.execv(sys.executable, command)  # noqa: S606  # the same process, so that Ctrl-C and signals reach the service itself


def chat(
    context: typer.Context,
    job_id: JobIdArgument,
    artifact: Annotated[str | None, typer.Option(help="Which GGUF; left out, the first.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One question; left out, a conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.7,
) -> None:
    """Talk to the result, on this machine."""
    settings = Settings.from_environment()
    with create_client(context) as client:
        job = client.get(f"/jobs/{job_id}")
        ggufs = [artifact["name"] for artifact in job["artifacts"] if artifact["kind"] == "gguf"]
        if not ggufs:
            hint = f"tunesmith export {job_id} --gguf q8_0" if job["status"] == "completed" else f"the job is {job['status']}"
            raise CliError(f"{job_id} has no GGUF file to talk to", hint)
        folder = settings.home_folder / "downloads" / job_id
        [gguf] = download_artifact(client, job_id, artifact or ggufs[0], folder, skip_existing=True)
    command = [str(settings.trainer_python), "-m", "jobs.llm.chat", "--gguf", str(gguf)]
    command += ["--max-tokens", str(max_tokens), "--temperature", str(temperature)]
    command += ["--prompt", prompt] if prompt else []
    raise typer.Exit(subprocess.run(command, cwd=SOURCE_ROOT, check=False).returncode)
