"""The background task that looks at the open jobs: soon after something happened, and every so often anyway."""

import logging
import threading
from collections.abc import Callable

from service.core.errors import TunesmithError

MIN_INTERVAL_S = 0.05  # a burst of submissions wakes it once

log = logging.getLogger(__name__)


class Reconciler:
    """A thread that calls `turn` when woken, and at least every `interval_s`."""

    def __init__(self, reconcile: Callable[[], int], interval_s: float) -> None:
        self._reconcile = reconcile
        self._interval_s = interval_s
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    def start(self) -> None:
        """Begin with a turn at once: it adopts what an earlier service left running."""
        self._thread.start()

    def wake(self, job_id: str) -> None:  # noqa: ARG002  # a turn looks at every open job
        """Something happened that may need a turn."""
        self._woken.set()

    def stop(self) -> None:
        """Finish the turn under way, and no more."""
        self._stopping.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            changed = 0
            try:
                changed = self._reconcile()
            except TunesmithError as error:
                log.warning("reconcile did not finish", extra={"error": error.message})
            except Exception:  # a thread has no caller: if it died, every job would be stuck
                log.exception("reconcile broke off")
            if not changed:  # a change may have made the next one possible
                self._woken.wait(self._interval_s)
            self._stopping.wait(MIN_INTERVAL_S)
