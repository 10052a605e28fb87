"""What an attempt's compute counts and costs over time: pure functions of its record.

An attempt's compute counts from its launch, or from its claim where it waited for a machine, until the service knows that it ended.
The sum never decreases. Months are those of UTC.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from schema.base import ForwardCompatible
from schema.estimate.prices import SECONDS_PER_HOUR
from schema.job import Attempt, Job


@dataclass(frozen=True)
class Spending:
    """What attempts have used. `usd` is None where no price is known."""

    gpu_seconds: float
    usd: float | None


class JobCost(ForwardCompatible):
    """What lists store of a job's cost: the sum of its ended attempts, and the attempt that still adds to it."""

    gpu_seconds: float = 0.0
    usd: float | None = None
    running: Attempt | None = None

    def until(self, now: datetime) -> Spending:
        """What the job has used until now."""
        running = sum_attempts((self.running,) if self.running else (), now)
        costs = [usd for usd in (self.usd, running.usd) if usd is not None]
        return Spending(self.gpu_seconds + running.gpu_seconds, math.fsum(costs) if costs else None)


def summarize_cost(job: Job) -> JobCost:
    """The cost of a job, from which it can be computed at any time until its record changes."""
    ended = [attempt for attempt in job.attempts if attempt.ended_at is not None]
    running = next((attempt for attempt in job.attempts if attempt.ended_at is None and attempt.rate is not None), None)
    spent = sum_attempts(ended, job.updated_at)
    times = running.model_copy(update={"refusals": (), "pending_reason": None}) if running else None
    return JobCost(gpu_seconds=spent.gpu_seconds, usd=spent.usd, running=times)


def sum_spending(job: Job, now: datetime) -> Spending:
    """What the attempts of a job have used until now."""
    return sum_attempts(job.attempts, now)


def sum_attempts(attempts: Sequence[Attempt], now: datetime) -> Spending:
    """What attempts have used until now."""
    gpu_seconds = math.fsum(_gpu_seconds(attempt, now) for attempt in attempts)
    costs = [usd for attempt in attempts if (usd := _usd(attempt, now)) is not None]
    return Spending(gpu_seconds, math.fsum(costs) if costs else None)


def iter_months(attempt: Attempt, now: datetime) -> Iterator[tuple[str, Spending]]:
    """An attempt's usage, divided by the time in each month. Nothing for one that used no compute that counts."""
    started_at, ended_at = _compute_started_at(attempt), attempt.ended_at or now
    gpu_seconds, usd = _gpu_seconds(attempt, now), _usd(attempt, now) or 0.0
    if started_at is None or ended_at <= started_at or not (gpu_seconds or usd):
        return
    total_s, begin = (ended_at - started_at).total_seconds(), started_at
    while begin < ended_at:
        end = min(ended_at, _next_month(begin))
        share = (end - begin).total_seconds() / total_s
        yield month_of(begin), Spending(gpu_seconds * share, usd * share)
        begin = end


def month_of(moment: datetime) -> str:
    """The month of a moment, in UTC: "2026-11"."""
    return f"{moment.astimezone(UTC):%Y-%m}"


def _next_month(moment: datetime) -> datetime:
    first = moment.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1)


def _compute_started_at(attempt: Attempt) -> datetime | None:
    """When the attempt's compute began; None: it has none yet."""
    if attempt.waited_for_machine:
        return attempt.claimed_at
    return min((moment for moment in (attempt.launched_at, attempt.claimed_at) if moment), default=None)


def _compute_s(attempt: Attempt, now: datetime) -> float:
    started_at = _compute_started_at(attempt)
    return max(0.0, ((attempt.ended_at or now) - started_at).total_seconds()) if started_at else 0.0


def _gpu_seconds(attempt: Attempt, now: datetime) -> float:
    return _compute_s(attempt, now) * attempt.rate.gpus if attempt.rate else 0.0


def _usd(attempt: Attempt, now: datetime) -> float | None:
    """The price of an attempt's billed time; None when its price is not known."""
    rate = attempt.rate
    if rate is None or rate.usd_per_hour is None:
        return None
    seconds = _compute_s(attempt, now)
    if seconds and rate.billing_step_s:
        seconds = math.ceil(seconds / rate.billing_step_s) * rate.billing_step_s
    return (max(seconds, rate.min_billed_s) if seconds else 0.0) * rate.usd_per_hour / SECONDS_PER_HOUR
