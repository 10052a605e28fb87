"""The commands that follow a job: `watch` and `logs`."""

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from cli.errors import ApiError
from cli.http_client import Client, Json
from cli.job_names import find_job_id, shorten_job_id
from cli.options import JobArgument, JsonOption, create_client
from cli.output import err, out, print_json
from cli.render.job import next_commands, print_job
from cli.render.watching import WatchView

JOB_POLL_S = 15.0
REFRESHES_PER_S = 4


def watch(context: typer.Context, job: JobArgument, as_json: JsonOption = False) -> None:
    """Follow the progress of a job until it ends; pauses are waited out. Exits with 1 unless the job completed."""
    with create_client(context) as client:
        watch_job(client, find_job_id(client, job), as_json)


def logs(
    context: typer.Context,
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, help="Start this many lines before the end. Default: at the beginning.")] = None,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Attempt number. Default: the latest, or with --follow each attempt in turn.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the output of an attempt."""
    with create_client(context) as client:
        job_id = find_job_id(client, job)
        pages = client.follow_log(job_id, attempt, tail) if follow else _read_log(client, job_id, attempt, tail)
        for page in pages:
            if as_json:
                print_json(page)
            else:
                sys.stdout.write(page["text"])
                sys.stdout.flush()


def _read_log(client: Client, job_id: str, attempt: int | None, tail: int | None) -> Iterator[Json]:
    page = client.get(f"/jobs/{job_id}/logs", attempt=attempt, tail=tail, offset=0 if tail is None else None)
    while page["text"]:
        yield page
        page = client.get(f"/jobs/{job_id}/logs", attempt=page["attempt"], offset=page["next_offset"])


def watch_job(client: Client, job_id: str, as_json: bool) -> None:
    """Print a job's events until it is final, then what it achieved.

    Raises Exit(1) unless it completed, and Exit(130) if a person stops watching with Ctrl-C, which does not stop the job.
    """
    try:
        if as_json:
            for event in client.stream_events(job_id):
                print_json(event)
        else:
            _show_events(client, job_id, out)
        job = client.get(f"/jobs/{job_id}")
    except KeyboardInterrupt:
        word = shorten_job_id(job_id) if err.is_terminal else job_id
        err.print(f"the job goes on; tunesmith watch {word} | pause {word} | cancel {word}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if not as_json:
        print_job(out, job, with_setup=False)
    if job["status"] != "completed":
        raise typer.Exit(1)


def _show_events(client: Client, job_id: str, console: Console) -> None:
    """Print the events; on a terminal with a panel below them that shows the job as it is now."""
    is_live = console.is_terminal and not console.is_dumb_terminal
    view = WatchView(console, client.get(f"/jobs/{job_id}"), is_live=is_live)
    live = Live(
        console=console,
        get_renderable=lambda: view.render(time.monotonic()),
        refresh_per_second=REFRESHES_PER_S,
        transient=True,
        vertical_overflow="crop",
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with live if is_live else nullcontext(), _poll_job(client, job_id, view.update):
        for event in client.stream_events(job_id):
            view.show(event, time.monotonic(), time.time())
            if event["event"].get("status") == "paused" and (job := client.get(f"/jobs/{job_id}"))["status"] == "paused":
                [command] = next_commands(job, shorten_job_id(job_id) if is_live else job_id)
                view.print(f"[dim]waiting for `{escape(command)}`; Ctrl-C stops watching, not the job[/]")
    view.print_chart()


@contextmanager
def _poll_job(client: Client, job_id: str, update: Callable[[Json], None]) -> Generator[None]:
    """Poll in a thread for what events do not carry: what the job has cost, and why it is not launched yet."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(JOB_POLL_S):
            with suppress(ApiError):
                update(client.get(f"/jobs/{job_id}"))

    thread = threading.Thread(target=poll, name="job-poll", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
