"""Deleting jobs, stale secrets and orphaned files."""

from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import pytest

from schema.job import HubPush, Status
from schema.requests import RetryRequest
from schema.spec import attempt_name, spec_key
from service.core.errors import Conflict, InvalidRequest, NotFound
from service.core.jobs.deletion import Deletion
from service.core.jobs.ownership import JobMarks
from service.core.launchers import LauncherPool
from service.core.ports import Buckets
from service.core.principals import UPKEEP_PRINCIPAL
from storage import StoreUnavailable
from storage.file import LocalStore
from tests.factories import START
from tests.unit.jobs_harness import DEPLOYMENT_ID, PRINCIPAL, JobsHarness, make_artifact


def test_sweep_destroys_only_leftover_secrets(harness: JobsHarness) -> None:
    ended, open_job = harness.submit(hf_token="hf_x"), harness.submit(hf_token="hf_x")
    harness.jobs.control.cancel(PRINCIPAL, ended.job_id)
    harness.secrets.put(ended.job_id, {"hf_token": "hf_x"})  # as after a failed destroy
    harness.secrets.put("orphan", {"hf_token": "hf_x"})
    assert harness.jobs.deletion.delete_stale_secrets(UPKEEP_PRINCIPAL) == 1
    assert list(harness.secrets.iter_job_ids()) == sorted(["orphan", open_job.job_id])
    assert harness.jobs.deletion.delete_stale_secrets(UPKEEP_PRINCIPAL, orphans=True) == 1
    assert list(harness.secrets.iter_job_ids()) == [open_job.job_id]


def test_hub_repository_is_deleted_only_on_request_without_foreign_commits(harness: JobsHarness) -> None:
    job = harness.start_pushing_to("ada/tuned")
    push = HubPush(repo_id="ada/tuned", revision="a", url="https://hub/ada/tuned/tree/a")
    harness.finish(harness.write_result(job, artifacts=[make_artifact(job) | {"hub": push}]))
    harness.hub.repositories["ada/tuned"] = ["initial", "a", "of another job"]
    with pytest.raises(InvalidRequest, match="needs a token") as excinfo:
        harness.jobs.deletion.delete(PRINCIPAL, job.job_id, delete_hub=True)
    assert excinfo.value.param == "X-HF-Token"
    with pytest.raises(InvalidRequest, match="1 commits that are not of this job"):
        harness.jobs.deletion.delete(PRINCIPAL, job.job_id, delete_hub=True, hub_token="hf_x")
    assert harness.find_job(job).deletion_started_at is None
    harness.hub.repositories["ada/tuned"].pop()
    deleted = harness.jobs.deletion.delete(PRINCIPAL, job.job_id, delete_hub=True, hub_token="hf_x")
    assert deleted is not None
    assert deleted.resources[0] == "hf://ada/tuned"
    assert harness.hub.repositories == {}


def test_deletion_keeps_hub_repository_by_default(harness: JobsHarness) -> None:
    job = harness.start_pushing_to("ada/tuned")
    push = HubPush(repo_id="ada/tuned", revision="a", url="https://hub/ada/tuned/tree/a")
    harness.finish(harness.write_result(job, artifacts=[make_artifact(job) | {"hub": push}]))
    harness.hub.repositories["ada/tuned"] = ["initial", "a"]
    assert harness.jobs.deletion.delete(PRINCIPAL, job.job_id)
    assert "ada/tuned" in harness.hub.repositories


def test_orphaned_files_are_found_and_removed(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.write_checkpoint(job, step=1)
    for key in (
        "trained_adapters/gone/attempt-1/a",
        "trained_adapters/gone/attempt-1/b",
        "checkpoints/projects/p/jobs/gone/attempt-1/step-00000001/x",
        "configs/gone.json",
        "results/gone/1.json",
        "runs/gone/attempt-1/run.json",
        "trackers/gone/events",
        "onnx_models/gone/model.onnx",
        "pretrained_weights/huggingface/a/b/config.json",
        "datasets/dataset_1/train.jsonl",
    ):
        harness.objects.write(key, b"xy")
    JobMarks(harness.objects, DEPLOYMENT_ID).write("gone", START - timedelta(hours=25))
    keys = {stored.key for stored in harness.objects.iter_objects("")}
    listing = harness.jobs.deletion.list_orphans(UPKEEP_PRINCIPAL)
    assert listing.complete
    assert sorted((orphan.prefix, orphan.objects, orphan.size_bytes) for orphan in listing.orphans) == [
        ("checkpoints/projects/p/jobs/gone/", 1, 2),
        ("configs/gone.json", 1, 2),
        ("onnx_models/gone/", 1, 2),
        ("results/gone/", 1, 2),
        ("runs/gone/", 1, 2),
        ("trackers/gone/", 1, 2),
        ("trained_adapters/gone/", 2, 4),
    ]
    harness.jobs.deletion.delete_orphans(UPKEEP_PRINCIPAL)
    assert keys - {stored.key for stored in harness.objects.iter_objects("")} == {key for key in keys if "gone" in key}
    assert harness.jobs.deletion.list_orphans(UPKEEP_PRINCIPAL).orphans == []


def test_cleanup_deletes_nothing_of_another_deployment_on_the_same_store(harness: JobsHarness, tmp_path: Path) -> None:
    other = JobsHarness(tmp_path, deployment_id="other")
    job = other.start_training()
    other.finish(other.write_result(job, artifacts=[make_artifact(job)]))
    other.objects.write(f"trained_adapters/{job.job_id}/attempt-1/adapter_model.safetensors", b"x")
    harness.objects.write("merged_models/nobodys/attempt-1/a", b"x")  # of no deployment, or of one from before there were marks
    keys = {stored.key for stored in harness.objects.iter_objects("")}
    harness.clock.advance(timedelta(days=400).total_seconds())
    assert harness.jobs.deletion.delete_orphans(UPKEEP_PRINCIPAL).orphans == []
    assert {stored.key for stored in harness.objects.iter_objects("")} == keys


def test_files_of_a_deleted_job_are_orphans_a_day_after_its_last_launch(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.finish(harness.write_result(job))
    harness.jobs.deletion.delete(PRINCIPAL, job.job_id)
    harness.objects.write(f"trained_adapters/{job.job_id}/attempt-1/late", b"x")
    assert harness.jobs.deletion.delete_orphans(UPKEEP_PRINCIPAL).orphans == []
    assert len(harness.jobs.deletion.list_orphans(UPKEEP_PRINCIPAL, min_age=timedelta(seconds=-1)).orphans) == 1
    harness.clock.advance(timedelta(hours=25).total_seconds())
    assert [orphan.job_id for orphan in harness.jobs.deletion.delete_orphans(UPKEEP_PRINCIPAL).orphans] == [job.job_id]
    assert list(harness.objects.iter_objects("")) == []


def test_a_job_that_is_being_deleted_cannot_be_retried(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.submit()

    def raise_unavailable(_key: str) -> NoReturn:
        raise StoreUnavailable("away")

    harness.objects.write(spec_key(job.job_id), b"{}")
    monkeypatch.setattr(harness.objects, "delete", raise_unavailable)
    deleted = harness.jobs.deletion.delete(PRINCIPAL, job.job_id)
    assert deleted is not None
    assert deleted.failures
    with pytest.raises(Conflict, match="being deleted"):
        harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({}))


def test_delete_cancels_job_first_and_removes_everything(harness: JobsHarness, tmp_path: Path) -> None:
    job = harness.start_training()
    other_key = "trained_adapters/another/adapter.bin"
    for key in (
        f"trained_adapters/{job.job_id}/a",
        f"gguf_models/{job.job_id}/m.gguf",
        f"onnx_models/{job.job_id}/attempt-1/model.onnx",
        f"trackers/{job.job_id}/tensorboard/events",
        f"runs/{job.job_id}/attempt-1/run.json",
        f"checkpoints/test-jobs/job_{job.job_id}/1",
        other_key,
    ):
        harness.objects.write(key, b"x")
    assert harness.jobs.deletion.delete(PRINCIPAL, job.job_id) is None
    assert harness.find_job(job).status is Status.CANCELLING
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.reconcile()
    deleted = harness.jobs.deletion.delete(PRINCIPAL, job.job_id)
    assert deleted is not None
    assert f"{harness.objects.url}/trained_adapters/{job.job_id}/" in deleted.resources
    mark = f"deployments/{DEPLOYMENT_ID}/jobs/{job.job_id}.json"  # for what the attempt may still write
    assert sorted(stored.key for stored in harness.objects.iter_objects("")) == [mark, other_key]
    with pytest.raises(NotFound):
        harness.find_job(job)


def test_failed_deletion_is_reported_and_keeps_record(harness: JobsHarness) -> None:
    job = harness.submit()

    class UndeletableStore(LocalStore):
        def delete(self, key: str) -> bool:
            raise StoreUnavailable("read-only")

    harness.objects.write(f"merged_models/{job.job_id}/m", b"x")
    buckets = Buckets(configs=harness.objects, datasets=harness.objects, models=UndeletableStore(harness.objects.url))
    deletion = Deletion(
        harness.jobs.repository,
        control=harness.jobs.control,
        launchers=LauncherPool(harness.launchers),
        buckets=buckets,
        marks=JobMarks(harness.objects, DEPLOYMENT_ID),
        hub=harness.hub,
    )
    deleted = deletion.delete(PRINCIPAL, job.job_id)
    assert deleted is not None
    assert deleted.failures
    assert harness.find_job(job).status is Status.CANCELLED
