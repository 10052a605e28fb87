"""The commands `tunesmith models list`, `show`, `pull`, `import` and `remove`: the base models in the service's model store.

Pulling and importing run in the trainer's environment, which checks a model as a training would, and write to the model store directly.
"""

import json
import subprocess
from pathlib import Path
from typing import Annotated
from urllib.parse import quote, urlsplit

import typer
from rich.markup import escape
from rich.table import Table

from cli.completion import complete_bases
from cli.errors import CliError
from cli.http_client import Client, Json
from cli.options import HfTokenOption, JsonOption, create_client
from cli.output import confirm, err, print_answer
from cli.settings import SOURCE_ROOT, Settings
from cli.storage import format_bytes

app = typer.Typer(help="List, show, pull, import and remove base models.", no_args_is_help=True)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
UNFINISHED = ("queued", "preparing", "training", "pausing", "paused", "cancelling")
HUB_ANSWERS = {
    "yes": "on the Hub",
    "gated": "on the Hub, gated: accept its license there and pass --hf-token",
    "refused": "on the Hub, which refuses to show it without a token",
    "bad_token": "on the Hub, which refuses to show it without a token",
    "unknown": "unknown: the Hub does not answer",
}

NameArgument = Annotated[
    str,
    typer.Argument(
        autocompletion=complete_bases, help="Name of a model, such as google/gemma-3-270m; the last part is enough if it is unique."
    ),
]
FullNameArgument = Annotated[str, typer.Argument(help="Name of the model as the Hub writes it: owner/name.")]
ReplaceOption = Annotated[bool, typer.Option("--replace", help="Replace a model of the same name.")]


@app.command("list")
def list_models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the base models in the model store. Jobs can start from them without a download."""
    with create_client(context) as client:
        answer = client.get("/models")
    print_answer(answer, as_json, _model_table(answer["models"]))
    if not answer["models"] and not as_json:
        err.print("none yet: `tunesmith models pull NAME` or `tunesmith models import FOLDER --name NAME`", style="dim")


@app.command("show")
def show_model(context: typer.Context, name: NameArgument, as_json: JsonOption = False) -> None:
    """Show a base model; of one that is not in the model store, what the Hub says."""
    with create_client(context) as client:
        model = client.get(f"/models/{quote(name)}")
    print_answer(model, as_json, _model_details(model))


@app.command("pull")
def pull_model(
    context: typer.Context,
    name: FullNameArgument,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit. Default: the newest commit.")] = None,
    hf_token: HfTokenOption = None,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Download a model from the Hub into the model store. Repeat the command to continue an interrupted download."""
    settings = Settings.from_environment()
    with create_client(context) as client:
        arguments = ["pull", name, "--store", _find_store_url(client), "--work", str(settings.home_folder / "pulls")]
    arguments += ["--revision", revision] if revision else []
    arguments += ["--replace"] if replace else []
    model = _run_bases(settings, arguments, hf_token)["model"]
    print_answer(model, as_json, _describe_stored(model))


@app.command("import")
def import_model(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder with config.json, *.safetensors and the tokenizer.")],
    name: Annotated[str, typer.Option("--name", help="Name of the model in the model store: owner/name.")],
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put a model of this machine into the model store. Within one file system its files are linked, not copied."""
    with create_client(context) as client:
        model = _import(Settings.from_environment(), client, folder, name, replace=replace)
    print_answer(model, as_json, _describe_stored(model))


@app.command("remove")
def remove_model(
    context: typer.Context,
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a model from the model store. Models that jobs trained are not touched."""
    with create_client(context) as client:
        model = client.get(f"/models/{quote(name)}")
        if not model["available"]:
            raise CliError(f"{model['name']} is not in the model store", "`tunesmith models list` shows what is there")
        users = _find_unfinished_jobs(client, model["name"])
        if users:
            raise CliError(
                f"{model['name']} is the base of unfinished jobs: {', '.join(users)}", "cancel them, or wait until they have ended"
            )
        store_url = _find_store_url(client)
    confirm(f"Delete {model['name']} ({format_bytes(model['size_bytes'])}) from the model store?", yes=yes)
    removed = _run_bases(Settings.from_environment(), ["remove", model["name"], "--store", store_url])
    print_answer(removed, as_json, f"removed {escape(model['name'])}, {format_bytes(removed['removed_bytes'])}")


def import_folder(settings: Settings, client: Client, folder: Path, name: str) -> str:
    """Put the model in a folder of this machine into the model store, and return its name there. Raises CliError.

    The same files under the same name are not stored again.
    """
    return _import(settings, client, folder, name)["name"]


def _import(settings: Settings, client: Client, folder: Path, name: str, *, replace: bool = False) -> Json:
    arguments = ["import", name, "--folder", str(folder.expanduser().absolute()), "--store", _find_store_url(client)]
    return _run_bases(settings, arguments + (["--replace"] if replace else []))["model"]


def _find_store_url(client: Client) -> str:
    """The URL of the model store. Raises CliError for a folder of another machine."""
    store_url = str(client.get("/models")["store_url"])
    if urlsplit(store_url).scheme == "file" and (urlsplit(client.url).hostname or "") not in LOOPBACK:
        raise CliError(f"the model store is a folder on the machine of {client.url}", "run the command on that machine")
    return store_url


def _run_bases(settings: Settings, arguments: list[str], token: str | None = None) -> Json:
    """Run `jobs.llm.bases` in the trainer's environment; its progress goes to standard error. Raises CliError."""
    python = settings.trainer_python
    if not python.exists():
        raise CliError(f"the trainer's environment is not installed: {python} is missing", "`make setup` installs it")
    # Without -P: the trainer's environment has no package `jobs`, so Python must find it in the folder where it starts.
    command = [str(python), "-m", "jobs.llm.bases", *arguments, *(["--token-on-stdin"] if token else [])]
    done = subprocess.run(command, cwd=SOURCE_ROOT, input=f"{token or ''}\n", stdout=subprocess.PIPE, text=True, check=False)
    try:
        answer: Json = json.loads(done.stdout)
    except ValueError as error:
        raise CliError(f"the command failed with exit code {done.returncode}", "its output is above") from error
    if problem := answer.get("error"):
        raise CliError(problem["message"], problem["hint"])
    return answer


def _find_unfinished_jobs(client: Client, name: str) -> list[str]:
    """The caller's unfinished jobs with this base."""
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = client.get("/jobs", status=list(UNFINISHED), limit=200, cursor=cursor)
        found += [row["job_id"] for row in page["jobs"] if row["base_model_id"] == name]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def _model_table(models: list[Json]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("name", "family", "source", "precision", "parameters", "size", "license", "available"):
        table.add_column(column, justify="right" if column in ("parameters", "size") else "left", no_wrap=column == "name")
    for model in models:
        table.add_row(
            escape(model["name"]),
            model["family"],
            model["source"],
            escape(model["precision"] or ""),
            format_count(model["parameters"]),
            format_bytes(model["size_bytes"]),
            escape(model["license"] or ""),
            "yes" if model["available"] else "no",
        )
    return table


def _model_details(model: Json) -> Table:
    """A row for each field that is known."""
    table = Table(box=None, show_header=False, pad_edge=False)
    fields = {
        "name": model["name"],
        "available": "yes, in the model store" if model["available"] else f"no; {HUB_ANSWERS.get(model['hub'], 'not in the model store')}",
        "family": model["family"],
        "source": model["source"],
        "revision": model["revision"],
        "precision": model["precision"],
        "note": model["note"],
        "parameters": format_count(model["parameters"]),
        "size": format_bytes(model["size_bytes"]) if model["size_bytes"] else None,
        "license": model["license"],
        "architecture": model["architecture"],
        "hidden size": model["hidden_size"],
        "images": model["images"],
        "imported": (model["imported_at"] or "")[:16].replace("T", " "),
    }
    for label, value in fields.items():
        if value not in (None, ""):
            table.add_row(f"[dim]{label}[/]", escape(str(value)))
    return table


def _describe_stored(model: Json) -> str:
    terms = f", license {model['license']}" if model["license"] else "; its license is not stated"
    size = f"{format_count(model['parameters'])} parameters, {format_bytes(model['size_bytes'])}"
    return f"{escape(model['name'])} is in the model store: {size}{escape(terms)}"


def format_count(count: int | None) -> str:
    """A number of parameters, such as 268 M; empty if it is not known."""
    if count is None:
        return ""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return str(count)
