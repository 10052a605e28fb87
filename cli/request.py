"""Builds request bodies from files and options."""

import re
from pathlib import Path
from typing import cast

import yaml

from cli.errors import CliError
from cli.http_client import Json

# Fields of a request beside training_config, which `--set` reaches by their names; any other path is below training_config.
REQUEST_FIELDS = frozenset(
    {
        *("processed_dataset_id", "datasets", "hf_token", "job_name", "project_id", "metadata", "hardware"),
        *("max_gpu_seconds", "max_cost_usd", "secrets", "training_config"),
    }
)


class _Loader(yaml.SafeLoader):
    """YAML, in which 1e-4 is a number as in YAML 1.2: PyYAML reads YAML 1.1, where only 1.0e-4 is one."""


_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]  # PyYAML has no types
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def build_train_request(file: Path | None, fields: Json, training_fields: Json, overrides: list[str] | None) -> Json:
    """The body of `POST /train`. Options override the file, and `--set` overrides both. Objects are merged, field by field.

    The file contains a whole request or only a `training_config`. Raises CliError if it cannot be parsed.
    """
    request: Json = {}
    if file:
        request = load_request_file(file)
        if "training_config" not in request:
            request = {"training_config": request}
    if fields.get("processed_dataset_id"):
        request.pop("datasets", None)  # a mix in the file
    _merge(request, {**without_none(fields), "training_config": without_none(training_fields)})
    apply_overrides(request, overrides)
    return request


def load_request_file(file: Path) -> Json:
    """The object in a YAML or JSON file. Raises CliError if there is none."""
    try:
        content = _parse(file.read_text())  # JSON is also YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CliError(f"{file} is not valid YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise CliError(f"{file} does not contain an object", "docs/api.md shows a request")
    return cast(Json, content)


def apply_overrides(request: Json, overrides: list[str] | None) -> None:
    """Apply overrides such as `hyperparameters.max_steps=40` or `project_id=x`. Values are YAML, so numbers and lists keep their type."""
    for override in overrides or []:
        path, text = _parse_pair("--set", override)
        steps = path.split(".")
        *parents, name = steps if steps[0] in REQUEST_FIELDS else ["training_config", *steps]
        target = request
        for parent in parents:
            inner: object = target.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise CliError(f"--set {override}: {parent} is not an object")
            target = cast(Json, inner)
        try:
            target[name] = _parse(text)
        except yaml.YAMLError as error:
            raise CliError(f"--set {override}: the value is not valid YAML", f"quote it: --set '{path}=\"…\"'") from error


def parse_hardware(text: str | None) -> str | list[str] | None:
    """The `--hardware` option as a request writes it: one profile, or a list if there are several, separated by commas."""
    names = [name.strip() for name in text.split(",")] if text else []
    return names if len(names) > 1 else text


def parse_pairs(option: str, pairs: list[str] | None) -> dict[str, str] | None:
    """Options such as `--secret NAME=VALUE` as an object, or None if there are none."""
    return dict(_parse_pair(option, text) for text in pairs) if pairs else None


def _parse_pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise CliError(f"{option} {name} has no value", f"write {option} {name}=VALUE")
    return name, value


def _parse(text: str) -> object:
    return yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader


def _merge(target: Json, changes: Json) -> None:
    """Set fields; of a field that is an object on both sides, set its fields."""
    for name, value in changes.items():
        inner = target.get(name)
        if isinstance(inner, dict) and isinstance(value, dict):
            _merge(cast(Json, inner), cast(Json, value))
        else:
            target[name] = value


def without_none(fields: Json) -> Json:
    """The fields whose value is not None; objects without a field are left out as well."""
    cleaned = {name: without_none(cast(Json, value)) if isinstance(value, dict) else value for name, value in fields.items()}
    return {name: value for name, value in cleaned.items() if value is not None and value != {}}
