"""Stopping in time, whatever the main thread is doing, and without losing what it has done.

    cancel      the job shall end: at once, also in the middle of a step
    pause       the job shall wait: after the step at work and its checkpoint
    preempted   the compute is taken away (SIGTERM): the same, but the platform kills what is still there 10 s later
    time_slice  the time is up: the training yields before that by itself, and this is for what does not

A request reaches the main thread as a signal, whose handler raises Stopped. Inside `politely`, where there is something to save,
it is not sent: the main thread looks at `wanted` after every step. A handler runs in the main thread only between two of its
bytecodes, and one backward pass is a single call that can take many seconds. So requests have deadlines: if the main thread has
not come by then, `last_resort` writes the last word in its stead and ends the process.

Signals are heard by a thread, through the wake-up pipe. The handler in the main thread only looks: it takes no lock, writes no log.
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
INTERRUPT_GRACE_S = 0.6  # for the main thread to come; a cancel must be over in 2 s, and hearing of it takes 0.5
PREEMPTION_DEADLINE_S = 8.0  # after a SIGTERM, so that one or two are left for the last word
SIGKILL_DELAY_S = 10.0  # after a SIGTERM, by Cloud Run and by the local launcher
SHUTDOWN_RESERVE_S = 15.0  # kept back at the end of a time limit
MAX_SHUTDOWN_SHARE = 0.1  # but not more of it than this

REASON_BY_SIGNAL: dict[int, StopReason] = {signal.SIGTERM: "preempted", signal.SIGINT: "cancel"}
WAKE_SIGNAL = signal.SIGUSR1  # ours: "there is something to look at"; it also ends a sleep or a read


class StopController:
    """Requests to stop, from signals, from the service, or from the clock. The first one counts, but a cancel always does."""

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
        self._ends_at: float | None = None  # when the time limit interrupts the work, or the earliest deadline
        self._killed_at: float | None = None
        self._is_deferred = False
        self._raised = False
        self._shutdown_begun = threading.Event()  # the main thread has let go of its work
        self._finalized = threading.Event()

    @property
    def stop_reason(self) -> StopReason | None:
        """What was asked for, if anything."""
        return self._stop_reason

    def install_signal_handlers(self, time_limit_s: float | None = None) -> None:
        """Hear SIGTERM and SIGINT from now on, and the clock. To be called by the main thread."""
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
            clock = threading.Timer(time_limit_s - self._shutdown_reserve_s, self.request, args=("time_slice",))
            clock.daemon = True
            clock.start()

    def request(self, reason: StopReason) -> None:
        """Stop the attempt; from any thread, as often as one likes."""
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
            interrupts = self._should_interrupt
        log.warning("asked to stop", extra={"reason": reason})
        if deadline_s is not None:
            until = self._shutdown_begun if reason == "pause" else self._finalized
            threading.Thread(target=self._enforce_deadline, args=(deadline_s, until), name="stop-deadline", daemon=True).start()
        self._on_request(reason)
        if interrupts:
            _wake_main_thread()

    def check(self) -> None:
        """Raises Stopped when a stop was asked for; inside `politely` only for a cancel, or when the time is up."""
        if self._should_interrupt and self._stop_reason is not None:
            self._raised = True
            raise Stopped(self._stop_reason)

    @contextmanager
    def defer_stop(self) -> Generator[None]:
        """Inside, the main thread looks at `wanted` at every step by itself. What it has not obeyed by the end is raised then."""
        self.check()
        try:
            self._is_deferred = True
            yield
        except Stopped:
            self._raised = True  # the main thread is on its way: a second exception would only get in between
            raise
        finally:
            self._is_deferred = False
        self.check()

    def time_left_s(self) -> float | None:
        """Until everything but the last word must be done; None: no limit."""
        return None if self._ends_at is None else max(0.0, self._ends_at - self._clock())

    def time_until_kill_s(self) -> float | None:
        """Until the platform may kill the process; None: no limit."""
        return None if self._killed_at is None else max(0.0, self._killed_at - self._clock())

    def begin_shutdown(self) -> None:
        """The main thread has let go of its work. It tidies up now: a pause waits for that, and only a deadline cuts it short."""
        self._raised = True
        self._shutdown_begun.set()

    def finalize(self) -> StopReason | None:
        """The main thread has its last word ready: from here on nothing interrupts it. Returns what was asked for by now."""
        self._shutdown_begun.set()
        with self._lock:
            self._finalized.set()
            return self._stop_reason

    @property
    def _should_interrupt(self) -> bool:
        """Whether what is wanted is worth an exception in the middle of anything."""
        if self._stop_reason is None or self._finalized.is_set():
            return False
        return not self._is_deferred or self._stop_reason == "cancel" or "time_slice" in self._requested

    def _deadline_s(self, reason: StopReason) -> float | None:
        """When the last word is spoken without the main thread; None: when it comes."""
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

    def _enforce_deadline(self, deadline_s: float, until: threading.Event) -> None:
        # A signal that comes while another one's handler runs is not noticed by a sleep that then goes on: it is sent again.
        for _ in range(int(deadline_s // SIGNAL_RETRY_S)):
            if until.wait(SIGNAL_RETRY_S):
                return
            if self._should_interrupt and not self._raised:
                _wake_main_thread()
        if not until.wait(deadline_s % SIGNAL_RETRY_S) and self._stop_reason is not None:
            log.warning("the main thread is busy; ending without it", extra={"reason": self._stop_reason})
            self._force_exit(self._stop_reason)

    def _on_signal(self, _number: int, _frame: object) -> None:
        """Runs in the main thread, in the middle of anything: it takes no lock and writes no log."""
        if not self._raised:
            self.check()


class NeverStop:
    """A stop signal that is never given: for worker processes, which rank 0 stops or kills, and for a trainer that runs alone."""

    stop_reason = None

    def check(self) -> None:
        """Return always."""

    def defer_stop(self) -> AbstractContextManager[None]:
        return nullcontext()

    def time_left_s(self) -> float | None:
        return None


def _wake_main_thread() -> None:
    """Let the main thread look at what is wanted."""
    signal.pthread_kill(threading.main_thread().ident or 0, WAKE_SIGNAL)


def shutdown_reserve_s(time_limit_s: float) -> float:
    """How much of a time limit is kept back for the last word."""
    return min(SHUTDOWN_RESERVE_S, time_limit_s * MAX_SHUTDOWN_SHARE)


def _earlier(one: float | None, other: float) -> float:
    return other if one is None else min(one, other)
