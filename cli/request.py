"""Builds request bodies from files and options."""

from contextlib import suppress
from pathlib import Path
from typing import cast

import yaml

from cli.errors import CliError
from cli.http_client import Json


def build_train_request(file: Path | None, fields: Json, training_fields: Json, overrides: list[str] | None) -> Json:
    """The body of `POST /train`. Options override the file, and `--set` overrides both.

    The file contains a whole request or only a `training_config`. Raises CliError if it cannot be parsed.
    """
    request: Json = {}
    if file:
        request = _load_request_file(file)
        if "training_config" not in request:
            request = {"training_config": request}
    if fields.get("processed_dataset_id"):
        request.pop("datasets", None)  # a mix in the file
    request |= without_none(fields)
    training_config: Json = request.setdefault("training_config", {})
    training_config |= without_none(training_fields)
    apply_overrides(training_config, overrides)
    return request


def _load_request_file(file: Path) -> Json:
    try:
        content: object = yaml.safe_load(file.read_text())  # JSON is also YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CliError(f"{file} is not valid YAML or JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise CliError(f"{file} does not contain an object", "docs/api.md shows a request")
    return cast(Json, content)


def apply_overrides(training_config: Json, overrides: list[str] | None) -> None:
    """Apply overrides such as `hyperparameters.max_steps=40`. Values are parsed as YAML, so numbers and lists keep their type."""
    for override in overrides or []:
        path, text = _parse_pair("--set", override)
        *parents, name = path.split(".")
        target = training_config
        for parent in parents:
            inner: object = target.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise CliError(f"--set {override}: {parent} is not an object")
            target = cast(Json, inner)
        value = yaml.safe_load(text)
        if isinstance(value, str):  # YAML 1.1 parses 1e-4 as a string
            with suppress(ValueError):
                value = float(value)
        target[name] = value


def parse_hardware(text: str | None) -> str | list[str] | None:
    """The `--hardware` option as a request writes it: one profile, or a list if there are several, separated by commas."""
    names = [name.strip() for name in text.split(",")] if text else []
    return names if len(names) > 1 else text


def parse_secrets(secrets: list[str] | None) -> dict[str, str] | None:
    """The `--secret NAME=VALUE` options as an object, or None if there are none."""
    return dict(_parse_pair("--secret", text) for text in secrets) if secrets else None


def _parse_pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise CliError(f"{option} {name} has no value", f"write {option} {name}=VALUE")
    return name, value


def without_none(fields: Json) -> Json:
    """The fields whose value is not None."""
    return {name: value for name, value in fields.items() if value is not None}
