"""How long whoever asked will still wait. Adapters bound their calls and retries by it; it follows the caller through threads.

Client libraries of cloud services retry for a minute or more by default. A caller of the API waits 5 s.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

LEAST_S = 0.05  # a call that is made at all gets this long: a library takes 0 for "for ever"

_until: ContextVar[float | None] = ContextVar("until", default=None)


@contextmanager
def patience(seconds: float) -> Generator[None]:
    """Everything below is for somebody who waits that long, or less if an outer caller waits less."""
    token = _until.set(time.monotonic() + time_left(seconds))
    try:
        yield
    finally:
        _until.reset(token)


def time_left(at_most_s: float) -> float:
    """Seconds that a call may take: `at_most_s`, or what is left of the caller's patience."""
    until = _until.get()
    return at_most_s if until is None else max(LEAST_S, min(at_most_s, until - time.monotonic()))
