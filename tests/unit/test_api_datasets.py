"""Datasets over HTTP: uploads, and files that are already in the object store."""

import json

import pytest
from starlette.testclient import TestClient

from tests.unit.api_harness import ROWS, get_error, get_services, submit_job, upload


def test_upload_returns_counts_splits_and_preview(client: TestClient) -> None:
    response = upload(client, ROWS, name="my rows", eval_fraction="0.2")
    assert response.status_code == 201
    dataset = response.json()
    assert (dataset["name"], dataset["dataset_type"], dataset["rows"], dataset["splits"]) == (
        "my rows",
        "messages",
        20,
        {"train": 16, "eval": 4},
    )
    detail = client.get(f"/datasets/{dataset['processed_dataset_id']}").json()
    assert len(detail["preview"]["eval"]) == 4
    assert client.get("/datasets").json()["datasets"][0] == dataset
    assert client.delete(f"/datasets/{dataset['processed_dataset_id']}").json()["deleted"] is True
    get_error(client.get(f"/datasets/{dataset['processed_dataset_id']}"), 404)


def test_tools_are_shown_in_record_and_preview(client: TestClient) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]}
    dataset = upload(client, json.dumps(row), eval_fraction="0").json()
    assert (dataset["has_tools"], dataset["has_weights"], dataset["prompt_form"]) == (True, False, "messages")
    assert client.get(f"/datasets/{dataset['processed_dataset_id']}").json()["preview"] == {"train": [row]}


INVALID_ROW_CASES: list[tuple[str | bytes, str]] = [
    ("", "no rows"),
    ("\n\n", "no rows"),
    (b"\xff\xfe{}", "line 1"),
    ('{"text": "a"}\n{"text": ', "line 2"),
    ('{"text": "a"}\n\n[1]', "line 3"),
    ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', "line 2"),
    ('{"text": ""}', "line 1"),
    ('{"text": NaN}', "line 1"),
    ('{"text": "a", "text": "b"}', "line 1"),
    ('{"messages": []}', "line 1"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "line 1"),
    ('{"text": "' + "x" * 20_000 + '"}', "line 1"),
    ("[" * 9_000, "line 1"),
]


@pytest.mark.parametrize(("content", "message"), INVALID_ROW_CASES, ids=range(len(INVALID_ROW_CASES)))
def test_invalid_row_is_rejected_with_line_and_nothing_is_stored(readonly_client: TestClient, content: str | bytes, message: str) -> None:
    assert message in get_error(upload(readonly_client, content), 400)["message"]
    assert readonly_client.get("/datasets").json()["datasets"] == []
    assert list(get_services(readonly_client).buckets.models.iter_objects("")) == []


def test_upload_without_file_is_rejected(readonly_client: TestClient) -> None:
    assert get_error(readonly_client.post("/datasets", data={"name": "x"}), 400)["param"] == "file"


@pytest.mark.parametrize("fraction", ["-0.1", "0.9", "nan", "x"])
def test_invalid_eval_fraction_is_rejected(readonly_client: TestClient, fraction: str) -> None:
    assert get_error(upload(readonly_client, ROWS, eval_fraction=fraction), 422)["param"] == "eval_fraction"


def test_a_dataset_in_use_cannot_be_deleted(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    assert job_id in get_error(client.delete(f"/datasets/{dataset_id}"), 409)["message"]
    client.post(f"/jobs/{job_id}/cancel")
    assert client.delete(f"/datasets/{dataset_id}").status_code == 200


# --- files in the object store ---------------------------------------------------------------------------------------


def test_a_file_in_the_store_becomes_a_dataset(client: TestClient) -> None:
    objects = get_services(client).buckets.datasets
    objects.write("incoming/more/rows.jsonl", ROWS.encode())
    response = client.post("/datasets", data={"incoming": "incoming/more/rows.jsonl", "eval_fraction": "0.2"})
    assert response.status_code == 201, response.text
    assert (response.json()["name"], response.json()["rows"]) == ("rows.jsonl", 20)
    assert objects.stat("incoming/more/rows.jsonl")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"incoming": "incoming/nothing.jsonl"}, 404, "incoming"),
        ({"incoming": "results/job/1.json"}, 400, "incoming"),
        ({"incoming": "incoming/../results/job/1.json"}, 400, "incoming"),
        ({"incoming": "incoming/large.jsonl"}, 413, "incoming"),
        ({"incoming": "incoming/bad.jsonl"}, 400, "file"),
        ({}, 400, "file"),
    ],
)
def test_invalid_store_file_is_rejected_with_field(client: TestClient, fields: dict[str, str], status: int, param: str) -> None:
    objects = get_services(client).buckets.datasets
    objects.write("incoming/large.jsonl", b"x" * 200_001)
    objects.write("incoming/bad.jsonl", b"no json\n")
    response = client.post("/datasets", data=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert client.get("/datasets").json()["datasets"] == []


def test_file_and_store_key_together_are_rejected(client: TestClient) -> None:
    response = upload(client, ROWS, incoming="incoming/rows.jsonl")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "file")
