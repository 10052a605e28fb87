"""The commands that follow a job: `watch` and `logs`."""

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress, TaskID

from cli.errors import ApiError
from cli.http_client import Client, Json
from cli.job_names import find_job_id
from cli.options import JobArgument, JsonOption, create_client
from cli.output import out, print_json
from cli.render.events import event_line, progress_bar
from cli.render.formats import format_cost, format_time_left
from cli.render.job import continue_command, get_pending_reason, print_job

JOB_POLL_S = 15.0


def watch(context: typer.Context, job: JobArgument, as_json: JsonOption = False) -> None:
    """Follow the progress of a job until it ends; pauses are waited out. Exits with 1 unless the job completed."""
    with create_client(context) as client:
        watch_job(client, find_job_id(client, job), as_json)


def logs(
    context: typer.Context,
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Attempt number. Default: the latest, or with --follow each attempt in turn.")
    ] = None,
) -> None:
    """Print the output of an attempt."""
    with create_client(context) as client:
        job_id = find_job_id(client, job)
        if follow:
            for text in client.follow_log(job_id, attempt):
                sys.stdout.write(text)
                sys.stdout.flush()
            return
        offset = 0
        while True:
            page = client.get(f"/jobs/{job_id}/logs", attempt=attempt, offset=offset)
            if not page["text"]:
                return
            sys.stdout.write(page["text"])
            offset = page["next_offset"]


def watch_job(client: Client, job_id: str, as_json: bool) -> None:
    """Print a job's events until it is final. Raises Exit(1) unless it completed."""
    if as_json:
        for event in client.stream_events(job_id):
            print_json(event)
    else:
        _show_progress(client, job_id)
    job = client.get(f"/jobs/{job_id}")
    if not as_json:
        print_job(out, job)
    if job["status"] != "completed":
        raise typer.Exit(1)


def _show_progress(client: Client, job_id: str) -> None:
    with progress_bar(out) as bar:
        task = bar.add_task("", total=1, phase="queued", loss="–", eta="", cost="")
        with _show_pending_reason_and_cost(client, job_id, bar, task):
            _show_events(client, job_id, bar, task)


def _show_events(client: Client, job_id: str, bar: Progress, task: TaskID) -> None:
    for event in client.stream_events(job_id):
        _update_progress(bar, task, event["event"])
        if line := event_line(event):
            bar.console.print(line, highlight=False)
        if event["event"].get("status") == "paused" and (job := client.get(f"/jobs/{job_id}"))["status"] == "paused":
            bar.console.print(f"[dim]waiting for `{continue_command(job)}`; Ctrl-C stops watching, not the job[/]", soft_wrap=True)


def _update_progress(bar: Progress, task: TaskID, body: Json) -> None:
    match body["type"]:
        case "status":
            bar.update(task, phase=body["status"], eta="")
        case "phase":
            bar.update(task, phase=body["phase"])
        case "checkpoint_restored":
            bar.update(task, completed=body["step"])
        case "metrics" if body["progress"]:
            progress, loss = body["progress"], body["values"].get("loss")
            bar.update(task, completed=progress["step"], total=progress["total_steps"])
            bar.update(task, eta=format_time_left(progress["eta_s"]))
            if loss is not None:
                bar.update(task, loss=f"{loss:.3f}")
        case _:
            pass


@contextmanager
def _show_pending_reason_and_cost(client: Client, job_id: str, bar: Progress, task: TaskID) -> Generator[None]:
    """Poll in a thread for what events do not carry: what the job has cost, and why it is not launched yet; each new reason is printed."""
    stop = threading.Event()

    def poll() -> None:
        printed: str | None = None
        while not stop.wait(JOB_POLL_S):
            with suppress(ApiError):
                job = client.get(f"/jobs/{job_id}")
                reason = get_pending_reason(job)
                if reason and reason != printed:
                    bar.console.print(f"[yellow]waiting[/] {escape(reason)}", highlight=False)
                printed = reason
                bar.update(task, cost=format_cost(job["cost"]))

    thread = threading.Thread(target=poll, name="job-poll", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
