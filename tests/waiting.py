"""Polling for the result of another thread or process. Tests, infra and benchmarks use it."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], timeout_s: float = 60.0, *, interval_s: float = 0.01, description: str | Callable[[], str] = "the condition"
) -> T:
    """Call `condition` until it returns a true value, and return that value. It is called at least once.

    `description` names the condition in the error; a callable is evaluated only on timeout, for example to show a log.
    Raises TimeoutError after `timeout_s` seconds; errors of `condition` pass through.
    """
    deadline_at = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline_at:
            raise TimeoutError(f"not true after {timeout_s:g} s: {description() if callable(description) else description}")
        time.sleep(interval_s)
    return value
