"""Secrets of a request: found wherever they stand, named, and left out of everything that is kept."""

from typing import Any

import pytest
from pydantic import SecretStr

from schema.requests import ResumeRequest
from schema.training import TRAINING_CONFIG, TrainingConfig
from service.core.secrets import REDACTED, config_secrets, places_of, redacted, secrets_of, sent_again
from service.core.trackers import Trackers, deployments_secrets, with_trackers
from tests.factories import a_grpo_config, a_request

JUDGE = {"type": "score_model", "name": "judge", "base_url": "https://judge.example/v1", "model": "m", "api_key": "canary-judge"}
NEAR = {
    "type": "text_similarity",
    "name": "near",
    "metric": "cosine",
    "embedding_model": "e",
    "base_url": "https://e.example",
    "api_key": "canary-near",
}
EVERYWHERE: dict[str, Any] = {
    "wandb_config": {"api_key": "canary-wandb"},
    "mlflow_config": {"tracking_uri": "https://mlflow.example", "token": "canary-mlflow"},
}
NAMED = {
    "wandb_api_key": "canary-wandb",
    "mlflow_token": "canary-mlflow",
    "judge_api_key": "canary-judge",
    "near_api_key": "canary-near",
}


def a_secretive_config(**changes: Any) -> TrainingConfig:
    return a_grpo_config({"type": "format", "name": "form"}, JUDGE, NEAR, **(EVERYWHERE | changes))


def test_every_secret_has_a_name_that_says_where_it_stood() -> None:
    assert config_secrets(a_secretive_config()) == NAMED
    config = {"base_model_id": "g/m", "wandb_config": {"api_key": "canary-wandb"}}
    assert secrets_of(a_request(hf_token="hf_canary", training_config=config)) == {
        "hf_token": "hf_canary",
        "wandb_api_key": "canary-wandb",
    }


def test_what_is_kept_has_none_of_them_and_all_the_rest() -> None:
    config = a_secretive_config()
    kept = redacted(config)
    assert "canary" not in kept.model_dump_json() + repr(kept) + str(kept.model_dump())
    assert {place.secret.get_secret_value() for place in places_of(kept)} == {REDACTED.get_secret_value()}
    assert type(kept).model_validate_json(kept.model_dump_json()) == kept
    hidden = {"wandb_config", "mlflow_config", "reward_config"}
    assert kept.model_dump(exclude=hidden) == config.model_dump(exclude=hidden)


def test_a_configuration_without_secrets_is_itself() -> None:
    config = a_grpo_config({"type": "format", "name": "form"})
    assert redacted(config) is config


@pytest.mark.parametrize("field", [field for kind in (a_grpo_config(JUDGE, NEAR, **EVERYWHERE),) for field, _ in kind])
def test_no_field_of_a_configuration_holds_a_secret_that_is_not_found(field: str) -> None:
    """Dumped with its secrets shown, what stays of each field has none once those that were found are taken out."""
    config = a_grpo_config(JUDGE, NEAR, **EVERYWHERE)
    text = repr(_revealed(dict(config)[field]))
    for secret in config_secrets(config).values():
        text = text.replace(secret, "")
    assert "canary" not in text


def _revealed(value: object) -> object:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case list():
            return [_revealed(item) for item in value]
        case _ if hasattr(value, "model_fields_set"):
            return {name: _revealed(item) for name, item in value}  # type: ignore[attr-defined]
        case _:
            return value


def test_secrets_can_be_sent_again_by_name_and_by_the_older_fields() -> None:
    body = {"hf_token": "a", "wandb_api_key": "b", "secrets": {"judge_api_key": "c"}}
    assert sent_again(ResumeRequest.model_validate(body)) == {"hf_token": "a", "wandb_api_key": "b", "judge_api_key": "c"}
    assert sent_again(ResumeRequest.model_validate({})) == {}


# --- the deployment's trackers ---------------------------------------------------------------------------------------

OURS = Trackers.model_validate(
    {"mlflow_config": {"tracking_uri": "https://ours.example", "token": "canary-ours"}, "tensorboard_config": {}}
)


def test_a_job_that_names_no_tracker_of_a_kind_has_the_deployments() -> None:
    config = with_trackers(TRAINING_CONFIG.validate_python({"base_model_id": "g/m"}), OURS)
    assert config.mlflow_config is not None
    assert config.mlflow_config.tracking_uri == "https://ours.example"
    assert config.tensorboard_config is not None
    assert config.wandb_config is None
    assert deployments_secrets(redacted(config), OURS) == {"mlflow_token": "canary-ours"}


def test_a_job_that_names_its_own_keeps_it() -> None:
    config = with_trackers(a_secretive_config(), OURS)
    assert config_secrets(config)["mlflow_token"] == "canary-mlflow"
    assert deployments_secrets(redacted(config), OURS) == {}


def test_a_deployment_gives_no_wandb_key_to_everybody() -> None:
    with pytest.raises(ValueError, match="offline"):
        Trackers.model_validate({"wandb_config": {"api_key": "k"}})
    assert Trackers.model_validate({"wandb_config": {"mode": "offline"}}).wandb_config
