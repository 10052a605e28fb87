"""Checkpoints that nobody needs are deleted; what is kept is whole at every moment, and what was deleted is explained."""

from datetime import timedelta
from typing import Any

import pytest

from schema.checkpoint import MANIFEST, Checkpoint, checkpoint_key, checkpoints_prefix
from schema.job import Job, Status
from schema.requests import RetryRequest
from service.core.errors import Conflict, NotFound
from service.core.jobs.checkpoints import list_checkpoints
from service.core.jobs.retention import CheckpointRetention
from service.core.principals import UPKEEP_PRINCIPAL
from storage import ObjectStore, StoreUnavailable
from tests.factories import START
from tests.unit.jobs_harness import OTHER_PRINCIPAL, PRINCIPAL, JobsHarness, make_artifact, make_reexport_request

FILES = {"model.safetensors": b"weights", "optimizer.pt": b"twice the weights", "tunesmith.json": b"{}"}
WEEK = timedelta(days=7)


def write_checkpoint(harness: JobsHarness, job: Job, step: int, attempt: int = 1) -> str:
    """Write a checkpoint with the files of a Full training; returns the key of its folder."""
    key = checkpoint_key(checkpoints_prefix(job.job_id, job.project_id), attempt, step)
    files = [{"path": path, "size_bytes": len(content), "sha256": "0" * 64} for path, content in FILES.items()]
    body: dict[str, Any] = {"job_id": job.job_id, "attempt": attempt, "step": step, "total_steps": 30, "epoch": 0.5, "files": files}
    checkpoint = Checkpoint.model_validate(body | {"training_config": job.training_config, "created_at": START})
    for path, content in FILES.items():
        harness.objects.write(key + path, content)
    harness.objects.write(key + MANIFEST, checkpoint.with_checksum())
    return key


def complete_job(harness: JobsHarness, published_step: int = 20) -> Job:
    """A completed job with three checkpoints."""
    job = harness.start_training()
    for step in (10, 20, 30):
        write_checkpoint(harness, job, step)
    harness.finish(harness.write_result(job, published_step=published_step, artifacts=[make_artifact(job)]))
    return harness.find_job(job)


def fail_job(harness: JobsHarness) -> Job:
    job = harness.start_training()
    for step in (10, 20):
        write_checkpoint(harness, job, step)
    harness.finish(harness.write_result(job, "failed", failure={"code": "internal", "message": "no"}))
    return harness.find_job(job)


def list_files(harness: JobsHarness, job: Job) -> list[str]:
    prefix = checkpoints_prefix(job.job_id, job.project_id)
    return [stored.key.removeprefix(prefix) for stored in harness.objects.iter_objects(prefix)]


def make_retention(harness: JobsHarness, retention: timedelta | None = WEEK, store: ObjectStore | None = None) -> CheckpointRetention:
    return CheckpointRetention(harness.jobs.repository, store or harness.objects, retention)


def test_published_checkpoint_of_a_completed_job_is_kept_without_its_optimizer(harness: JobsHarness) -> None:
    job = complete_job(harness)
    pruned = harness.jobs.retention.prune(PRINCIPAL, job.job_id)
    folder = "attempt-1/step-00000020/"
    assert list_files(harness, job) == [folder + name for name in ("manifest.json", "model.safetensors", "tunesmith.json")]
    [kept] = list_checkpoints(harness.objects, harness.find_job(job))
    assert [file.path for file in kept.checkpoint.files] == ["model.safetensors", "tunesmith.json"]
    assert (pruned.deleted_steps, pruned.kept_step) == ((10, 30), 20)
    shown = harness.find_job(job).checkpoint
    assert shown is not None
    assert shown.step == 20
    assert pruned.freed_bytes > 3 * len(FILES["optimizer.pt"])
    assert harness.jobs.retention.prune(PRINCIPAL, job.job_id).freed_bytes == 0, "nothing is left to free"
    assert harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request()).export_of


def test_newest_checkpoint_of_a_failed_job_is_kept_whole(harness: JobsHarness) -> None:
    job = fail_job(harness)
    assert harness.jobs.retention.prune(PRINCIPAL, job.job_id).kept_step == 20
    [kept] = list_checkpoints(harness.objects, harness.find_job(job))
    assert [file.path for file in kept.checkpoint.files] == list(FILES)
    assert harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({})).status is Status.QUEUED


def test_checkpoint_of_a_newer_version_is_kept_unless_all_are_to_go(harness: JobsHarness) -> None:
    job = complete_job(harness)
    newer = checkpoint_key(checkpoints_prefix(job.job_id, job.project_id), 1, 30)
    harness.objects.write(newer + MANIFEST, b'{"schema_version": 99}')
    assert harness.jobs.retention.prune(PRINCIPAL, job.job_id).deleted_steps == (10,)
    assert harness.objects.stat(newer + "model.safetensors")
    assert harness.jobs.retention.prune(PRINCIPAL, job.job_id, "none").deleted_steps == (20, 30)
    assert list_files(harness, job) == []


def test_retry_without_any_checkpoint_says_what_happened(harness: JobsHarness) -> None:
    job = fail_job(harness)
    harness.jobs.retention.prune(PRINCIPAL, job.job_id, "none")
    assert list_files(harness, job) == []
    with pytest.raises(Conflict, match="were deleted") as refused:
        harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({}))
    assert "from_start" in refused.value.hint
    request = RetryRequest.model_validate({"from_start": True})
    assert harness.jobs.control.retry(PRINCIPAL, job.job_id, request).status is Status.QUEUED


def test_export_of_a_deleted_checkpoint_says_what_would_work(harness: JobsHarness) -> None:
    job = complete_job(harness)
    harness.jobs.retention.prune(PRINCIPAL, job.job_id)
    with pytest.raises(NotFound, match="it has: 20; its others were deleted on 2026-01-01"):
        harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request(step=30))
    harness.jobs.retention.prune(PRINCIPAL, job.job_id, "none")
    with pytest.raises(NotFound, match="its checkpoints were deleted") as refused:
        harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request())
    assert f"base_model_id job:{job.job_id}" in refused.value.hint


def test_unfinished_job_keeps_its_checkpoints(harness: JobsHarness) -> None:
    job = harness.start_training()
    write_checkpoint(harness, job, 10)
    with pytest.raises(Conflict, match="once it has ended"):
        harness.jobs.retention.prune(PRINCIPAL, job.job_id)
    with pytest.raises(NotFound):
        harness.jobs.retention.prune(OTHER_PRINCIPAL, job.job_id)
    assert len(list_files(harness, job)) == 4


def test_checkpoints_that_an_unfinished_export_reads_are_kept(harness: JobsHarness) -> None:
    job = complete_job(harness)
    export = harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request())
    with pytest.raises(Conflict, match=f"{export.job_id} is not finished"):
        harness.jobs.retention.prune(PRINCIPAL, job.job_id)
    harness.clock.advance(WEEK.total_seconds() + 1)
    assert make_retention(harness).prune_expired(UPKEEP_PRINCIPAL).jobs == 0
    harness.jobs.control.cancel(PRINCIPAL, export.job_id)
    assert make_retention(harness).prune_expired(UPKEEP_PRINCIPAL).jobs == 1


def test_only_jobs_that_were_completed_long_ago_expire(harness: JobsHarness) -> None:
    failed, completed = fail_job(harness), complete_job(harness)
    harness.clock.advance(WEEK.total_seconds() - 1)
    assert make_retention(harness).prune_expired(UPKEEP_PRINCIPAL).freed_bytes == 0
    harness.clock.advance(2)
    assert make_retention(harness, None).prune_expired(UPKEEP_PRINCIPAL).freed_bytes == 0
    assert make_retention(harness).prune_expired(UPKEEP_PRINCIPAL).jobs == 1
    assert len(list_files(harness, failed)) == 8
    assert len(list_files(harness, completed)) == 3
    assert make_retention(harness).prune_expired(UPKEEP_PRINCIPAL).jobs == 0


def test_files_of_another_deployments_job_are_left_alone(harness: JobsHarness) -> None:
    harness.objects.write("checkpoints/test-jobs/job_theirs/attempt-1/step-00000010/optimizer.pt", b"x")
    harness.clock.advance(WEEK.total_seconds() * 2)
    assert make_retention(harness).prune_expired(UPKEEP_PRINCIPAL).freed_bytes == 0
    assert harness.objects.stat("checkpoints/test-jobs/job_theirs/attempt-1/step-00000010/optimizer.pt")


class FailingStore:
    """An object store that stops working after a number of writes and deletions."""

    def __init__(self, store: ObjectStore, changes: int) -> None:
        self._store = store
        self._changes = changes

    def write(self, key: str, content: bytes) -> object:
        self._count_change()
        return self._store.write(key, content)

    def delete(self, key: str) -> bool:
        self._count_change()
        return self._store.delete(key)

    def _count_change(self) -> None:
        self._changes -= 1
        if self._changes < 0:
            raise StoreUnavailable("gone")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.parametrize("changes", range(12))
def test_interrupted_pruning_leaves_no_damaged_checkpoint_and_is_finished_later(harness: JobsHarness, changes: int) -> None:
    job = complete_job(harness)
    store: Any = FailingStore(harness.objects, changes)
    with pytest.raises(StoreUnavailable):
        make_retention(harness, store=store).prune(PRINCIPAL, job.job_id)
    for stored in list_checkpoints(harness.objects, harness.find_job(job)):
        assert all(harness.objects.stat(stored.key + file.path) for file in stored.checkpoint.files)
    harness.jobs.retention.prune(PRINCIPAL, job.job_id)
    assert len(list_files(harness, job)) == 3


def test_storage_is_counted_by_kind_and_job(harness: JobsHarness) -> None:
    job = complete_job(harness)
    harness.objects.write(f"trained_adapters/{job.job_id}/attempt-1/adapter_model.safetensors", b"12345")
    harness.objects.write("pretrained_weights/huggingface/a/b/model.safetensors", b"123")
    usage = harness.jobs.storage.measure(PRINCIPAL)
    assert [row.job_id for row in usage.jobs] == [job.job_id]
    assert usage.by_kind.artifacts == 5
    assert usage.by_kind.checkpoints == sum(
        stored.size_bytes for stored in harness.objects.iter_objects(checkpoints_prefix(job.job_id, None))
    )
    assert (usage.base_model_bytes, usage.complete) == (3, True)
    foreign = harness.jobs.storage.measure(OTHER_PRINCIPAL)
    assert (foreign.jobs, foreign.by_kind.total, foreign.dataset_bytes) == ([], 0, 0)
