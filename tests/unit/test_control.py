"""Cancel, pause, resume, retry."""

import pytest
from pydantic import ValidationError

from schema.job import Status
from schema.requests import ResumeRequest, RetryRequest
from schema.spec import JobSpec, attempt_name, spec_key
from service.core.errors import InvalidRequest, Unavailable
from service.core.jobs.checkpoints import list_checkpoints
from tests.factories import make_dataset, make_grpo_config
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness, make_batch


def test_secrets_are_destroyed_when_job_ends(harness: JobsHarness) -> None:
    job = harness.submit(hf_token="hf_x")
    harness.jobs.control.cancel(PRINCIPAL, job.job_id)
    assert list(harness.secrets.iter_job_ids()) == []


def test_pause_directive_keeps_progress_for_resume(harness: JobsHarness) -> None:
    job = harness.start_training()
    assert harness.jobs.control.pause(PRINCIPAL, job.job_id).status is Status.PAUSING
    assert harness.report(job, 1, make_batch()).directive == "pause"
    harness.finish(harness.write_result(job, "paused", saved_step=3))
    assert harness.find_job(job).status is Status.PAUSED
    harness.reconcile()
    assert len(harness.launcher.launched) == 1
    harness.jobs.control.resume(PRINCIPAL, job.job_id, ResumeRequest.model_validate({}))
    harness.reconcile()
    assert attempt_name(job.job_id, 2) in harness.launcher.launched


def test_pausing_unlaunched_job_does_not_relaunch_it(harness: JobsHarness) -> None:
    harness.launcher.refusal = Unavailable("no room")
    job = harness.submit()
    harness.reconcile()
    harness.jobs.control.pause(PRINCIPAL, job.job_id)
    harness.launcher.refusal = None
    harness.clock.advance(6)
    harness.reconcile()
    assert harness.find_job(job).status is Status.PAUSED
    assert harness.launcher.launched == {}


def test_resume_allows_extension_and_rejects_immutable_fields(harness: JobsHarness) -> None:
    job = harness.submit()
    harness.jobs.control.pause(PRINCIPAL, job.job_id)
    for changes, param, message in (
        ({"epochs": 1}, "epochs", "can only grow"),
        ({"max_steps": 50}, "max_steps", "counted in epochs"),
        ({"hf_token": "hf_x"}, "hf_token", "was created without"),
    ):
        with pytest.raises(InvalidRequest, match=message) as excinfo:
            harness.jobs.control.resume(PRINCIPAL, job.job_id, ResumeRequest.model_validate(changes))
        assert excinfo.value.param == param
    with pytest.raises(ValidationError, match="learning_rate cannot change"):
        ResumeRequest.model_validate({"learning_rate": 0.1})
    resumed = harness.jobs.control.resume(PRINCIPAL, job.job_id, ResumeRequest.model_validate({"epochs": 9}))
    assert resumed.training_config.hyperparameters.epochs == 9
    harness.reconcile()
    assert JobSpec.load(harness.objects.read(spec_key(job.job_id))).training_config.hyperparameters.epochs == 9


def test_extension_keeps_the_rules_between_length_and_other_fields(harness: JobsHarness) -> None:
    job = harness.submit()
    hyperparameters = {"num_iterations": 2, "max_steps": 4, "max_completion_length": 64}
    config = make_grpo_config(hyperparameters=hyperparameters)
    harness.store.replace_job(job.model_copy(update={"training_config": config}))
    harness.jobs.control.pause(PRINCIPAL, job.job_id)
    with pytest.raises(InvalidRequest, match="not a multiple of num_iterations") as excinfo:
        harness.jobs.control.resume(PRINCIPAL, job.job_id, ResumeRequest.model_validate({"max_steps": 5}))
    assert excinfo.value.param == "max_steps"
    resumed = harness.jobs.control.resume(PRINCIPAL, job.job_id, ResumeRequest.model_validate({"max_steps": 6}))
    assert resumed.training_config.hyperparameters.max_steps == 6


def test_retry_requires_secrets_again(harness: JobsHarness) -> None:
    job = harness.submit(hf_token="hf_x")
    harness.jobs.control.cancel(PRINCIPAL, job.job_id)
    with pytest.raises(InvalidRequest, match="hf_token is needed again") as excinfo:
        harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({}))
    assert excinfo.value.param == "hf_token"
    assert harness.find_job(job).status is Status.CANCELLED
    retried = harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({"hf_token": "hf_y"}))
    assert retried.status is Status.QUEUED
    harness.reconcile()
    assert harness.claim(job, 1, "p").secrets == {"hf_token": "hf_y"}


def test_retry_resumes_from_checkpoint_or_restarts(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.write_checkpoint(job, step=8)
    harness.finish(harness.write_result(job, "failed", saved_step=8))
    harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({}))
    harness.reconcile()
    assert JobSpec.load(harness.objects.read(spec_key(job.job_id))).resume_from_attempt == 1
    assert [stored.checkpoint.step for stored in list_checkpoints(harness.objects, harness.find_job(job))] == [8]
    harness.claim(job, 2, "p")
    harness.finish(harness.write_result(job, "failed", attempt=2))
    harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({"from_start": True}))
    harness.reconcile()
    assert JobSpec.load(harness.objects.read(spec_key(job.job_id))).resume_from_attempt == 3
    assert list_checkpoints(harness.objects, harness.find_job(job)) == []


def test_retry_requires_grader_and_tracker_secrets_by_name(harness: JobsHarness) -> None:
    harness.store.create_dataset(make_dataset("prompts", dataset_type="prompt"))
    judge = {"type": "score_model", "name": "judge", "base_url": "https://j.example", "model": "m", "api_key": "canary-1"}
    config = {"base_model_id": "g/m", "trainer_type": "grpo", "reward_config": [judge]}
    job = harness.submit(processed_dataset_id="prompts", training_config=config)
    assert "canary" not in harness.find_job(job).model_dump_json()
    harness.jobs.control.cancel(PRINCIPAL, job.job_id)
    with pytest.raises(InvalidRequest, match="judge_api_key is needed again") as excinfo:
        harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({}))
    assert excinfo.value.param == "secrets.judge_api_key"
    harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({"secrets": {"judge_api_key": "canary-2"}}))
    harness.reconcile()
    assert harness.claim(job, 1, "p").secrets == {"judge_api_key": "canary-2"}
