"""The caller's deadline, a context variable. Adapters bound their calls and retries by it; worker threads inherit it.

Client libraries of cloud services retry for a minute or more by default. An API request waits 5 s.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

MIN_TIMEOUT_S = 0.05  # never 0, which some libraries take for "no timeout"

_deadline_at: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextmanager
def deadline(timeout_s: float) -> Generator[None]:
    """Bound every call in the block by this timeout, or by an outer deadline that is earlier."""
    token = _deadline_at.set(time.monotonic() + remaining_s(timeout_s))
    try:
        yield
    finally:
        _deadline_at.reset(token)


def remaining_s(max_s: float) -> float:
    """Seconds that a call may take: `max_s`, or the time left until the deadline if that is less."""
    deadline_at = _deadline_at.get()
    return max_s if deadline_at is None else max(MIN_TIMEOUT_S, min(max_s, deadline_at - time.monotonic()))
