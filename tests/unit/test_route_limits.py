"""The deadline and the body limit of every route: where they are declared, and that they hold over HTTP."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated

import pytest
from fastapi import APIRouter, Body, FastAPI, Request, UploadFile
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message

from service.adapters.access.memory import MemoryAccessStore
from service.api import errors
from service.api.audit import AuditWriter
from service.api.rate_limits import RateLimiter
from service.api.route import LimitedRoute, limits
from service.core.access.audit import AuditLog
from service.core.errors import Unavailable
from service.core.principals import LOCAL_PRINCIPAL, Principal
from service.main import create_app
from service.settings import Settings
from storage.deadline import remaining_s
from tests.factories import START
from tests.unit.api_harness import attempt_headers, get_error, run_test_service, upload

MIB = 1 << 20
DOCS_PATHS = {"/docs"}  # a page that reads no body and calls nothing
FORM_START = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'

# Every route that differs from the default: its deadline in seconds, and its largest body in bytes.
DECLARED_LIMITS = {
    "DELETE /datasets/{processed_dataset_id}": (None, MIB),
    "DELETE /jobs/{job_id}": (55, MIB),
    "DELETE /jobs/{job_id}/checkpoints": (55, MIB),
    "GET /internal/orphans": (55, MIB),
    "GET /storage": (55, MIB),
    "POST /datasets": (None, None),  # the setting max_upload_bytes
    "POST /datasets/check": (None, None),
    "POST /datasets/{processed_dataset_id}/token_lengths": (None, MIB),
    "PUT /datasets/uploads/{token}": (None, None),
    "POST /internal/cleanup": (55, MIB),
    "POST /internal/jobs/{job_id}/attempts/{attempt}/claim": (4, 4 * MIB),
    "POST /internal/jobs/{job_id}/attempts/{attempt}/events": (4, 4 * MIB),
    "POST /internal/jobs/{job_id}/attempts/{attempt}/result": (4, 4 * MIB),
    "POST /internal/reconcile": (55, MIB),
}


# --- declarations ----------------------------------------------------------------------------------------------------


def test_only_the_known_routes_differ_from_the_default(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)  # type: ignore[call-arg]
    found: dict[str, tuple[float | None, int | None]] = {}
    for context in iter_route_contexts(create_app(settings).routes):
        route = context.original_route
        if isinstance(route, APIRoute) and context.path not in DOCS_PATHS:
            assert isinstance(route, LimitedRoute), f"{context.path}: its router needs route_class=LimitedRoute"
            (method,) = context.methods or ()
            found[f"{method} {context.path}"] = (route.limits.timeout_s, route.limits.body_bytes)
    assert {"POST /train", "GET /jobs", "GET /health", "GET /", "GET /capabilities"} <= set(found)
    assert {name: limit for name, limit in found.items() if limit != (4, MIB)} == DECLARED_LIMITS


# --- deadlines -------------------------------------------------------------------------------------------------------

router = APIRouter(route_class=LimitedRoute)


@router.get("/default")
def read_default() -> float:
    return remaining_s(1000)


@router.get("/async")
async def read_async() -> float:
    return remaining_s(1000)


@router.get("/below")
@limits(timeout_s=55)
def read_declared_below() -> float:
    return remaining_s(1000)


@limits(timeout_s=55)
@router.get("/above")
def read_declared_above() -> float:
    return remaining_s(1000)


@router.get("/unbounded")
@limits(timeout_s=None)
def read_unbounded() -> float:
    return remaining_s(1000)


@router.get("/stream")
async def stream() -> StreamingResponse:
    async def chunks() -> AsyncIterator[str]:
        yield f" {remaining_s(1000)}"

    return StreamingResponse(chunks(), headers={"X-Before": str(remaining_s(1000))})


@router.get("/expired")
@limits(timeout_s=0)
def raise_if_expired() -> None:
    if remaining_s(1000) < 1:
        raise Unavailable("the store did not answer")


@router.post("/json")
@limits(body_bytes=100, body_hint="send less")
def read_json(text: Annotated[str, Body()]) -> int:
    return len(text)


@router.post("/form")
@limits(body_bytes=1000)
def read_form(file: UploadFile) -> int | None:
    return file.size


class AdmitsEverybody:
    async def authenticate_caller(self, request: Request) -> Principal:
        return LOCAL_PRINCIPAL


@pytest.fixture(scope="module")
def toy_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    app = FastAPI()
    app.state.settings = Settings(home=tmp_path_factory.mktemp("home"))  # type: ignore[call-arg]
    app.state.authenticator = AdmitsEverybody()
    app.state.rate_limiter = RateLimiter({})
    app.state.audit_writer = AuditWriter(AuditLog(MemoryAccessStore(), lambda: START, random_suffix=lambda: "0"))
    errors.install(app)
    app.include_router(router, prefix="/v1")
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(("path", "seconds"), [("default", 4), ("async", 4), ("below", 55), ("above", 55), ("unbounded", 1000)])
def test_endpoint_runs_under_the_deadline_of_its_route(toy_client: TestClient, path: str, seconds: float) -> None:
    assert toy_client.get(f"/v1/{path}").json() == pytest.approx(seconds, abs=1)


def test_stream_has_no_deadline_once_it_started(toy_client: TestClient) -> None:
    response = toy_client.get("/v1/stream")
    assert float(response.headers["X-Before"]) == pytest.approx(4, abs=1)
    assert float(response.text) == 1000


def test_expired_deadline_is_503_with_retry_after(toy_client: TestClient) -> None:
    response = toy_client.get("/v1/expired")
    assert get_error(response, 503)["code"] == "unavailable"
    assert int(response.headers["Retry-After"]) > 0


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_body_of_exactly_the_limit_is_accepted(toy_client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    assert toy_client.post("/v1/json", content=b'"' + b"x" * 98 + b'"', headers=headers).json() == 98
    error = get_error(toy_client.post("/v1/json", content=b'"' + b"x" * 99 + b'"', headers=headers), 413)
    assert error == {
        "code": "too_large",
        "message": "the body is larger than 100 bytes, the limit of this path",
        "hint": "send less",
        "param": None,
        "errors": [{"message": error["message"], "hint": "send less", "param": None}],
    }


async def post_endless_body(app: ASGIApp, path: str, headers: dict[bytes, bytes]) -> tuple[int, int]:
    """The status of the response to a body that never ends, and how many bytes of it were taken."""
    taken_bytes, statuses = 0, list[int]()

    async def receive() -> Message:
        nonlocal taken_bytes
        assert taken_bytes < 100_000, "the body is read without a limit"
        body = b"x" * 100 if taken_bytes else FORM_START
        taken_bytes += len(body)
        return {"type": "http.request", "body": body, "more_body": True}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": list(headers.items())}
    await asyncio.wait_for(app(scope, receive, send), timeout=10)
    (status,) = statuses
    return status, taken_bytes


def test_body_of_declared_length_is_rejected_unread(toy_client: TestClient) -> None:
    headers = {b"content-type": b"application/json", b"content-length": b"101"}
    assert asyncio.run(post_endless_body(toy_client.app, "/v1/json", headers)) == (413, 0)


@pytest.mark.parametrize(
    ("path", "content_type", "limit_bytes"),
    [("/v1/json", b"application/json", 100), ("/v1/form", b"multipart/form-data; boundary=b", 1000)],
)
def test_body_of_unknown_length_is_rejected_while_it_arrives(
    toy_client: TestClient, caplog: pytest.LogCaptureFixture, path: str, content_type: bytes, limit_bytes: int
) -> None:
    with caplog.at_level(logging.WARNING):
        status, taken_bytes = asyncio.run(post_endless_body(toy_client.app, path, {b"content-type": content_type}))
    assert status == 413
    assert limit_bytes < taken_bytes <= limit_bytes + 100
    assert not caplog.records


def test_upload_and_training_request_have_their_own_limits(readonly_client: TestClient) -> None:
    error = get_error(upload(readonly_client, "x" * 200_000), 413)
    assert (error["code"], "POST /datasets/uploads" in error["hint"]) == ("too_large", True)
    error = get_error(readonly_client.post("/train", content=b"x" * 2_000_000), 413)
    assert (error["code"], error["hint"]) == ("too_large", "")


def test_reports_may_be_larger_than_other_bodies(tmp_path: Path) -> None:
    with run_test_service(tmp_path) as client:
        headers = attempt_headers(client, "job") | {"Content-Type": "application/json"}
        path = "/internal/jobs/job/attempts/1/events"
        assert client.post(path, content=b" " * 2 * MIB + b'{"first_seq": 0}', headers=headers).status_code == 404
        get_error(client.post(path, content=b" " * 17 * MIB, headers=headers), 413)


def test_unknown_path_and_wrong_method_are_reported_as_such_for_any_body(readonly_client: TestClient) -> None:
    body = b"x" * 2_000_000
    get_error(readonly_client.post("/nowhere", content=body), 404)
    get_error(readonly_client.put("/train", content=body), 405)
