"""The command `download`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from cli.http_client import Client
from cli.job_names import find_job_id
from cli.options import JobArgument, JsonOption, create_client
from cli.output import err, print_json


def download(
    context: typer.Context,
    job: JobArgument,
    artifact: Annotated[
        str | None, typer.Option(help="Artifact name: adapter, merged, gguf-q8_0, …. Default: GGUF, else merged, else adapter.")
    ] = None,
    folder: Annotated[Path, typer.Option("--to", help="Folder to write to.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Download an artifact of a job and verify its SHA-256 digests."""
    with create_client(context) as client:
        paths = download_artifact(client, find_job_id(client, job), artifact, folder)
    if as_json:
        print_json({"files": [str(path) for path in paths]})
    else:
        for path in paths:
            print(path)  # rich would wrap long paths


def download_artifact(client: Client, job_id: str, artifact: str | None, folder: Path, *, skip_existing: bool = False) -> list[Path]:
    """Download the files of an artifact and return their paths. Raises ApiError.

    `skip_existing` skips files that already exist with the right size.
    """
    answer = client.get(f"/jobs/download/{job_id}", artifact=artifact)
    paths: list[Path] = []
    with Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn(), console=err, transient=True) as bar:
        for file in answer["files"]:
            target = folder / answer["artifact"] / file["path"] if answer["is_folder"] else folder / file["path"]
            paths.append(target)
            if skip_existing and target.exists() and target.stat().st_size == file["size_bytes"]:
                continue
            task = bar.add_task(target.name, total=file["size_bytes"])
            client.download_file(file, target, lambda count, task=task: bar.advance(task, count))
    return paths
