"""Work that runs beside the main thread, such as waiting for child processes, and whose failure is raised where it is asked for.

It must not draw random numbers, and not use a library that the main thread uses at the same time. It gets what the main thread leaves of
the processors.
"""

import os
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")

NICENESS = 10  # about a tenth of a processor that the main thread wants as well; child processes inherit it


class BackgroundTask(Generic[Result]):
    """A function that runs in its own thread, from now on. The thread does not keep the process alive."""

    def __init__(self, name: str, run: Callable[[], Result]) -> None:
        self._run = run
        self._results: list[Result] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._keep_outcome, name=name, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns or raises at once."""
        return not self._thread.is_alive()

    def wait(self) -> Result:
        """Wait until the function has returned; returns its result, or raises what it raised. A signal's handler may interrupt it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _keep_outcome(self) -> None:
        if sys.platform == "linux":  # elsewhere it would be the niceness of the whole process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._results.append(self._run())
        except Exception as error:  # noqa: BLE001  # kept, and raised in the thread that waits
            self._error = error
