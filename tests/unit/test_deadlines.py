"""Deadlines: contexts, threads and requests."""

import asyncio
import threading

import pytest

from service.api.deadlines import RequestDeadlineMiddleware
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


@pytest.mark.parametrize(
    ("method", "path", "query", "accept", "seconds"),
    [
        ("POST", "/train", b"", b"*/*", 4.0),
        ("GET", "/datasets", b"", b"*/*", 4.0),
        ("POST", "/datasets", b"", b"*/*", None),
        ("DELETE", "/jobs/j", b"", b"*/*", 55),
        ("POST", "/internal/reconcile", b"", b"*/*", 55),
        ("GET", "/jobs/j/events", b"", b"text/event-stream", None),
        ("GET", "/jobs/j/logs", b"follow=true", b"*/*", None),
        ("POST", "/internal/jobs/j/attempts/1/events", b"", b"*/*", 4.0),
    ],
)
def test_requests_have_deadlines_and_streams_do_not(method: str, path: str, query: bytes, accept: bytes, seconds: float | None) -> None:
    remaining = asyncio.run(remaining_s_in_app(method, path, query, accept))
    assert remaining == pytest.approx(seconds or 1000, abs=0.5)


async def remaining_s_in_app(method: str, path: str, query: bytes, accept: bytes) -> float:
    seen: list[float] = []

    async def app(*_: object) -> None:
        seen.append(remaining_s(1000))

    scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": [(b"accept", accept)]}
    await RequestDeadlineMiddleware(app)(scope, None, None)  # type: ignore[arg-type]
    return seen[0]
