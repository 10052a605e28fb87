"""Datasets over HTTP: uploads, and files that are already in the object store."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from schema.dataset import Dataset
from schema.ingestion import IngestTask
from schema.job import Failure, Job, Status
from service.adapters.ingester import ProcessIngester
from service.core.datasets.ports import IngestTimeout
from service.core.principals import Principal
from tests.factories import make_job
from tests.unit.api_harness import ROWS, get_error, get_services, run_test_service, submit_job, upload


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


# --- options ---------------------------------------------------------------------------------------------------------

TEXTS = "\n".join(json.dumps({"text": f"text {number}"}) for number in range(10))


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"eval_fracton": "0.1"}, 422, "eval_fracton", "not a field"),
        ({"mapping": "{prompt"}, 400, "mapping", "not JSON"),
        ({"mapping": "[1]"}, 400, "mapping", "not a JSON object"),
        ({"mapping": '{"promt": "a", "completion": "b"}'}, 422, "mapping.promt", "not a field"),
        ({"mapping": '{"prompt": 1, "completion": "b"}'}, 422, "mapping.prompt", "string"),
        ({"mapping": '{"completion": "a"}'}, 422, "mapping", "makes no row"),
        ({"on_invalid": "keep"}, 422, "on_invalid", "'refuse' or 'drop'"),
        ({"text_unit": "word"}, 422, "text_unit", "'file', 'paragraph' or 'line'"),
        ({"delimiter": ",,"}, 422, "delimiter", "at most 1"),
        ({"max_seq_length": "7"}, 422, "max_seq_length", "8"),
        ({"full_report": "perhaps"}, 422, "full_report", "boolean"),
        ({"hardware": "a b"}, 422, "hardware", "no such name"),
        ({"hf_token": "hf_secret"}, 400, "hf_token", "for a `source`"),
        ({"source_credentials": "{}"}, 400, "source_credentials", "for a `source`"),
        ({"source": "gs://bucket/rows.csv"}, 400, "file", "exactly one of the three"),
        ({"base_model_id": "google/gemma-3-270m"}, 400, "base_model_id", "does not have the model"),
    ],
)
def test_invalid_option_is_refused_with_its_field(
    readonly_client: TestClient, fields: dict[str, str], status: int, param: str, message: str
) -> None:
    error = get_error(upload(readonly_client, ROWS, **fields), status)
    assert error["param"] == param
    assert message in error["message"]
    assert readonly_client.get("/datasets").json()["datasets"] == []


def test_file_that_is_text_is_refused(readonly_client: TestClient) -> None:
    error = get_error(readonly_client.post("/datasets", data={"file": ROWS}), 422)
    assert (error["param"], "curl -F file=@" in error["message"]) == ("file", True)


def test_options_and_filename_reach_the_ingestion(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[IngestTask] = []

    def ingest(_: object, task: IngestTask, **__: object) -> None:
        tasks.append(task)
        raise IngestTimeout

    monkeypatch.setattr(ProcessIngester, "ingest", ingest)
    mapping = {"prompt": "{a}\n{b}", "completion": "c"}
    fields = {"format": "CSV", "encoding": "cp1252", "delimiter": ";", "mapping": json.dumps(mapping), "full_report": "true"}
    fields |= {"on_invalid": "drop", "max_seq_length": "512", "eval_fraction": "0.2", "text_unit": "line", "sheet": "one"}
    client.post("/datasets/check", files={"file": ("folder/faq.csv.gz", b"x")}, data=fields)
    (task,) = tasks
    assert task.files[0].name == "folder/faq.csv.gz"
    assert task.check_only
    assert task.options.mapping is not None
    assert task.options.mapping.model_dump(exclude_defaults=True) == mapping
    chosen = task.options.model_dump(exclude={"mapping", "base_model_id"})
    assert chosen == {
        "format": "csv",
        "encoding": "cp1252",
        "delimiter": ";",
        "sheet": "one",
        "text_unit": "line",
        "eval_fraction": 0.2,
        "on_invalid": "drop",
        "max_seq_length": 512,
        "full_report": True,
    }


def test_upload_shows_what_was_detected_and_dropped(client: TestClient) -> None:
    dataset = upload(client, TEXTS + '\n{"text": 1}\n{"text": "text 1"}', on_invalid="drop").json()
    assert (dataset["status"], dataset["source"], dataset["job_id"]) == ("ready", "rows.jsonl", None)
    assert (dataset["detected"]["format"], dataset["detected"]["shape"]) == ("jsonl", "native")
    assert dataset["dropped"] == {"wrong_type": 1, "duplicate": 1}
    report = client.get(f"/datasets/{dataset['processed_dataset_id']}").json()["report"]
    assert (report["rows_read"], report["rows_kept"], report["problems"][0]["line"]) == (12, 10, 11)


def test_refused_upload_lists_the_first_hundred_rows(client: TestClient) -> None:
    error = get_error(upload(client, "\n".join([TEXTS, *['{"text": 1}'] * 150])), 400)
    assert (error["code"], error["param"], len(error["errors"])) == ("invalid_data", "text", 100)
    assert error["message"].startswith("line 11: text is a number")
    assert "POST /datasets/check with the same fields lists all 150 rows" in error["hint"]


# --- checking --------------------------------------------------------------------------------------------------------


def check(client: TestClient, content: str | bytes, **fields: str) -> Any:
    return client.post("/datasets/check", files={"file": ("rows.jsonl", content)}, data=fields)


def test_check_tells_all_problems_and_keeps_nothing(client: TestClient) -> None:
    answer = check(client, TEXTS + '\n{"text": 1}\n{"text": ""}\n{')
    assert answer.status_code == 200
    found = answer.json()
    assert (found["rows_read"], found["valid_rows"], found["problem_count"]) == (13, 10, 3)
    assert [(problem["line"], problem["field"]) for problem in found["problems"]] == [(11, "text"), (12, "text"), (13, "")]
    assert sum(found["problem_counts"].values()) == 3
    assert found["splits"] == {"train": 9, "eval": 1}
    assert found["samples"][0] == {"text": "text 0"}
    assert client.get("/datasets").json()["datasets"] == []
    assert list(get_services(client).buckets.datasets.iter_objects("")) == []


def test_check_names_the_first_thousand_and_counts_the_others(client: TestClient) -> None:
    found = check(client, "\n".join([TEXTS, *['{"text": 1}'] * 1200])).json()
    assert (len(found["problems"]), found["problem_count"], found["problem_counts"]) == (1000, 1200, {"wrong_type": 1200})


def test_check_reads_a_file_in_the_store(client: TestClient) -> None:
    get_services(client).buckets.datasets.write("incoming/rows.jsonl", ROWS.encode())
    answer = client.post("/datasets/check", data={"incoming": "incoming/rows.jsonl"})
    assert (answer.status_code, answer.json()["valid_rows"]) == (200, 20)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_check_of_a_file_that_cannot_be_read_is_an_error(readonly_client: TestClient, content: str) -> None:
    assert "no rows" in get_error(check(readonly_client, content), 400)["message"]


def test_check_that_takes_too_long_names_another_way(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def ingest(*_: object, **__: object) -> None:
        raise IngestTimeout

    monkeypatch.setattr(ProcessIngester, "ingest", ingest)
    error = get_error(check(client, ROWS), 413)
    assert "takes longer than 60 seconds" in error["message"]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_any_page_of_rows_is_shown(client: TestClient, dataset_id: str) -> None:
    page = client.get(f"/datasets/{dataset_id}/rows", params={"offset": 16, "limit": 5}).json()
    assert (page["split"], page["offset"], page["total_rows"], page["next_offset"], len(page["rows"])) == ("train", 16, 18, None, 2)
    assert client.get(f"/datasets/{dataset_id}/rows", params={"offset": 3, "limit": 2}).json()["next_offset"] == 5
    assert client.get(f"/datasets/{dataset_id}/rows", params={"offset": 300}).json()["rows"] == []


def test_unknown_split_and_dataset_are_refused(client: TestClient, dataset_id: str) -> None:
    error = get_error(client.get(f"/datasets/{dataset_id}/rows", params={"split": "tran"}), 400)
    assert (error["param"], error["hint"]) == ("split", "did you mean train? it has eval and train")
    get_error(client.get("/datasets/dataset_0/rows"), 404)


# --- links for uploads -----------------------------------------------------------------------------------------------


def test_large_file_goes_to_a_link_and_becomes_a_dataset(client: TestClient) -> None:
    answer = client.post("/datasets/uploads", json={"filename": "../my rows.jsonl", "size_bytes": len(ROWS)})
    assert answer.status_code == 201
    ticket = answer.json()
    assert ticket["incoming"].startswith("incoming/uploads/")
    assert ticket["incoming"].endswith("/my_rows.jsonl")
    assert datetime.fromisoformat(ticket["expires_at"]).tzinfo
    sent = client.put(ticket["url"], content=ROWS, headers={"Authorization": ""})
    assert (sent.status_code, sent.json()) == (200, {"incoming": ticket["incoming"], "size_bytes": len(ROWS)})
    dataset = client.post("/datasets", data={"incoming": ticket["incoming"]})
    assert (dataset.status_code, dataset.json()["rows"]) == (201, 20)
    get_error(client.post("/datasets", data={"incoming": ticket["incoming"]}), 404)  # the file was for one dataset


def test_larger_file_than_announced_is_not_kept(client: TestClient) -> None:
    ticket = client.post("/datasets/uploads", json={"filename": "rows.jsonl", "size_bytes": 10}).json()
    assert "10 bytes" in get_error(client.put(ticket["url"], content=ROWS), 413)["message"]
    assert list(get_services(client).buckets.datasets.iter_objects("")) == []


def test_link_of_another_key_is_refused(client: TestClient) -> None:
    ticket = client.post("/datasets/uploads", json={"filename": "rows.jsonl", "size_bytes": 10}).json()
    get_error(client.put(ticket["url"] + "x", content=b"1"), 401)


def test_file_beyond_the_limit_gets_no_link(readonly_client: TestClient) -> None:
    answer = readonly_client.post("/datasets/uploads", json={"filename": "rows.jsonl", "size_bytes": 1_000_000})
    error = get_error(answer, 413)
    assert (error["param"], "at most 100000" in error["message"]) == ("size_bytes", True)


# --- datasets that jobs make -----------------------------------------------------------------------------------------


class FakeIngestions:
    """Creates jobs without placements, and remembers what they are for."""

    def __init__(self, client: TestClient) -> None:
        self.store = get_services(client).store
        self.started: list[dict[str, Any]] = []

    def start(self, principal: Principal, dataset: Dataset, **arguments: Any) -> Job:
        self.started.append(arguments | {"tenant_id": principal.tenant_id, "dataset": dataset})
        job = make_job(job_id=f"ingestion_{len(self.started)}", processed_dataset_id=dataset.processed_dataset_id)
        self.store.create_dataset(dataset.model_copy(update={"job_id": job.job_id}))
        return self.store.create_job(job)


@pytest.fixture
def ingestions(client: TestClient) -> FakeIngestions:
    fake = FakeIngestions(client)
    get_services(client).datasets.ingestion._jobs = fake  # pyright: ignore[reportPrivateUsage]
    return fake


@pytest.fixture
def timed_out(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # it has its own ingestion before
    """No ingestion is done in time."""

    def ingest(*_: object, **__: object) -> None:
        raise IngestTimeout

    with monkeypatch.context() as patch:
        patch.setattr(ProcessIngester, "ingest", ingest)
        yield


def test_source_elsewhere_is_left_to_a_job(client: TestClient, ingestions: FakeIngestions) -> None:
    fields = {"source": "hf://owner/rows:en@main", "hf_token": "hf_secret", "hardware": "local", "name": "mine", "eval_fraction": "0"}
    answer = client.post("/datasets", data=fields)
    assert answer.status_code == 202, answer.text
    view = answer.json()
    assert (view["status"], view["job_id"], view["source"], view["rows"]) == ("processing", "ingestion_1", fields["source"], 0)
    (started,) = ingestions.started
    assert (started["source"], started["secrets"], started["hardware"]) == (fields["source"], {"hf_token": "hf_secret"}, "local")
    assert started["options"].eval_fraction == 0
    assert "hf_secret" not in answer.text


@pytest.mark.usefixtures("timed_out")
def test_upload_that_takes_long_is_left_to_a_job(client: TestClient, ingestions: FakeIngestions) -> None:
    answer = client.post("/datasets", files={"file": ("my rows.csv.gz", ROWS)})
    assert answer.status_code == 202, answer.text
    key = ingestions.started[0]["source"]
    assert key.startswith("incoming/uploads/")
    assert key.endswith("/my_rows.csv.gz")
    assert get_services(client).buckets.datasets.read(key).decode() == ROWS
    assert answer.json()["source"] == "my rows.csv.gz"


def test_caller_need_not_wait(client: TestClient, ingestions: FakeIngestions) -> None:
    assert upload(client, ROWS, wait="false").status_code == 202
    get_services(client).buckets.datasets.write("incoming/rows.jsonl", ROWS.encode())
    assert client.post("/datasets", data={"incoming": "incoming/rows.jsonl", "wait": "false"}).status_code == 202
    assert ingestions.started[1]["source"] == "incoming/rows.jsonl"


def test_large_file_in_the_store_is_left_to_a_job(tmp_path: Path) -> None:
    with run_test_service(tmp_path / "home", ingest_request_bytes=1000) as client:
        fake = FakeIngestions(client)
        get_services(client).datasets.ingestion._jobs = fake  # pyright: ignore[reportPrivateUsage]
        get_services(client).buckets.datasets.write("incoming/rows.jsonl", ROWS.encode())
        assert client.post("/datasets", data={"incoming": "incoming/rows.jsonl"}).status_code == 202
        assert fake.started[0]["source"] == "incoming/rows.jsonl"


def test_processing_dataset_shows_the_progress_of_its_job(client: TestClient, ingestions: FakeIngestions) -> None:
    view = upload(client, ROWS, wait="false").json()
    path = f"/datasets/{view['processed_dataset_id']}"
    detail = client.get(path).json()
    assert (detail["status"], detail["failure"], detail["preview"]) == ("processing", None, {})
    assert "is being processed" in get_error(client.get(path + "/rows"), 409)["message"]
    job = ingestions.store.find_job(view["job_id"])
    assert job is not None
    failure = Failure(code="invalid_data", message="line 2: text is a number")
    ingestions.store.replace_job(job.model_copy(update={"status": Status.FAILED, "failure": failure}))
    detail = client.get(path).json()
    assert (detail["status"], detail["failure"]["message"]) == ("failed", failure.message)


def test_dataset_whose_job_was_deleted_counts_as_failed(client: TestClient, ingestions: FakeIngestions) -> None:
    view = upload(client, ROWS, wait="false").json()
    ingestions.store.delete_job(view["job_id"])
    detail = client.get(f"/datasets/{view['processed_dataset_id']}").json()
    assert (detail["status"], "its job was deleted" in detail["failure"]["message"]) == ("failed", True)
