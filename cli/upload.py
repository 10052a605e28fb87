"""Sends rows to the service and follows it until they are a dataset: in a request, by a link if they are many, or from elsewhere."""

import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import BinaryIO

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cli.errors import ApiError, CliError, Problem
from cli.http_client import Client, Json
from cli.output import err
from cli.render.dataset import describe_dataset, describe_phase, problem_table
from cli.row_options import RowOptions
from cli.rows import RowsFile, find_row_warning

LINK_FROM_BYTES = 24_000_000  # Cloud Run refuses requests of 32 MiB
SHOWN_FROM_BYTES = 5_000_000  # smaller uploads take no time
SHOWN_PROBLEMS = 20
ROW_PROBLEM = re.compile(r"(?P<place>(?:.* )?(?:line|row) \d+): (?P<reason>.*)", re.DOTALL)
MAPPING = re.compile(r'\{"[^{}]*(?:\{[^{}]*\}[^{}]*)*\}')


def upload_rows(client: Client, rows: RowsFile, options: RowOptions, *, is_quiet: bool = False) -> Json:
    """Make a dataset of a file or folder. Asks which mapping is meant if the columns can be read in several ways, and there is a terminal.

    Raises CliError; rows that are not valid are printed as a table.
    """
    try:
        return _follow(client, _send(client, rows, options), is_quiet=is_quiet)
    except ApiError as error:
        if (mapping := _choose_mapping(error, is_quiet=is_quiet)) is None:
            raise summarize_problems(error, is_quiet=is_quiet) from error
    return upload_rows(client, rows, replace(options, reading={**options.reading, "mapping": mapping}), is_quiet=is_quiet)


def import_source(client: Client, source: str, options: RowOptions, *, is_quiet: bool = False) -> Json:
    """Make a dataset of rows elsewhere, which a job of the service reads."""
    dataset = client.import_dataset({"source": source, **options.form_fields, **options.secrets})
    return _follow(client, dataset, is_quiet=is_quiet)


def import_key(client: Client, key: str, options: RowOptions, *, is_quiet: bool = False) -> Json:
    """Make a dataset of a file in the dataset store."""
    return _follow(client, client.import_dataset({"incoming": key, **options.form_fields}), is_quiet=is_quiet)


def check_rows(client: Client, rows: RowsFile, options: RowOptions) -> Json:
    """Let the service find every row that is not valid, without keeping anything."""
    with rows.open() as (stream, size), _show_progress(rows.name, stream, size) as shown:
        return client.check(shown, rows.name, options.check_fields)


def print_dataset(label: str, dataset: Json, note: str = "") -> None:
    """Print what a file was taken for, and what is doubtful about its rows."""
    err.print(f"{escape(label)}: {escape(describe_dataset(dataset))}{note}", highlight=False, soft_wrap=True)
    detected: Json | None = dataset.get("detected")  # a service of an earlier version sends none
    if detected and detected["unused_columns"]:
        err.print(f"left out: {escape(', '.join(detected['unused_columns']))}", style="dim", highlight=False, soft_wrap=True)
    for warning in [find_row_warning(dataset), *dataset.get("warnings", [])]:
        if warning:
            err.print(f"[yellow]warning[/] {escape(warning)}", highlight=False, soft_wrap=True)


def summarize_problems(error: ApiError, *, is_quiet: bool) -> CliError:
    """The error of a file with several invalid rows, after a table of the first ones; any other error as it is."""
    found = [ROW_PROBLEM.fullmatch(problem.message) for problem in error.problems]
    listed = [{"place": each["place"], "reason": each["reason"]} for each in found if each]
    if is_quiet or len(listed) < 2:
        return error
    err.print(problem_table(listed[:SHOWN_PROBLEMS]))
    more = len(listed) - SHOWN_PROBLEMS
    if more > 0:
        err.print(f"and {more} more", style="dim")
    others = [problem for problem, match in zip(error.problems, found, strict=True) if not match]
    return CliError.of([*others, Problem("rows are not valid; nothing was kept", error.hint)])


def _send(client: Client, rows: RowsFile, options: RowOptions) -> Json:
    with rows.open() as (stream, size), _show_progress(rows.name, stream, size) as shown:
        if size >= LINK_FROM_BYTES and (link := _create_link(client, rows.name, size)):
            client.send_file(link, shown, size)
            return client.import_dataset({"incoming": link["incoming"], "name": rows.name[:128], **options.form_fields})
        return client.upload(shown, rows.name, options.form_fields)


def _create_link(client: Client, name: str, size_bytes: int) -> Json | None:
    """A link for a large file; None of a service from before there were links."""
    try:
        return client.post("/datasets/uploads", {"filename": name, "size_bytes": size_bytes})
    except ApiError as error:
        if error.status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            return None
        raise


@contextmanager
def _show_progress(name: str, stream: BinaryIO, size: int) -> Generator[BinaryIO]:
    """The stream, with a progress bar on a terminal if it is large."""
    columns = (TextColumn("uploading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    is_shown = err.is_terminal and size >= SHOWN_FROM_BYTES
    with Progress(*columns, console=err, transient=True, disable=not is_shown) as bar:
        yield bar.wrap_file(stream, size, description=escape(name))


def _follow(client: Client, dataset: Json, *, is_quiet: bool) -> Json:
    """The dataset once it is ready. Raises CliError if it failed, and Exit(130) for Ctrl-C, which does not stop its job."""
    dataset_id = dataset["processed_dataset_id"]
    if dataset.get("status", "ready") == "ready":
        return dataset
    if not is_quiet:
        err.print(f"{dataset_id}: a job reads the rows", highlight=False)
    try:
        with err.status("waiting for the job") as status:
            for dataset in client.follow_dataset(dataset_id):
                status.update(escape(describe_phase(dataset)))
    except KeyboardInterrupt:
        err.print(f"the job goes on; `tunesmith datasets show {dataset_id}` says how far it is", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if dataset["status"] == "failed":
        failure: Json = dataset["failure"] or {"message": "the dataset was not made", "hint": ""}
        if dataset["problems"] and not is_quiet:
            err.print(problem_table(dataset["problems"][:SHOWN_PROBLEMS]))
        raise CliError(failure["message"], failure["hint"] or f"`tunesmith datasets show {dataset_id}` lists what is wrong")
    return dataset


def _choose_mapping(error: ApiError, *, is_quiet: bool) -> str | None:
    """The mapping that a person chooses among those that an error proposes; None if it proposes no choice or nobody can be asked."""
    mappings: list[str] = MAPPING.findall(error.hint) if error.param == "mapping" else []
    if is_quiet or len(mappings) < 2 or not (sys.stdin.isatty() and err.is_terminal):
        return None
    err.print(f"{escape(error.message)}:", highlight=False, soft_wrap=True)
    for number, mapping in enumerate(mappings, start=1):
        err.print(f"  {number}  {escape(mapping)}", highlight=False, soft_wrap=True)
    chosen = 0
    while not 1 <= chosen <= len(mappings):
        chosen = typer.prompt("which one", type=int, err=True)
    return mappings[chosen - 1]
