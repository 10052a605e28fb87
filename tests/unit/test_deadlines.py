"""Deadlines of contexts and threads. Those of requests are in test_route_limits.py."""

import threading

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
