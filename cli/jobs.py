"""The commands that list, show and delete jobs: `jobs`, `show`, `checkpoints` and `delete`."""

import time
from typing import Annotated

import typer

from cli.errors import CliError
from cli.job_names import find_job_id
from cli.options import CursorOption, JobArgument, JsonOption, LimitOption, create_client
from cli.output import err, out, print_answer, print_json, print_next_cursor
from cli.render.job import print_job
from cli.render.tables import checkpoint_table, job_table

MAX_DELETE_TRIES, DELETE_RETRY_DELAY_S = 40, 0.5  # the launcher kills an attempt that does not stop within ten seconds


def list_jobs(
    context: typer.Context,
    status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None,
    project: Annotated[str | None, typer.Option(help="Only jobs of this project.")] = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    with create_client(context) as client:
        page = client.get("/jobs", status=status, project_id=project, limit=limit, cursor=cursor)
    print_answer(page, as_json, job_table(page["jobs"]))
    print_next_cursor(page, as_json)


def show_job(context: typer.Context, job: JobArgument, as_json: JsonOption = False) -> None:
    """Show a job in full."""
    with create_client(context) as client:
        answer = client.get(f"/jobs/{find_job_id(client, job)}")
    if as_json:
        print_json(answer)
    else:
        print_job(out, answer)


def list_checkpoints(context: typer.Context, job: JobArgument, as_json: JsonOption = False) -> None:
    """List the checkpoints that a job can continue from or export. The next attempt uses the first."""
    with create_client(context) as client:
        answer = client.get(f"/jobs/{find_job_id(client, job)}/checkpoints")
    print_answer(answer, as_json, checkpoint_table(answer["checkpoints"]))
    if not answer["checkpoints"] and not as_json:
        err.print("none yet", style="dim")


def delete_job(
    context: typer.Context,
    job: JobArgument,
    delete_hub: Annotated[bool, typer.Option("--hub", help="Also delete the job's Hub repository, if it contains nothing else.")] = False,
    hf_token: Annotated[
        str | None,
        typer.Option(envvar="HF_TOKEN", help="Hugging Face token that may delete the repository; used only with --hub.", show_envvar=True),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Stop a job and delete it with all its files."""
    if delete_hub and not hf_token:
        raise CliError("--hub needs a Hugging Face token that may delete the repository", "set --hf-token or HF_TOKEN")
    hub_token = hf_token if delete_hub else None
    with create_client(context) as client:
        job_id = find_job_id(client, job)
        answer = client.delete(f"/jobs/{job_id}", hub_token=hub_token)
        for _ in range(MAX_DELETE_TRIES):
            if answer["deleted"]:
                break
            time.sleep(DELETE_RETRY_DELAY_S)  # the service is stopping it
            answer = client.delete(f"/jobs/{job_id}", hub_token=hub_token)
    print_answer(answer, as_json, answer["message"])
