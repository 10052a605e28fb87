"""How long whoever asked will still wait. Adapters bound their calls and retries by it; it follows the caller through threads.

Client libraries of cloud services retry for a minute or more by default. A caller of the API waits 5 s.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

MIN_TIMEOUT_S = 0.05  # a call that is made at all gets this long: a library takes 0 for "for ever"

_deadline_at: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextmanager
def deadline(timeout_s: float) -> Generator[None]:
    """Everything below is for somebody who waits that long, or less if an outer caller waits less."""
    token = _deadline_at.set(time.monotonic() + remaining_s(timeout_s))
    try:
        yield
    finally:
        _deadline_at.reset(token)


def remaining_s(max_s: float) -> float:
    """Seconds that a call may take: `at_most_s`, or what is left of the caller's patience."""
    until = _deadline_at.get()
    return max_s if until is None else max(MIN_TIMEOUT_S, min(max_s, until - time.monotonic()))
