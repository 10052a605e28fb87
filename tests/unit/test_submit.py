"""Submitting: what is rejected, what is stored, and where the secrets go."""

from pathlib import Path

import pytest

from schema.job import Job, Status
from schema.requests import CloneRequest, RetryRequest
from schema.spec import attempt_name
from service.core.errors import InvalidRequest, NotFound, Unavailable, Unsupported
from service.core.jobs.trackers import DeploymentTrackers
from service.core.ports import HubAccount, IdempotencyKey
from service.core.principals import attempt_principal
from tests.factories import make_dataset, make_train_request
from tests.unit.jobs_harness import OTHER_PRINCIPAL, PRINCIPAL, JobsHarness, make_reexport_request


def test_submitted_job_is_stored_and_wakes_launcher(harness: JobsHarness) -> None:
    job = harness.submit(job_name="my job")
    assert harness.find_job(job) == job
    assert job.status is Status.QUEUED
    assert job.job_id == "training_1_gemma-3-270m_0001"
    assert harness.wake_count == 1


def test_equal_requests_create_two_jobs(harness: JobsHarness) -> None:
    assert harness.submit().job_id != harness.submit().job_id


def test_idempotency_key_ignores_changed_token(harness: JobsHarness) -> None:
    first = harness.jobs.submission.submit(PRINCIPAL, make_train_request(hf_token="hf_old"), "key")
    second = harness.jobs.submission.submit(PRINCIPAL, make_train_request(hf_token="hf_new"), "key")
    assert first == second
    assert list(harness.secrets.iter_job_ids()) == [first.job_id]


def test_secrets_are_in_the_secret_store_and_nowhere_else(harness: JobsHarness, tmp_path: Path) -> None:
    config = {"base_model_id": "google/gemma-3-270m", "wandb_config": {"api_key": "wb_canary"}}
    job = harness.jobs.submission.submit(PRINCIPAL, make_train_request(hf_token="hf_canary", training_config=config))
    harness.reconcile()
    assert harness.secrets.read(job.job_id) == {"hf_token": "hf_canary", "wandb_api_key": "wb_canary"}
    stored_job = harness.find_job(job)
    stored_text = stored_job.model_dump_json() + repr(stored_job) + repr(harness.launcher.launched) + str(stored_job.training_config)
    stored_text += "".join(path.read_text() for path in (tmp_path / "objects").rglob("*") if path.is_file())
    stored_text += str(harness.launcher.launched[attempt_name(job.job_id, 1)].variables)
    assert "canary" not in stored_text


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"processed_dataset_id": "dataset_none"}, NotFound, "processed_dataset_id"),
        ({"training_config": {"base_model_id": "g/m", "method": "QLoRA"}}, Unsupported, "training_config.method"),
        ({"training_config": {"base_model_id": "g/m", "provider": "unsloth"}}, Unsupported, "training_config.provider"),
        ({"training_config": {"base_model_id": "g/m", "modality": "vision"}}, InvalidRequest, "training_config.modality"),
        (
            {"training_config": {"base_model_id": "g/m", "hyperparameters": {"use_fa2": True}}},
            Unsupported,
            "training_config.hyperparameters.use_fa2",
        ),
    ],
)
def test_unsupported_request_is_rejected_before_storing(
    harness: JobsHarness, changes: dict[str, object], error: type[InvalidRequest], param: str
) -> None:
    with pytest.raises(error) as excinfo:
        harness.submit(**changes, hf_token="hf_x")
    assert excinfo.value.param == param
    assert harness.store.list_queued_jobs(None, 10) == []
    assert list(harness.secrets.iter_job_ids()) == []


def test_evaluation_without_held_out_rows_is_rejected(harness: JobsHarness) -> None:
    train_only = {"train": make_dataset().splits["train"]}
    harness.store.create_dataset(make_dataset("dataset_2", splits=train_only))
    with pytest.raises(InvalidRequest, match="held-out"):
        harness.submit(processed_dataset_id="dataset_2")


def test_dataset_of_other_tenant_is_not_found(harness: JobsHarness) -> None:
    with pytest.raises(NotFound):
        harness.jobs.submission.submit(OTHER_PRINCIPAL, make_train_request())


def test_secrets_are_kept_when_create_outcome_is_unknown(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    create = harness.store.create_job

    def create_and_lose_response(job: Job, key: IdempotencyKey | None = None) -> Job:
        create(job, key)
        raise Unavailable("the response was lost")

    monkeypatch.setattr(harness.store, "create_job", create_and_lose_response)
    with pytest.raises(Unavailable):
        harness.submit(hf_token="hf_x")
    (job_id,) = harness.secrets.iter_job_ids()
    harness.reconcile()
    assert harness.jobs.attempts.claim(attempt_principal(job_id, 1), job_id, 1, "p").secrets == {"hf_token": "hf_x"}


def test_deployment_tracker_is_shown_and_needs_no_user_secret(tmp_path: Path) -> None:
    trackers = DeploymentTrackers.model_validate({"mlflow_config": {"tracking_uri": "https://ours.example", "token": "canary"}})
    harness = JobsHarness(tmp_path, trackers)
    job = harness.submit()
    assert job.training_config.mlflow_config is not None
    assert job.training_config.mlflow_config.tracking_uri == "https://ours.example"
    assert "canary" not in harness.find_job(job).model_dump_json()
    harness.jobs.control.cancel(PRINCIPAL, job.job_id)
    harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({}))
    cloned = harness.jobs.submission.clone(PRINCIPAL, job.job_id, CloneRequest.model_validate({}))
    harness.reconcile()
    for submitted in (job, cloned):
        assert harness.claim(submitted, 1, "p").secrets == {"mlflow_token": "canary"}


def test_embedding_grader_needs_stored_model_or_endpoint(harness: JobsHarness) -> None:
    harness.store.create_dataset(make_dataset("prompts", dataset_type="prompt", columns=("answer",)))
    grader = {"type": "text_similarity", "name": "near", "metric": "cosine", "embedding_model": "lab/small"}

    def submit(**changes: object) -> Job:
        config = {"base_model_id": "g/m", "trainer_type": "grpo", "reward_config": [grader | changes]}
        return harness.submit(processed_dataset_id="prompts", training_config=config)

    with pytest.raises(InvalidRequest, match="not in this deployment's model store") as excinfo:
        submit()
    assert excinfo.value.param == "training_config.reward_config.0.embedding_model"
    submit(base_url="https://e.example")
    harness.objects.write("pretrained_weights/huggingface/lab/small/config.json", b"{}")
    submit()


PUSH_CONFIG = {"base_model_id": "g/m", "export_config": {"destination": "hfhub", "hf_repo_id": "ada/tuned"}}


def test_hub_push_requires_token(harness: JobsHarness) -> None:
    trackio_config = {"base_model_id": "g/m", "trackio_config": {"space_id": "ada/curves"}}
    for config in (PUSH_CONFIG, trackio_config):
        with pytest.raises(InvalidRequest, match="needs hf_token, to write to ada/") as excinfo:
            harness.submit(training_config=config)
        assert excinfo.value.param == "hf_token"
    assert harness.submit(training_config=trackio_config, hf_token="hf_x").secret_names == ("hf_token",)
    job = harness.submit()
    harness.write_checkpoint(job, step=1)
    with pytest.raises(InvalidRequest, match="needs hf_token"):
        harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request(export_config=PUSH_CONFIG["export_config"]))


def test_missing_hub_access_is_rejected_before_storing(harness: JobsHarness) -> None:
    harness.hub.write_result, harness.hub.account_result = "absent", HubAccount("grace", "write", {})
    with pytest.raises(InvalidRequest, match="cannot write to 'ada'"):
        harness.submit(training_config=PUSH_CONFIG, hf_token="hf_x")
    harness.hub.read_result = "gated"
    with pytest.raises(InvalidRequest, match="gated"):
        harness.submit()
    assert harness.store.list_queued_jobs(None, 10) == []
    assert list(harness.secrets.iter_job_ids()) == []
    harness.hub.read_result, harness.hub.write_result = "unknown", "unknown"
    harness.hub.account_result = None
    assert harness.submit(training_config=PUSH_CONFIG, hf_token="hf_x").status is Status.QUEUED


def test_stored_base_model_needs_no_hub_call(harness: JobsHarness) -> None:
    harness.objects.write("pretrained_weights/huggingface/google/gemma-3-270m/config.json", b"{}")
    harness.hub.read_result = "absent"
    assert harness.submit().status is Status.QUEUED
    assert harness.hub.requests == []
