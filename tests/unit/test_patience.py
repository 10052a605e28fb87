"""How long who waits for what."""

import asyncio
import threading

import pytest

from service.api.patience import Patience
from storage.patience import LEAST_S, patience, time_left


def test_nobody_waiting_means_the_callers_own_limit() -> None:
    assert time_left(30) == 30


def test_what_is_left_is_shared_by_everything_below() -> None:
    with patience(4):
        assert 3 < time_left(30) <= 4
        assert time_left(1) == 1
        with patience(60):  # nobody inside waits longer than whoever is outside
            assert time_left(30) <= 4
    assert time_left(30) == 30


def test_a_patience_that_is_over_still_leaves_a_call_its_shortest_time() -> None:
    with patience(0):
        assert time_left(30) == LEAST_S


def test_another_thread_is_not_hurried_by_accident() -> None:
    seen: list[float] = []
    with patience(1):
        thread = threading.Thread(target=lambda: seen.append(time_left(30)))
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
def test_a_request_is_answered_in_time_and_a_stream_lasts(
    method: str, path: str, query: bytes, accept: bytes, seconds: float | None
) -> None:
    seen = asyncio.run(seen_by_the_app(method, path, query, accept))
    assert seen == pytest.approx(seconds or 1000, abs=0.5)


async def seen_by_the_app(method: str, path: str, query: bytes, accept: bytes) -> float:
    seen: list[float] = []

    async def app(*_: object) -> None:
        seen.append(time_left(1000))

    scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": [(b"accept", accept)]}
    await Patience(app)(scope, None, None)  # type: ignore[arg-type]
    return seen[0]
