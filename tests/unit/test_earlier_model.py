"""Starting from the model of an earlier job: what is resolved, what the attempt may read, and what is refused in words."""

from typing import Any

import pytest

from schema.job import EarlierModel, Job, Status
from schema.requests import CloneRequest, ExportRequest, TrainRequest
from schema.spec import JobSpec, attempt_name, spec_key
from schema.training.llm_export import ExportConfig
from service.core.errors import InvalidRequest, NotFound, TunesmithError
from service.core.jobs.credentials import find_attempt_access
from service.core.ports import Buckets
from tests.factories import make_capabilities, make_dataset, make_manifest, make_train_request
from tests.unit.jobs_harness import OTHER_PRINCIPAL, PRINCIPAL, JobsHarness, make_artifact

BASE = "google/gemma-3-270m"


@pytest.fixture
def harness(harness: JobsHarness) -> JobsHarness:
    """The job services, with a dataset of pairs and hardware for every method."""
    options = {"provider": ("huggingface",), "method": ("LoRA", "QLoRA", "Full"), "modality": ("text", "vision")}
    harness.launcher.manifests = {"llm": make_manifest(make_capabilities(options=options))}
    harness.store.create_dataset(make_dataset("pairs", dataset_type="preference"))
    return harness


def make_folder(job: Job, kind: str) -> dict[str, object]:
    folder = {"adapter": "trained_adapters", "merged": "merged_models"}[kind]
    return make_artifact(job) | {"name": kind, "kind": kind, "key": f"{folder}/{job.job_id}/attempt-1/"}


def make_gguf(job: Job) -> dict[str, object]:
    return make_artifact(job) | {"name": "gguf-q8_0", "kind": "gguf", "key": f"gguf_models/{job.job_id}/attempt-1/m-q8_0.gguf"}


def complete(harness: JobsHarness, *kinds: str, dataset: str = "dataset_1", **config: Any) -> Job:
    """A completed job with artifacts of these kinds."""
    job = harness.submit(processed_dataset_id=dataset, training_config={"base_model_id": BASE} | config)
    artifacts = [make_gguf(job) if kind == "gguf" else make_folder(job, kind) for kind in kinds]
    stored = harness.find_job(job).model_dump() | {"status": Status.COMPLETED, "artifacts": artifacts}
    return harness.store.replace_job(Job.model_validate(stored))


def request_dpo(job_id: str, **config: Any) -> TrainRequest:
    changes = {"base_model_id": f"job:{job_id}", "trainer_type": "dpo"} | config
    return make_train_request(processed_dataset_id="pairs", training_config=changes)


def continue_from(harness: JobsHarness, earlier: Job, **config: Any) -> Job:
    return harness.jobs.submission.submit(PRINCIPAL, request_dpo(earlier.job_id, **config))


def get_source(job: Job) -> EarlierModel:
    assert job.earlier_model is not None
    return job.earlier_model


def get_export(job: Job) -> ExportConfig:
    export = job.training_config.export_config
    assert isinstance(export, ExportConfig)
    return export


def test_job_keeps_the_original_base_and_names_the_earlier_model(harness: JobsHarness) -> None:
    earlier = complete(harness, "merged", "adapter")
    job = continue_from(harness, earlier)
    assert job.training_config.base_model_id == BASE
    source = get_source(job)
    assert (source.job_id, source.kind, source.trainer_type) == (earlier.job_id, "adapter", "sft")
    assert source.key == f"trained_adapters/{earlier.job_id}/attempt-1/"
    assert source.digest.startswith("sha256:")
    assert (source.in_adapter, get_export(job).format) == (True, "adapter")
    assert job.job_id.startswith("training_pairs_gemma-3-270m_")


def test_attempt_reads_the_earlier_model_and_nothing_else_of_that_job(harness: JobsHarness) -> None:
    earlier = complete(harness, "adapter")
    job = continue_from(harness, earlier)
    harness.reconcile()
    assert attempt_name(job.job_id, 1) in harness.launcher.launched
    spec = JobSpec.load(harness.objects.read(spec_key(job.job_id)))
    assert spec.earlier_model == job.earlier_model
    buckets = Buckets(configs=harness.objects, datasets=harness.objects, models=harness.objects)
    (access,) = find_attempt_access(job, [make_dataset("pairs")], buckets)
    assert [key for key in access.readable if earlier.job_id in key] == [f"trained_adapters/{earlier.job_id}/attempt-1/"]
    assert not any(earlier.job_id in key for key in access.writable)


def test_chain_of_jobs_keeps_the_first_base(harness: JobsHarness) -> None:
    second = continue_from(harness, complete(harness, "adapter"))
    stored = second.model_dump() | {"status": Status.COMPLETED, "artifacts": [make_folder(second, "adapter")]}
    second = harness.store.replace_job(Job.model_validate(stored))
    third = continue_from(harness, second)
    assert (third.training_config.base_model_id, get_source(third).job_id) == (BASE, second.job_id)


def test_job_that_exported_an_adapter_can_be_continued(harness: JobsHarness) -> None:
    trained = complete(harness, "gguf")
    harness.write_checkpoint(trained, step=10)
    export = harness.jobs.exports.export(PRINCIPAL, trained.job_id, 10, ExportRequest.model_validate({}))
    stored = harness.find_job(export).model_dump() | {"status": Status.COMPLETED, "artifacts": [make_folder(export, "adapter")]}
    export = harness.store.replace_job(Job.model_validate(stored))
    assert get_source(continue_from(harness, export)).job_id == export.job_id


@pytest.mark.parametrize(
    ("earlier", "config", "kind", "in_adapter"),
    [
        ({"method": "Full"}, {}, "merged", False),
        ({"hyperparameters": {"use_dora": True}}, {}, "adapter", False),
        ({}, {"hyperparameters": {"use_dora": True}}, "adapter", False),
        ({}, {"trainer_type": "reward"}, "adapter", False),
        ({}, {"method": "QLoRA"}, "adapter", True),
        ({}, {"method": "Full"}, "adapter", False),
    ],
    ids=["whole model", "earlier DoRA", "new DoRA", "reward model", "QLoRA", "Full"],
)
def test_adapter_is_published_where_the_sum_of_both_exists(
    harness: JobsHarness, earlier: dict[str, Any], config: dict[str, Any], kind: str, in_adapter: bool
) -> None:
    job = continue_from(harness, complete(harness, kind, **earlier), **config)
    assert (get_source(job).kind, get_source(job).in_adapter) == (kind, in_adapter)
    assert get_export(job).format == ("adapter" if in_adapter or "method" in config else "merged")


@pytest.mark.parametrize(
    ("export", "param"),
    [({"format": "adapter"}, "format"), ({"format": ["merged", "adapter"]}, "format"), ({"include_lora_gguf": True}, "include_lora_gguf")],
)
def test_impossible_adapter_is_refused_with_what_would_work(harness: JobsHarness, export: dict[str, Any], param: str) -> None:
    earlier = complete(harness, "merged", method="Full")
    with pytest.raises(InvalidRequest, match="whole model") as excinfo:
        continue_from(harness, earlier, export_config=export)
    assert excinfo.value.param == f"training_config.export_config.{param}"
    assert "merged" in excinfo.value.hint or "include_gguf" in excinfo.value.hint
    job = continue_from(harness, earlier, export_config={"format": "merged", "include_gguf": True})
    harness.write_checkpoint(job, step=10)
    with pytest.raises(InvalidRequest, match="whole model") as excinfo:
        harness.jobs.exports.export(PRINCIPAL, job.job_id, 10, ExportRequest.model_validate({"export_config": export}))
    assert excinfo.value.param == f"export_config.{param}"
    exported = harness.jobs.exports.export(PRINCIPAL, job.job_id, 10, ExportRequest.model_validate({}))
    assert (get_export(exported).format, exported.earlier_model) == ("merged", job.earlier_model)


def refuse(harness: JobsHarness, request: TrainRequest) -> TunesmithError:
    """The error of a request that must be refused before anything is stored."""
    queued = harness.store.list_queued_jobs(None, 100)
    with pytest.raises(TunesmithError) as excinfo:
        harness.jobs.submission.submit(PRINCIPAL, request)
    assert harness.store.list_queued_jobs(None, 100) == queued
    assert excinfo.value.param == "training_config.base_model_id"
    assert excinfo.value.hint
    return excinfo.value


@pytest.mark.parametrize(
    ("kinds", "changes", "config", "message"),
    [
        (("adapter",), {"status": Status.FAILED}, {}, "is failed"),
        (("adapter",), {"status": Status.TRAINING}, {}, "is training"),
        (("gguf",), {}, {}, "published gguf-q8_0"),
        ((), {}, {}, "published nothing"),
        ((), {"gate": {"passed": False, "checks": ()}}, {}, "promotion gate"),
        (("adapter",), {"deletion_started_at": "2026-01-01T00:00:00Z"}, {}, "is being deleted"),
        (("adapter",), {"training_config": {"base_model_id": BASE, "trainer_type": "reward"}}, {}, "trained a reward model"),
    ],
)
def test_job_without_a_model_to_start_from_is_refused(
    harness: JobsHarness, kinds: tuple[str, ...], changes: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    earlier = complete(harness, *kinds)
    harness.store.replace_job(Job.model_validate(earlier.model_dump() | changes))
    assert message in refuse(harness, request_dpo(earlier.job_id, **config)).message


def test_reward_model_can_be_continued_as_reward_model(harness: JobsHarness) -> None:
    earlier = complete(harness, "adapter", dataset="pairs", trainer_type="reward")
    assert get_source(continue_from(harness, earlier, trainer_type="reward")).in_adapter


def test_job_of_another_tenant_is_answered_as_a_missing_one(harness: JobsHarness) -> None:
    earlier = complete(harness, "adapter")
    harness.store.create_dataset(make_dataset("foreign", tenant_id="other", dataset_type="preference"))
    errors: list[str] = []
    for job_id in (earlier.job_id, "training_nothing"):
        request = request_dpo(job_id).model_copy(update={"processed_dataset_id": "foreign"})
        with pytest.raises(NotFound) as excinfo:
            harness.jobs.submission.submit(OTHER_PRINCIPAL, request)
        errors.append(f"{excinfo.value.message} {excinfo.value.hint} {excinfo.value.param}".replace(job_id, "ID"))
    assert errors[0] == errors[1]
    assert "training_config.base_model_id" in errors[0]


def test_clone_starts_from_the_same_model_unless_it_names_another(harness: JobsHarness) -> None:
    job = continue_from(harness, complete(harness, "adapter"))
    clone = harness.jobs.submission.clone(PRINCIPAL, job.job_id, CloneRequest())
    assert clone.earlier_model == job.earlier_model
    assert clone.training_config == job.training_config
    changed = CloneRequest.model_validate({"training_config": {"base_model_id": "google/gemma-3-1b"}})
    other = harness.jobs.submission.clone(PRINCIPAL, job.job_id, changed)
    assert (other.earlier_model, other.training_config.base_model_id) == (None, "google/gemma-3-1b")


def test_known_limits_of_the_original_base_apply(harness: JobsHarness) -> None:
    earlier = complete(harness, "adapter")
    with pytest.raises(InvalidRequest, match="above 640"):
        continue_from(harness, earlier, hyperparameters={"lora_rank": 641})


def test_hub_is_asked_for_the_base_only_where_it_is_read(harness: JobsHarness) -> None:
    adapter, whole = complete(harness, "adapter"), complete(harness, "merged", method="Full")
    harness.hub.read_result = "gated"
    with pytest.raises(InvalidRequest, match="gated"):
        continue_from(harness, adapter)
    assert get_source(continue_from(harness, whole)).kind == "merged"
