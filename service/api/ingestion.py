"""How many datasets are checked at the same time: reading one keeps a thread and a core busy, and other requests need both."""

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from service.core.errors import Unavailable

QUEUE_PER_SLOT = 4  # requests that wait for a slot; each holds a connection and, on disk, its file

Result = TypeVar("Result")


class IngestionSlots:
    """Threads of their own for ingestion, and a short queue in front of them."""

    def __init__(self, slots: int) -> None:
        self._limiter = CapacityLimiter(slots)
        self._max_waiting = slots * QUEUE_PER_SLOT

    async def run(self, ingest: Callable[[], Result]) -> Result:
        """Call `ingest` in a thread, once there is a slot. Raises Unavailable when too many wait already."""
        if self._limiter.statistics().tasks_waiting >= self._max_waiting:
            raise Unavailable("too many datasets are being uploaded", hint="try again, or send several files one after the other")
        return await to_thread.run_sync(ingest, limiter=self._limiter)
