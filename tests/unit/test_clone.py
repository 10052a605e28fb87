"""Cloning: an RFC 7386 patch on the request of a job, validated like a new request."""

from typing import Any

import pytest
from pydantic import JsonValue, ValidationError

from schema.job import Job, Status
from schema.requests import CloneRequest, TrainRequest
from schema.training import TRAINING_CONFIG, SftConfig
from service.core.errors import InvalidRequest, NotFound, Unsupported
from service.core.jobs.clone import clone_request, merge_patch, original_request
from service.core.jobs.secrets import redact
from tests.factories import FAKE_PLACEMENT, make_config, make_grpo_config, make_job
from tests.unit.jobs_harness import OTHER_PRINCIPAL, PRINCIPAL, JobsHarness, make_reexport_request

NO_SECRETS: frozenset[str] = frozenset()


def clone(source: Job, **patch: Any) -> TrainRequest:
    return clone_request(source, CloneRequest.model_validate(patch), deployment_trackers=NO_SECRETS, deployment_secrets=NO_SECRETS)


# https://www.rfc-editor.org/rfc/rfc7386#appendix-A
RFC_EXAMPLES: list[tuple[JsonValue, JsonValue, JsonValue]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "merged"), RFC_EXAMPLES)
def test_merge_patch_follows_rfc_7386(target: JsonValue, patch: JsonValue, merged: JsonValue) -> None:
    assert merge_patch(target, patch) == merged


def test_clone_without_changes_repeats_request() -> None:
    hyperparameters = {"learning_rate": 3e-4, "epochs": 7, "target_modules": ["q_proj"]}
    for config in (
        make_config(hyperparameters=hyperparameters, export_config={"format": ["adapter", "merged"]}),
        make_config(),
        make_grpo_config(),
    ):
        source = make_job(training_config=config, job_name="mine", project_id="p", placements=(FAKE_PLACEMENT,))
        request = clone(source)
        assert request.training_config == config
        assert (request.job_name, request.project_id, request.hardware) == ("mine", "p", ["fake/fake"])


def test_unset_fields_follow_new_defaults() -> None:
    assert original_request(make_config()) == {"base_model_id": "google/gemma-3-270m", "hyperparameters": {}}
    full = clone(make_job(), training_config={"method": "Full"}).training_config
    assert full.hyperparameters.learning_rate == SftConfig.learning_rates["Full"]
    pairs = clone(make_job(), training_config={"trainer_type": "dpo"}).training_config
    assert (pairs.hyperparameters.batch_size, pairs.hyperparameters.learning_rate) == (1, 1e-5)


def test_explicit_fields_are_kept_and_revalidated() -> None:
    source = make_job(training_config=make_config(hyperparameters={"learning_rate": 3e-4, "lora_rank": 8}))
    assert clone(source, training_config={"hyperparameters": {"epochs": 9}}).training_config.hyperparameters.learning_rate == 3e-4
    with pytest.raises(ValidationError, match="lora_rank is only used with"):
        clone(source, training_config={"method": "Full"})
    config = clone(source, training_config={"method": "Full", "hyperparameters": {"lora_rank": None}}).training_config
    assert config.hyperparameters.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"hyperparameters": {"epochs": 0}}, "epochs"),
        ({"hyperparameters": {"nonsense": 1}}, "nonsense"),
        ({"base_model_id": None}, "base_model_id"),
        ({"trainer_type": "grpo"}, "reward_config"),
        ({"hyperparameters": 3}, "hyperparameters"),
    ],
)
def test_invalid_merged_request_names_field(patch: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as excinfo:
        clone(make_job(), training_config=patch)
    assert field in excinfo.value.errors()[0]["loc"]


# --- secrets ---------------------------------------------------------------------------------------------------------

JUDGE = {"type": "score_model", "name": "judge", "base_url": "https://judge.example/v1", "model": "m", "api_key": "k"}
REDACTED_CONFIG = redact(make_grpo_config(JUDGE, wandb_config={"api_key": "w"}))
JOB_WITH_SECRETS = make_job(training_config=REDACTED_CONFIG, secret_names=("hf_token", "judge_api_key", "wandb_api_key"))
RESENT_SECRETS = {"wandb_api_key": "w2", "judge_api_key": "k2", "hf_token": "h2"}


@pytest.mark.parametrize(
    ("missing", "param"), [("hf_token", "hf_token"), ("judge_api_key", "secrets.judge_api_key"), ("wandb_api_key", "secrets.wandb_api_key")]
)
def test_clone_requires_secret_again(missing: str, param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"created with {missing}") as excinfo:
        clone(JOB_WITH_SECRETS, secrets={name: value for name, value in RESENT_SECRETS.items() if name != missing})
    assert excinfo.value.param == param


def test_resent_secrets_are_placed_in_config() -> None:
    request = clone(JOB_WITH_SECRETS, secrets=RESENT_SECRETS)
    assert request.hf_token is not None
    assert request.hf_token.get_secret_value() == "h2"
    config: Any = request.training_config
    assert config.reward_config[0].api_key.get_secret_value() == "k2"
    assert config.wandb_config.api_key.get_secret_value() == "w2"


@pytest.mark.parametrize(
    "patch",
    [
        {"hf_token": None, "secrets": {"judge_api_key": "k"}, "training_config": {"wandb_config": None}},
        {"hf_token": None, "secrets": {"judge_api_key": None}, "training_config": {"wandb_config": {"mode": "offline"}}},
        {
            "secrets": {"hf_token": None},
            "training_config": {"wandb_config": {"api_key": "new"}, "reward_config": [{"type": "format", "name": "form"}]},
        },
    ],
)
def test_removed_secret_is_not_required(patch: dict[str, Any]) -> None:
    assert clone(JOB_WITH_SECRETS, **patch).hf_token is None


def test_unused_secret_is_rejected() -> None:
    with pytest.raises(InvalidRequest, match="uses mlflow_token") as excinfo:
        clone(make_job(), secrets={"mlflow_token": "x"})
    assert excinfo.value.param == "secrets.mlflow_token"


def test_redaction_placeholder_is_never_sent() -> None:
    assert "*" not in str(original_request(TRAINING_CONFIG.validate_python(REDACTED_CONFIG.model_dump())))


def test_clone_is_a_new_job_with_source_reference(harness: JobsHarness) -> None:
    job = harness.submit(job_name="first")
    patch = CloneRequest.model_validate({"training_config": {"hyperparameters": {"epochs": 9}}})
    cloned = harness.jobs.submission.clone(PRINCIPAL, job.job_id, patch, "key-1")
    assert harness.jobs.submission.clone(PRINCIPAL, job.job_id, patch, "key-1").job_id == cloned.job_id
    assert (cloned.cloned_from, cloned.job_name, cloned.status) == (job.job_id, "first", Status.QUEUED)
    assert cloned.training_config.hyperparameters.epochs == 9
    assert harness.find_job(job) == job
    with pytest.raises(NotFound):
        harness.jobs.submission.clone(OTHER_PRINCIPAL, job.job_id, patch)


def test_clone_is_validated_like_a_request(harness: JobsHarness) -> None:
    job = harness.submit()
    for patch, error in (
        ({"training_config": {"method": "QLoRA"}}, Unsupported),
        ({"training_config": {"trainer_type": "dpo"}}, InvalidRequest),
        ({"processed_dataset_id": "dataset_none"}, NotFound),
    ):
        with pytest.raises(error):
            harness.jobs.submission.clone(PRINCIPAL, job.job_id, CloneRequest.model_validate(patch))
    harness.write_checkpoint(job, step=1)
    export = harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request())
    with pytest.raises(InvalidRequest, match="trained nothing"):
        harness.jobs.submission.clone(PRINCIPAL, export.job_id, CloneRequest.model_validate({}))
