"""Secrets in a request: removed before anything is stored, known by name, and never shown.

The name of a secret follows from its field: `wandb_config.api_key` is `wandb_api_key`, `mlflow_config.token` is `mlflow_token`, and the
`api_key` of the grader called `judge` is `judge_api_key`. `hf_token` is a field of the request itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from pydantic import BaseModel, SecretStr

from schema.requests import ContinuationOptions, TrainRequest

HF_SECRET = "hf_token"
WANDB_SECRET = "wandb_api_key"
REDACTED = SecretStr("**********")

FieldPath = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class SecretPath:
    """A secret of a configuration, with its name and the path of its field."""

    name: str
    path: FieldPath
    secret: SecretStr


def extract_request_secrets(request: TrainRequest) -> dict[str, str]:
    """The secrets in a request, by name."""
    token = {HF_SECRET: request.hf_token.get_secret_value()} if request.hf_token else {}
    return token | extract_config_secrets(request.training_config)


def extract_config_secrets(config: BaseModel) -> dict[str, str]:
    """The secrets in a configuration, by name."""
    return {secret_path.name: secret_path.secret.get_secret_value() for secret_path in iter_config_secrets(config)}


def iter_config_secrets(config: BaseModel) -> Iterator[SecretPath]:
    """Every secret in a configuration."""
    for path, owner, value in _iter_leaves(config):
        if isinstance(value, SecretStr):
            yield SecretPath(f"{owner}_{path[-1]}", path, value)


def redact(model: Model) -> Model:
    """A copy with every secret replaced by REDACTED, which may be stored and shown."""
    changes = {field: redacted for field, value in model if (redacted := _redact_value(value)) is not value}
    return model.model_copy(update=changes) if changes else model


def resent_secrets(request: ContinuationOptions) -> dict[str, str]:
    """The secrets that a caller sends again for an existing job, by name."""
    sent = {HF_SECRET: request.hf_token, WANDB_SECRET: request.wandb_api_key, **request.secrets}
    return {name: secret.get_secret_value() for name, secret in sent.items() if secret}


def _iter_leaves(model: BaseModel, path: FieldPath = (), owner: str = "") -> Iterator[tuple[FieldPath, str, object]]:
    """Every value in a model that is not a model itself: its path, and the name of the part it belongs to."""
    for field, value in model:
        if isinstance(value, BaseModel):
            yield from _iter_leaves(value, (*path, field), field.removesuffix("_config"))
        elif isinstance(value, list):
            items = cast(Sequence[object], value)
            for index, item in enumerate(items):
                if isinstance(item, BaseModel):
                    yield from _iter_leaves(item, (*path, field, index), str(dict(item).get("name", f"{field}_{index}")))
        else:
            yield (*path, field), owner, value


def _redact_value(value: object) -> object:
    match value:
        case SecretStr():
            return REDACTED
        case BaseModel():
            return redact(value)
        case list():
            items = cast(list[object], value)
            redacted = [_redact_value(item) for item in items]
            return redacted if any(after is not before for after, before in zip(redacted, items, strict=True)) else items
        case _:
            return value
