"""The commands that list, show and delete jobs: `jobs`, `show`, `checkpoints` and `delete`."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

import typer

from cli.durations import EXAMPLES, read_duration
from cli.errors import ApiError, CliError
from cli.http_client import Client, Json
from cli.job_names import find_job_id
from cli.options import CursorOption, JobArgument, JobsArgument, JsonOption, LimitOption, create_client
from cli.output import confirm, err, out, print_answer, print_json, print_next_cursor
from cli.render.formats import format_size
from cli.render.job import print_job
from cli.render.tables import checkpoint_table, count_line, job_table
from cli.settings import Settings
from cli.storage import remove_local_copies

MAX_DELETE_TRIES, DELETE_RETRY_DELAY_S = 40, 0.5  # the launcher kills an attempt that does not stop within ten seconds
EVENTS_PER_PAGE = 1000
ENDED = ("completed", "failed", "cancelled")


def list_jobs(
    context: typer.Context,
    status: Annotated[list[str] | None, typer.Option(help="Only jobs with this status; can be repeated.")] = None,
    search: Annotated[str | None, typer.Option(help="Only jobs whose name contains this, or whose id ends with it.")] = None,
    trainer: Annotated[str | None, typer.Option(help="Only jobs of this trainer type: sft, dpo, ….")] = None,
    project: Annotated[str | None, typer.Option(help="Only jobs of this project.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="Only jobs with this metadata, as key=value; can be repeated.")] = None,
    mine: Annotated[bool, typer.Option("--mine", help="Only jobs that you created.")] = False,
    since: Annotated[str | None, typer.Option(help="Only jobs created since then: 30m, 12h, 7d, 2w or a date.")] = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
    all_pages: Annotated[bool, typer.Option("--all-pages", help="All jobs, not only the first --limit.")] = False,
    counts: Annotated[bool, typer.Option("--counts", help="Also say how many jobs have each status.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    now = datetime.now(UTC)
    query: dict[str, str | int | list[str] | None] = {
        "status": status,
        "search": search,
        "trainer_type": trainer,
        "project_id": project,
        "metadata": metadata,
        "created_by": "me" if mine else None,
        "created_after": parse_since(since, now).isoformat() if since else None,
        "counts": "true" if counts else None,
        "limit": limit,
    }
    with create_client(context) as client:
        page = client.get("/jobs", **query, cursor=cursor)
        while all_pages and page["next_cursor"]:
            page = _join_pages(page, client.get("/jobs", **query, cursor=page["next_cursor"]))
    print_answer(page, as_json, job_table(page["jobs"], now=now, width=out.width, with_short_ids=out.is_terminal))
    if "counts" in page and not as_json:  # a service of an earlier version counts nothing
        out.print(count_line(page["counts"]), highlight=False)
    print_next_cursor(page, as_json)


def parse_since(text: str, now: datetime) -> datetime:
    """The time that `7d`, `12h` or a date means. Raises CliError."""
    if (duration := read_duration(text)) is not None:
        return now - duration
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        hint = f"write {EXAMPLES}, or a date such as 2026-01-31"
        raise CliError(f"--since {text} is neither a time span nor a date", hint, exit_code=2) from error
    return moment if moment.tzinfo else moment.astimezone()


def _join_pages(page: Json, following: Json) -> Json:
    return page | {"jobs": page["jobs"] + following["jobs"], "next_cursor": following["next_cursor"]}


def show_job(
    context: typer.Context,
    job: JobArgument,
    decisions: Annotated[bool, typer.Option("--decisions", help="Also show the settings that the attempts chose, and why.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a job: what it was made from, how it is going, what it achieved and made, and what to do next."""
    with create_client(context) as client:
        job_id = find_job_id(client, job)
        answer = client.get(f"/jobs/{job_id}")
        chosen = list(_read_decisions(client, job_id)) if decisions else []
        datasets = {} if as_json else _read_datasets(client, answer)
    if as_json:
        print_json(answer | ({"decisions": chosen} if decisions else {}))
    else:
        print_job(out, answer, datasets=datasets, decisions=chosen)


def _read_decisions(client: Client, job_id: str) -> Iterator[Json]:
    page = client.get(f"/jobs/{job_id}/events", limit=EVENTS_PER_PAGE)
    while page["events"]:
        yield from (row["event"] for row in page["events"] if row["event"]["type"] == "decision")
        page = client.get(f"/jobs/{job_id}/events", after=page["next_after"], limit=EVENTS_PER_PAGE)


def _read_datasets(client: Client, job: Json) -> dict[str, Json]:
    """The records of a job's datasets by id. One that was deleted, or that the caller may not read, is left out."""
    ids = [share["processed_dataset_id"] for share in job.get("datasets", [])] or [job["processed_dataset_id"]]
    datasets: dict[str, Json] = {}
    for dataset_id in ids:
        try:
            datasets[dataset_id] = client.get(f"/datasets/{dataset_id}")
        except ApiError as error:
            if error.status not in (403, 404):
                raise
    return datasets


def list_checkpoints(context: typer.Context, job: JobArgument, as_json: JsonOption = False) -> None:
    """List the checkpoints that a job can continue from or export. The next attempt uses the first."""
    with create_client(context) as client:
        answer = client.get(f"/jobs/{find_job_id(client, job)}/checkpoints")
    print_answer(answer, as_json, checkpoint_table(answer["checkpoints"]))
    if not answer["checkpoints"] and not as_json:
        err.print("none yet", style="dim")


def delete_jobs(
    context: typer.Context,
    jobs: JobsArgument,
    delete_hub: Annotated[bool, typer.Option("--hub", help="Also delete the job's Hub repository, if it contains nothing else.")] = False,
    hf_token: Annotated[
        str | None,
        typer.Option(envvar="HF_TOKEN", help="Hugging Face token that may delete the repository; used only with --hub.", show_envvar=True),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, also if a job runs or has artifacts.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Stop jobs and delete them with all their files, also this machine's copies."""
    if delete_hub and not hf_token:
        raise CliError("--hub needs a Hugging Face token that may delete the repository", "set --hf-token or HF_TOKEN")
    with create_client(context) as client:
        ids = [find_job_id(client, job) for job in jobs]
        if not yes:
            losses = [loss for job_id in ids if (loss := describe_loss(client.get(f"/jobs/{job_id}")))]
            if losses:
                confirm(f"{'; '.join(losses)}. Delete {'it' if len(ids) == 1 else f'these {len(ids)} jobs'}?", yes=False)
        answers = [_delete_job(client, job_id, hf_token if delete_hub else None) for job_id in ids]
    if as_json:
        print_json(answers[0] if len(answers) == 1 else {"jobs": answers})
        return
    for answer in answers:
        out.print(answer["message"], markup=False, highlight=False, soft_wrap=True)
        for resource in answer["deleted_resources"]:
            out.print(f"  {resource}", style="dim", markup=False, highlight=False, soft_wrap=True)
        if answer["local_bytes"]:
            out.print(f"  copies on this machine, {format_size(answer['local_bytes'])}", style="dim", highlight=False)


def describe_loss(job: Json) -> str:
    """What a person may not want to lose with a job; empty for a job that has ended and made nothing."""
    facts = [] if job["status"] in ENDED else [f"is {job['status']}"]
    if artifacts := job["artifacts"]:
        size = format_size(sum(artifact["size_bytes"] for artifact in artifacts))
        facts.append(f"has {', '.join(artifact['name'] for artifact in artifacts)} ({size})")
    return f"{job['job_id']} {' and '.join(facts)}" if facts else ""


def _delete_job(client: Client, job_id: str, hub_token: str | None) -> Json:
    answer = client.delete(f"/jobs/{job_id}", hub_token=hub_token)
    for _ in range(MAX_DELETE_TRIES):
        if answer["deleted"]:
            break
        time.sleep(DELETE_RETRY_DELAY_S)  # the service is stopping it
        answer = client.delete(f"/jobs/{job_id}", hub_token=hub_token)
    return answer | {"local_bytes": remove_local_copies(Settings.from_environment(), job_id) if answer["deleted"] else 0}
