"""`tunesmith download`: fetches what a job made."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from cli.http_client import Client
from cli.options import JobIdArgument, JsonOption, create_client
from cli.output import err, out


def download(
    context: typer.Context,
    job_id: JobIdArgument,
    artifact: Annotated[str | None, typer.Option(help="adapter, merged, gguf-q8_0, …; left out: GGUF, else merged, else adapter.")] = None,
    to: Annotated[Path, typer.Option("--to", help="The folder to write into.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Fetch what a job made, and check every digest."""
    with create_client(context) as client:
        paths = download_artifact(client, job_id, artifact, to)
    if as_json:
        out.print_json(data={"files": [str(path) for path in paths]})
    else:
        for path in paths:
            print(path)  # a path must not be wrapped


def download_artifact(client: Client, job_id: str, artifact: str | None, to: Path, *, skip_existing: bool = False) -> list[Path]:
    """Fetch an artifact's files; with `skip_existing`, not those that are there already with the right size."""
    answer = client.get(f"/jobs/download/{job_id}", artifact=artifact)
    paths: list[Path] = []
    with Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn(), console=err, transient=True) as bar:
        for file in answer["files"]:
            target = to / answer["artifact"] / file["path"] if answer["is_folder"] else to / file["path"]
            paths.append(target)
            if skip_existing and target.exists() and target.stat().st_size == file["size_bytes"]:
                continue
            task = bar.add_task(target.name, total=file["size_bytes"])
            client.download_file(file, target, lambda count, task=task: bar.advance(task, count))
    return paths
