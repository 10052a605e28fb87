"""The background task that reconciles the open jobs: soon after it is woken, and at a fixed interval."""

import logging
import threading
from collections.abc import Callable, Sequence

from service.core.errors import TunesmithError

MIN_INTERVAL_S = 0.05  # so that a burst of submissions causes one reconcile

log = logging.getLogger(__name__)


class Reconciler:
    """A thread for each launcher, so that one that does not answer delays no job of another.

    Each thread calls `reconcile` with the launcher's name when woken, and at least every `interval_s` seconds.
    """

    def __init__(self, reconcile: Callable[[str], int], launchers: Sequence[str], interval_s: float) -> None:
        self._reconcile = reconcile
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._woken = {name: threading.Event() for name in launchers}
        self._threads = [threading.Thread(target=self._run, args=(name,), name=f"reconciler-{name}", daemon=True) for name in launchers]

    def start(self) -> None:
        """Start the threads. They reconcile at once, which adopts the attempts that an earlier service left running."""
        for thread in self._threads:
            thread.start()

    def wake(self, job_id: str) -> None:  # noqa: ARG002  # a reconcile looks at every open job
        """Reconcile soon: the next step of a job can be taken."""
        for woken in self._woken.values():
            woken.set()

    def stop(self) -> None:
        """Finish the reconciles that are running, then end the threads."""
        self._stopping.set()
        for woken in self._woken.values():
            woken.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _run(self, launcher: str) -> None:
        woken = self._woken[launcher]
        while not self._stopping.is_set():
            woken.clear()
            changed = 0
            try:
                changed = self._reconcile(launcher)
            except TunesmithError as error:
                log.warning("reconcile did not finish", extra={"launcher": launcher, "error": error.message})
            except Exception:  # the thread has no caller: if it ended, every job of the launcher would be stuck
                log.exception("reconcile failed", extra={"launcher": launcher})
            if not changed:  # after a change, another step may be possible at once
                woken.wait(self._interval_s)
            self._stopping.wait(MIN_INTERVAL_S)
