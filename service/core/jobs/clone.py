"""Cloning: a JSON merge patch (RFC 7386) on the request that created a job, validated like a new request."""

import json
from collections.abc import Iterator, Mapping
from typing import TypeGuard

from pydantic import JsonValue

from schema.job import Job
from schema.requests import CloneRequest, TrainRequest
from schema.training import TrainingConfig
from schema.types import JOB_PREFIX
from service.core.errors import InvalidRequest
from service.core.jobs.kinds import training_of
from service.core.jobs.secrets import HF_SECRET, FieldPath, iter_config_secrets

JsonObject = dict[str, JsonValue]
SECRET_FIELDS = ("api_key", "token")


def clone_request(
    source: Job, patch: CloneRequest, *, deployment_secrets: frozenset[str], deployment_trackers: frozenset[str]
) -> TrainRequest:
    """The changed request. Raises ValidationError when it is not valid, InvalidRequest when a secret is missing or the job trained nothing.

    `deployment_trackers` are the kinds of trackers that the deployment adds, `deployment_secrets` the names of their secrets.
    """
    sent = {name: value for name, value in original_request(training_of(source)).items() if name not in deployment_trackers}
    if source.earlier_model:
        sent["base_model_id"] = f"{JOB_PREFIX}{source.earlier_model.job_id}"
    config = merge_patch(sent, patch.training_config)
    if is_object(config):
        _insert_secrets(config, patch, [name for name in source.secret_names if name not in (HF_SECRET, *deployment_secrets)])
    body: JsonObject = {
        **_datasets(source, patch),
        "job_name": patch.job_name or source.job_name,
        "project_id": source.project_id,
        "metadata": dict[str, JsonValue](source.metadata if patch.metadata is None else patch.metadata),
        "hardware": _hardware(source, patch),
        "max_gpu_seconds": patch.max_gpu_seconds or source.max_gpu_seconds,
        "max_cost_usd": patch.max_cost_usd or source.max_cost_usd,
        "hf_token": _hf_token(source, patch),
        "training_config": config,
    }
    return TrainRequest.model_validate_json(json.dumps(body))


def original_request(config: TrainingConfig) -> JsonObject:
    """What a caller would send for this configuration: no secrets, and no defaults, so that defaults follow the changes."""
    sent: JsonObject = config.model_dump(mode="json", exclude_defaults=True)
    for secret in iter_config_secrets(config):
        parent = _get_at_path(sent, secret.path[:-1])
        if is_object(parent):
            parent.pop(str(secret.path[-1]), None)
    _remove_computed(sent, config.computed_defaults())
    return sent


def merge_patch(target: JsonValue, patch: JsonValue) -> JsonValue:
    """RFC 7386: objects are merged, null removes, everything else replaces."""
    if not is_object(patch):
        return patch
    merged = dict(target) if is_object(target) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def is_object(value: object) -> TypeGuard[JsonObject]:
    """Whether a JSON value is an object."""
    return isinstance(value, dict)


def _remove_computed(sent: JsonObject, computed: Mapping[str, JsonValue]) -> None:
    """Remove values that the configuration computed: the clone computes them from its own fields."""
    for name, value in computed.items():
        part = sent.get(name)
        if is_object(value) and is_object(part):
            _remove_computed(part, value)
        elif name in sent and part == value:
            del sent[name]


def _get_at_path(value: JsonValue, path: FieldPath) -> JsonValue:
    """The value at a path."""
    for step in path:
        if is_object(value):
            value = value.get(str(step))
        elif isinstance(value, list) and isinstance(step, int):
            value = value[step]
    return value


def _datasets(source: Job, patch: CloneRequest) -> JsonObject:
    if patch.processed_dataset_id:
        return {"processed_dataset_id": patch.processed_dataset_id}
    mixed = patch.datasets or source.datasets
    return (
        {"datasets": [each.model_dump(mode="json") for each in mixed]} if mixed else {"processed_dataset_id": source.processed_dataset_id}
    )


def _hardware(source: Job, patch: CloneRequest) -> JsonValue:
    names: list[JsonValue] = [placement.hardware for placement in source.placements]
    match patch.hardware:
        case None:
            return names
        case str(name):
            return name
        case list(requested):
            return [*requested]


def _hf_token(source: Job, patch: CloneRequest) -> str | None:
    token = patch.hf_token or patch.secrets.get(HF_SECRET)
    declined = HF_SECRET in patch.model_fields_set or HF_SECRET in patch.secrets  # null: the clone needs no token
    if HF_SECRET in source.secret_names and token is None and not declined:
        raise _missing_secret_error(HF_SECRET, HF_SECRET)
    return token.get_secret_value() if token else None


def _insert_secrets(config: JsonObject, patch: CloneRequest, required_names: list[str]) -> None:
    """Put the sent secrets into the configuration. Raises InvalidRequest when one that the source had is missing."""
    fields = {f"{owner}_{field}": (part, field) for owner, part in _iter_secret_owners(config) for field in SECRET_FIELDS}
    for name, secret in patch.secrets.items():
        if name == HF_SECRET or secret is None:
            continue
        if name not in fields:
            raise InvalidRequest(f"nothing in the clone's training_config uses {name}", hint="leave it out", param=f"secrets.{name}")
        part, field = fields[name]
        part[field] = secret.get_secret_value()
    for name in required_names:
        if name not in fields or name in patch.secrets:
            continue
        part, field = fields[name]
        if field not in part and part.get("mode") != "offline":
            raise _missing_secret_error(name, f"secrets.{name}")


def _iter_secret_owners(config: JsonObject) -> Iterator[tuple[str, JsonObject]]:
    """The parts of a configuration that may have a secret, with the prefix of the secret's name."""
    for field, value in config.items():
        if is_object(value):
            yield field.removesuffix("_config"), value
        elif isinstance(value, list):
            yield from ((str(item.get("name")), item) for item in value if is_object(item))


def _missing_secret_error(name: str, param: str) -> InvalidRequest:
    hint = "secrets are never copied from job to job; null creates the clone without it"
    return InvalidRequest(f"the job was created with {name}, and its clone needs it again; send it in the body", hint=hint, param=param)
