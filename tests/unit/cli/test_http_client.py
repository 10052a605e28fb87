"""The HTTP client: retries, idempotency keys, event streams and errors."""

import io
import json
from collections.abc import Callable

import httpx2
import pytest

from cli.errors import ApiError
from cli.http_client import MAX_TRIES, Client
from tests.unit.cli.fake_service import BUSY, CONNECTION_LOST, JOB_CREATED, UNAVAILABLE, FakeService

JOB = httpx2.Response(200, json={"job_id": "training_1"})
DONE = "event: done\ndata: {}\n\n"


def make_event_stream(*cursors: int, end: str = "") -> httpx2.Response:
    rows = "".join(f"id: {cursor}\ndata: {json.dumps({'id': cursor})}\n\n" for cursor in cursors)
    return httpx2.Response(200, text=rows + end, headers={"Content-Type": "text/event-stream"})


JOB_CREATING_CALLS: list[Callable[[Client], str]] = [
    lambda client: client.train({"processed_dataset_id": "dataset_1"}),
    lambda client: client.export("training_0", 40, {}),
    lambda client: client.export("training_0", None, {}),
    lambda client: client.clone("training_0", {}),
]


@pytest.mark.parametrize("create_job", JOB_CREATING_CALLS)
def test_job_creation_is_retried_with_same_key(create_job: Callable[[Client], str]) -> None:
    service = FakeService(UNAVAILABLE, CONNECTION_LOST, BUSY, JOB_CREATED)
    assert create_job(service.client) == "training_1"
    assert len(service.requests) == 4
    assert len(set(service.idempotency_keys)) == 1


@pytest.mark.parametrize("create_job", JOB_CREATING_CALLS)
def test_each_job_gets_its_own_key(create_job: Callable[[Client], str]) -> None:
    service = FakeService(JOB_CREATED)
    create_job(service.client)
    create_job(service.client)
    assert len(set(service.idempotency_keys)) == 2


@pytest.mark.parametrize(("response", "status"), [(UNAVAILABLE, 503), (BUSY, 429)])
def test_persistent_error_is_raised_with_message(response: httpx2.Response, status: int) -> None:
    service = FakeService(response)
    with pytest.raises(ApiError) as excinfo:
        service.client.post("/jobs/training_1/pause")
    assert excinfo.value.status == status
    assert len(service.requests) == MAX_TRIES


def test_unreachable_service_error_has_hint() -> None:
    service = FakeService(httpx2.ConnectError("refused"))
    with pytest.raises(ApiError, match="no service answers at http://service") as excinfo:
        service.client.get("/jobs")
    assert "tunesmith serve" in excinfo.value.hint
    assert len(service.requests) == MAX_TRIES


def test_retry_after_is_respected_up_to_a_limit() -> None:
    tomorrow = httpx2.Response(503, json={}, headers={"Retry-After": "86400"})
    dated = httpx2.Response(503, json={}, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})
    service = FakeService(UNAVAILABLE, tomorrow, dated, JOB_CREATED)
    service.client.train({})
    first, second, third = service.sleeps_s
    assert first == 2
    assert second == 30
    assert 0 < third <= 3


def test_invalid_request_is_not_retried_and_names_field() -> None:
    error = {"code": "invalid_request", "message": "hf_token is needed again", "hint": "", "param": "hf_token"}
    service = FakeService(httpx2.Response(400, json={"error": error}))
    with pytest.raises(ApiError) as excinfo:
        service.client.post("/jobs/training_1/retry", {})
    assert (excinfo.value.param, len(service.requests)) == ("hf_token", 1)


def test_incomplete_deletion_raises_with_message() -> None:
    incomplete = {
        "job_id": "training_1",
        "deleted": False,
        "message": "Not everything could be deleted; repeat the call. x",
        "deleted_resources": [],
    }
    service = FakeService(httpx2.Response(503, json=incomplete))
    with pytest.raises(ApiError, match="Not everything could be deleted") as excinfo:
        service.client.delete("/jobs/training_1")
    assert excinfo.value.status == 503
    assert len(service.requests) == 1


def test_upload_is_not_retried() -> None:
    service = FakeService(UNAVAILABLE, JOB_CREATED)
    with pytest.raises(ApiError):
        service.client.upload(io.BytesIO(b"{}"), "rows.jsonl", {})
    assert len(service.requests) == 1


def test_event_stream_resumes_after_interruptions() -> None:
    service = FakeService(
        JOB,
        make_event_stream(1, 2),
        JOB,
        UNAVAILABLE,
        UNAVAILABLE,
        JOB,
        CONNECTION_LOST,
        CONNECTION_LOST,
        JOB,
        make_event_stream(3, end=DONE),
    )
    assert [row["id"] for row in service.client.stream_events("training_1")] == [1, 2, 3]
    last_ids = [request.headers["Last-Event-ID"] for request in service.requests if request.url.path.endswith("/events")]
    assert last_ids == ["0", "2", "2", "2"]


def test_event_stream_of_unreachable_service_fails_quickly() -> None:
    service = FakeService(httpx2.ConnectError("refused"))
    with pytest.raises(ApiError):
        next(service.client.stream_events("training_1"))
    assert len(service.requests) == MAX_TRIES
