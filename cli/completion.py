"""What the shell offers to complete: what the service has. A service that does not answer at once completes nothing."""

from collections.abc import Iterable
from contextlib import suppress

import typer
from httpx2 import InvalidURL

from cli.connection import Connection
from cli.errors import ApiError
from cli.http_client import Json

TIMEOUT_S = 0.5  # a person waits at the prompt
MAX_OFFERED = 30


def complete_jobs(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Ids and names of the newest jobs, and @last."""
    rows: list[Json] = _get(context, "/jobs", limit=MAX_OFFERED).get("jobs", [])
    offered = {"@last": "your newest job"}
    for row in rows:
        offered.setdefault(row["job_name"], f"{row['status']}, {row['base_model_id']}")
        offered[row["job_id"]] = f"{row['job_name']}, {row['status']}"
    return [(word, text) for word, text in offered.items() if word.startswith(incomplete)]


def complete_datasets(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Ids of the newest datasets."""
    rows: list[Json] = _get(context, "/datasets", limit=MAX_OFFERED).get("datasets", [])
    return [(row["processed_dataset_id"], row["name"]) for row in rows if row["processed_dataset_id"].startswith(incomplete)]


def complete_bases(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Names of the models in the store, also without their owner."""
    offered: dict[str, str] = {}
    for model in _get(context, "/models").get("models", []):
        description = f"{model['family']}, {model['source']}"
        offered[model["name"]] = offered[model["name"].rpartition("/")[2]] = description
    return [(name, text) for name, text in offered.items() if name.startswith(incomplete)]


def complete_trainers(context: typer.Context, incomplete: str) -> list[str]:
    """Trainer types of the deployment."""
    return _starting_with(incomplete, _get(context, "/capabilities").get("trainer_types", {}))


def complete_methods(context: typer.Context, incomplete: str) -> list[str]:
    """Methods that the default hardware can train with."""
    return _starting_with(incomplete, _get(context, "/capabilities").get("methods", []))


def complete_hardware(context: typer.Context, incomplete: str) -> list[str]:
    """Profiles of every launcher, and `auto`."""
    launchers: dict[str, Json] = _get(context, "/capabilities").get("launchers", {})
    return _starting_with(
        incomplete, ["auto", *(f"{name}/{profile}" for name, launcher in launchers.items() for profile in launcher["profiles"])]
    )


def _starting_with(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def _get(context: typer.Context, path: str, **query: str | int) -> Json:
    """The response to a GET request; nothing if there is none in time. Completion must never print an error."""
    options = context.find_root().params
    connection = Connection.choose(options.get("url"), options.get("api_key"), options.get("identity_token"))
    with suppress(ApiError, InvalidURL, ValueError), connection.create_impatient_client(TIMEOUT_S) as client:
        return client.get(path, **query)
    return {}
