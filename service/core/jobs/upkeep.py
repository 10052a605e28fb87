"""A background thread for what must happen sometimes. Without one, a scheduler calls `POST /internal/cleanup`."""

import logging
import threading
from collections.abc import Callable

STOP_TIMEOUT_S = 5.0
FIRST_DELAY_S = 60.0  # a service that was just started has more urgent things to do

log = logging.getLogger(__name__)


class Upkeep:
    """Calls a function soon after the start, and then at a fixed interval, until it is stopped."""

    def __init__(self, function: Callable[[], object], interval_s: float, first_delay_s: float = FIRST_DELAY_S) -> None:
        self._function = function
        self._interval_s = interval_s
        self._first_delay_s = first_delay_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the call that is running if that ends soon: every call can be interrupted and repeated."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        delay_s = self._first_delay_s
        while not self._stopping.wait(delay_s):
            try:
                self._function()
            except Exception:  # the thread has no caller: the next call may succeed
                log.exception("upkeep failed")
            delay_s = self._interval_s
