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
from contextlib import contextmanager

from jobs.errors import Reason, Stopped

log = logging.getLogger(__name__)

AGAIN_S = 0.1
GRACE_S = 0.6  # for the main thread to come; a cancel must be over in 2 s, and hearing of it takes 0.5
PREEMPTED_S = 8.0  # after a SIGTERM, so that one or two are left for the last word
KILLED_S = 10.0  # after a SIGTERM, by Cloud Run and by the local launcher
LAST_WORD_S = 15.0  # kept back at the end of a time limit
LAST_WORD_SHARE = 0.1  # but not more of it than this

MEANING: dict[int, Reason] = {signal.SIGTERM: "preempted", signal.SIGINT: "cancel"}
LOOK = signal.SIGUSR1  # ours: "there is something to look at"; it also ends a sleep or a read


class Stop:
    """Requests to stop, from signals, from the service, or from the clock. The first one counts, but a cancel always does."""

    def __init__(
        self,
        last_resort: Callable[[Reason], object],
        *,
        heard: Callable[[Reason], object] = lambda _: None,
        grace_s: float = GRACE_S,
        preempted_s: float = PREEMPTED_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._last_resort = last_resort
        self._heard = heard
        self._grace_s = grace_s
        self._preempted_s = preempted_s
        self._last_word_s = LAST_WORD_S
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted: Reason | None = None
        self._asked: set[Reason] = set()
        self._ends_at: float | None = None  # when the time limit interrupts the work, or the earliest deadline
        self._killed_at: float | None = None
        self._polite = False
        self._raised = False
        self._unwound = threading.Event()  # the main thread has let go of its work
        self._settled = threading.Event()

    @property
    def wanted(self) -> Reason | None:
        """What was asked for, if anything."""
        return self._wanted

    def listen(self, time_limit_s: float | None = None) -> None:
        """Hear SIGTERM and SIGINT from now on, and the clock. To be called by the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*MEANING, LOOK):
            signal.signal(number, self._look)
        threading.Thread(target=self._hear, args=(reader,), name="stop-listener", daemon=True).start()
        if time_limit_s is not None:
            self._last_word_s = last_word_s(time_limit_s)
            self._killed_at = self._clock() + time_limit_s
            self._ends_at = self._killed_at - self._last_word_s
            clock = threading.Timer(time_limit_s - self._last_word_s, self.ask, args=("time_slice",))
            clock.daemon = True
            clock.start()

    def ask(self, reason: Reason) -> None:
        """Stop the attempt; from any thread, as often as one likes."""
        with self._lock:
            if reason in self._asked or self._settled.is_set():
                return
            self._asked.add(reason)
            if self._wanted is None or reason == "cancel":
                self._wanted = reason
            deadline_s = self._deadline_s(reason)
            if deadline_s is not None and reason != "pause":
                self._ends_at = _earlier(None if reason == "time_slice" else self._ends_at, self._clock() + deadline_s)
            if reason == "preempted":
                self._killed_at = _earlier(self._killed_at, self._clock() + KILLED_S)
            interrupts = self._interrupts
        log.warning("asked to stop", extra={"reason": reason})
        if deadline_s is not None:
            until = self._unwound if reason == "pause" else self._settled
            threading.Thread(target=self._insist, args=(deadline_s, until), name="stop-deadline", daemon=True).start()
        self._heard(reason)
        if interrupts:
            _look_up()

    def check(self) -> None:
        """Raises Stopped when a stop was asked for; inside `politely` only for a cancel, or when the time is up."""
        if self._interrupts and self._wanted is not None:
            self._raised = True
            raise Stopped(self._wanted)

    @contextmanager
    def politely(self) -> Generator[None]:
        """Inside, the main thread looks at `wanted` at every step by itself. What it has not obeyed by the end is raised then."""
        self.check()
        try:
            self._polite = True
            yield
        except Stopped:
            self._raised = True  # the main thread is on its way: a second exception would only get in between
            raise
        finally:
            self._polite = False
        self.check()

    def time_left_s(self) -> float | None:
        """Until everything but the last word must be done; None: no limit."""
        return None if self._ends_at is None else max(0.0, self._ends_at - self._clock())

    def killed_in_s(self) -> float | None:
        """Until the platform may kill the process; None: no limit."""
        return None if self._killed_at is None else max(0.0, self._killed_at - self._clock())

    def unwound(self) -> None:
        """The main thread has let go of its work. It tidies up now: a pause waits for that, and only a deadline cuts it short."""
        self._raised = True
        self._unwound.set()

    def settle(self) -> Reason | None:
        """The main thread has its last word ready: from here on nothing interrupts it. Returns what was asked for by now."""
        self._unwound.set()
        with self._lock:
            self._settled.set()
            return self._wanted

    @property
    def _interrupts(self) -> bool:
        """Whether what is wanted is worth an exception in the middle of anything."""
        if self._wanted is None or self._settled.is_set():
            return False
        return not self._polite or self._wanted == "cancel" or "time_slice" in self._asked

    def _deadline_s(self, reason: Reason) -> float | None:
        """When the last word is spoken without the main thread; None: when it comes."""
        match reason:
            case "cancel":
                return self._grace_s
            case "pause":
                return None if self._polite else self._grace_s
            case "preempted":
                return self._preempted_s
            case "time_slice":
                return self._last_word_s / 2

    def _hear(self, reader: int) -> None:
        while signals := os.read(reader, 16):
            for number in signals:
                if number in MEANING:
                    self.ask(MEANING[number])
        os.close(reader)

    def _insist(self, deadline_s: float, until: threading.Event) -> None:
        # A signal that comes while another one's handler runs is not noticed by a sleep that then goes on: it is sent again.
        for _ in range(int(deadline_s // AGAIN_S)):
            if until.wait(AGAIN_S):
                return
            if self._interrupts and not self._raised:
                _look_up()
        if not until.wait(deadline_s % AGAIN_S) and self._wanted is not None:
            log.warning("the main thread is busy; ending without it", extra={"reason": self._wanted})
            self._last_resort(self._wanted)

    def _look(self, _number: int, _frame: object) -> None:
        """Runs in the main thread, in the middle of anything: it takes no lock and writes no log."""
        if not self._raised:
            self.check()


def _look_up() -> None:
    """Let the main thread look at what is wanted."""
    signal.pthread_kill(threading.main_thread().ident or 0, LOOK)


def last_word_s(time_limit_s: float) -> float:
    """How much of a time limit is kept back for the last word."""
    return min(LAST_WORD_S, time_limit_s * LAST_WORD_SHARE)


def _earlier(one: float | None, other: float) -> float:
    return other if one is None else min(one, other)
