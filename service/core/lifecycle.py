"""The state machine of a job: pure functions from a record and a fact to the next record.

No clock, no store, no network. Every function either returns the record as it should be, which may be the
record itself when the fact changes nothing, or raises what a caller should be told.
"""

from datetime import datetime

from schema.events import CheckpointSaved, Evaluated, Event, GateJudged, PhaseChanged, Resumed, StatusChanged, TrackerStarted
from schema.job import Attempt, AttemptOutcome, Failure, Job, SavedPoint, Status
from schema.result import Result
from schema.training import TrainingConfig
from service.core.errors import Conflict, Fenced

# Which status may follow which. Out of `failed` and `cancelled` leads a retry alone; `completed` is the end.
FOLLOWS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.PREPARING, Status.PAUSED, Status.CANCELLED, Status.FAILED}),
    Status.PREPARING: frozenset({Status.TRAINING, Status.CANCELLING, Status.PAUSING, Status.COMPLETED, Status.FAILED, Status.QUEUED}),
    Status.TRAINING: frozenset({Status.CANCELLING, Status.PAUSING, Status.COMPLETED, Status.FAILED, Status.QUEUED}),
    Status.PAUSING: frozenset({Status.PAUSED, Status.CANCELLING, Status.COMPLETED, Status.FAILED, Status.QUEUED}),
    Status.PAUSED: frozenset({Status.QUEUED, Status.CANCELLED, Status.FAILED}),
    Status.CANCELLING: frozenset({Status.CANCELLED, Status.COMPLETED}),
    Status.FAILED: frozenset({Status.QUEUED}),
    Status.CANCELLED: frozenset({Status.QUEUED}),
}

# Attempts in a row that ended early and saved nothing new, before the job is given up.
MOST_WITHOUT_PROGRESS = 5
MOST_LOST = 3  # of them, those that vanished: each may have cost an hour, and a process that is killed for its memory is killed again
LAST_WORDS = ("metrics", "base_metrics", "gate", "published_step", "wandb_url")  # of a result, those that the record takes over as they are
GOES_ON: frozenset[AttemptOutcome] = frozenset({"yielded", "preempted", "lost"})
# What the compute may tell of an attempt that ended early, and that another attempt can get over.
CAN_GO_ON = frozenset({"preempted", "timeout"})


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
        case TrackerStarted(tracker=tracker, url=str(url)):
            wandb = {"wandb_url": url} if tracker == "wandb" else {}
            return job.model_copy(update={"trackers": job.trackers | {tracker: url}, "updated_at": now, **wandb})
        case GateJudged(gate=gate):
            return job.model_copy(update={"gate": gate, "updated_at": now})
        case CheckpointSaved(step=step):
            return _saved(job, number, step, now)
        case Resumed(step=step, from_attempt=source) if source != number:  # otherwise it went back for want of memory
            return _with_attempt(job, _attempt(job, number).model_copy(update={"resumed_step": step}), now)
        case _:
            return job


def finished(job: Job, result: Result, now: datetime) -> Job:
    """The attempt's last word. One that comes too late, or twice, changes nothing; a wrong attempt raises Fenced."""
    attempt = _attempt(job, result.attempt)
    if attempt.ended_at is not None:
        return job
    check_current(job, result.attempt)
    told = job.model_copy(update={name: value for name in LAST_WORDS if (value := getattr(result, name)) is not None})
    told = told.model_copy(update={"trackers": job.trackers | result.trackers})
    if result.saved_step is not None:
        told = _saved(told, result.attempt, result.saved_step, now)
    match result.outcome:
        case "completed":
            return _end(told.model_copy(update={"artifacts": result.artifacts}), result.attempt, "completed", None, now)
        case "failed":
            failure = result.failure or Failure(code="internal", message="the attempt failed and did not say why")
            return _end(told, result.attempt, "failed", failure, now)
        case "cancelled" if job.status is not Status.CANCELLING:
            return _end(told, result.attempt, "preempted", None, now)  # nobody asked: its compute was taken away
        case "yielded" if result.yielded_because == "preempted":
            return _end(told, result.attempt, "preempted", None, now)
        case "paused" if job.status not in (Status.PAUSING, Status.CANCELLING):
            return _end(told, result.attempt, "yielded", None, now)
        case outcome:
            return _end(told, result.attempt, outcome, None, now)


def vanished(
    job: Job, number: int, now: datetime, reason: Failure | None = None, *, preempted: bool = False, saved_step: int | None = None
) -> Job:
    """The compute ended and left no result.

    `reason` is what the compute told, `preempted` that it took itself away unasked, `saved_step` the newest checkpoint of the
    attempt that was found, which may never have been reported.
    """
    attempt = check_current(job, number)
    if saved_step is not None:
        job = _saved(job, number, saved_step, now)
    if reason is not None:
        return _end(job, number, "preempted" if preempted else "lost" if reason.code in CAN_GO_ON else "failed", reason, now)
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


def pause_requested(job: Job, now: datetime) -> Job:
    """Somebody wants the compute freed and the place kept. Repeating it is harmless. Raises Conflict for a job that ends or has ended."""
    match job.status:
        case Status.PAUSED | Status.PAUSING:
            return job
        case Status.QUEUED:
            return _move(job, Status.PAUSED, now)
        case Status.PREPARING | Status.TRAINING:
            return _move(job, Status.PAUSING, now)
        case _:
            raise Conflict(f"{job.job_id} is {job.status}; there is nothing to pause")


def resume_requested(job: Job, now: datetime, *, training_config: TrainingConfig | None = None, hardware: str | None = None) -> Job:
    """Somebody wants a paused job to go on, perhaps elsewhere or for longer. Repeating it is harmless. Raises Conflict."""
    changes: dict[str, object] = {"training_config": training_config or job.training_config, "hardware": hardware or job.hardware}
    match job.status:
        case Status.PAUSED:
            return _move(job, Status.QUEUED, now, counted_from=len(job.attempts) + 1, **changes)
        case Status.QUEUED | Status.PREPARING | Status.TRAINING:
            if all(getattr(job, name) == value for name, value in changes.items()):
                return job
            raise Conflict(f"{job.job_id} is {job.status} already; it can be changed while it is paused", hint="pause it first")
        case Status.PAUSING:
            raise Conflict(f"{job.job_id} is still pausing", hint="repeat the call once it is paused")
        case _:
            hint = "POST /jobs/{id}/retry continues it" if job.status in (Status.FAILED, Status.CANCELLED) else ""
            raise Conflict(f"{job.job_id} is {job.status}; there is nothing to resume", hint=hint)


def retry_requested(
    job: Job, now: datetime, *, from_start: bool = False, training_config: TrainingConfig | None = None, hardware: str | None = None
) -> Job:
    """Somebody wants a failed or cancelled job to be continued. Repeating it is harmless while the retry is under way. Raises Conflict."""
    if job.status not in (Status.FAILED, Status.CANCELLED):
        if job.retried_at is not None and not job.status.is_final:
            return job
        hint = "POST /jobs/{id}/resume continues it" if job.status is Status.PAUSED else ""
        raise Conflict(f"{job.job_id} is {job.status}; only a failed or cancelled job can be retried", hint=hint)
    if job.deleting_since is not None:
        raise Conflict(f"{job.job_id} is being deleted")
    following = len(job.attempts) + 1
    return _move(
        job,
        Status.QUEUED,
        now,
        failure=None,
        finished_at=None,
        retried_at=now,
        counted_from=following,
        first_attempt=following if from_start else job.first_attempt,
        checkpoint=None if from_start else job.checkpoint,
        training_config=training_config or job.training_config,
        hardware=hardware or job.hardware,
    )


def deletion_begun(job: Job, now: datetime) -> Job:
    """The job's files are about to go: from now on it cannot be retried. Raises Conflict for a job that has not ended."""
    if not job.status.is_final:
        raise Conflict(f"{job.job_id} is {job.status}; it can be deleted once it has ended")
    return job if job.deleting_since else job.model_copy(update={"deleting_since": now, "updated_at": now})


def doubted(job: Job, number: int, now: datetime) -> Job:
    """The attempt is silent although its compute is there. From now on its lease runs out, unless it is heard of again."""
    attempt = check_current(job, number)
    return _with_attempt(job, attempt.model_copy(update={"doubted_at": now}), now)


def heard(job: Job, number: int, now: datetime) -> Job:
    """The attempt was heard of: a doubt is over for good. Left to be judged by two times, it would come back with a clock that moves."""
    attempt = check_current(job, number)
    return _with_attempt(job, attempt.model_copy(update={"doubted_at": None}), now) if attempt.doubted_at else job


def manifest_written(job: Job, now: datetime) -> Job:
    """The published files are listed in the bucket as well."""
    return job if job.manifest_written else job.model_copy(update={"manifest_written": True, "updated_at": now})


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
        return _move(job, status, now, failure=_why_given_up(job, ended) if outcome in GOES_ON else failure)
    return _move(job, status, now)


def _status_after(job: Job, outcome: AttemptOutcome) -> Status:
    """Asked when the attempt is noted as ended."""
    if outcome == "completed":
        return Status.COMPLETED  # also when a cancel was under way: it won the race
    if job.status is Status.CANCELLING:
        return Status.CANCELLED
    if job.status is Status.PAUSING and outcome in (*GOES_ON, "paused"):
        return Status.PAUSED  # whatever ended it, its place is its last checkpoint
    match outcome:
        case "yielded" | "preempted" | "lost":
            return Status.FAILED if _is_stuck(job) else Status.QUEUED
        case _:
            return Status.FAILED


def _is_stuck(job: Job) -> bool:
    """Too many attempts in a row have saved nothing new."""
    vain = _without_progress(job)
    return len(vain) >= MOST_WITHOUT_PROGRESS or sum(attempt.outcome == "lost" for attempt in vain) >= MOST_LOST


def _without_progress(job: Job) -> list[Attempt]:
    """The latest attempts that ended early and saved nothing beyond what there was before them, newest first."""
    found: list[Attempt] = []
    for attempt in reversed(job.attempts[job.counted_from - 1 :]):
        before = [earlier.saved_step for earlier in job.attempts[job.first_attempt - 1 : attempt.number - 1]]
        reached = max((step for step in before if step is not None), default=0)
        if attempt.outcome not in GOES_ON or (attempt.saved_step or 0) > reached:
            break
        found.append(attempt)
    return found


def _why_given_up(job: Job, ended: Attempt) -> Failure:
    """The reason for a person: how often in vain, and what the last attempt came to."""
    vain = len(_without_progress(job))
    last = f": {ended.failure.message}" if ended.failure else ""
    return Failure(
        code=ended.failure.code if ended.failure else "timeout" if ended.outcome == "yielded" else "preempted",
        message=f"{vain} attempts in a row ended early and got no further ({ended.outcome}){last}",
        hint=ended.failure.hint if ended.failure and ended.failure.hint else "POST /jobs/{id}/retry goes on; larger hardware may help",
        attempt=ended.number,
    )


def _saved(job: Job, number: int, step: int, now: datetime) -> Job:
    """A checkpoint of the attempt is durable."""
    attempt = _attempt(job, number)
    if attempt.saved_step is not None and attempt.saved_step >= step:
        return job
    job = _with_attempt(job, attempt.model_copy(update={"saved_step": step}), now)
    return job.model_copy(update={"checkpoint": SavedPoint(step=step, attempt=number, at=now)})


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
