"""A stop request interrupts the main thread in time or forces the exit, and does not interrupt saving."""

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from jobs.runtime.context import deadline_reached
from jobs.runtime.errors import Stopped, StopReason
from jobs.runtime.shutdown import FORCED_SHUTDOWN, SHUTDOWN_TIMEOUTS, cap_timeouts
from jobs.runtime.stop import REASON_BY_SIGNAL, WAKE_SIGNAL, StopController, shutdown_reserve_s

HANG_TIMEOUT_S = 20.0  # no test takes that long unless it hangs
GRACE_S = 0.15


@dataclass
class ForceExitRecorder:
    """A `force_exit` that records its calls."""

    reasons: list[StopReason] = field(default_factory=list)
    called: threading.Event = field(default_factory=threading.Event)

    def __call__(self, reason: StopReason) -> None:
        self.reasons.append(reason)
        self.called.set()


@pytest.fixture
def force_exit() -> ForceExitRecorder:
    return ForceExitRecorder()


@pytest.fixture
def make(force_exit: ForceExitRecorder) -> Iterator[Callable[..., StopController]]:
    """Makes a StopController with its signal handlers; afterwards restores the old handlers and ends every deadline."""
    made: list[StopController] = []
    before = {number: signal.getsignal(number) for number in REASON_BY_SIGNAL}

    def make(time_limit_s: float | None = None, *, preempted_s: float = GRACE_S) -> StopController:
        made.append(StopController(force_exit, grace_s=GRACE_S, preemption_deadline_s=preempted_s))
        made[-1].install_signal_handlers(time_limit_s)
        return made[-1]

    yield make
    for stop in made:
        stop.finalize()
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.signal(WAKE_SIGNAL, signal.SIG_IGN)  # a signal may still be pending
    os.close(signal.set_wakeup_fd(-1))  # ends the signal thread


Make = Callable[..., StopController]


@contextmanager
def assert_stopped(reason: StopReason) -> Generator[None]:
    """The block raises Stopped with that reason."""
    try:
        yield
    except Stopped as request:
        assert request.reason == reason
        return
    pytest.fail("Stopped was not raised")


def call_later(call: Callable[[], object], after_s: float = 0.05) -> None:
    """Call `call` from another thread after `after_s`."""
    timer = threading.Timer(after_s, call)
    timer.daemon = True
    timer.start()


def make_signal_sender(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def block_signals(seconds: float) -> None:
    """Block signals like a long backward pass, in which no handler runs."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {WAKE_SIGNAL, *REASON_BY_SIGNAL})
    time.sleep(seconds)
    signal.pthread_sigmask(signal.SIG_SETMASK, old)


# --- outside of defer_stop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["cancel", "pause", "preempted", "time_slice"])
def test_request_outside_training_interrupts_immediately(make: Make, force_exit: ForceExitRecorder, reason: StopReason) -> None:
    stop = make()
    call_later(lambda: stop.request(reason))
    began = time.monotonic()
    with assert_stopped(reason):
        time.sleep(HANG_TIMEOUT_S)
    assert time.monotonic() - began < 1
    assert stop.finalize() == reason
    assert force_exit.reasons == []


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "preempted"), (signal.SIGINT, "cancel")])
def test_signals_map_to_reasons(make: Make, number: signal.Signals, reason: StopReason) -> None:
    stop = make()
    call_later(make_signal_sender(number))
    with assert_stopped(reason):
        time.sleep(HANG_TIMEOUT_S)
    assert stop.stop_reason == reason


def test_unnoticed_interrupt_is_sent_again(make: Make) -> None:
    stop = make(preempted_s=HANG_TIMEOUT_S)
    signal.signal(WAKE_SIGNAL, signal.SIG_IGN)
    stop.request("preempted")
    signal.signal(WAKE_SIGNAL, stop._on_signal)
    began = time.monotonic()
    with assert_stopped("preempted"):
        time.sleep(HANG_TIMEOUT_S)
    assert time.monotonic() - began < HANG_TIMEOUT_S / 2


@pytest.mark.parametrize("reason", ["cancel", "pause", "preempted"])
def test_unresponsive_main_thread_is_force_exited(make: Make, force_exit: ForceExitRecorder, reason: StopReason) -> None:
    stop = make()
    call_later(lambda: stop.request(reason))
    with assert_stopped(reason):
        block_signals(0.05 + 3 * GRACE_S)
    assert force_exit.reasons == [reason]


def test_first_request_wins(make: Make) -> None:
    stop = make()
    with assert_stopped("pause"), stop.defer_stop():
        stop.request("pause")
        stop.request("preempted")
        assert stop.stop_reason == "pause"


def test_swallowed_interrupt_is_raised_at_next_check(make: Make) -> None:
    stop = make()
    with assert_stopped("pause"):
        stop.request("pause")
        time.sleep(HANG_TIMEOUT_S)
    with assert_stopped("pause"):
        stop.check()


def test_stopped_is_raised_only_once(make: Make) -> None:
    stop = make()
    try:
        stop.request("pause")
        time.sleep(HANG_TIMEOUT_S)
    except Stopped:
        stop.request("cancel")
        time.sleep(0.02)
    assert stop.finalize() == "cancel"


def test_requests_after_finalize_are_ignored(make: Make, force_exit: ForceExitRecorder) -> None:
    stop = make()
    assert stop.finalize() is None
    stop.request("cancel")
    os.kill(os.getpid(), signal.SIGTERM)
    stop.check()
    time.sleep(2 * GRACE_S)
    assert force_exit.reasons == []
    assert stop.stop_reason is None


# --- inside of defer_stop --------------------------------------------------------------------------------------------


def test_deferred_pause_waits_for_check_without_deadline(make: Make, force_exit: ForceExitRecorder) -> None:
    stop = make()
    steps = 0
    with assert_stopped("pause"), stop.defer_stop():
        stop.request("pause")
        while steps < 5:
            time.sleep(GRACE_S / 2)
            stop.check()
            steps += 1
        assert stop.stop_reason == "pause"
        raise Stopped("pause")
    assert force_exit.reasons == []


def test_unhandled_request_is_raised_when_deferral_ends(make: Make) -> None:
    stop, after = make(), []
    with assert_stopped("pause"):
        with stop.defer_stop():
            stop.request("pause")
        after.append("not reached")
    assert after == []


def test_earlier_request_is_raised_when_deferral_starts(make: Make) -> None:
    stop = make()
    with assert_stopped("pause"):
        stop.request("pause")
        time.sleep(HANG_TIMEOUT_S)
    with assert_stopped("pause"), stop.defer_stop():
        pytest.fail("the block was entered")


def test_deferred_sigterm_leaves_limited_time_to_save(make: Make, force_exit: ForceExitRecorder) -> None:
    stop = make(preempted_s=0.4)
    with assert_stopped("preempted"), stop.defer_stop():
        call_later(make_signal_sender(signal.SIGTERM), 0)
        while stop.stop_reason is None:
            time.sleep(0.01)
        assert stop.stop_reason == "preempted"
        left = stop.time_left_s()
        assert left is not None
        assert 0 < left <= 0.4
        assert force_exit.reasons == []
        assert force_exit.called.wait(2)  # saving took too long
        assert stop.time_left_s() == 0
    assert force_exit.reasons == ["preempted"]


def test_sigterm_ends_a_deferred_pause(make: Make, force_exit: ForceExitRecorder) -> None:
    stop = make()
    with assert_stopped("pause"), stop.defer_stop():
        stop.request("pause")
        stop.request("preempted")
        assert force_exit.called.wait(2)
    assert force_exit.reasons == ["pause"]


@pytest.mark.parametrize("before", [None, "pause", "preempted"])
def test_cancel_interrupts_deferred_stop(make: Make, force_exit: ForceExitRecorder, before: StopReason | None) -> None:
    stop = make(preempted_s=HANG_TIMEOUT_S)
    with assert_stopped("cancel"), stop.defer_stop():
        if before:
            stop.request(before)
        call_later(lambda: stop.request("cancel"))
        time.sleep(HANG_TIMEOUT_S)
    assert stop.finalize() == "cancel"
    assert force_exit.reasons == []


def test_cancel_during_pause_cleanup_forces_exit(make: Make, force_exit: ForceExitRecorder) -> None:
    stop = make()
    with assert_stopped("pause"), stop.defer_stop():
        stop.request("pause")
        raise Stopped("pause")
    stop.begin_shutdown()
    call_later(make_signal_sender(signal.SIGINT), 0)
    assert force_exit.called.wait(2)  # the main thread was not interrupted
    assert force_exit.reasons == ["cancel"]


def test_pause_cleanup_has_no_deadline(make: Make, force_exit: ForceExitRecorder) -> None:
    stop = make()
    with assert_stopped("pause"):
        stop.request("pause")
        time.sleep(HANG_TIMEOUT_S)
    stop.begin_shutdown()
    time.sleep(3 * GRACE_S)
    assert stop.finalize() == "pause"
    assert force_exit.reasons == []


# --- the time limit --------------------------------------------------------------------------------------------------


def test_training_is_interrupted_before_the_time_limit(make: Make, force_exit: ForceExitRecorder) -> None:
    stop = make(2.0)
    with assert_stopped("time_slice"), stop.defer_stop():
        time.sleep(HANG_TIMEOUT_S)
    left = stop.time_until_kill_s()
    assert left is not None
    assert 0 < left <= 0.2
    stop.finalize()
    assert force_exit.reasons == []


def test_time_limit_ends_a_deferred_pause(make: Make) -> None:
    stop = make(0.4)
    with assert_stopped("pause"), stop.defer_stop():
        stop.request("pause")
        time.sleep(HANG_TIMEOUT_S)


def test_time_limit_forces_exit_of_blocked_main_thread(make: Make, force_exit: ForceExitRecorder) -> None:
    make(0.3)
    with assert_stopped("time_slice"):
        block_signals(0.5)
    assert force_exit.reasons == ["time_slice"]


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_reported_and_shrinks_on_preemption(make: Make, force_exit: ForceExitRecorder) -> None:
    make()  # restores the signal handlers afterwards
    clock = Clock()
    stop = StopController(force_exit, clock=clock)
    assert (stop.time_left_s(), stop.time_until_kill_s()) == (None, None)
    stop.install_signal_handlers(3600)
    assert (stop.time_left_s(), stop.time_until_kill_s()) == (3585, 3600)
    clock.now += 3000
    assert stop.time_left_s() == 585
    with assert_stopped("preempted"), stop.defer_stop():
        stop.request("preempted")
        clock.now += 1
        assert (stop.time_left_s(), stop.time_until_kill_s()) == (7, 9)
    stop.finalize()


@pytest.mark.parametrize(("limit_s", "reserve_s"), [(3600, 15), (150, 15), (60, 6), (1, 0.1)])
def test_shutdown_reserve_is_a_fraction_of_short_limits(limit_s: float, reserve_s: float) -> None:
    assert shutdown_reserve_s(limit_s) == pytest.approx(reserve_s)


# --- decisions by time left ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost_s", "left_s", "reached"), [(40, None, False), (40, 100, False), (40, 60, True), (0, 2, False), (0, 0.5, True)]
)
def test_training_yields_while_step_and_save_still_fit(cost_s: float, left_s: float | None, reached: bool) -> None:
    assert deadline_reached(cost_s, left_s) is reached


def test_shutdown_timeouts_fit_time_left() -> None:
    timeouts = SHUTDOWN_TIMEOUTS["completed"]
    assert cap_timeouts(timeouts, None) == cap_timeouts(timeouts, 3600) == timeouts
    short = cap_timeouts(timeouts, 9)
    assert 3 * short.report_s + short.checkpoint_s + short.tracker_s < 8
    assert cap_timeouts(timeouts, 0) == FORCED_SHUTDOWN
    assert cap_timeouts(SHUTDOWN_TIMEOUTS["cancelled"], 5).report_s == SHUTDOWN_TIMEOUTS["cancelled"].report_s
