"""Printing: results on standard output, messages about them on standard error."""

import json
import sys
from typing import IO

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from cli.errors import CliError, Problem
from cli.hints import get_option, translate_hint
from cli.http_client import Json

ID_FIELDS = ("job_id", "processed_dataset_id", "key_id")
UNWRAPPED_WIDTH = 1_000_000  # in a pipe or a file, wrapped lines would break scripts


def _create_console(stream: IO[str], *, stderr: bool = False) -> Console:
    return Console(stderr=stderr, width=None if stream.isatty() else UNWRAPPED_WIDTH)


out = _create_console(sys.stdout)
err = _create_console(sys.stderr, stderr=True)


def print_json(document: object) -> None:
    """Print one compact JSON document on a line of its own."""
    print(json.dumps(document, separators=(",", ":")), flush=True)


def print_answer(answer: Json, as_json: bool, readable: RenderableType) -> None:
    """Print an API response as JSON or in its readable form."""
    if as_json:
        print_json(answer)
    else:
        out.print(readable)


def print_next_cursor(page: Json, as_json: bool) -> None:
    """Print the option that shows the next page, if there is one."""
    if page["next_cursor"] and not as_json:
        err.print(f"more: --cursor {page['next_cursor']}", style="dim", soft_wrap=True)


def print_error(error: CliError, as_json: bool) -> None:
    """Print every problem of an error with its field and a hint; with --json the error as the API writes it, on standard output."""
    problems = [_localize(problem, error.options) for problem in error.problems]
    if as_json:
        described = [{"message": problem.message, "hint": problem.hint, "param": problem.param} for problem in problems]
        print_json({"error": {"code": error.code, **described[0], "errors": described}})
        return
    for problem in problems:
        err.print(f"[red]error[/]{escape(_get_label(problem.param, error))} {escape(problem.message)}", highlight=False, soft_wrap=True)
        if problem.hint:
            err.print(f"  hint: {escape(problem.hint)}", style="dim", highlight=False, soft_wrap=True)


def _localize(problem: Problem, options: frozenset[str]) -> Problem:
    """The problem with its hint in terms of commands, and with its field named once."""
    return Problem(problem.message.removeprefix(f"{problem.param}: "), translate_hint(problem.hint, options), problem.param)


def _get_label(param: str | None, error: CliError) -> str:
    """` learning_rate (--lr):`, the field and its option. The id of an unknown job or dataset is in the message already."""
    if param is None or (error.code == "not_found" and param in ID_FIELDS):
        return ""
    option = get_option(param, error.options)
    name = param.removeprefix("training_config.").removeprefix("hyperparameters.")
    return f" {name} ({option}):" if option else f" {name}:"


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is lost. Without a terminal to ask on, or if the answer is no, raises CliError; `yes` skips the question."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CliError(f"{question} There is no terminal to ask on", "repeat the command with --yes", exit_code=2)
    if not typer.confirm(question, err=True):
        raise CliError("not confirmed; nothing was changed")
