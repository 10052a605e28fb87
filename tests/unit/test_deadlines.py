"""Deadlines of contexts, threads and requests, and the limits that routes declare."""

import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from fastapi import APIRouter, FastAPI
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from service.api.route import LimitedRoute, limits
from service.main import ROUTERS
from storage.deadline import MIN_TIMEOUT_S, deadline, remaining_s


def test_without_deadline_default_timeout_applies() -> None:
    assert remaining_s(30) == 30


def test_nested_calls_share_remaining_time() -> None:
    with deadline(4):
        assert 3 < remaining_s(30) <= 4
        assert remaining_s(1) == 1
        with deadline(60):  # an inner deadline never exceeds the outer one
            assert remaining_s(30) <= 4
    assert remaining_s(30) == 30


def test_expired_deadline_leaves_minimum_timeout() -> None:
    with deadline(0):
        assert remaining_s(30) == MIN_TIMEOUT_S


def test_deadline_does_not_apply_to_other_threads() -> None:
    seen: list[float] = []
    with deadline(1):
        thread = threading.Thread(target=lambda: seen.append(remaining_s(30)))
        thread.start()
        thread.join()
    assert seen == [30]


ROUTES = {(method, route.path): route for router in ROUTERS for route in router.routes for method in route.methods}  # type: ignore[attr-defined]


def test_every_route_keeps_declared_limits() -> None:
    assert len(ROUTES) > 25
    assert all(isinstance(route, LimitedRoute) for route in ROUTES.values())


@pytest.mark.parametrize(
    ("method", "path", "seconds", "body_bytes"),
    [
        ("POST", "/train", 4.0, 1 << 20),
        ("GET", "/datasets", 4.0, 1 << 20),
        ("POST", "/datasets", None, None),
        ("DELETE", "/datasets/{processed_dataset_id}", None, 1 << 20),
        ("DELETE", "/jobs/{job_id}", 55.0, 1 << 20),
        ("POST", "/internal/reconcile", 55.0, 1 << 20),
        ("POST", "/internal/jobs/{job_id}/attempts/{attempt}/events", 4.0, 16 << 20),
    ],
)
def test_route_declares_its_limits(method: str, path: str, seconds: float | None, body_bytes: int | None) -> None:
    route = ROUTES[method, path]
    assert isinstance(route, LimitedRoute)
    assert (route.limits.timeout_s, route.limits.body_bytes) == (seconds, body_bytes)


def test_endpoint_has_its_deadline_and_a_stream_has_none() -> None:
    router = APIRouter(route_class=LimitedRoute)

    @router.get("/default")
    def read_default() -> float:  # in a thread
        return remaining_s(1000)

    @router.get("/long")
    @limits(timeout_s=55.0)
    async def read_long() -> float:
        return remaining_s(1000)

    @router.get("/unbounded")
    @limits(timeout_s=None)
    def read_unbounded() -> float:
        return remaining_s(1000)

    @router.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            yield str(remaining_s(1000))

        return StreamingResponse(chunks())

    app = FastAPI()
    app.include_router(router)
    client = TestClient(app)
    assert [client.get(path).json() for path in ("/default", "/long", "/unbounded", "/stream")] == [
        pytest.approx(4.0, abs=0.5),
        pytest.approx(55.0, abs=0.5),
        1000,
        1000,
    ]


@pytest.mark.parametrize("declared", [True, False])
def test_too_large_body_is_refused_while_it_arrives(declared: bool) -> None:
    router, seen = APIRouter(route_class=LimitedRoute), list[int]()

    @router.post("/small")
    @limits(body_bytes=100, body_hint="send less")
    def read(body: dict[str, str]) -> int:
        seen.append(len(body))
        return 1

    app = FastAPI()
    app.include_router(router)

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 50

    response = TestClient(app).post("/small", content=b"x" * 101 if declared else chunks())
    assert (response.status_code, response.json()["error"]["hint"], seen) == (413, "send less", [])
