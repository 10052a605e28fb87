"""The background task that reconciles the open jobs: soon after it is woken, and at a fixed interval."""

import logging
import threading
from collections.abc import Callable

from service.core.errors import TunesmithError

MIN_INTERVAL_S = 0.05  # so that a burst of submissions causes one reconcile

log = logging.getLogger(__name__)


class Reconciler:
    """A thread that calls `reconcile` when woken, and at least every `interval_s` seconds."""

    def __init__(self, reconcile: Callable[[], int], interval_s: float) -> None:
        self._reconcile = reconcile
        self._interval_s = interval_s
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    def start(self) -> None:
        """Start the thread. It reconciles at once, which adopts the attempts that an earlier service left running."""
        self._thread.start()

    def wake(self, job_id: str) -> None:  # noqa: ARG002  # a reconcile looks at every open job
        """Reconcile soon: the next step of a job can be taken."""
        self._woken.set()

    def stop(self) -> None:
        """Finish the reconcile that is running, then end the thread."""
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
            except Exception:  # the thread has no caller: if it ended, every job would be stuck
                log.exception("reconcile failed")
            if not changed:  # after a change, another step may be possible at once
                self._woken.wait(self._interval_s)
            self._stopping.wait(MIN_INTERVAL_S)
