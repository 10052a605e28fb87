"""The command `download`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cli.artifacts import describe_choice, explain_silence
from cli.http_client import Json
from cli.job_names import find_job_id
from cli.options import JobArgument, JsonOption, create_client
from cli.output import err, print_json
from cli.transfer import Downloader, LocalArtifact

ALL = "all"


def download(
    context: typer.Context,
    job: JobArgument,
    artifact: Annotated[
        str | None,
        typer.Option(
            help="Artifact name: adapter, merged, gguf-q8_0, …; or all. Default: the first GGUF model that kept the training, else merged, "
            "else adapter."
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--to", help="Folder to write to; every artifact gets a folder in it. Default: tunesmith-<end of the id>."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist with other content.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Download an artifact of a job and verify its SHA-256 digests. Repeat the command to continue an interrupted download."""
    with create_client(context) as client:
        job_id = find_job_id(client, job)
        detail = client.get(f"/jobs/{job_id}")
        names = [each["name"] for each in detail["artifacts"]] if artifact == ALL else []
        downloader = Downloader(client, folder or Path(f"tunesmith-{job_id.rpartition('_')[2]}"))
        artifacts = [downloader.download(job_id, name, overwrite=overwrite) for name in names or [None if artifact == ALL else artifact]]
    if as_json:
        print_json({"job_id": job_id, "artifacts": [_describe(each) for each in artifacts]})
        return
    for each in artifacts:
        for file in each.files:
            print(file.path)  # rich would wrap long paths
    kept = sum(file.kept for each in artifacts for file in each.files)
    if kept:
        err.print(f"{kept} of these files {'was' if kept == 1 else 'were'} there already, with the right digest", style="dim")
    for line in _advise(detail, artifacts, artifact):
        err.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _describe(artifact: LocalArtifact) -> Json:
    files = [{"path": str(file.path), "size_bytes": file.size_bytes, "sha256": file.sha256, "kept": file.kept} for file in artifact.files]
    return {"artifact": artifact.name, "folder": str(artifact.folder), "files": files}


def _advise(job: Json, artifacts: list[LocalArtifact], requested: str | None) -> list[str]:
    """Why this artifact was chosen, and what to do next with it."""
    by_name = {artifact["name"]: artifact for artifact in job["artifacts"]}
    lines: list[str] = []
    for artifact in artifacts:
        detail = by_name[artifact.name]
        lines += describe_choice(job, detail) if requested is None else ()
        if explain_silence(job, detail) is not None:
            continue
        lines.append(f"next: tunesmith chat {job['job_id']} --artifact {artifact.name}")
        modelfile, gguf = artifact.find("Modelfile"), artifact.find(".gguf")
        if modelfile is not None:
            model = f"{job['base_model_id'].rpartition('/')[2]}-{artifact.name.removeprefix('gguf-')}".lower()
            lines.append(f"      ollama create {model} -f {shlex.quote(str(modelfile))}")
        if gguf is not None:
            lines.append(f"      llama-cli -m {shlex.quote(str(gguf))}")
    return lines
