"""The caps of a job: what its attempts may use, and when it must be asked to pause so that it does not use more. Pure functions."""

from collections.abc import Sequence
from datetime import datetime

from schema.estimate.prices import SECONDS_PER_HOUR, find_price
from schema.job import ComputeRate, Job, PauseReason
from schema.placement import Placement
from service.core.accrual import sum_spending
from service.core.errors import Conflict, InvalidRequest
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


def check_cost_cap(max_cost_usd: float | None, placements: Sequence[Placement], param: str = "max_cost_usd") -> None:
    """Raise InvalidRequest for a cap in dollars on hardware whose price is not known: it could not be enforced."""
    unpriced = [placement.hardware for placement in placements if find_price(placement.launcher, placement.profile) is None]
    if max_cost_usd is not None and unpriced:
        hint = "use max_gpu_seconds, or hardware that GET /capabilities lists with a price"
        raise InvalidRequest(f"max_cost_usd needs a price, and the price of {', '.join(unpriced)} is not known", hint=hint, param=param)


def change_caps(job: Job, now: datetime, *, max_gpu_seconds: float | None, max_cost_usd: float | None) -> Job:
    """The job with the caps that were sent, None leaves one as it is. It must have room to continue.

    Raises InvalidRequest for a cap that was sent and leaves no room, Conflict for one that the job had.
    """
    sent = {name: cap for name, cap in (("max_gpu_seconds", max_gpu_seconds), ("max_cost_usd", max_cost_usd)) if cap is not None}
    changed = job.model_copy(update=sent) if any(getattr(job, name) != cap for name, cap in sent.items()) else job
    reason = find_reached_cap(changed, now)
    if reason is None:
        return changed
    spending, name = sum_spending(job, now), "max_cost_usd" if reason == "cost_cap" else "max_gpu_seconds"
    used = f"${spending.usd or 0.0:.4g}" if reason == "cost_cap" else f"{spending.gpu_seconds:.0f} GPU seconds"
    message = f"{job.job_id} has used {used}, which leaves too little of its {name} of {getattr(changed, name):g} to go on"
    error = InvalidRequest if name in sent else Conflict
    raise error(message, hint=f"send a higher {name}", param=name)


def find_reached_cap(job: Job, now: datetime) -> PauseReason | None:
    """The cap that the job would exceed if it were not asked to pause now; None: it may go on.

    That is before the cap: the attempt gets the request with the answer to its next report, finishes its step and saves a checkpoint.
    """
    if not has_cap(job):
        return None
    spending = sum_spending(job, now)
    rate = job.attempt.rate if job.attempt else None
    reserve_s = estimate_stop_s(job)
    if job.max_cost_usd is not None and spending.usd is not None:
        usd_per_s = (rate.usd_per_hour or 0.0) / SECONDS_PER_HOUR if rate else 0.0
        if spending.usd + min(reserve_s * usd_per_s, MAX_RESERVE_SHARE * job.max_cost_usd) >= job.max_cost_usd:
            return "cost_cap"
    if job.max_gpu_seconds is not None and spending.gpu_seconds:
        reserve = reserve_s * rate.gpus if rate else 0.0
        if spending.gpu_seconds + min(reserve, MAX_RESERVE_SHARE * job.max_gpu_seconds) >= job.max_gpu_seconds:
            return "gpu_seconds_cap"
    return None


def has_cap(job: Job) -> bool:
    """Whether the job has a cap of its own."""
    return job.max_cost_usd is not None or job.max_gpu_seconds is not None


def is_cap_exceeded(job: Job, now: datetime) -> bool:
    """Whether the job has used all of a cap: its attempt has not stopped in the time that was reserved for it."""
    spending = sum_spending(job, now)
    return (job.max_cost_usd is not None and (spending.usd or 0.0) >= job.max_cost_usd) or (
        job.max_gpu_seconds is not None and spending.gpu_seconds >= job.max_gpu_seconds
    )


def estimate_stop_s(job: Job) -> float:
    """Seconds from the request to pause until the current attempt has ended."""
    reported = [attempt.checkpoint_s for attempt in job.attempts if attempt.checkpoint_s is not None]
    return REPORT_DELAY_S + STEP_S + (max(0.0, reported[-1]) if reported else FIRST_CHECKPOINT_S)
