"""Sends secrets again when a job is continued or cloned: the service deletes a job's secrets when the job ends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

import typer

from cli.errors import ApiError
from cli.http_client import Json

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True)
class SecretOption:
    """A secret that a command takes as an option or from an environment variable."""

    field: str  # path in the request body: `hf_token`, `secrets.wandb_api_key`
    value: str | None
    is_typed: bool  # given on the command line, not by an environment variable

    @classmethod
    def of(cls, context: typer.Context, option: str, value: str | None, field: str | None = None) -> Self:
        """The value of a command option, with its source."""
        source = context.get_parameter_source(option)
        return cls(field or option, value, source is not None and source.name == "COMMANDLINE")


def send_with_secrets(send: Callable[[Json], AnswerT], body: Json, secrets: list[SecretOption]) -> AnswerT:
    """Send a request body with the secrets given on the command line.

    A secret from the environment is added only after the service reports that field as missing. Raises ApiError; if a secret is missing,
    its hint names the option.
    """
    by_field = {secret.field: secret for secret in secrets}
    sent = {secret.field for secret in secrets if secret.is_typed}
    for secret in secrets:
        if secret.is_typed and secret.value:
            _set_secret(body, secret.field, secret.value)
    while True:
        try:
            return send(body)
        except ApiError as error:
            field = error.param or ""
            secret = by_field.get(field)
            if secret is None and field.startswith("secrets."):
                raise error.with_hint(f"--secret {field.removeprefix('secrets.')}=…; {error.hint}") from error
            if secret is None or field in sent:
                raise
            if not secret.value:
                option = field.removeprefix("secrets.").replace("_", "-")
                raise error.with_hint(f"--{option}; {error.hint}") from error
            sent.add(field)
            _set_secret(body, field, secret.value)


def _set_secret(body: Json, field: str, value: str) -> None:
    """Set a field: `secrets.wandb_api_key` goes into the `secrets` object, a name without a dot into the body itself."""
    group, dot, name = field.partition(".")
    if dot:
        body.setdefault(group, {})[name] = value
    else:
        body[field] = value
