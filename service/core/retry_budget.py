"""When a job that keeps ending early is given up: pure functions over its attempts."""

from schema.job import Attempt, AttemptOutcome, Failure, Job

CONTINUABLE_OUTCOMES: frozenset[AttemptOutcome] = frozenset({"yielded", "preempted", "lost"})
# The job fails after this many attempts in a row that ended early and saved nothing new.
MAX_ATTEMPTS_WITHOUT_PROGRESS = 5
# Or after this many of them that were lost: each may have cost an hour, and a process killed for its memory is killed again.
MAX_LOST_ATTEMPTS = 3


def is_exhausted(job: Job) -> bool:
    """Whether too many attempts in a row saved nothing new."""
    attempts = _attempts_without_progress(job)
    return len(attempts) >= MAX_ATTEMPTS_WITHOUT_PROGRESS or sum(attempt.outcome == "lost" for attempt in attempts) >= MAX_LOST_ATTEMPTS


def describe_exhausted(job: Job, ended: Attempt) -> Failure:
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
