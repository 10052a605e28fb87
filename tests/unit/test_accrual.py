"""What attempts use and cost over time, and how a month's share of it is found."""

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.job import Attempt, ComputeRate
from service.core.accrual import iter_months, month_of, sum_spending
from tests.factories import START, make_attempt, make_job

L4 = ComputeRate(gpus=1, usd_per_hour=3.6, billing_step_s=0.1, min_billed_s=60)  # 0.1 cents a second
EIGHT_GPUS = ComputeRate(gpus=8, usd_per_hour=36.0)
CPU = ComputeRate(usd_per_hour=0.36)

rates = st.sampled_from([L4, EIGHT_GPUS, CPU, ComputeRate(gpus=2), ComputeRate(), None])
delays_s = st.floats(0, 1e6)
moments = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


@st.composite
def attempts(draw: st.DrawFn) -> Attempt:
    """An attempt in any state: not launched, launched, claimed, ended, with or without having waited for a machine."""
    launched_s, claimed_s, ended_s = (draw(st.none() | delays_s) for _ in range(3))
    return make_attempt(
        rate=draw(rates),
        launched_at=None if launched_s is None else after(launched_s),
        claimed_at=None if claimed_s is None else after(claimed_s),
        ended_at=None if ended_s is None else after(ended_s),
        waited_for_machine=draw(st.booleans()),
    )


@given(st.lists(attempts(), max_size=5), delays_s, delays_s)
def test_spending_never_decreases(attempts: list[Attempt], first_s: float, more_s: float) -> None:
    job = make_job(attempts=tuple(attempts))
    earlier, later = sum_spending(job, after(first_s)), sum_spending(job, after(first_s + more_s))
    assert later.gpu_seconds >= earlier.gpu_seconds >= 0
    assert (later.usd or 0.0) >= (earlier.usd or 0.0) >= 0


@given(st.lists(attempts(), max_size=5), delays_s)
def test_spending_of_job_is_the_sum_over_its_attempts(attempts: list[Attempt], now_s: float) -> None:
    total = sum_spending(make_job(attempts=tuple(attempts)), after(now_s))
    single = [sum_spending(make_job(attempts=(attempt,)), after(now_s)) for attempt in attempts]
    assert total.gpu_seconds == pytest.approx(math.fsum(each.gpu_seconds for each in single))
    assert (total.usd or 0.0) == pytest.approx(math.fsum(each.usd or 0.0 for each in single))
    assert (total.usd is None) == all(each.usd is None for each in single)


@given(attempts(), delays_s)
def test_ended_attempt_costs_no_more_later(attempt: Attempt, more_s: float) -> None:
    ended = attempt.model_copy(update={"ended_at": after(500)})
    job = make_job(attempts=(ended,))
    assert sum_spending(job, after(500)) == sum_spending(job, after(500 + more_s))


@given(attempts(), moments, moments)
def test_months_add_up_to_the_whole(attempt: Attempt, first: datetime, second: datetime) -> None:
    begin, now = sorted((first, second))
    running = attempt.model_copy(update={"launched_at": begin, "claimed_at": begin, "ended_at": None})
    total, months = sum_spending(make_job(attempts=(running,)), now), list(iter_months(running, now))
    assert math.fsum(each.gpu_seconds for _, each in months) == pytest.approx(total.gpu_seconds, abs=1e-6)
    assert math.fsum(each.usd or 0.0 for _, each in months) == pytest.approx(total.usd or 0.0, abs=1e-6)
    names = [name for name, _ in months]
    assert names == sorted(set(names))
    assert all(month_of(begin) <= name <= month_of(now) for name in names)


@pytest.mark.parametrize(
    ("rate", "seconds", "gpu_seconds", "usd"),
    [
        (L4, 100, 100, 0.1),
        (L4, 100.01, 100.01, 0.1001),  # billed by tenths of a second
        (L4, 3, 3, 0.06),  # the shortest time that is billed
        (EIGHT_GPUS, 100, 800, 1.0),
        (CPU, 100, 0, 0.01),
        (ComputeRate(gpus=2), 100, 200, None),  # the price is not known
        (None, 100, 0, None),  # an attempt of an earlier version
    ],
)
def test_time_on_compute_counts_gpus_and_costs_by_the_stored_rate(
    rate: ComputeRate | None, seconds: float, gpu_seconds: float, usd: float | None
) -> None:
    spending = sum_spending(make_job(attempts=(make_attempt(rate=rate, launched_at=START),)), after(seconds))
    assert spending.gpu_seconds == pytest.approx(gpu_seconds)
    assert spending.usd == (None if usd is None else pytest.approx(usd))


def test_compute_counts_from_the_launch_or_the_claim() -> None:
    for times, counted_s in (
        ({}, 0),  # nothing was started
        ({"launched_at": after(10)}, 90),
        ({"launched_at": after(10), "claimed_at": after(40)}, 90),
        ({"claimed_at": after(40)}, 60),  # the answer of the launcher was lost
        ({"launched_at": after(10), "waited_for_machine": True}, 0),
        ({"launched_at": after(10), "claimed_at": after(40), "waited_for_machine": True}, 60),
        ({"launched_at": after(10), "ended_at": after(30)}, 20),
    ):
        job = make_job(attempts=(make_attempt(rate=EIGHT_GPUS, **times),))
        assert sum_spending(job, after(100)).gpu_seconds == 8 * counted_s, times


def test_attempt_over_the_end_of_a_month_counts_in_both() -> None:
    begin = datetime(2026, 12, 31, 23, 0, tzinfo=UTC)
    attempt = make_attempt(rate=L4, launched_at=begin)
    months = dict(iter_months(attempt, begin + timedelta(hours=4)))
    assert {name: round(each.gpu_seconds) for name, each in months.items()} == {"2026-12": 3600, "2027-01": 10800}
