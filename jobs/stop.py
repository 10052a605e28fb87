"""Stopping promptly, whatever the main thread is doing.

A signal handler runs in the main thread only between two of its bytecodes. One backward pass is a single call that can
take many seconds, so a listener thread hears the signal as well, through the wake-up pipe, and sets a deadline: if the
main thread has not unwound by then, `last_resort` writes the last word in its stead and ends the process.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Literal

from jobs.errors import Cancelled

log = logging.getLogger(__name__)

Reason = Literal["cancel", "timeout"]
GRACE_S = 0.6  # for the main thread to unwind; a cancel must be over in 2 s, and hearing of it takes 0.5


class Stop:
    """A request to stop, which can come from a signal, from the service, or from the clock."""

    def __init__(self, last_resort: Callable[[Reason], object], grace_s: float = GRACE_S) -> None:
        self.reason: Reason | None = None
        self._last_resort = last_resort
        self._grace_s = grace_s
        self._lock = threading.Lock()
        self._raised = False
        self._settled = threading.Event()

    def listen(self, time_limit_s: float | None = None) -> None:
        """Hear SIGTERM and SIGINT from now on, and the clock. To be called by the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._interrupt)
        threading.Thread(target=self._hear, args=(reader,), name="stop-listener", daemon=True).start()
        if time_limit_s is not None:
            clock = threading.Timer(time_limit_s, self.ask, args=("timeout",))
            clock.daemon = True
            clock.start()

    def ask(self, reason: Reason) -> None:
        """Stop the attempt; from any thread, as often as one likes."""
        if self._note(reason):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # also ends a sleep or a read

    def check(self) -> None:
        """Raises Cancelled when a stop was asked for."""
        if self.reason is not None and not self._settled.is_set():
            raise Cancelled(self.reason)

    def settle(self) -> None:
        """The main thread has its last word ready: from here on nothing interrupts it."""
        self._settled.set()

    def _hear(self, reader: int) -> None:
        while signals := os.read(reader, 16):
            if {signal.SIGTERM, signal.SIGINT} & set(signals):
                self._note("cancel")

    def _note(self, reason: Reason) -> bool:
        """Remember the first request and start its deadline; False for all others."""
        with self._lock:
            if self.reason is not None or self._settled.is_set():
                return False
            self.reason = reason
        log.warning("asked to stop", extra={"reason": reason})
        threading.Thread(target=self._insist, name="stop-deadline", daemon=True).start()
        return True

    def _insist(self) -> None:
        if not self._settled.wait(self._grace_s) and self.reason is not None:
            log.warning("the main thread is busy; ending without it", extra={"reason": self.reason})
            self._last_resort(self.reason)

    def _interrupt(self, _number: int, _frame: object) -> None:
        """Runs in the main thread, in the middle of anything: it takes no lock and writes no log."""
        if not self._raised and not self._settled.is_set():
            self._raised = True
            raise Cancelled(self.reason or "cancel")
