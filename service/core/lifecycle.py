"""The state machine of a job: pure functions from a record and a fact to the next record.

No clock, no store, no network. Every function either returns the record as it should be, which may be the
record itself when the fact changes nothing, or raises what a caller should be told.
"""

from datetime import datetime

from schema.events import Evaluated, Event, PhaseChanged, StatusChanged, TrackerStarted
from schema.job import Attempt, AttemptOutcome, Failure, Job, Status
from schema.result import Result
from service.core.errors import Conflict, Fenced

# Which status may follow which. A status that is not a key here is final.
FOLLOWS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.PREPARING, Status.CANCELLED, Status.FAILED}),
    Status.PREPARING: frozenset({Status.TRAINING, Status.CANCELLING, Status.PAUSING, Status.COMPLETED, Status.FAILED, Status.QUEUED}),
    Status.TRAINING: frozenset({Status.CANCELLING, Status.PAUSING, Status.COMPLETED, Status.FAILED, Status.QUEUED}),
    Status.PAUSING: frozenset({Status.PAUSED, Status.CANCELLING, Status.COMPLETED, Status.FAILED, Status.QUEUED}),
    Status.PAUSED: frozenset({Status.QUEUED, Status.CANCELLED, Status.FAILED}),
    Status.CANCELLING: frozenset({Status.CANCELLED, Status.COMPLETED}),
}

# Attempts in a row that ended early through no fault of the job before it is given up.
MOST_ATTEMPTS = 5


def begin_attempt(job: Job, launcher: str, now: datetime) -> Job:
    """A queued job gets its next attempt, which has no handle yet."""
    attempt = Attempt(number=len(job.attempts) + 1, launcher=launcher, created_at=now, launch_began_at=now)
    return _move(job, Status.PREPARING, now, attempts=(*job.attempts, attempt))


def launching_again(job: Job, number: int, now: datetime) -> Job:
    """Somebody is about to send the attempt once more. Of two at once, the one whose change is kept may."""
    attempt = check_current(job, number)
    return _with_attempt(job, attempt.model_copy(update={"launch_began_at": now}), now)


def launch_delayed(job: Job, number: int, why: str, now: datetime) -> Job:
    """The compute cannot take the attempt now; it will be tried again."""
    attempt = _attempt(job, number)
    if attempt.handle is not None or attempt.ended_at is not None or attempt.delay == why:
        return job
    return _with_attempt(job, attempt.model_copy(update={"delay": why}), now)


def launched(job: Job, number: int, handle: str, now: datetime) -> Job:
    """The compute took the attempt. A process that claimed it may have been quicker than the answer, and even have ended."""
    attempt = _attempt(job, number)
    if attempt.handle == handle:
        return job
    return _with_attempt(job, attempt.model_copy(update={"handle": handle, "launched_at": now, "delay": None}), now)


def launch_refused(job: Job, number: int, failure: Failure, now: datetime) -> Job:
    """The compute said that the attempt can never start."""
    return _end(job, number, "launch_failed", failure, now)


def claimed(job: Job, number: int, claimant: str, now: datetime) -> Job:
    """A process takes possession of the attempt; a second process is told that it is too late. Raises Fenced."""
    attempt = check_current(job, number)
    if attempt.claimed_by == claimant:
        return job
    if attempt.claimed_by is not None:
        raise Fenced(f"attempt {number} of {job.job_id} is owned by another process")
    job = _with_attempt(job, attempt.model_copy(update={"claimed_by": claimant, "claimed_at": now}), now)
    return job if job.started_at else job.model_copy(update={"started_at": now})


def absorbed(job: Job, number: int, event: Event, now: datetime) -> Job:
    """What an event of the current attempt changes in the record; most change nothing. Raises Fenced."""
    check_current(job, number)
    match event:
        case PhaseChanged(phase="training") if job.status is Status.PREPARING:
            return _move(job, Status.TRAINING, now)
        case Evaluated(when="before", metrics=metrics):
            return job.model_copy(update={"base_metrics": metrics, "updated_at": now})
        case Evaluated(metrics=metrics):
            return job.model_copy(update={"metrics": metrics, "updated_at": now})
        case TrackerStarted(tracker="wandb", url=str(url)):
            return job.model_copy(update={"wandb_url": url, "updated_at": now})
        case _:
            return job


def finished(job: Job, result: Result, now: datetime) -> Job:
    """The attempt's last word. One that comes too late, or twice, changes nothing; a wrong attempt raises Fenced."""
    attempt = _attempt(job, result.attempt)
    if attempt.ended_at is not None:
        return job
    check_current(job, result.attempt)
    told = job.model_copy(update={name: value for name in ("metrics", "base_metrics", "wandb_url") if (value := getattr(result, name))})
    match result.outcome:
        case "completed":
            return _end(told.model_copy(update={"artifacts": result.artifacts}), result.attempt, "completed", None, now)
        case "failed":
            failure = result.failure or Failure(code="internal", message="the attempt failed and did not say why")
            return _end(told, result.attempt, "failed", failure, now)
        case "cancelled" if job.status is not Status.CANCELLING:
            return _end(told, result.attempt, "preempted", None, now)  # nobody asked: its compute was taken away
        case outcome:
            return _end(told, result.attempt, outcome, None, now)


def vanished(job: Job, number: int, now: datetime, reason: Failure | None = None, *, preempted: bool = False) -> Job:
    """The compute ended and left no result. `reason` is what the compute told, `preempted` that it took itself away unasked."""
    attempt = check_current(job, number)
    if reason is not None:
        return _end(job, number, "preempted" if preempted else "failed", reason, now)
    where = "before it started to work" if attempt.claimed_by is None else "without a last word"
    failure = Failure(
        code="lost",
        message=f"attempt {number} ended {where}; it was probably killed",
        hint="see GET /jobs/{id}/logs; a process that ran out of memory dies like this: try a smaller batch_size or max_seq_length",
        attempt=number,
    )
    return _end(job, number, "lost", failure, now)


def cancel_requested(job: Job, now: datetime) -> Job:
    """Somebody wants the job to stop. Repeating it is harmless. Raises Conflict for a job that has ended otherwise."""
    match job.status:
        case Status.CANCELLED | Status.CANCELLING:
            return job
        case Status.QUEUED | Status.PAUSED:
            return _move(job, Status.CANCELLED, now)
        case Status.COMPLETED | Status.FAILED:
            raise Conflict(f"{job.job_id} has already {job.status}; there is nothing to cancel")
        case _:
            return _move(job, Status.CANCELLING, now)


def check_current(job: Job, number: int) -> Attempt:
    """The attempt, if it is the one at work. Raises Fenced."""
    attempt = _attempt(job, number)
    if number != len(job.attempts) or attempt.ended_at is not None or not job.status.is_active:
        raise Fenced(f"attempt {number} of {job.job_id} is over")
    return attempt


def status_event(before: Job, after: Job) -> StatusChanged | None:
    """What to tell about a change of status, if there was one."""
    if before.status is after.status:
        return None
    attempt = after.attempt
    reason = (attempt.outcome or "") if attempt and attempt.ended_at == after.updated_at else ""
    return StatusChanged(status=after.status, attempt=attempt.number if attempt else 0, reason=reason, failure=after.failure)


def _end(job: Job, number: int, outcome: AttemptOutcome, failure: Failure | None, now: datetime) -> Job:
    attempt = _attempt(job, number)
    if attempt.ended_at is not None:
        return job
    if failure:
        failure = failure.model_copy(update={"attempt": number})
    ended = attempt.model_copy(update={"ended_at": now, "outcome": outcome, "failure": failure})
    job = _with_attempt(job, ended, now)
    status = _status_after(job, outcome)
    if status is Status.FAILED:
        failure = failure or Failure(
            code="preempted",
            message=f"{MOST_ATTEMPTS} attempts in a row lost their compute",
            hint="send the job again when the machine is quieter",
            attempt=number,
        )
        return _move(job, status, now, failure=failure)
    return _move(job, status, now)


def _status_after(job: Job, outcome: AttemptOutcome) -> Status:
    if outcome == "completed":
        return Status.COMPLETED  # also when a cancel was under way: it won the race
    if job.status is Status.CANCELLING:
        return Status.CANCELLED
    match outcome:
        case "paused":
            return Status.PAUSED
        case "yielded":
            return Status.QUEUED
        case "preempted":
            lost_in_a_row = [attempt.outcome for attempt in job.attempts[-MOST_ATTEMPTS:]]
            return Status.FAILED if lost_in_a_row == ["preempted"] * MOST_ATTEMPTS else Status.QUEUED
        case _:
            return Status.FAILED


def _move(job: Job, status: Status, now: datetime, **changes: object) -> Job:
    if status not in FOLLOWS.get(job.status, frozenset()):
        raise Conflict(f"{job.job_id} is {job.status}; it cannot become {status}")
    changes |= {"status": status, "status_changed_at": now, "updated_at": now}
    if status.is_final:
        changes["finished_at"] = now
    return job.model_copy(update=changes)


def _with_attempt(job: Job, attempt: Attempt, now: datetime) -> Job:
    attempts = tuple(attempt if old.number == attempt.number else old for old in job.attempts)
    return job.model_copy(update={"attempts": attempts, "updated_at": now})


def _attempt(job: Job, number: int) -> Attempt:
    if not 1 <= number <= len(job.attempts):
        raise Fenced(f"{job.job_id} has no attempt {number}")
    return job.attempts[number - 1]
