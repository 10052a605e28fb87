"""The caps of a job: what its attempts may use, and when it must be asked to pause so that it does not use more. Pure functions."""

from datetime import datetime

from schema.estimate.prices import SECONDS_PER_HOUR, find_price
from schema.job import ComputeRate, Job, PauseReason
from schema.placement import Placement
from service.core.accrual import sum_spending
from service.core.ports import Launcher

REPORT_DELAY_S = 15.0  # the longest interval between two reports of an attempt: it learns of the pause with the answer to one
STEP_S = 5.0  # for the step that is being taken
FIRST_CHECKPOINT_S = 15.0  # for a checkpoint of an attempt that has reported none
MAX_RESERVE_SHARE = 0.25  # of the cap: a small cap must leave room for work


def make_rate(launcher: Launcher, placement: Placement) -> ComputeRate:
    """What an attempt at this placement counts as and costs from now on."""
    profile, price = launcher.profiles.get(placement.profile), find_price(placement.launcher, placement.profile)
    gpus = profile.gpus if profile else 0
    if price is None:
        return ComputeRate(gpus=gpus)
    return ComputeRate(
        gpus=gpus,
        usd_per_hour=price.usd_per_hour,
        billing_step_s=price.billing_step_s,
        min_billed_s=price.min_billed_s,
        source=price.source,
        as_of=price.as_of,
    )


def set_rate(job: Job, launcher: Launcher) -> Job:
    """Store the rate of the current attempt, which is about to be launched at its placement."""
    attempt = job.attempt
    assert attempt is not None
    rated = attempt.model_copy(update={"rate": make_rate(launcher, attempt.placement)})
    return job.model_copy(update={"attempts": (*job.attempts[:-1], rated)})


def find_reached_cap(job: Job, now: datetime) -> PauseReason | None:
    """The cap that the job would exceed if it were not asked to pause now; None: it may go on.

    That is before the cap: the attempt gets the request with the answer to its next report, finishes its step and saves a checkpoint.
    """
    spending = sum_spending(job, now)
    rate = job.attempt.rate if job.attempt else None
    reserve_s = _estimate_stop_s(job)
    if job.max_cost_usd is not None and spending.usd is not None:
        usd_per_s = (rate.usd_per_hour or 0.0) / SECONDS_PER_HOUR if rate else 0.0
        if spending.usd + min(reserve_s * usd_per_s, MAX_RESERVE_SHARE * job.max_cost_usd) >= job.max_cost_usd:
            return "cost_cap"
    if job.max_gpu_seconds is not None and spending.gpu_seconds:
        reserve = reserve_s * rate.gpus if rate else 0.0
        if spending.gpu_seconds + min(reserve, MAX_RESERVE_SHARE * job.max_gpu_seconds) >= job.max_gpu_seconds:
            return "gpu_seconds_cap"
    return None


def is_cap_exceeded(job: Job, now: datetime) -> bool:
    """Whether the job has used all of a cap: its attempt has not stopped in the time that was reserved for it."""
    spending = sum_spending(job, now)
    return (job.max_cost_usd is not None and (spending.usd or 0.0) >= job.max_cost_usd) or (
        job.max_gpu_seconds is not None and spending.gpu_seconds >= job.max_gpu_seconds
    )


def _estimate_stop_s(job: Job) -> float:
    """Seconds from the request to pause until the current attempt has ended."""
    reported = [attempt.checkpoint_s for attempt in job.attempts if attempt.checkpoint_s is not None]
    return REPORT_DELAY_S + STEP_S + (max(0.0, reported[-1]) if reported else FIRST_CHECKPOINT_S)
