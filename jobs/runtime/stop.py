"""Stops an attempt in time, whatever the main thread is doing, and without losing its work.

    cancel      the job ends: at once, even in the middle of a step
    pause       the job waits: it stops after the current step and its checkpoint
    preempted   the compute is taken away (SIGTERM): like a pause, but the platform kills the process 10 s later
    time_slice  the time limit is reached: the training yields before that by itself, so this interrupts everything else

A request reaches the main thread as a signal, whose handler raises Stopped. Inside `defer_stop`, where there is work to save, no signal
is sent: the main thread polls `stop_reason` after every step. Python runs a signal handler only between two bytecodes of the main
thread, and one backward pass is a single call that can take many seconds. So requests have deadlines: if the main thread has not reacted
by then, `force_exit` publishes the result from another thread and ends the process.

A thread receives the signals through the wake-up file descriptor. The handler in the main thread only checks for a request: it takes no
lock and writes no log.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from jobs.runtime.errors import Stopped, StopReason

log = logging.getLogger(__name__)

SIGNAL_RETRY_S = 0.1
INTERRUPT_GRACE_S = 0.6  # for the main thread to react; a cancel must be over in 2 s, and its directive takes up to 0.5 s to arrive
PREEMPTION_DEADLINE_S = 8.0  # after a SIGTERM, so that one or two seconds are left to publish the result
SIGKILL_DELAY_S = 10.0  # after a SIGTERM: Cloud Run and the local launcher wait this long
SHUTDOWN_RESERVE_S = 15.0  # reserved at the end of a time limit
MAX_SHUTDOWN_SHARE = 0.1  # of the time limit; the reserve is never more

REASON_BY_SIGNAL: dict[int, StopReason] = {signal.SIGTERM: "preempted", signal.SIGINT: "cancel"}
WAKE_SIGNAL = signal.SIGUSR1  # makes the main thread check for a request; it also ends a sleep or a read


class StopController:
    """Collects requests to stop from signals, the service and the clock. The first one counts, but a cancel replaces any other."""

    def __init__(
        self,
        force_exit: Callable[[StopReason], object],
        *,
        on_request: Callable[[StopReason], object] = lambda _: None,
        grace_s: float = INTERRUPT_GRACE_S,
        preemption_deadline_s: float = PREEMPTION_DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._force_exit = force_exit
        self._on_request = on_request
        self._grace_s = grace_s
        self._preemption_deadline_s = preemption_deadline_s
        self._shutdown_reserve_s = SHUTDOWN_RESERVE_S
        self._clock = clock
        self._lock = threading.Lock()
        self._stop_reason: StopReason | None = None
        self._requested: set[StopReason] = set()
        self._ends_at: float | None = None  # when the work is interrupted: by the time limit or an earlier deadline
        self._killed_at: float | None = None  # when the platform may kill the process
        self._is_deferred = False
        self._raised = False  # the main thread is stopping already, so a signal raises nothing
        self._shutdown_begun = threading.Event()  # the main thread has left its work
        self._finalized = threading.Event()

    @property
    def stop_reason(self) -> StopReason | None:
        """The requested reason to stop; None if nothing is requested."""
        return self._stop_reason

    def install_signal_handlers(self, time_limit_s: float | None = None) -> None:
        """Handle SIGTERM, SIGINT and the time limit from now on. Call it from the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*REASON_BY_SIGNAL, WAKE_SIGNAL):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._read_signals, args=(reader,), name="stop-listener", daemon=True).start()
        if time_limit_s is not None:
            self._shutdown_reserve_s = shutdown_reserve_s(time_limit_s)
            self._killed_at = self._clock() + time_limit_s
            self._ends_at = self._killed_at - self._shutdown_reserve_s
            timer = threading.Timer(time_limit_s - self._shutdown_reserve_s, self.request, args=("time_slice",))
            timer.daemon = True
            timer.start()

    def request(self, reason: StopReason) -> None:
        """Request a stop, from any thread; repeated requests have no effect."""
        with self._lock:
            if reason in self._requested or self._finalized.is_set():
                return
            self._requested.add(reason)
            if self._stop_reason is None or reason == "cancel":
                self._stop_reason = reason
            deadline_s = self._deadline_s(reason)
            if deadline_s is not None and reason != "pause":
                self._ends_at = _earlier(None if reason == "time_slice" else self._ends_at, self._clock() + deadline_s)
            if reason == "preempted":
                self._killed_at = _earlier(self._killed_at, self._clock() + SIGKILL_DELAY_S)
            should_interrupt = self._should_interrupt
        log.warning("stop requested", extra={"reason": reason})
        if deadline_s is not None:
            ended = self._shutdown_begun if reason == "pause" else self._finalized
            threading.Thread(target=self._enforce_deadline, args=(deadline_s, ended), name="stop-deadline", daemon=True).start()
        self._on_request(reason)
        if should_interrupt:
            _wake_main_thread()

    def check(self) -> None:
        """Raises Stopped if a stop is requested; inside `defer_stop` only for a cancel or when the time is up."""
        if self._should_interrupt and self._stop_reason is not None:
            self._raised = True
            raise Stopped(self._stop_reason)

    @contextmanager
    def defer_stop(self) -> Generator[None]:
        """Inside, the main thread polls `stop_reason` at every step. On exit, raises Stopped for a request that it did not handle."""
        self.check()
        try:
            self._is_deferred = True
            yield
        except Stopped:
            self._raised = True  # the main thread is stopping already; a second exception would disturb it
            raise
        finally:
            self._is_deferred = False
        self.check()

    def time_left_s(self) -> float | None:
        """Seconds until everything except publishing the result must be done; None without a limit."""
        return None if self._ends_at is None else max(0.0, self._ends_at - self._clock())

    def time_until_kill_s(self) -> float | None:
        """Seconds until the platform may kill the process; None without a limit."""
        return None if self._killed_at is None else max(0.0, self._killed_at - self._clock())

    def begin_shutdown(self) -> None:
        """The main thread has left its work and flushes what it has. A pause waits for that; other requests have a deadline."""
        self._raised = True
        self._shutdown_begun.set()

    def finalize(self) -> StopReason | None:
        """The main thread publishes its result: from here on nothing interrupts it. Returns the requested reason to stop, if any."""
        self._shutdown_begun.set()
        with self._lock:
            self._finalized.set()
            return self._stop_reason

    @property
    def _should_interrupt(self) -> bool:
        """Whether the request justifies an exception at any point of the main thread."""
        if self._stop_reason is None or self._finalized.is_set():
            return False
        return not self._is_deferred or self._stop_reason == "cancel" or "time_slice" in self._requested

    def _deadline_s(self, reason: StopReason) -> float | None:
        """Seconds after which the attempt ends without the main thread; None: wait for the main thread."""
        match reason:
            case "cancel":
                return self._grace_s
            case "pause":
                return None if self._is_deferred else self._grace_s
            case "preempted":
                return self._preemption_deadline_s
            case "time_slice":
                return self._shutdown_reserve_s / 2

    def _read_signals(self, reader: int) -> None:
        while signals := os.read(reader, 16):
            for number in signals:
                if number in REASON_BY_SIGNAL:
                    self.request(REASON_BY_SIGNAL[number])
        os.close(reader)

    def _enforce_deadline(self, deadline_s: float, ended: threading.Event) -> None:
        # A signal that arrives while the handler of another one runs does not end a sleep, so it is sent again.
        for _ in range(int(deadline_s // SIGNAL_RETRY_S)):
            if ended.wait(SIGNAL_RETRY_S):
                return
            if self._should_interrupt and not self._raised:
                _wake_main_thread()
        if not ended.wait(deadline_s % SIGNAL_RETRY_S) and self._stop_reason is not None:
            log.warning("main thread is busy, ending without it", extra={"reason": self._stop_reason})
            self._force_exit(self._stop_reason)

    def _on_signal(self, _number: int, _frame: object) -> None:
        """Runs in the main thread at any point: it takes no lock and writes no log."""
        if not self._raised:
            self.check()


class NeverStop:
    """A StopSignal that never requests a stop: for worker processes, which rank 0 stops or kills, and for a trainer that runs alone."""

    stop_reason = None

    def check(self) -> None:
        """Never raises."""

    def defer_stop(self) -> AbstractContextManager[None]:
        return nullcontext()

    def time_left_s(self) -> float | None:
        return None


def _wake_main_thread() -> None:
    """Make the main thread check for a request."""
    signal.pthread_kill(threading.main_thread().ident or 0, WAKE_SIGNAL)


def shutdown_reserve_s(time_limit_s: float) -> float:
    """Seconds at the end of a time limit that are reserved for publishing the result."""
    return min(SHUTDOWN_RESERVE_S, time_limit_s * MAX_SHUTDOWN_SHARE)


def _earlier(current: float | None, new: float) -> float:
    return new if current is None else min(current, new)
