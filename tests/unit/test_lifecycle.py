"""The state machine: examples, and random sequences of changes."""

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from schema.events import CheckpointRestored, CheckpointSaved, EvaluationCompleted, GateEvaluated, PhaseChanged, TrackerStarted
from schema.job import EvalMetrics, Failure, Gate, GateCheck, Job, Status
from schema.result import Result
from service.core import lifecycle
from service.core.errors import Conflict, Fenced
from service.core.lifecycle import ALLOWED_TRANSITIONS
from service.core.retry_budget import MAX_ATTEMPTS_WITHOUT_PROGRESS, MAX_LOST_ATTEMPTS
from tests.factories import FAKE_PLACEMENT, START, make_config, make_job

BIG = FAKE_PLACEMENT.model_copy(update={"profile": "big"})
OUTCOMES = ("completed", "failed", "cancelled", "paused", "yielded")


def make_result(attempt: int = 1, outcome: str = "completed", **changes: object) -> Result:
    return Result.model_validate(
        {"job_id": "job-1", "attempt": attempt, "claimant": "process-1", "outcome": outcome, "started_at": START, "finished_at": START}
        | changes
    )


def make_active_job(status: Status = Status.PREPARING) -> Job:
    job = lifecycle.claim_attempt(lifecycle.begin_attempt(make_job(), FAKE_PLACEMENT, START), 1, "process-1", START)
    return job.model_copy(update={"status": status})


def test_new_attempt_moves_job_to_preparing() -> None:
    job = lifecycle.begin_attempt(make_job(), FAKE_PLACEMENT, START)
    assert job.status is Status.PREPARING
    assert job.attempt is not None
    assert (job.attempt.number, job.attempt.handle) == (1, None)


def test_claim_is_exclusive_and_idempotent() -> None:
    job = make_active_job()
    assert lifecycle.claim_attempt(job, 1, "process-1", START) is job
    with pytest.raises(Fenced):
        lifecycle.claim_attempt(job, 1, "process-2", START)


def test_training_phase_moves_job_to_training() -> None:
    assert lifecycle.apply_event(make_active_job(), 1, PhaseChanged(phase="tokenizing"), START).status is Status.PREPARING
    assert lifecycle.apply_event(make_active_job(), 1, PhaseChanged(phase="training"), START).status is Status.TRAINING


def test_evaluations_and_tracker_urls_are_recorded() -> None:
    before, after = EvalMetrics(eval_loss=4.0), EvalMetrics(eval_loss=3.0)
    job = lifecycle.apply_event(make_active_job(), 1, EvaluationCompleted(when="before", step=0, metrics=before), START)
    job = lifecycle.apply_event(job, 1, EvaluationCompleted(when="during", step=5, metrics=after), START)
    job = lifecycle.apply_event(job, 1, TrackerStarted(tracker="wandb", url="https://w"), START)
    job = lifecycle.apply_event(job, 1, TrackerStarted(tracker="mlflow", url="https://m"), START)
    job = lifecycle.apply_event(job, 1, TrackerStarted(tracker="tensorboard", url=None), START)
    assert (job.base_metrics, job.metrics, job.wandb_url) == (before, after, "https://w")
    assert job.tracker_urls == {"wandb": "https://w", "mlflow": "https://m"}


def test_files_of_an_offline_wandb_run_are_no_page() -> None:
    job = lifecycle.apply_event(make_active_job(), 1, TrackerStarted(tracker="wandb", url="file:///objects/trackers/1/wandb"), START)
    assert (job.tracker_urls, job.wandb_url) == ({"wandb": "file:///objects/trackers/1/wandb"}, None)


def test_gate_outcome_is_recorded_from_event_and_result() -> None:
    gate = Gate(passed=False, checks=(GateCheck(metric="perplexity", value=9.0, at_most=8.0, passed=False),))
    assert lifecycle.apply_event(make_active_job(), 1, GateEvaluated(gate=gate), START).gate == gate
    job = lifecycle.apply_result(make_active_job(), make_result(gate=gate, published_step=0, tracker_urls={"mlflow": "https://m"}), START)
    assert (job.status, job.gate, job.published_step, job.tracker_urls) == (Status.COMPLETED, gate, 0, {"mlflow": "https://m"})


def test_result_without_fields_keeps_known_values() -> None:
    known = make_active_job().model_copy(update={"tracker_urls": {"mlflow": "https://m"}, "wandb_url": "https://w", "published_step": 3})
    job = lifecycle.apply_result(known, make_result(), START)
    assert (job.tracker_urls, job.wandb_url, job.published_step) == ({"mlflow": "https://m"}, "https://w", 3)


def test_a_completed_attempt_completes_its_job() -> None:
    job = lifecycle.apply_result(make_active_job(), make_result(metrics=EvalMetrics(eval_loss=1.0)), START)
    assert job.status is Status.COMPLETED
    assert job.metrics == EvalMetrics(eval_loss=1.0)
    assert job.finished_at == START


def test_failed_attempt_records_failure() -> None:
    failure = Failure(code="invalid_data", message="no rows")
    job = lifecycle.apply_result(make_active_job(), make_result(outcome="failed", failure=failure), START)
    assert job.status is Status.FAILED
    assert job.failure == failure.model_copy(update={"attempt": 1})


def test_cancel_wins_unless_attempt_completed() -> None:
    cancelling = lifecycle.request_cancel(make_active_job(Status.TRAINING), START)
    assert cancelling.status is Status.CANCELLING
    assert lifecycle.apply_result(cancelling, make_result(outcome="cancelled"), START).status is Status.CANCELLED
    assert lifecycle.apply_result(cancelling, make_result(outcome="failed"), START).status is Status.CANCELLED
    assert lifecycle.apply_result(cancelling, make_result(outcome="completed"), START).status is Status.COMPLETED


def test_cancel_is_idempotent_and_conflicts_after_completion() -> None:
    cancelling = lifecycle.request_cancel(make_active_job(), START)
    assert lifecycle.request_cancel(cancelling, START) is cancelling
    cancelled = lifecycle.request_cancel(make_job(), START)
    assert cancelled.status is Status.CANCELLED
    assert lifecycle.request_cancel(cancelled, START) is cancelled
    with pytest.raises(Conflict, match="already completed"):
        lifecycle.request_cancel(make_job(status=Status.COMPLETED), START)


def test_unrequested_stop_requeues_job() -> None:
    job = lifecycle.apply_result(make_active_job(Status.TRAINING), make_result(outcome="cancelled"), START)
    assert job.status is Status.QUEUED
    assert job.attempts[0].outcome == "preempted"
    assert lifecycle.begin_attempt(job, FAKE_PLACEMENT, START).attempts[1].number == 2


def test_repeated_preemption_without_progress_fails_job() -> None:
    job = make_job()
    for number in range(1, MAX_ATTEMPTS_WITHOUT_PROGRESS + 1):
        job = lifecycle.begin_attempt(job, FAKE_PLACEMENT, START)
        job = lifecycle.claim_attempt(job, number, "process-1", START)
        job = lifecycle.apply_result(job, make_result(number, "cancelled"), START)
    assert job.status is Status.FAILED
    assert job.failure is not None
    assert job.failure.code == "preempted"


def test_lost_attempts_are_retried_up_to_limit() -> None:
    job = lifecycle.mark_lost(make_active_job(Status.TRAINING), 1, START)
    assert (job.status, job.attempts[0].outcome) == (Status.QUEUED, "lost")
    for number in range(2, MAX_LOST_ATTEMPTS + 1):
        job = lifecycle.mark_lost(lifecycle.begin_attempt(job, FAKE_PLACEMENT, START), number, START)
    assert job.status is Status.FAILED
    assert job.failure is not None
    assert (job.failure.code, job.failure.attempt) == ("lost", MAX_LOST_ATTEMPTS)
    assert "3 attempts in a row" in job.failure.message
    assert "memory" in job.failure.hint


def test_lost_attempts_with_progress_are_unlimited() -> None:
    job = make_job()
    for number in range(1, 20):
        job = lifecycle.begin_attempt(job, FAKE_PLACEMENT, START)
        job = lifecycle.mark_lost(job, number, START, last_checkpoint_step=10 * number)
        assert job.status is Status.QUEUED
    assert job.checkpoint is not None
    assert (job.checkpoint.step, job.checkpoint.attempt) == (190, 19)


def test_existing_checkpoint_does_not_count_as_progress() -> None:
    job = lifecycle.mark_lost(make_active_job(Status.TRAINING), 1, START, last_checkpoint_step=50)
    for number in range(2, 2 + MAX_LOST_ATTEMPTS):
        job = lifecycle.mark_lost(lifecycle.begin_attempt(job, FAKE_PLACEMENT, START), number, START, last_checkpoint_step=50)
    assert job.status is Status.FAILED


def test_exit_reason_decides_whether_to_retry() -> None:
    timeout, crash = Failure(code="timeout", message="ran into its limit"), Failure(code="internal", message="exit code 3")
    assert lifecycle.mark_lost(make_active_job(Status.TRAINING), 1, START, timeout).status is Status.QUEUED
    assert lifecycle.mark_lost(make_active_job(Status.TRAINING), 1, START, crash).status is Status.FAILED
    preempted = lifecycle.mark_lost(make_active_job(Status.TRAINING), 1, START, crash, preempted=True)
    assert (preempted.status, preempted.attempts[0].outcome) == (Status.QUEUED, "preempted")


def test_time_slices_continue_only_with_progress() -> None:
    job = make_job()
    for number in range(1, 11):
        job = lifecycle.begin_attempt(job, FAKE_PLACEMENT, START)
        job = lifecycle.claim_attempt(job, number, "process-1", START)
        job = lifecycle.apply_result(job, make_result(number, "yielded", yield_reason="time_slice", last_checkpoint_step=number), START)
        assert job.status is Status.QUEUED
    for number in range(11, 11 + MAX_ATTEMPTS_WITHOUT_PROGRESS):
        job = lifecycle.claim_attempt(lifecycle.begin_attempt(job, FAKE_PLACEMENT, START), number, "process-1", START)
        job = lifecycle.apply_result(job, make_result(number, "yielded", last_checkpoint_step=10), START)
    assert job.status is Status.FAILED
    assert job.failure is not None
    assert job.failure.code == "timeout"


def test_pause_and_resume_keep_progress() -> None:
    pausing = lifecycle.request_pause(make_active_job(Status.TRAINING), START)
    assert pausing.status is Status.PAUSING
    assert lifecycle.request_pause(pausing, START) is pausing
    paused = lifecycle.apply_result(pausing, make_result(outcome="paused", last_checkpoint_step=7), START)
    assert (paused.status, paused.attempts[0].outcome) == (Status.PAUSED, "paused")
    assert lifecycle.request_pause(paused, START) is paused
    resumed = lifecycle.request_resume(paused, START)
    assert resumed.status is Status.QUEUED
    assert lifecycle.request_resume(resumed, START) is resumed


def test_queued_job_is_paused_immediately() -> None:
    assert lifecycle.request_pause(make_job(), START).status is Status.PAUSED


@pytest.mark.parametrize("outcome", ["yielded", "cancelled"])
def test_pausing_job_ends_paused_unless_final(outcome: str) -> None:
    pausing = lifecycle.request_pause(make_active_job(Status.TRAINING), START)
    assert lifecycle.apply_result(pausing, make_result(outcome=outcome), START).status is Status.PAUSED
    assert lifecycle.mark_lost(pausing, 1, START).status is Status.PAUSED
    assert lifecycle.apply_result(pausing, make_result(outcome="completed"), START).status is Status.COMPLETED
    assert lifecycle.apply_result(pausing, make_result(outcome="failed"), START).status is Status.FAILED


def test_cancel_overrides_pause() -> None:
    pausing = lifecycle.request_pause(make_active_job(), START)
    cancelling = lifecycle.request_cancel(pausing, START)
    assert cancelling.status is Status.CANCELLING
    assert lifecycle.apply_result(cancelling, make_result(outcome="paused"), START).status is Status.CANCELLED
    with pytest.raises(Conflict, match="nothing to pause"):
        lifecycle.request_pause(cancelling, START)


def test_only_paused_job_can_be_resumed_with_changes() -> None:
    longer = make_config(hyperparameters={"epochs": 9})
    paused = lifecycle.request_pause(make_job(), START)
    resumed = lifecycle.request_resume(paused, START, training_config=longer, placements=(BIG,))
    assert (resumed.training_config, resumed.placements) == (longer, (BIG,))
    assert lifecycle.request_resume(resumed, START, training_config=longer, placements=(BIG,)) is resumed
    with pytest.raises(Conflict, match="while it is paused"):
        lifecycle.request_resume(make_active_job(), START, placements=(BIG,))
    with pytest.raises(Conflict, match="still pausing"):
        lifecycle.request_resume(lifecycle.request_pause(make_active_job(), START), START)
    with pytest.raises(Conflict, match="nothing to resume"):
        lifecycle.request_resume(make_job(status=Status.FAILED), START)


def test_retry_keeps_attempt_history() -> None:
    failed = lifecycle.apply_result(make_active_job(Status.TRAINING), make_result(outcome="failed", last_checkpoint_step=5), START)
    retried = lifecycle.request_retry(failed, START)
    assert (retried.status, retried.failure, retried.finished_at) == (Status.QUEUED, None, None)
    assert retried.attempts == failed.attempts
    assert retried.resume_from_attempt == 1
    assert lifecycle.request_retry(retried, START) is retried
    restarted = lifecycle.request_retry(failed, START, from_start=True)
    assert (restarted.resume_from_attempt, restarted.checkpoint) == (2, None)


def test_retry_requires_failed_or_cancelled_job_not_being_deleted() -> None:
    for job in (make_job(), make_active_job(), make_job(status=Status.COMPLETED), make_job(status=Status.PAUSED)):
        with pytest.raises(Conflict, match="only a failed or cancelled job"):
            lifecycle.request_retry(job, START)
    deleting = lifecycle.start_deletion(lifecycle.request_cancel(make_job(), START), START)
    with pytest.raises(Conflict, match="being deleted"):
        lifecycle.request_retry(deleting, START)


def test_retry_resets_lost_attempt_budget() -> None:
    job = make_active_job(Status.TRAINING)
    for number in range(1, MAX_LOST_ATTEMPTS + 1):
        job = lifecycle.mark_lost(job if number == 1 else lifecycle.begin_attempt(job, FAKE_PLACEMENT, START), number, START)
    assert job.status is Status.FAILED
    job = lifecycle.begin_attempt(lifecycle.request_retry(job, START), FAKE_PLACEMENT, START)
    assert lifecycle.mark_lost(job, MAX_LOST_ATTEMPTS + 1, START).status is Status.QUEUED


def test_recorded_checkpoint_step_never_decreases() -> None:
    def make_checkpoint_event(step: int) -> CheckpointSaved:
        return CheckpointSaved(step=step, epoch=1.0, reason="interval", size_bytes=1, save_s=0.1, upload_s=0.1)

    job = lifecycle.apply_result(make_active_job(Status.TRAINING), make_result(outcome="yielded", last_checkpoint_step=5), START)
    job = lifecycle.begin_attempt(job, FAKE_PLACEMENT, START)
    job = lifecycle.apply_event(job, 2, CheckpointRestored(step=5, from_attempt=1), START)
    job = lifecycle.apply_event(job, 2, make_checkpoint_event(20), START)
    # Back to its own checkpoint, after running out of memory.
    job = lifecycle.apply_event(job, 2, CheckpointRestored(step=20, from_attempt=2), START)
    assert lifecycle.apply_event(job, 2, make_checkpoint_event(10), START) is job
    assert job.attempt is not None
    assert (job.attempt.resumed_step, job.attempt.last_checkpoint_step) == (5, 20)
    assert job.checkpoint is not None
    assert job.checkpoint.step == 20


def test_late_messages_of_old_attempt_are_ignored_or_fenced() -> None:
    job = lifecycle.apply_result(make_active_job(Status.TRAINING), make_result(outcome="yielded"), START)
    second = lifecycle.begin_attempt(job, FAKE_PLACEMENT, START)
    assert lifecycle.apply_result(second, make_result(1, "completed"), START) is second
    for number in (1, 3, 0, -1):
        with pytest.raises(Fenced):
            lifecycle.apply_event(second, number, PhaseChanged(phase="training"), START)


class JobLifecycleMachine(RuleBasedStateMachine):
    """Changes arrive in any order, repeated and late; the record stays consistent."""

    def __init__(self) -> None:
        super().__init__()
        self.job = make_job()
        self.now = START
        self.final: Job | None = None
        self.claimants: dict[int, str] = {}

    def apply_change(self, after: Job) -> None:
        before = self.job
        if after.status is not before.status:
            assert after.status in ALLOWED_TRANSITIONS[before.status]
        assert len(after.attempts) >= len(before.attempts)
        assert after.attempts[: len(before.attempts) - 1] == before.attempts[:-1]
        self.job = after.model_copy(update={"revision": before.revision + (after is not before)})

    def try_change(self, change: Callable[[], Job]) -> None:
        """Apply a change that may be rejected; then the job stays as it is."""
        try:
            after = change()
        except (Fenced, Conflict):
            return
        self.apply_change(after)

    def tick(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now

    @rule()
    def launch(self) -> None:
        self.try_change(lambda: lifecycle.begin_attempt(self.job, FAKE_PLACEMENT, self.tick()))

    @rule(number=st.integers(0, 4), claimant=st.sampled_from("ab"))
    def claim(self, number: int, claimant: str) -> None:
        def claim() -> Job:
            job = lifecycle.claim_attempt(self.job, number, claimant, self.tick())
            assert self.claimants.setdefault(number, claimant) == claimant
            return job

        self.try_change(claim)

    @rule(number=st.integers(0, 4), phase=st.sampled_from(["downloading", "training", "uploading"]))
    def report(self, number: int, phase: str) -> None:
        self.try_change(lambda: lifecycle.apply_event(self.job, number, PhaseChanged.model_validate({"phase": phase}), self.tick()))

    @rule(number=st.integers(0, 4), outcome=st.sampled_from(OUTCOMES), is_owner=st.booleans())
    def finish(self, number: int, outcome: str, is_owner: bool) -> None:
        def finish() -> Job:
            claimant = self.claimants.get(number, "nobody") if is_owner else "nobody"
            after = lifecycle.apply_result(self.job, make_result(number, outcome, claimant=claimant), self.tick())
            assert claimant != "nobody"
            return after

        self.try_change(finish)

    @rule(number=st.integers(0, 4))
    def lose(self, number: int) -> None:
        self.try_change(lambda: lifecycle.mark_lost(self.job, number, self.tick()))

    @rule()
    def cancel(self) -> None:
        self.try_change(lambda: lifecycle.request_cancel(self.job, self.tick()))

    @rule()
    def pause(self) -> None:
        self.try_change(lambda: lifecycle.request_pause(self.job, self.tick()))

    @rule()
    def resume(self) -> None:
        self.try_change(lambda: lifecycle.request_resume(self.job, self.tick()))

    @rule(from_start=st.booleans())
    def retry(self, from_start: bool) -> None:
        before = self.job
        self.try_change(lambda: lifecycle.request_retry(self.job, self.tick(), from_start=from_start))
        if self.job.status is not before.status:
            self.final = None  # only a retry leaves a final status, and never `completed`
            assert before.status in (Status.FAILED, Status.CANCELLED)

    @precondition(lambda self: self.job.status.is_final)
    @rule()
    def record_final_job(self) -> None:
        self.final = self.final or self.job

    @invariant()
    def final_job_never_changes(self) -> None:
        if self.final:
            assert self.job == self.final

    @invariant()
    def attempts_without_progress_are_bounded(self) -> None:
        involuntary = [
            attempt.outcome in ("yielded", "preempted", "lost") for attempt in self.job.attempts[self.job.retry_budget_from_attempt - 1 :]
        ]
        is_waiting = self.job.status in (Status.QUEUED, Status.PREPARING)
        # These sequences never save a checkpoint.
        assert not (is_waiting and all(involuntary) and len(involuntary) >= MAX_ATTEMPTS_WITHOUT_PROGRESS)

    @invariant()
    def only_active_job_has_running_attempt(self) -> None:
        running = [attempt for attempt in self.job.attempts if attempt.ended_at is None]
        assert len(running) == (1 if self.job.status.is_active else 0)

    @invariant()
    def only_failed_job_has_failure(self) -> None:
        assert (self.job.failure is not None) == (self.job.status is Status.FAILED)

    @invariant()
    def only_final_job_has_finished_at(self) -> None:
        assert (self.job.finished_at is not None) == self.job.status.is_final


TestJobLifecycle = JobLifecycleMachine.TestCase
TestJobLifecycle.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
