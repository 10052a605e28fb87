"""A request to stop reaches the main thread in time, or its deadline does; and what is being saved is not torn apart."""

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from jobs.attempt import HASTY, PATIENCE, within
from jobs.context import is_too_late
from jobs.errors import Reason, Stopped
from jobs.stop import LOOK, MEANING, Stop, last_word_s

LONG_S = 20.0  # nothing here takes that long; it is what would hang
GRACE_S = 0.15


@dataclass
class Resort:
    """A last resort that remembers."""

    reasons: list[Reason] = field(default_factory=list)
    came: threading.Event = field(default_factory=threading.Event)

    def __call__(self, reason: Reason) -> None:
        self.reasons.append(reason)
        self.came.set()


@pytest.fixture
def resort() -> Resort:
    return Resort()


@pytest.fixture
def make(resort: Resort) -> Iterator[Callable[..., Stop]]:
    """Makes a Stop that listens; afterwards signals mean again what they meant, and no deadline is left."""
    made: list[Stop] = []
    before = {number: signal.getsignal(number) for number in MEANING}

    def make(time_limit_s: float | None = None, *, preempted_s: float = GRACE_S) -> Stop:
        made.append(Stop(resort, grace_s=GRACE_S, preempted_s=preempted_s))
        made[-1].listen(time_limit_s)
        return made[-1]

    yield make
    for stop in made:
        stop.settle()
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.signal(LOOK, signal.SIG_IGN)  # one may still be on its way
    os.close(signal.set_wakeup_fd(-1))  # ends the listener


Make = Callable[..., Stop]


@contextmanager
def stopped(reason: Reason) -> Generator[None]:
    """What is inside is stopped, for that reason."""
    try:
        yield
    except Stopped as request:
        assert request.reason == reason
        return
    pytest.fail("it was not stopped")


def soon(call: Callable[[], object], after_s: float = 0.05) -> None:
    """Does it from another thread, in a moment."""
    timer = threading.Timer(after_s, call)
    timer.daemon = True
    timer.start()


def tell(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def in_one_call(seconds: float) -> None:
    """As a long backward pass: no handler runs in it."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {LOOK, *MEANING})
    time.sleep(seconds)
    signal.pthread_sigmask(signal.SIG_SETMASK, old)


# --- outside of what can be saved ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["cancel", "pause", "preempted", "time_slice"])
def test_outside_a_training_a_request_interrupts_at_once(make: Make, resort: Resort, reason: Reason) -> None:
    stop = make()
    soon(lambda: stop.ask(reason))
    began = time.monotonic()
    with stopped(reason):
        time.sleep(LONG_S)
    assert time.monotonic() - began < 1
    assert stop.settle() == reason
    assert resort.reasons == []


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "preempted"), (signal.SIGINT, "cancel")])
def test_what_a_signal_means(make: Make, number: signal.Signals, reason: Reason) -> None:
    stop = make()
    soon(tell(number))
    with stopped(reason):
        time.sleep(LONG_S)
    assert stop.wanted == reason


def test_an_interruption_that_was_not_noticed_is_sent_again(make: Make) -> None:
    stop = make(preempted_s=LONG_S)
    signal.signal(LOOK, signal.SIG_IGN)
    stop.ask("preempted")
    signal.signal(LOOK, stop._look)
    began = time.monotonic()
    with stopped("preempted"):
        time.sleep(LONG_S)
    assert time.monotonic() - began < LONG_S / 2


@pytest.mark.parametrize("reason", ["cancel", "pause", "preempted"])
def test_a_main_thread_that_does_not_come_is_ended_without(make: Make, resort: Resort, reason: Reason) -> None:
    stop = make()
    soon(lambda: stop.ask(reason))
    with stopped(reason):
        in_one_call(0.05 + 3 * GRACE_S)
    assert resort.reasons == [reason]


def test_the_first_request_counts(make: Make) -> None:
    stop = make()
    with stopped("pause"), stop.politely():
        stop.ask("pause")
        stop.ask("preempted")
        assert stop.wanted == "pause"


def test_a_library_that_swallows_the_interruption_meets_it_at_the_next_check(make: Make) -> None:
    stop = make()
    with stopped("pause"):
        stop.ask("pause")
        time.sleep(LONG_S)
    with stopped("pause"):
        stop.check()


def test_it_is_raised_once_so_that_nothing_interrupts_the_way_out(make: Make) -> None:
    stop = make()
    try:
        stop.ask("pause")
        time.sleep(LONG_S)
    except Stopped:
        stop.ask("cancel")
        time.sleep(0.02)
    assert stop.settle() == "cancel"


def test_after_settling_nothing_is_raised_and_nothing_asked_for_counts(make: Make, resort: Resort) -> None:
    stop = make()
    assert stop.settle() is None
    stop.ask("cancel")
    os.kill(os.getpid(), signal.SIGTERM)
    stop.check()
    time.sleep(2 * GRACE_S)
    assert resort.reasons == []
    assert stop.wanted is None


# --- inside ----------------------------------------------------------------------------------------------------------


def test_inside_a_training_a_pause_waits_until_the_main_thread_looks_and_has_no_deadline(make: Make, resort: Resort) -> None:
    stop = make()
    steps = 0
    with stopped("pause"), stop.politely():
        stop.ask("pause")
        while steps < 5:
            time.sleep(GRACE_S / 2)
            stop.check()
            steps += 1
        assert stop.wanted == "pause"
        raise Stopped("pause")
    assert resort.reasons == []


def test_what_was_not_obeyed_inside_is_raised_on_the_way_out(make: Make) -> None:
    stop, after = make(), []
    with stopped("pause"):
        with stop.politely():
            stop.ask("pause")
        after.append("never")
    assert after == []


def test_a_request_from_before_is_raised_on_the_way_in(make: Make) -> None:
    stop = make()
    with stopped("pause"):
        stop.ask("pause")
        time.sleep(LONG_S)
    with stopped("pause"), stop.politely():
        pytest.fail("it was let in")


def test_a_sigterm_inside_a_training_leaves_time_to_save_and_no_more(make: Make, resort: Resort) -> None:
    stop = make(preempted_s=0.4)
    with stopped("preempted"), stop.politely():
        soon(tell(signal.SIGTERM), 0)
        while stop.wanted is None:
            time.sleep(0.01)
        assert stop.wanted == "preempted"
        left = stop.time_left_s()
        assert left is not None
        assert 0 < left <= 0.4
        assert resort.reasons == []
        assert resort.came.wait(2)  # it was not done in time
        assert stop.time_left_s() == 0
    assert resort.reasons == ["preempted"]


def test_a_sigterm_while_a_pause_waits_for_its_step_puts_an_end_to_the_waiting(make: Make, resort: Resort) -> None:
    stop = make()
    with stopped("pause"), stop.politely():
        stop.ask("pause")
        stop.ask("preempted")
        assert resort.came.wait(2)
    assert resort.reasons == ["pause"]


@pytest.mark.parametrize("before", [None, "pause", "preempted"])
def test_a_cancel_interrupts_also_what_is_polite(make: Make, resort: Resort, before: Reason | None) -> None:
    stop = make(preempted_s=LONG_S)
    with stopped("cancel"), stop.politely():
        if before:
            stop.ask(before)
        soon(lambda: stop.ask("cancel"))
        time.sleep(LONG_S)
    assert stop.settle() == "cancel"
    assert resort.reasons == []


def test_a_cancel_while_a_pause_tidies_up_does_not_wait_for_it(make: Make, resort: Resort) -> None:
    stop = make()
    with stopped("pause"), stop.politely():
        stop.ask("pause")
        raise Stopped("pause")
    stop.unwound()
    soon(tell(signal.SIGINT), 0)
    assert resort.came.wait(2)  # and the main thread was not interrupted
    assert resort.reasons == ["cancel"]


def test_a_pause_that_has_unwound_tidies_up_as_long_as_it_takes(make: Make, resort: Resort) -> None:
    stop = make()
    with stopped("pause"):
        stop.ask("pause")
        time.sleep(LONG_S)
    stop.unwound()
    time.sleep(3 * GRACE_S)
    assert stop.settle() == "pause"
    assert resort.reasons == []


# --- the time limit --------------------------------------------------------------------------------------------------


def test_a_training_that_did_not_yield_in_time_is_interrupted_before_the_limit(make: Make, resort: Resort) -> None:
    stop = make(2.0)
    with stopped("time_slice"), stop.politely():
        time.sleep(LONG_S)
    left = stop.killed_in_s()
    assert left is not None
    assert 0 < left <= 0.2
    stop.settle()
    assert resort.reasons == []


def test_the_limit_also_ends_a_pause_that_waits_for_its_step(make: Make) -> None:
    stop = make(0.4)
    with stopped("pause"), stop.politely():
        stop.ask("pause")
        time.sleep(LONG_S)


def test_at_the_limit_the_last_word_does_not_wait_for_the_main_thread(make: Make, resort: Resort) -> None:
    make(0.3)
    with stopped("time_slice"):
        in_one_call(0.5)
    assert resort.reasons == ["time_slice"]


class Clock:
    """Goes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_known_and_shrinks_when_the_machine_is_taken_away(make: Make, resort: Resort) -> None:
    make()  # signals are heard
    clock = Clock()
    stop = Stop(resort, clock=clock)
    assert (stop.time_left_s(), stop.killed_in_s()) == (None, None)
    stop.listen(3600)
    assert (stop.time_left_s(), stop.killed_in_s()) == (3585, 3600)
    clock.now += 3000
    assert stop.time_left_s() == 585
    with stopped("preempted"), stop.politely():
        stop.ask("preempted")
        clock.now += 1
        assert (stop.time_left_s(), stop.killed_in_s()) == (7, 9)
    stop.settle()


@pytest.mark.parametrize(("limit_s", "last_s"), [(3600, 15), (150, 15), (60, 6), (1, 0.1)])
def test_a_short_limit_is_not_spent_on_the_last_word(limit_s: float, last_s: float) -> None:
    assert last_word_s(limit_s) == pytest.approx(last_s)


# --- what follows from it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cost_s", "left_s", "late"), [(40, None, False), (40, 100, False), (40, 60, True), (0, 2, False), (0, 0.5, True)])
def test_a_training_yields_while_a_step_and_a_save_still_fit_with_a_margin(cost_s: float, left_s: float | None, late: bool) -> None:
    assert is_too_late(cost_s, left_s) is late


def test_the_last_word_takes_no_longer_than_the_platform_leaves() -> None:
    patience = PATIENCE["completed"]
    assert within(patience, None) == within(patience, 3600) == patience
    short = within(patience, 9)
    assert 3 * short.words_s + short.checkpoint_s + short.tracker_s < 8
    assert within(patience, 0) == HASTY
    assert within(PATIENCE["cancelled"], 5).words_s == PATIENCE["cancelled"].words_s
