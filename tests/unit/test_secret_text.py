"""Tokens and API keys in requests: what may become part of a header is all that is accepted."""

from typing import Any

import pytest
from pydantic import SecretStr, TypeAdapter, ValidationError
from starlette.testclient import TestClient

from schema.requests import CloneRequest, ReexportRequest, ResumeRequest, TrainRequest
from schema.types import SecretText
from tests.unit.api_harness import get_error, make_request_body_with_config

SECRET: TypeAdapter[SecretStr] = TypeAdapter(SecretText)
JUDGE = {"type": "score_model", "name": "judge", "base_url": "https://judge.example/v1", "model": "m"}
GRPO = {"trainer_type": "grpo", "hyperparameters": None, "eval_config": None}
BAD_SECRETS = [
    "canary\r\nX-Evil: 1",
    "canary\n",
    "canary\r",
    "\ncanary",
    "canary key",
    " canary",
    "canary\t",
    "canary\x00",
    "canary\x7f",
    "canärý",
    "canary\u2028",
    "canary\ud800",
    "c" * 4097,
    "",
]


@pytest.mark.parametrize("secret", ["hf_abc", "sk-proj_Az09", "a:b/c=d+e~!", "**********", "c" * 4096])
def test_printable_ascii_is_accepted(secret: str) -> None:
    assert SECRET.validate_python(secret).get_secret_value() == secret


@pytest.mark.parametrize("secret", BAD_SECRETS)
def test_anything_else_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(ValidationError) as refused:
        SECRET.validate_python(secret)
    assert "canary" not in " ".join(problem["msg"] for problem in refused.value.errors())


@pytest.mark.parametrize("model", [TrainRequest, ResumeRequest, CloneRequest, ReexportRequest])
def test_every_secret_of_a_request_has_the_same_rule(model: type[Any]) -> None:
    secrets: list[object] = []

    def collect(schema: object) -> None:
        if isinstance(schema, dict):
            if schema.get("format") == "password":
                secrets.append(schema)
            for value in schema.values():
                collect(value)
        elif isinstance(schema, list):
            for item in schema:
                collect(item)

    collect(model.model_json_schema())
    assert secrets
    for schema in secrets:
        assert isinstance(schema, dict)
        assert (schema["pattern"], schema["minLength"], schema["maxLength"]) == ("^[!-~]+$", 1, 4096)


@pytest.mark.parametrize(
    ("body", "config", "param"),
    [
        ({"hf_token": "canary\r\nX-Evil: 1"}, {}, "hf_token"),
        ({}, {"wandb_config": {"api_key": "canary\n"}}, "training_config.wandb_config.api_key"),
        (
            {},
            {"mlflow_config": {"tracking_uri": "https://m.example", "token": "canary key"}},
            "training_config.mlflow_config.token",
        ),
        (
            {},
            GRPO | {"reward_config": [JUDGE | {"api_key": "canary\u00e9"}]},
            "training_config.reward_config.0.api_key",
        ),
    ],
)
def test_request_with_bad_secret_is_refused_with_its_field(
    readonly_client: TestClient, readonly_dataset_id: str, body: dict[str, Any], config: dict[str, Any], param: str
) -> None:
    request = make_request_body_with_config(readonly_dataset_id, **config) | body
    for field in [name for name, value in request["training_config"].items() if value is None]:
        del request["training_config"][field]
    error = get_error(readonly_client.post("/train", json=request), 422)
    assert error["param"] == param
    assert "canary" not in str(error)


def test_secret_sent_again_is_checked(readonly_client: TestClient) -> None:
    error = get_error(readonly_client.post("/jobs/job-1/retry", json={"secrets": {"judge_api_key": "canary\r\n"}}), 422)
    assert error["param"] == "secrets.judge_api_key"
    assert "canary" not in str(error)


@pytest.mark.parametrize("token", ["canary canary", "canär", "canary\tcanary"])
def test_hub_token_in_header_is_checked(readonly_client: TestClient, token: str) -> None:
    headers = {"X-HF-Token": token.encode("latin-1")}
    error = get_error(readonly_client.delete("/jobs/job-1", params={"delete_hub": True}, headers=headers), 422)
    assert error["param"] == "X-HF-Token"
    assert "canary" not in str(error)
