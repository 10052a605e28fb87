"""Secrets of a request: found in every field, named, and removed from everything that is stored."""

from typing import Any

import pytest
from pydantic import SecretStr

from schema.requests import ResumeRequest
from schema.training import TRAINING_CONFIG, TrainingConfig
from service.core.jobs.secrets import REDACTED, extract_config_secrets, extract_request_secrets, iter_config_secrets, redact, resent_secrets
from service.core.jobs.trackers import DeploymentTrackers, add_deployment_trackers, deployment_tracker_secrets
from tests.factories import make_grpo_config, make_train_request

JUDGE = {"type": "score_model", "name": "judge", "base_url": "https://judge.example/v1", "model": "m", "api_key": "canary-judge"}
SIMILARITY_GRADER = {
    "type": "text_similarity",
    "name": "near",
    "metric": "cosine",
    "embedding_model": "e",
    "base_url": "https://e.example",
    "api_key": "canary-near",
}
TRACKERS_WITH_SECRETS: dict[str, Any] = {
    "wandb_config": {"api_key": "canary-wandb"},
    "mlflow_config": {"tracking_uri": "https://mlflow.example", "token": "canary-mlflow"},
}
EXPECTED_SECRETS = {
    "wandb_api_key": "canary-wandb",
    "mlflow_token": "canary-mlflow",
    "judge_api_key": "canary-judge",
    "near_api_key": "canary-near",
}


def make_config_with_secrets(**changes: Any) -> TrainingConfig:
    return make_grpo_config({"type": "format", "name": "form"}, JUDGE, SIMILARITY_GRADER, **(TRACKERS_WITH_SECRETS | changes))


def test_secret_names_describe_their_location() -> None:
    assert extract_config_secrets(make_config_with_secrets()) == EXPECTED_SECRETS
    config = {"base_model_id": "g/m", "wandb_config": {"api_key": "canary-wandb"}}
    assert extract_request_secrets(make_train_request(hf_token="hf_canary", training_config=config)) == {
        "hf_token": "hf_canary",
        "wandb_api_key": "canary-wandb",
    }


def test_redacted_config_has_no_secrets_and_all_other_fields() -> None:
    config = make_config_with_secrets()
    redacted = redact(config)
    assert "canary" not in redacted.model_dump_json() + repr(redacted) + str(redacted.model_dump())
    assert {entry.secret.get_secret_value() for entry in iter_config_secrets(redacted)} == {REDACTED.get_secret_value()}
    assert type(redacted).model_validate_json(redacted.model_dump_json()) == redacted
    hidden = {"wandb_config", "mlflow_config", "reward_config"}
    assert redacted.model_dump(exclude=hidden) == config.model_dump(exclude=hidden)


def test_config_without_secrets_is_unchanged() -> None:
    config = make_grpo_config({"type": "format", "name": "form"})
    assert redact(config) is config


@pytest.mark.parametrize(
    "field", [field for config in (make_grpo_config(JUDGE, SIMILARITY_GRADER, **TRACKERS_WITH_SECRETS),) for field, _ in config]
)
def test_every_secret_field_is_detected(field: str) -> None:
    """With secrets revealed, a dump of the config contains the secret until the detected one is removed."""
    config = make_grpo_config(JUDGE, SIMILARITY_GRADER, **TRACKERS_WITH_SECRETS)
    text = repr(_reveal_secrets(dict(config)[field]))
    for secret in extract_config_secrets(config).values():
        text = text.replace(secret, "")
    assert "canary" not in text


def _reveal_secrets(value: object) -> object:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case list():
            return [_reveal_secrets(item) for item in value]
        case _ if hasattr(value, "model_fields_set"):
            return {name: _reveal_secrets(item) for name, item in value}  # type: ignore[attr-defined]
        case _:
            return value


def test_secrets_can_be_resent_by_name_or_legacy_field() -> None:
    body = {"hf_token": "a", "wandb_api_key": "b", "secrets": {"judge_api_key": "c"}}
    assert resent_secrets(ResumeRequest.model_validate(body)) == {"hf_token": "a", "wandb_api_key": "b", "judge_api_key": "c"}
    assert resent_secrets(ResumeRequest.model_validate({})) == {}


# --- the deployment's trackers ---------------------------------------------------------------------------------------

DEPLOYMENT_TRACKERS = DeploymentTrackers.model_validate(
    {"mlflow_config": {"tracking_uri": "https://ours.example", "token": "canary-ours"}, "tensorboard_config": {}}
)


def test_job_without_tracker_uses_deployment_tracker() -> None:
    config = add_deployment_trackers(TRAINING_CONFIG.validate_python({"base_model_id": "g/m"}), DEPLOYMENT_TRACKERS)
    assert config.mlflow_config is not None
    assert config.mlflow_config.tracking_uri == "https://ours.example"
    assert config.tensorboard_config is not None
    assert config.wandb_config is None
    assert deployment_tracker_secrets(redact(config), DEPLOYMENT_TRACKERS) == {"mlflow_token": "canary-ours"}


def test_job_tracker_overrides_deployment_tracker() -> None:
    config = add_deployment_trackers(make_config_with_secrets(), DEPLOYMENT_TRACKERS)
    assert extract_config_secrets(config)["mlflow_token"] == "canary-mlflow"
    assert deployment_tracker_secrets(redact(config), DEPLOYMENT_TRACKERS) == {}


def test_deployment_wandb_must_be_offline() -> None:
    with pytest.raises(ValueError, match="offline"):
        DeploymentTrackers.model_validate({"wandb_config": {"api_key": "k"}})
    assert DeploymentTrackers.model_validate({"wandb_config": {"mode": "offline"}}).wandb_config
