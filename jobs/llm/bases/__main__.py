"""`python -m jobs.llm.bases pull|import|remove`: one JSON document on standard output, progress on standard error.

The document is {"model": {…}}, {"removed_bytes": n}, or {"error": {"code", "message", "hint"}} with exit code 1. A token of the Hub is
read from standard input: arguments can be seen by everybody on the machine.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.llm.bases.folder import import_model
from jobs.llm.bases.hub import pull_model
from jobs.llm.bases.store import remove_model
from jobs.runtime.errors import JobFailed, failure_of
from schema.models import is_model_name
from storage import StorageError
from storage.registry import open_store


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parse_args(arguments)
    _limit_progress()
    try:
        answer = _run(options)
    except (JobFailed, StorageError, OSError) as error:
        failure = failure_of(error)
        print(json.dumps({"error": {"code": failure.code, "message": failure.message, "hint": failure.hint}}))
        return 1
    except KeyboardInterrupt:
        _say("interrupted; nothing was stored, and the same command continues the download")
        return 130
    print(json.dumps(answer))
    return 0


def _run(options: argparse.Namespace) -> dict[str, object]:
    if not is_model_name(options.name):
        raise JobFailed("invalid_config", f"{options.name!r} is not the name of a model", "a name is written owner/name")
    store = open_store(options.store)
    if options.command == "remove":
        return {"removed_bytes": remove_model(store, options.name)}
    if options.command == "import":
        record = import_model(options.folder, options.name, store, replace=options.replace, say=_say)
    else:
        token = sys.stdin.readline().strip() or None if options.token_on_stdin else None
        record = pull_model(options.name, store, options.work, revision=options.revision, token=token, replace=options.replace, say=_say)
    return {"model": record.model_dump(mode="json")}


def _limit_progress() -> None:
    """Progress bars are for terminals, and log lines of the Hub's client for nobody."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.llm.bases", description="Puts base models into a model store.")
    commands = parser.add_subparsers(dest="command", required=True)
    pull = commands.add_parser("pull", help="download a model from the Hub")
    pull.add_argument("--revision", help="branch, tag or commit")
    pull.add_argument("--work", type=Path, required=True, help="folder for unfinished downloads")
    pull.add_argument("--token-on-stdin", action="store_true", help="read the Hub's token from standard input")
    from_folder = commands.add_parser("import", help="take a model from a folder")
    from_folder.add_argument("--folder", type=Path, required=True)
    remove = commands.add_parser("remove", help="delete a model")
    for command in (pull, from_folder):
        command.add_argument("--replace", action="store_true", help="replace a model of the same name")
    for command in (pull, from_folder, remove):
        command.add_argument("name")
        command.add_argument("--store", required=True, help="URL of the model store")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
