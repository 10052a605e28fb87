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
from schema.job import Attempt, AttemptOutcome, CheckpointRef, Failure, Job, PauseReason, Refusal, Status
from schema.placement import Placement
from schema.result import Result
from schema.training import JobConfig
from service.core.errors import Conflict, Fenced
from service.core.retry_budget import CONTINUABLE_OUTCOMES, describe_exhausted, is_exhausted

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

# The fields of a result that the record copies as they are.
RESULT_FIELDS = ("metrics", "base_metrics", "gate", "published_step", "wandb_url")
# Exit reasons after which another attempt can succeed.
CONTINUABLE_FAILURES = frozenset({"preempted", "timeout"})


def begin_attempt(job: Job, placement: Placement, now: datetime) -> Job:
    """Give a queued job its next attempt, which has no handle yet."""
    attempt = Attempt(number=len(job.attempts) + 1, placement=placement, created_at=now, launch_started_at=now)
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


def refuse_launch(job: Job, number: int, failure: Failure, now: datetime, *, permanent: bool) -> Job:
    """Note that the attempt's launcher refused it, having started nothing, and move the attempt to the next candidate placement.

    After the last one it waits at the first for a later try. It fails if no placement could ever take it.
    """
    attempt = _get_attempt(job, number)
    if attempt.handle is not None or attempt.ended_at is not None:
        return job
    reason = f"{failure.message} {failure.hint}".strip()
    refusal = Refusal(placement=attempt.placement, reason=reason, permanent=permanent, at=now)
    refusals = (*(other for other in attempt.refusals if other.placement != attempt.placement), refusal)
    impossible = [refusal.placement for refusal in refusals if refusal.permanent]
    usable = [placement for placement in job.placements if placement not in impossible]
    changes: dict[str, object] = {"refusals": refusals, "pending_reason": reason}
    if not usable:
        if len(refusals) > 1:
            failure = failure.model_copy(update={"message": "; ".join(f"{each.placement.hardware}: {each.reason}" for each in refusals)})
        return _end(_replace_attempt(job, attempt.model_copy(update=changes), now), number, "launch_failed", failure, now)
    tried = job.placements.index(attempt.placement) if attempt.placement in job.placements else -1
    following = next((placement for placement in job.placements[tried + 1 :] if placement in usable), None)
    # Without a time, its launcher starts the attempt at once; with one, only after the delay of a retry.
    changes |= {"placement": following or usable[0], "launch_started_at": None if following else now}
    return _replace_attempt(job, attempt.model_copy(update=changes), now)


def mark_launch_failed(job: Job, number: int, failure: Failure, now: datetime) -> Job:
    """End an attempt that no launcher could start."""
    return _end(job, number, "launch_failed", failure, now)


def mark_waiting(job: Job, number: int, now: datetime) -> Job:
    """Note that the attempt is launched and waits until a machine claims it."""
    attempt = check_current(job, number)
    reason = f"waits until a machine of {attempt.placement.launcher} takes it"
    if attempt.claimed_by is not None or attempt.pending_reason == reason:
        return job
    return _replace_attempt(job, attempt.model_copy(update={"pending_reason": reason, "waited_for_machine": True}), now)


def mark_launched(job: Job, number: int, handle: str, now: datetime) -> Job:
    """Store the handle of a launched attempt. Its process may have claimed it, and even ended it, before the launcher answered."""
    attempt = _get_attempt(job, number)
    if attempt.handle == handle:
        return job
    return _replace_attempt(job, attempt.model_copy(update={"handle": handle, "launched_at": now, "pending_reason": None}), now)


def claim_attempt(job: Job, number: int, claimant: str, now: datetime) -> Job:
    """Give the attempt to one process. Raises Fenced for a second process."""
    attempt = check_current(job, number)
    if attempt.claimed_by == claimant:
        return job
    if attempt.claimed_by is not None:
        raise Fenced(f"attempt {number} of {job.job_id} is owned by another process")
    changes = {"claimed_by": claimant, "claimed_at": now, "pending_reason": None}
    job = _replace_attempt(job, attempt.model_copy(update=changes), now)
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
        case TrackerStarted(tracker=tracker, url=str(url), page=page):
            wandb = {"wandb_url": page} if tracker == "wandb" else {}
            return job.model_copy(update={"tracker_urls": job.tracker_urls | {tracker: url}, "updated_at": now, **wandb})
        case GateEvaluated(gate=gate):
            return job.model_copy(update={"gate": gate, "updated_at": now})
        case CheckpointSaved(step=step, save_s=save_s, upload_s=upload_s):
            saved = _record_checkpoint(job, number, step, now)
            timed = _get_attempt(saved, number).model_copy(update={"checkpoint_s": save_s + upload_s})
            return job if saved is job else _replace_attempt(saved, timed, now)
        case CheckpointRestored(step=step, from_attempt=source) if source != number:  # its own: it went back after running out of memory
            return _replace_attempt(job, _get_attempt(job, number).model_copy(update={"resumed_step": step}), now)
        case _:
            return job


def apply_result(job: Job, result: Result, now: datetime) -> Job:
    """Apply an attempt's result. A late or repeated one changes nothing.

    Raises Fenced for one of another process than the attempt's owner, or of an attempt that is not current.
    """
    attempt = check_claimant(job, result.attempt, result.claimant)
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


def fail_attempt(job: Job, number: int, failure: Failure, now: datetime) -> Job:
    """End the current attempt, whose job another attempt could not complete either. Raises Fenced."""
    check_current(job, number)
    return _end(job, number, "failed", failure, now)


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
        hint=f"see GET /jobs/{{id}}/logs; a process that ran out of memory ends like this: {job.training_config.out_of_memory_hint}",
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


def request_pause(job: Job, now: datetime, reason: PauseReason = "requested") -> Job:
    """Pause the job: free the compute, keep the progress. Can be repeated. Raises Conflict for a job that is final or is being canceled."""
    match job.status:
        case Status.PAUSED | Status.PAUSING:
            return job
        case Status.QUEUED:
            return _transition(job, Status.PAUSED, now, pause_reason=reason)
        case Status.PREPARING | Status.TRAINING:
            return _transition(job, Status.PAUSING, now, pause_reason=reason)
        case _:
            raise Conflict(f"{job.job_id} is {job.status}; there is nothing to pause")


def request_resume(
    job: Job, now: datetime, *, training_config: JobConfig | None = None, placements: tuple[Placement, ...] | None = None
) -> Job:
    """Queue a paused job again, with another configuration or other placements if given. Can be repeated. Raises Conflict."""
    changes: dict[str, object] = {"training_config": training_config or job.training_config, "placements": placements or job.placements}
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
    job: Job,
    now: datetime,
    *,
    from_start: bool = False,
    training_config: JobConfig | None = None,
    placements: tuple[Placement, ...] | None = None,
) -> Job:
    """Queue a failed or cancelled job again. Can be repeated while the retried job runs. Raises Conflict."""
    if job.status not in (Status.FAILED, Status.CANCELLED):
        if job.retried_at is not None and not job.status.is_final:
            return job
        hint = "POST /jobs/{id}/resume continues it" if job.status is Status.PAUSED else ""
        raise Conflict(f"{job.job_id} is {job.status}; only a failed or cancelled job can be retried", hint=hint)
    if job.deletion_started_at is not None:
        raise Conflict(f"{job.job_id} is being deleted")
    if _lost_checkpoints(job) and not from_start:
        message = f"the checkpoints of {job.job_id} were deleted, so a retry cannot continue it"
        raise Conflict(message, hint="send from_start: true, and the retry trains it again")
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
        placements=placements or job.placements,
    )


def _lost_checkpoints(job: Job) -> bool:
    """Whether all checkpoints that a retry would continue from were deleted, after the last attempt."""
    deleted, attempt = job.checkpoints_deleted, job.attempt
    return deleted is not None and deleted.kept_step is None and attempt is not None and attempt.created_at <= deleted.at


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


def check_claimant(job: Job, number: int, claimant: str) -> Attempt:
    """The attempt, current or not, if that process owns it. Raises Fenced."""
    attempt = _get_attempt(job, number)
    if attempt.claimed_by is None:
        raise Fenced(f"no process has claimed attempt {number} of {job.job_id}")
    if attempt.claimed_by != claimant:
        raise Fenced(f"attempt {number} of {job.job_id} is owned by another process")
    return attempt


def status_event(before: Job, after: Job) -> StatusChanged | None:
    """The event for a change of status, if there was one."""
    if before.status is after.status:
        return None
    attempt = after.attempt
    reason: str = (attempt.outcome or "") if attempt and attempt.ended_at == after.updated_at else ""
    if after.status in (Status.PAUSING, Status.PAUSED) and after.pause_reason and after.pause_reason != "requested":
        reason = after.pause_reason
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
        return _transition(job, status, now, failure=describe_exhausted(job, ended) if outcome in CONTINUABLE_OUTCOMES else failure)
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
            return Status.FAILED if is_exhausted(job) else Status.QUEUED
        case _:
            return Status.FAILED


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
