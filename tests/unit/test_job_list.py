"""`GET /jobs`: filters, counts and rows; and what `GET /jobs/{id}` says of a job's caller, time and loss."""

from datetime import timedelta
from typing import Any

import pytest
from starlette.testclient import TestClient

from schema.job import EvalMetrics, Status
from tests.factories import START, make_attempt
from tests.unit.api_harness import attempt_headers, get_error, get_services, make_request_body, start_attempt, submit_job
from tests.unit.test_api_access import make_headers

PROGRESS = {"step": 3, "total_steps": 10, "epoch": 0.3, "total_epochs": 1.0, "loss": 1.25, "remaining_s": 40.0}
WITHOUT_SECRETS = {"hf_token": None, "secrets": {"wandb_api_key": None}}  # the example's, which a clone would need again


def submit(client: TestClient, dataset_id: str, headers: dict[str, str] | None = None, **changes: Any) -> str:
    response = client.post("/train", json=make_request_body(dataset_id, **changes), headers=headers)
    assert response.status_code == 201, response.text
    return response.json()["job_id"]


def list_ids(client: TestClient, query: str, headers: dict[str, str] | None = None) -> list[str]:
    response = client.get(f"/jobs?{query}", headers=headers)
    assert response.status_code == 200, response.text
    return [row["job_id"] for row in response.json()["jobs"]]


def report(client: TestClient, job_id: str, **fields: Any) -> None:
    response = client.post(
        f"/internal/jobs/{job_id}/attempts/1/events",
        json={"first_seq": 0, "events": [], **fields},
        headers=attempt_headers(client, job_id),
    )
    assert response.is_success, response.text


def test_jobs_are_found_by_name_id_metadata_and_creator(client: TestClient, dataset_id: str) -> None:
    ours = submit(client, dataset_id, job_name="Support Bot", metadata={"team": "search", "note": "a=b & ü"})
    key = make_headers(client, "submit")
    theirs = submit(client, dataset_id, key, job_name="another", metadata={"team": "search"})
    assert (
        list_ids(client, "search=port+b") == list_ids(client, f"search={ours[-6:]}") == list_ids(client, f"search=…{ours[-4:]}") == [ours]
    )
    assert list_ids(client, "metadata=team=search") == [theirs, ours]
    assert list_ids(client, "metadata=team=search&metadata=note=a%3Db+%26+%C3%BC") == [ours]
    assert list_ids(client, "created_by=me") == list_ids(client, "created_by=local") == [ours]
    assert list_ids(client, "created_by=me", key) == [theirs]
    assert list_ids(client, "created_by=nobody") == list_ids(client, "metadata=team=") == list_ids(client, "search=zzz") == []


def test_metadata_of_another_tenant_is_not_found(client: TestClient, dataset_id: str) -> None:
    submit(client, dataset_id, job_name="Support Bot", metadata={"team": "search"})
    other = make_headers(client, "admin", tenant_id="other")
    for query in ("search=support", "metadata=team=search", "created_by=local", "created_after=2000-01-01", "status=queued"):
        answer = client.get(f"/jobs?counts=true&{query}", headers=other).json()
        assert (answer["jobs"], sum(answer["counts"].values())) == ([], 0)


def test_jobs_of_several_statuses_and_their_counts(client: TestClient, dataset_id: str) -> None:
    paused, queued, cancelled = (submit_job(client, dataset_id) for _ in range(3))
    client.post(f"/jobs/{paused}/pause")
    client.post(f"/jobs/{cancelled}/cancel")
    assert list_ids(client, "status=paused&status=cancelled") == [cancelled, paused]
    answer = client.get("/jobs?counts=true&limit=1&status=queued").json()
    assert [row["job_id"] for row in answer["jobs"]] == [queued]
    assert answer["counts"] == dict.fromkeys(Status, 0) | {"queued": 1, "paused": 1, "cancelled": 1}
    assert client.get("/jobs?counts=true&search=nothing").json()["counts"] == dict.fromkeys(Status, 0)
    assert "counts" not in client.get("/jobs").json()


def test_jobs_of_a_time_span(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    created_at = client.get(f"/jobs/{job_id}").json()["created_at"].replace("+", "%2B")
    assert list_ids(client, f"created_after={created_at}") == [job_id]
    assert list_ids(client, f"created_before={created_at}") == []
    assert list_ids(client, "created_after=2020-01-01&created_before=2099-12-31T23:59:59-10:00") == [job_id]


def test_row_shows_what_a_dashboard_needs(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    report(client, job_id, phase="training", progress=PROGRESS)
    [row] = client.get("/jobs").json()["jobs"]
    assert {**row["progress"], **PROGRESS} == row["progress"]
    expected = {"phase": "training", "method": "LoRA", "hardware": "local", "launcher": "local", "metadata": {}, "created_by": "local"}
    assert expected.items() <= row.items()
    assert row["processed_dataset_id"] == dataset_id
    assert (row["eval_loss"], row["base_eval_loss"], row["finished_at"]) == (None, None, None)
    assert row["started_at"] is not None
    assert row["last_seen_at"] is not None
    store = get_services(client).store
    job = store.find_job(job_id)
    assert job is not None
    finished = {"status": Status.COMPLETED, "metrics": EvalMetrics(eval_loss=0.5), "base_metrics": EvalMetrics(eval_loss=2.0)}
    store.replace_job(job.model_copy(update=finished | {"finished_at": START}))
    [row] = client.get("/jobs").json()["jobs"]
    assert (row["phase"], row["progress"]["loss"], row["eval_loss"], row["base_eval_loss"]) == (None, 1.25, 0.5, 2.0)


def test_row_of_a_job_without_attempt_has_no_progress(client: TestClient, dataset_id: str) -> None:
    submit_job(client, dataset_id)
    [row] = client.get("/jobs").json()["jobs"]
    assert (row["phase"], row["progress"], row["last_seen_at"], row["started_at"]) == (None, None, None, None)


def test_job_shows_its_metadata_creator_duration_and_loss(client: TestClient, dataset_id: str) -> None:
    job_id = submit(client, dataset_id, metadata={"team": "search"})
    shown = client.get(f"/jobs/{job_id}").json()
    assert (shown["metadata"], shown["created_by"]) == ({"team": "search"}, "local")
    assert (shown["duration_s"], shown["train_loss"]) == (None, None)
    running_id = start_attempt(client, dataset_id)
    report(client, running_id, phase="training", progress=PROGRESS)
    shown = client.get(f"/jobs/{running_id}").json()
    assert (shown["train_loss"], shown["duration_s"] >= 0) == (1.25, True)
    store = get_services(client).store
    job = store.find_job(running_id)
    assert job is not None
    times = {"started_at": START, "finished_at": START + timedelta(seconds=90.26)}
    store.replace_job(job.model_copy(update=times | {"status": Status.COMPLETED, "attempts": (make_attempt(),)}))
    assert client.get(f"/jobs/{running_id}").json()["duration_s"] == 90.3


def test_clone_has_the_metadata_and_its_own_creator(client: TestClient, dataset_id: str) -> None:
    job_id = submit(client, dataset_id, metadata={"team": "search"})
    key = make_headers(client, "submit")
    same = client.post(f"/jobs/{job_id}/clone", json=WITHOUT_SECRETS, headers=key)
    assert same.status_code == 201, same.text
    other = client.post(f"/jobs/{job_id}/clone", json=WITHOUT_SECRETS | {"metadata": {}})
    assert list_ids(client, "metadata=team=search") == [same.json()["job_id"], job_id]
    assert list_ids(client, "created_by=me") == [other.json()["job_id"], job_id]


@pytest.mark.parametrize(
    ("query", "status", "param", "message"),
    [
        ("status=done", 422, "status", "'queued'"),
        ("status=queued&status=", 422, "status", "'queued'"),
        ("search=", 422, "search", "at least 1 character"),
        ("search=+", 400, "search", "blank"),
        ("search=…abc", 400, "search", "too short"),
        ("search=...", 400, "search", "too short"),
        ("search=" + "x" * 201, 422, "search", "at most 200"),
        ("metadata=team", 400, "metadata", "key=value"),
        ("metadata==search", 400, "metadata", "key=value"),
        ("metadata=a+b=c", 400, "metadata", "key=value"),
        ("metadata=a=" + "x" * 600, 422, "metadata", "at most 600"),
        ("&".join(f"metadata=k{n}=v" for n in range(17)), 422, "metadata", "at most 16"),
        ("created_by=", 422, "created_by", "at least 1 character"),
        ("created_after=yesterday", 422, "created_after", "valid datetime"),
        ("created_after=0001-01-01", 422, "created_after", "1970 to 2100"),
        ("created_before=9999-12-31T23:59:59-10:00", 422, "created_before", "1970 to 2100"),
        ("created_after=2026-02-01&created_before=2026-01-01", 400, "created_after", "is not before created_before"),
        ("trainer_type=SFTT", 400, "trainer_type", "did you mean sft?"),
        ("counts=maybe", 422, "counts", "valid boolean"),
        ("limit=201", 422, "limit", "200"),
        ("cursor=x", 400, "cursor", "not one that this API issued"),
    ],
)
def test_wrong_filter_names_its_parameter(readonly_client: TestClient, query: str, status: int, param: str, message: str) -> None:
    error = get_error(readonly_client.get(f"/jobs?{query}"), status)
    assert error["param"].partition(".")[0] == param
    assert message in f"{error['message']} {error['hint']}"


def test_all_wrong_filters_are_named_at_once(readonly_client: TestClient) -> None:
    query = "search=…a&metadata=x&metadata=y&trainer_type=none&created_after=2026-02-01&created_before=2026-01-01"
    errors = get_error(readonly_client.get(f"/jobs?{query}"), 400)["errors"]
    assert [each["param"] for each in errors] == ["search", "metadata", "metadata", "created_after", "trainer_type"]


def test_filters_are_documented(readonly_client: TestClient) -> None:
    operation = readonly_client.get("/openapi.json").json()["paths"]["/jobs"]["get"]
    shown = {each["name"]: each["schema"].get("type") for each in operation["parameters"]}
    assert (shown["status"], shown["metadata"]) == ("array", "array")
    assert {"search", "created_by", "created_after", "created_before", "counts", "project_id", "modality", "trainer_type"} <= set(shown)
