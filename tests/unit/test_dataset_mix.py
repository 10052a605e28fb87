"""Several datasets in one job: their shares of an epoch, what is stored and read, and what is refused by name."""

from itertools import pairwise
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from schema.dataset import Split
from schema.job import Job
from schema.mixing import count_mixed_rows
from schema.provenance import DatasetRecord
from schema.requests import CloneRequest, ExportRequest
from schema.spec import JobSpec, spec_key
from service.core.errors import InvalidRequest, NotFound, TunesmithError
from service.core.jobs.credentials import find_attempt_access
from service.core.ports import Buckets
from tests.factories import make_dataset, make_train_request
from tests.unit.api_harness import ROWS, get_error, make_request_body, upload
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness

MIX = [{"processed_dataset_id": "dataset_1", "weight": 0.7}, {"processed_dataset_id": "dataset_2", "weight": 0.3}]


@pytest.fixture
def harness(harness: JobsHarness) -> JobsHarness:
    """The job services with three datasets; only the first has held-out rows."""
    for dataset_id in ("dataset_2", "dataset_3"):
        split = Split(rows=5, size_bytes=100, sha256="0" * 64, key=f"datasets/{dataset_id}/train.jsonl")
        harness.store.create_dataset(make_dataset(dataset_id, splits={"train": split}))
    return harness


def submit_mix(harness: JobsHarness, mix: list[dict[str, Any]]) -> Job:
    return harness.submit(processed_dataset_id=None, datasets=mix)


# --- shares ---


@given(
    st.lists(st.tuples(st.integers(1, 10**7), st.floats(1e-300, 1e6)), min_size=1, max_size=16),
)
def test_shares_add_up_to_the_rows_and_follow_the_weights(datasets: list[tuple[int, float]]) -> None:
    rows, weights = [count for count, _ in datasets], [weight for _, weight in datasets]
    counts = count_mixed_rows(rows, weights)
    assert sum(counts) == sum(rows)
    total, sum_of_weights = sum(rows), sum(weights)
    assert all(abs(count - total * weight / sum_of_weights) <= 1 for count, weight in zip(counts, weights, strict=True))
    by_weight = sorted(zip(weights, counts, strict=True))
    assert all(larger[1] >= smaller[1] - 1 for smaller, larger in pairwise(by_weight))


def test_shares_of_equal_weights() -> None:
    assert count_mixed_rows([90, 10], [1, 1]) == [50, 50]
    assert count_mixed_rows([5, 5, 1], [1, 1, 1]) == [4, 4, 3]
    assert count_mixed_rows([7], [0.1]) == [7]


# --- jobs ---


def test_job_keeps_every_dataset_with_its_weight(harness: JobsHarness) -> None:
    job = submit_mix(harness, MIX)
    assert job.processed_dataset_id == "dataset_1"
    assert [share.model_dump() for share in job.datasets] == MIX
    assert job.job_id.startswith("training_1_")
    harness.reconcile()
    spec = JobSpec.load(harness.objects.read(spec_key(job.job_id)))
    assert [(each.dataset.processed_dataset_id, each.weight) for each in spec.datasets] == [("dataset_1", 0.7), ("dataset_2", 0.3)]
    assert spec.dataset == spec.datasets[0].dataset


def test_job_of_one_dataset_has_no_mix(harness: JobsHarness) -> None:
    job = harness.submit()
    assert (job.datasets, job.dataset_ids) == ((), ("dataset_1",))
    harness.reconcile()
    spec = JobSpec.load(harness.objects.read(spec_key(job.job_id)))
    assert spec.mixed_datasets == ()
    assert [each.dataset for each in spec.datasets] == [spec.dataset]


def test_attempt_reads_the_rows_of_every_dataset(harness: JobsHarness) -> None:
    datasets = [each.dataset for each in harness.jobs.repository.find_datasets(submit_mix(harness, MIX))]
    buckets = Buckets(configs=harness.objects, datasets=harness.objects, models=harness.objects)
    (access,) = find_attempt_access(submit_mix(harness, MIX), datasets, buckets)
    assert {"datasets/dataset_1/train.jsonl", "datasets/dataset_1/eval.jsonl", "datasets/dataset_2/train.jsonl"} <= set(access.readable)
    assert {"datasets/dataset_1/tokens/", "datasets/dataset_2/tokens/"} <= set(access.writable)


def test_clone_and_export_keep_the_mix(harness: JobsHarness) -> None:
    job = submit_mix(harness, MIX)
    assert harness.jobs.submission.clone(PRINCIPAL, job.job_id, CloneRequest()).datasets == job.datasets
    single = harness.jobs.submission.clone(PRINCIPAL, job.job_id, CloneRequest(processed_dataset_id="dataset_1"))
    assert single.dataset_ids == ("dataset_1",)
    others = CloneRequest.model_validate({"datasets": [MIX[0], {"processed_dataset_id": "dataset_3", "weight": 1.0}]})
    assert harness.jobs.submission.clone(PRINCIPAL, job.job_id, others).dataset_ids == ("dataset_1", "dataset_3")
    harness.write_checkpoint(job, step=10)
    export = harness.jobs.exports.export(PRINCIPAL, job.job_id, 10, ExportRequest.model_validate({}))
    assert export.datasets == job.datasets


def test_held_out_rows_of_one_dataset_are_enough(harness: JobsHarness) -> None:
    assert submit_mix(harness, MIX).dataset_ids == ("dataset_1", "dataset_2")
    without_held_out = [MIX[1], {"processed_dataset_id": "dataset_3", "weight": 1.0}]
    with pytest.raises(InvalidRequest, match="held-out"):
        submit_mix(harness, without_held_out)


def test_record_of_a_mix_has_its_weight() -> None:
    assert DatasetRecord.from_dataset(make_dataset(), 0.3).weight == 0.3
    assert DatasetRecord.from_dataset(make_dataset()).weight is None


# --- bad input ---


@pytest.mark.parametrize(
    ("mix", "error", "param"),
    [
        ([MIX[0], {"processed_dataset_id": "dataset_none", "weight": 1.0}], NotFound, "datasets.1.processed_dataset_id"),
        ([MIX[0], {"processed_dataset_id": "foreign", "weight": 1.0}], NotFound, "datasets.1.processed_dataset_id"),
        ([MIX[0], {"processed_dataset_id": "texts", "weight": 1.0}], InvalidRequest, "datasets.1.processed_dataset_id"),
        ([MIX[0], MIX[1] | {"weight": 1e-9}], InvalidRequest, "datasets.1.weight"),
    ],
    ids=["unknown", "foreign", "other type", "no row"],
)
def test_dataset_that_cannot_be_mixed_is_named(
    harness: JobsHarness, mix: list[dict[str, Any]], error: type[TunesmithError], param: str
) -> None:
    harness.store.create_dataset(make_dataset("foreign", tenant_id="other"))
    harness.store.create_dataset(make_dataset("texts", dataset_type="text"))
    with pytest.raises(error) as excinfo:
        submit_mix(harness, mix)
    assert (excinfo.value.param, bool(excinfo.value.hint)) == (param, True)


def test_type_that_the_trainer_cannot_use_is_named(harness: JobsHarness) -> None:
    for dataset_id in ("pairs_1", "pairs_2"):
        harness.store.create_dataset(make_dataset(dataset_id, dataset_type="preference"))
    with pytest.raises(InvalidRequest) as excinfo:
        submit_mix(harness, [{"processed_dataset_id": f"pairs_{n}", "weight": 1.0} for n in (1, 2)])
    assert excinfo.value.param == "datasets.0.processed_dataset_id"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"datasets": MIX}, "datasets"),
        ({"processed_dataset_id": None, "datasets": MIX[:1]}, "datasets"),
        ({"processed_dataset_id": None, "datasets": [MIX[0], MIX[0]]}, "datasets.1.processed_dataset_id"),
        ({"processed_dataset_id": None, "datasets": [MIX[0], MIX[1] | {"weight": 0}]}, "datasets.1.weight"),
        ({"processed_dataset_id": None, "datasets": [MIX[0], MIX[1] | {"weight": -1}]}, "datasets.1.weight"),
        ({"processed_dataset_id": None, "datasets": [MIX[0], {"processed_dataset_id": "dataset_2"}]}, "datasets.1.weight"),
        (
            {"processed_dataset_id": None, "datasets": [MIX[0], MIX[1] | {"processed_dataset_id": "../x"}]},
            "datasets.1.processed_dataset_id",
        ),
        ({"processed_dataset_id": None, "datasets": [{"processed_dataset_id": f"d{n}", "weight": 1} for n in range(17)]}, "datasets"),
        ({"training_config": {"base_model_id": "job:"}}, "training_config.base_model_id"),
        ({"training_config": {"base_model_id": "job:a/b"}}, "training_config.base_model_id"),
    ],
)
def test_malformed_mix_is_refused_by_name(readonly_client: TestClient, changes: dict[str, Any], param: str) -> None:
    assert get_error(readonly_client.post("/train", json=make_request_body("dataset_1", **changes)), 422)["param"] == param


def test_weight_that_is_not_a_number_is_refused(readonly_client: TestClient) -> None:
    body = '{"datasets": [{"processed_dataset_id": "a", "weight": 1e999}], "training_config": {"base_model_id": "g/m"}}'
    response = readonly_client.post("/train", content=body, headers={"Content-Type": "application/json"})
    assert get_error(response, 422)["param"] == "datasets.0.weight"


def test_answers_show_the_mix_and_deletion_waits_for_it(client: TestClient) -> None:
    ids = [upload(client, ROWS).json()["processed_dataset_id"] for _ in range(2)]
    mix = [{"processed_dataset_id": dataset_id, "weight": weight} for dataset_id, weight in zip(ids, (3.0, 1.0), strict=True)]
    job_id = client.post("/train", json=make_request_body(ids[0], processed_dataset_id=None, datasets=mix)).json()["job_id"]
    detail = client.get(f"/jobs/{job_id}").json()
    assert (detail["processed_dataset_id"], detail["datasets"]) == (ids[0], mix)
    assert job_id in get_error(client.delete(f"/datasets/{ids[1]}"), 409)["message"]
    client.post(f"/jobs/{job_id}/cancel")
    assert client.delete(f"/datasets/{ids[1]}").json()["deleted"] is True


def test_mix_and_single_dataset_differ_under_one_key(harness: JobsHarness) -> None:
    first = harness.jobs.submission.submit(PRINCIPAL, make_train_request(), "key")
    assert harness.jobs.submission.submit(PRINCIPAL, make_train_request(), "key").job_id == first.job_id
    with pytest.raises(TunesmithError, match="another request"):
        harness.jobs.submission.submit(PRINCIPAL, make_train_request(processed_dataset_id=None, datasets=MIX), "key")
