"""Checkpoints, and the jobs that export them."""

import pytest

from schema.checkpoint import MANIFEST, checkpoint_key, checkpoints_prefix
from schema.requests import ExportRequest
from schema.spec import JobSpec, spec_key
from service.core.errors import InvalidRequest, NotFound
from service.core.jobs.checkpoints import list_checkpoints
from tests.factories import make_dataset
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness, make_reexport_request


def test_checkpoints_are_listed_in_resume_order(harness: JobsHarness) -> None:
    job = harness.start_training()
    for step, attempt in ((10, 1), (30, 1), (20, 2)):
        harness.write_checkpoint(job, step=step, attempt=attempt)
    harness.objects.write(f"{checkpoints_prefix(job.job_id, None)}attempt-3/step-00000040/adapter.bin", b"half a checkpoint")
    harness.objects.write(f"{checkpoints_prefix(job.job_id, None)}attempt-3/step-00000050/manifest.json", b"{")
    checkpoints = list_checkpoints(harness.objects, harness.find_job(job))
    assert [(stored.checkpoint.attempt, stored.checkpoint.step) for stored in checkpoints] == [(2, 20), (1, 30), (1, 10)]


def test_checkpoint_export_creates_its_own_job(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.write_checkpoint(job, step=10)
    request = ExportRequest.model_validate({"export_config": {"format": "merged"}})
    export_job = harness.jobs.exports.export(PRINCIPAL, job.job_id, 10, request, "key-1")
    assert harness.jobs.exports.export(PRINCIPAL, job.job_id, 10, request, "key-1").job_id == export_job.job_id
    assert export_job.job_name == f"{job.job_name} at step 10"
    harness.reconcile()
    spec = JobSpec.load(harness.objects.read(spec_key(export_job.job_id)))
    assert spec.export_of is not None
    assert (spec.export_of.job_id, spec.export_of.key) == (job.job_id, checkpoint_key(checkpoints_prefix(job.job_id, None), 1, 10))
    assert spec.training_config.export_config.format == "merged"
    with pytest.raises(NotFound, match="no checkpoint at step 11; it has: 10"):
        harness.jobs.exports.export(PRINCIPAL, job.job_id, 11, request)


def test_export_runs_no_gate_and_no_trackers(harness: JobsHarness) -> None:
    config = {"base_model_id": "g/m", "tensorboard_config": {}, "wandb_config": {"mode": "offline"}}
    gate = {"promotion_gate": [{"metric": "perplexity", "at_most": 0.9, "relative_to_base": True}]}
    job = harness.submit(training_config=config | {"eval_config": gate})
    harness.write_checkpoint(job, step=10)
    export_job = harness.jobs.exports.export(PRINCIPAL, job.job_id, 10, ExportRequest.model_validate({}))
    assert (export_job.training_config.tensorboard_config, export_job.training_config.wandb_config) == (None, None)
    assert export_job.training_config.eval_config.promotion_gate == []


@pytest.mark.parametrize(
    ("config", "export", "param"),
    [
        ({"method": "Full"}, {"format": "adapter"}, "export_config.format"),
        ({"method": "Full"}, {"include_lora_gguf": True}, "export_config.include_lora_gguf"),
        ({"trainer_type": "reward"}, {"include_gguf": True}, "export_config.include_gguf"),
    ],
)
def test_unsupported_export_is_rejected(harness: JobsHarness, config: dict[str, object], export: dict[str, object], param: str) -> None:
    harness.store.create_dataset(make_dataset("pairs", dataset_type="preference"))
    rows = "pairs" if "trainer_type" in config else "dataset_1"
    job = harness.submit(processed_dataset_id=rows, training_config={"base_model_id": "g/m"} | config)
    harness.write_checkpoint(job, step=10)
    with pytest.raises(InvalidRequest) as excinfo:
        harness.jobs.exports.export(PRINCIPAL, job.job_id, 10, ExportRequest.model_validate({"export_config": export}))
    assert excinfo.value.param == param


def test_export_defaults_to_published_then_newest_checkpoint(harness: JobsHarness) -> None:
    job = harness.start_training()
    for step in (10, 20, 30):
        harness.write_checkpoint(job, step=step)
    newest = harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request(), "key-1")
    assert newest.export_of is not None
    assert newest.export_of.step == 30
    harness.finish(harness.write_result(job, published_step=20))
    repeated = harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request(), "key-1")
    assert repeated.job_id == newest.job_id
    for body, step in (({}, 20), ({"step": 10}, 10)):
        export_job = harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request(**body))
        assert export_job.export_of is not None
        assert export_job.export_of.step == step
    harness.objects.delete(checkpoint_key(checkpoints_prefix(job.job_id, None), 1, 20) + MANIFEST)
    export_job = harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request())
    assert export_job.export_of is not None
    assert export_job.export_of.step == 30


def test_export_without_checkpoint_explains_why(harness: JobsHarness) -> None:
    job = harness.start_training()
    with pytest.raises(NotFound, match="is training and has no checkpoint yet"):
        harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request())
    harness.write_checkpoint(job, step=10)
    export = harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request())
    with pytest.raises(NotFound, match="trained nothing") as excinfo:
        harness.jobs.exports.reexport(PRINCIPAL, export.job_id, make_reexport_request())
    assert f"/jobs/{job.job_id}/export" in excinfo.value.hint
    harness.finish(harness.write_result(job))
    harness.objects.delete(checkpoint_key(checkpoints_prefix(job.job_id, None), 1, 10) + MANIFEST)
    with pytest.raises(NotFound, match="no checkpoint") as excinfo:
        harness.jobs.exports.reexport(PRINCIPAL, job.job_id, make_reexport_request())
    assert "clone" in excinfo.value.hint
