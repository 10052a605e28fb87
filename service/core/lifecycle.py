"""The state machine of a job: pure functions from a record and a fact to the next record.

No clock, no store, no network. Every function either returns the next record, which is the same object when the
fact changes nothing, or raises the error that the caller should get.
"""

from datetime import datetime

from schema.events import (
    CheckpointRestored,
    CheckpointSaved,
    EvaluationCompleted,
    Event,
    GateEvaluated,
    PhaseChanged,
    StatusChanged,
    TrackerStarted,
)
from schema.job import Attempt, AttemptOutcome, CheckpointRef, Failure, Job, Status
from schema.result import Result
from schema.training import TrainingConfig
from service.core.errors import Conflict, Fenced

# Which status may follow which. Only a retry leaves `failed` and `cancelled`; nothing leaves `completed`.
ALLOWED_TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.PREPARING, Status.PAUSED, Status.CANCELLED, Status.FAILED}),
    Status.PREPARING: frozenset({Status.TRAINING, Status.CANCELLING, Status.PAUSING, Status.COMPLETED, Status.FAILED, Status.QUEUED}),
    Status.TRAINING: frozenset({Status.CANCELLING, Status.PAUSING, Status.COMPLETED, Status.FAILED, Status.QUEUED}),
    Status.PAUSING: frozenset({Status.PAUSED, Status.CANCELLING, Status.COMPLETED, Status.FAILED, Status.QUEUED}),
    Status.PAUSED: frozenset({Status.QUEUED, Status.CANCELLED, Status.FAILED}),
    Status.CANCELLING: frozenset({Status.CANCELLED, Status.COMPLETED}),
    Status.FAILED: frozenset({Status.QUEUED}),
    Status.CANCELLED: frozenset({Status.QUEUED}),
}

# The job fails after this many attempts in a row that ended early and saved nothing new.
MAX_ATTEMPTS_WITHOUT_PROGRESS = 5
# Or after this many of them that were lost: each may have cost an hour, and a process killed for its memory is killed again.
MAX_LOST_ATTEMPTS = 3
# The fields of a result that the record copies as they are.
RESULT_FIELDS = ("metrics", "base_metrics", "gate", "published_step", "wandb_url")
CONTINUABLE_OUTCOMES: frozenset[AttemptOutcome] = frozenset({"yielded", "preempted", "lost"})
# Exit reasons after which another attempt can succeed.
CONTINUABLE_FAILURES = frozenset({"preempted", "timeout"})


def begin_attempt(job: Job, launcher: str, now: datetime) -> Job:
    """Give a queued job its next attempt, which has no handle yet."""
    attempt = Attempt(number=len(job.attempts) + 1, launcher=launcher, created_at=now, launch_started_at=now)
    return _transition(job, Status.PREPARING, now, attempts=(*job.attempts, attempt))


def relaunch(job: Job, number: int, now: datetime) -> Job:
    """Note that a process is about to launch the attempt again. Of two processes, the one whose change is stored launches it."""
    attempt = check_current(job, number)
    return _replace_attempt(job, attempt.model_copy(update={"launch_started_at": now}), now)


def delay_launch(job: Job, number: int, reason: str, now: datetime) -> Job:
    """Note why the launcher cannot start the attempt now; it is tried again later."""
    attempt = _get_attempt(job, number)
    if attempt.handle is not None or attempt.ended_at is not None or attempt.pending_reason == reason:
        return job
    return _replace_attempt(job, attempt.model_copy(update={"pending_reason": reason}), now)


def mark_launched(job: Job, number: int, handle: str, now: datetime) -> Job:
    """Store the handle of a launched attempt. Its process may have claimed it, and even ended it, before the launcher answered."""
    attempt = _get_attempt(job, number)
    if attempt.handle == handle:
        return job
    return _replace_attempt(job, attempt.model_copy(update={"handle": handle, "launched_at": now, "pending_reason": None}), now)


def mark_launch_failed(job: Job, number: int, failure: Failure, now: datetime) -> Job:
    """End an attempt that the launcher refused for good."""
    return _end(job, number, "launch_failed", failure, now)


def claim_attempt(job: Job, number: int, claimant: str, now: datetime) -> Job:
    """Give the attempt to one process. Raises Fenced for a second process."""
    attempt = check_current(job, number)
    if attempt.claimed_by == claimant:
        return job
    if attempt.claimed_by is not None:
        raise Fenced(f"attempt {number} of {job.job_id} is owned by another process")
    job = _replace_attempt(job, attempt.model_copy(update={"claimed_by": claimant, "claimed_at": now}), now)
    return job if job.started_at else job.model_copy(update={"started_at": now})


def apply_event(job: Job, number: int, event: Event, now: datetime) -> Job:
    """Apply an event of the current attempt to the record; most events change nothing. Raises Fenced."""
    check_current(job, number)
    match event:
        case PhaseChanged(phase="training") if job.status is Status.PREPARING:
            return _transition(job, Status.TRAINING, now)
        case EvaluationCompleted(when="before", metrics=metrics):
            return job.model_copy(update={"base_metrics": metrics, "updated_at": now})
        case EvaluationCompleted(metrics=metrics):
            return job.model_copy(update={"metrics": metrics, "updated_at": now})
        case TrackerStarted(tracker=tracker, url=str(url)):
            wandb = {"wandb_url": url} if tracker == "wandb" else {}
            return job.model_copy(update={"tracker_urls": job.tracker_urls | {tracker: url}, "updated_at": now, **wandb})
        case GateEvaluated(gate=gate):
            return job.model_copy(update={"gate": gate, "updated_at": now})
        case CheckpointSaved(step=step):
            return _record_checkpoint(job, number, step, now)
        case CheckpointRestored(step=step, from_attempt=source) if source != number:  # its own: it went back after running out of memory
            return _replace_attempt(job, _get_attempt(job, number).model_copy(update={"resumed_step": step}), now)
        case _:
            return job


def apply_result(job: Job, result: Result, now: datetime) -> Job:
    """Apply an attempt's result. A late or repeated one changes nothing; one of an attempt that is not current raises Fenced."""
    attempt = _get_attempt(job, result.attempt)
    if attempt.ended_at is not None:
        return job
    check_current(job, result.attempt)
    updated = job.model_copy(update={name: value for name in RESULT_FIELDS if (value := getattr(result, name)) is not None})
    updated = updated.model_copy(update={"tracker_urls": job.tracker_urls | result.tracker_urls})
    if result.last_checkpoint_step is not None:
        updated = _record_checkpoint(updated, result.attempt, result.last_checkpoint_step, now)
    match result.outcome:
        case "completed":
            return _end(updated.model_copy(update={"artifacts": result.artifacts}), result.attempt, "completed", None, now)
        case "failed":
            failure = result.failure or Failure(code="internal", message="the attempt failed without a reason")
            return _end(updated, result.attempt, "failed", failure, now)
        case "cancelled" if job.status is not Status.CANCELLING:
            return _end(updated, result.attempt, "preempted", None, now)  # nobody canceled the job: its compute was taken away
        case "yielded" if result.yield_reason == "preempted":
            return _end(updated, result.attempt, "preempted", None, now)
        case "paused" if job.status not in (Status.PAUSING, Status.CANCELLING):
            return _end(updated, result.attempt, "yielded", None, now)
        case outcome:
            return _end(updated, result.attempt, outcome, None, now)


def mark_lost(
    job: Job, number: int, now: datetime, reason: Failure | None = None, *, preempted: bool = False, last_checkpoint_step: int | None = None
) -> Job:
    """End an attempt whose compute ended without a result.

    `reason` is the launcher's, if it has one; `preempted`: the platform took the compute away; `last_checkpoint_step` is the
    attempt's newest stored checkpoint, which it may never have reported.
    """
    attempt = check_current(job, number)
    if last_checkpoint_step is not None:
        job = _record_checkpoint(job, number, last_checkpoint_step, now)
    if reason is not None:
        return _end(job, number, "preempted" if preempted else "lost" if reason.code in CONTINUABLE_FAILURES else "failed", reason, now)
    ending = "before a process claimed it" if attempt.claimed_by is None else "without writing a result"
    failure = Failure(
        code="lost",
        message=f"attempt {number} ended {ending}; it was probably killed",
        hint="see GET /jobs/{id}/logs; a process that ran out of memory ends like this: try a smaller batch_size or max_seq_length",
        attempt=number,
    )
    return _end(job, number, "lost", failure, now)


def request_cancel(job: Job, now: datetime) -> Job:
    """Cancel the job. Can be repeated. Raises Conflict for a job that has completed or failed."""
    match job.status:
        case Status.CANCELLED | Status.CANCELLING:
            return job
        case Status.QUEUED | Status.PAUSED:
            return _transition(job, Status.CANCELLED, now)
        case Status.COMPLETED | Status.FAILED:
            raise Conflict(f"{job.job_id} has already {job.status}; there is nothing to cancel")
        case _:
            return _transition(job, Status.CANCELLING, now)


def request_pause(job: Job, now: datetime) -> Job:
    """Pause the job: free the compute, keep the progress. Can be repeated. Raises Conflict for a job that is final or is being canceled."""
    match job.status:
        case Status.PAUSED | Status.PAUSING:
            return job
        case Status.QUEUED:
            return _transition(job, Status.PAUSED, now)
        case Status.PREPARING | Status.TRAINING:
            return _transition(job, Status.PAUSING, now)
        case _:
            raise Conflict(f"{job.job_id} is {job.status}; there is nothing to pause")


def request_resume(job: Job, now: datetime, *, training_config: TrainingConfig | None = None, hardware: str | None = None) -> Job:
    """Queue a paused job again, with another configuration or hardware if given. Can be repeated. Raises Conflict."""
    changes: dict[str, object] = {"training_config": training_config or job.training_config, "hardware": hardware or job.hardware}
    match job.status:
        case Status.PAUSED:
            return _transition(job, Status.QUEUED, now, retry_budget_from_attempt=len(job.attempts) + 1, **changes)
        case Status.QUEUED | Status.PREPARING | Status.TRAINING:
            if all(getattr(job, name) == value for name, value in changes.items()):
                return job
            raise Conflict(f"{job.job_id} is {job.status} already; it can be changed while it is paused", hint="pause it first")
        case Status.PAUSING:
            raise Conflict(f"{job.job_id} is still pausing", hint="repeat the call once it is paused")
        case _:
            hint = "POST /jobs/{id}/retry continues it" if job.status in (Status.FAILED, Status.CANCELLED) else ""
            raise Conflict(f"{job.job_id} is {job.status}; there is nothing to resume", hint=hint)


def request_retry(
    job: Job, now: datetime, *, from_start: bool = False, training_config: TrainingConfig | None = None, hardware: str | None = None
) -> Job:
    """Queue a failed or cancelled job again. Can be repeated while the retried job runs. Raises Conflict."""
    if job.status not in (Status.FAILED, Status.CANCELLED):
        if job.retried_at is not None and not job.status.is_final:
            return job
        hint = "POST /jobs/{id}/resume continues it" if job.status is Status.PAUSED else ""
        raise Conflict(f"{job.job_id} is {job.status}; only a failed or cancelled job can be retried", hint=hint)
    if job.deletion_started_at is not None:
        raise Conflict(f"{job.job_id} is being deleted")
    next_attempt = len(job.attempts) + 1
    return _transition(
        job,
        Status.QUEUED,
        now,
        failure=None,
        finished_at=None,
        retried_at=now,
        retry_budget_from_attempt=next_attempt,
        resume_from_attempt=next_attempt if from_start else job.resume_from_attempt,
        checkpoint=None if from_start else job.checkpoint,
        training_config=training_config or job.training_config,
        hardware=hardware or job.hardware,
    )


def start_deletion(job: Job, now: datetime) -> Job:
    """Mark the job before its files are deleted: it can no longer be retried. Raises Conflict for a job that has not ended."""
    if not job.status.is_final:
        raise Conflict(f"{job.job_id} is {job.status}; it can be deleted once it has ended")
    return job if job.deletion_started_at else job.model_copy(update={"deletion_started_at": now, "updated_at": now})


def suspect(job: Job, number: int, now: datetime) -> Job:
    """Start the lease of an attempt that is silent although its compute runs. A report clears it."""
    attempt = check_current(job, number)
    return _replace_attempt(job, attempt.model_copy(update={"suspected_at": now}), now)


def clear_suspicion(job: Job, number: int, now: datetime) -> Job:
    """Clear `suspected_at` when the attempt reports. Comparing it with the last heartbeat instead would break when a clock jumps."""
    attempt = check_current(job, number)
    return _replace_attempt(job, attempt.model_copy(update={"suspected_at": None}), now) if attempt.suspected_at else job


def mark_manifest_written(job: Job, now: datetime) -> Job:
    """Note that the publish manifest is in the bucket."""
    return job if job.manifest_written else job.model_copy(update={"manifest_written": True, "updated_at": now})


def check_current(job: Job, number: int) -> Attempt:
    """The attempt, if it is the job's current one and has not ended. Raises Fenced."""
    attempt = _get_attempt(job, number)
    if number != len(job.attempts) or attempt.ended_at is not None or not job.status.is_active:
        raise Fenced(f"attempt {number} of {job.job_id} is over")
    return attempt


def status_event(before: Job, after: Job) -> StatusChanged | None:
    """The event for a change of status, if there was one."""
    if before.status is after.status:
        return None
    attempt = after.attempt
    reason = (attempt.outcome or "") if attempt and attempt.ended_at == after.updated_at else ""
    return StatusChanged(status=after.status, attempt=attempt.number if attempt else 0, reason=reason, failure=after.failure)


def _end(job: Job, number: int, outcome: AttemptOutcome, failure: Failure | None, now: datetime) -> Job:
    attempt = _get_attempt(job, number)
    if attempt.ended_at is not None:
        return job
    if failure:
        failure = failure.model_copy(update={"attempt": number})
    ended = attempt.model_copy(update={"ended_at": now, "outcome": outcome, "failure": failure})
    job = _replace_attempt(job, ended, now)
    status = _status_after(job, outcome)
    if status is Status.FAILED:
        return _transition(job, status, now, failure=_retry_exhausted_failure(job, ended) if outcome in CONTINUABLE_OUTCOMES else failure)
    return _transition(job, status, now)


def _status_after(job: Job, outcome: AttemptOutcome) -> Status:
    """The status after the attempt, which the record already shows as ended."""
    if outcome == "completed":
        return Status.COMPLETED  # also when a cancel was requested: the attempt completed first
    if job.status is Status.CANCELLING:
        return Status.CANCELLED
    if job.status is Status.PAUSING and outcome in (*CONTINUABLE_OUTCOMES, "paused"):
        return Status.PAUSED  # however it ended, it resumes from its last checkpoint
    match outcome:
        case "yielded" | "preempted" | "lost":
            return Status.FAILED if _retry_budget_exhausted(job) else Status.QUEUED
        case _:
            return Status.FAILED


def _retry_budget_exhausted(job: Job) -> bool:
    """Whether too many attempts in a row saved nothing new."""
    attempts = _attempts_without_progress(job)
    return len(attempts) >= MAX_ATTEMPTS_WITHOUT_PROGRESS or sum(attempt.outcome == "lost" for attempt in attempts) >= MAX_LOST_ATTEMPTS


def _attempts_without_progress(job: Job) -> list[Attempt]:
    """The latest attempts that ended early without a checkpoint beyond the earlier ones, newest first."""
    attempts: list[Attempt] = []
    for attempt in reversed(job.attempts[job.retry_budget_from_attempt - 1 :]):
        earlier = [other.last_checkpoint_step for other in job.attempts[job.resume_from_attempt - 1 : attempt.number - 1]]
        furthest = max((step for step in earlier if step is not None), default=0)
        if attempt.outcome not in CONTINUABLE_OUTCOMES or (attempt.last_checkpoint_step or 0) > furthest:
            break
        attempts.append(attempt)
    return attempts


def _retry_exhausted_failure(job: Job, ended: Attempt) -> Failure:
    """How many attempts made no progress, and how the last one ended."""
    count = len(_attempts_without_progress(job))
    last_message = f": {ended.failure.message}" if ended.failure else ""
    own_hint = ended.failure.hint if ended.failure else ""
    return Failure(
        code=ended.failure.code if ended.failure else "timeout" if ended.outcome == "yielded" else "preempted",
        message=f"{count} attempts in a row ended early without progress ({ended.outcome}){last_message}",
        hint=own_hint or "POST /jobs/{id}/retry continues the job; larger hardware may help",
        attempt=ended.number,
    )


def _record_checkpoint(job: Job, number: int, step: int, now: datetime) -> Job:
    """Note a durable checkpoint of the attempt; a lower step than the last one changes nothing."""
    attempt = _get_attempt(job, number)
    if attempt.last_checkpoint_step is not None and attempt.last_checkpoint_step >= step:
        return job
    job = _replace_attempt(job, attempt.model_copy(update={"last_checkpoint_step": step}), now)
    return job.model_copy(update={"checkpoint": CheckpointRef(step=step, attempt=number, at=now)})


def _transition(job: Job, status: Status, now: datetime, **changes: object) -> Job:
    if status not in ALLOWED_TRANSITIONS.get(job.status, frozenset()):
        raise Conflict(f"{job.job_id} is {job.status}; it cannot become {status}")
    changes |= {"status": status, "status_changed_at": now, "updated_at": now}
    if status.is_final:
        changes["finished_at"] = now
    return job.model_copy(update=changes)


def _replace_attempt(job: Job, attempt: Attempt, now: datetime) -> Job:
    attempts = tuple(attempt if old.number == attempt.number else old for old in job.attempts)
    return job.model_copy(update={"attempts": attempts, "updated_at": now})


def _get_attempt(job: Job, number: int) -> Attempt:
    if not 1 <= number <= len(job.attempts):
        raise Fenced(f"{job.job_id} has no attempt {number}")
    return job.attempts[number - 1]
