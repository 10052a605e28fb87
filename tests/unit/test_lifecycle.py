"""The state machine, by example and by thousands of random lives."""

from datetime import datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from schema.events import CheckpointSaved, Evaluated, GateJudged, PhaseChanged, Resumed, TrackerStarted
from schema.job import EvalMetrics, Failure, Gate, GateCheck, Job, Status
from schema.result import Result
from service.core import lifecycle
from service.core.errors import Conflict, Fenced
from service.core.lifecycle import FOLLOWS, MOST_LOST, MOST_WITHOUT_PROGRESS
from tests.factories import START, a_config, a_job

OUTCOMES = ("completed", "failed", "cancelled", "paused", "yielded")


def a_result(attempt: int = 1, outcome: str = "completed", **changes: object) -> Result:
    return Result.model_validate(
        {"job_id": "job-1", "attempt": attempt, "outcome": outcome, "started_at": START, "finished_at": START} | changes
    )


def at_work(status: Status = Status.PREPARING) -> Job:
    job = lifecycle.claimed(lifecycle.begin_attempt(a_job(), "fake", START), 1, "process-1", START)
    return job.model_copy(update={"status": status})


def test_an_attempt_makes_a_queued_job_preparing() -> None:
    job = lifecycle.begin_attempt(a_job(), "fake", START)
    assert job.status is Status.PREPARING
    assert job.attempt is not None
    assert (job.attempt.number, job.attempt.handle) == (1, None)


def test_the_first_claim_owns_the_attempt_and_a_repeat_is_harmless() -> None:
    job = at_work()
    assert lifecycle.claimed(job, 1, "process-1", START) is job
    with pytest.raises(Fenced):
        lifecycle.claimed(job, 1, "process-2", START)


def test_training_begins_when_the_attempt_says_so() -> None:
    assert lifecycle.absorbed(at_work(), 1, PhaseChanged(phase="tokenizing"), START).status is Status.PREPARING
    assert lifecycle.absorbed(at_work(), 1, PhaseChanged(phase="training"), START).status is Status.TRAINING


def test_evaluations_and_the_tracker_reach_the_record() -> None:
    before, after = EvalMetrics(eval_loss=4.0), EvalMetrics(eval_loss=3.0)
    job = lifecycle.absorbed(at_work(), 1, Evaluated(when="before", step=0, metrics=before), START)
    job = lifecycle.absorbed(job, 1, Evaluated(when="during", step=5, metrics=after), START)
    job = lifecycle.absorbed(job, 1, TrackerStarted(tracker="wandb", url="https://w"), START)
    job = lifecycle.absorbed(job, 1, TrackerStarted(tracker="mlflow", url="https://m"), START)
    job = lifecycle.absorbed(job, 1, TrackerStarted(tracker="tensorboard", url=None), START)
    assert (job.base_metrics, job.metrics, job.wandb_url) == (before, after, "https://w")
    assert job.trackers == {"wandb": "https://w", "mlflow": "https://m"}


def test_the_gates_word_reaches_the_record_at_once_and_with_the_result() -> None:
    gate = Gate(passed=False, checks=(GateCheck(metric="perplexity", value=9.0, at_most=8.0, passed=False),))
    assert lifecycle.absorbed(at_work(), 1, GateJudged(gate=gate), START).gate == gate
    job = lifecycle.finished(at_work(), a_result(gate=gate, published_step=0, trackers={"mlflow": "https://m"}), START)
    assert (job.status, job.gate, job.published_step, job.trackers) == (Status.COMPLETED, gate, 0, {"mlflow": "https://m"})


def test_a_result_that_says_less_takes_nothing_away() -> None:
    known = at_work().model_copy(update={"trackers": {"mlflow": "https://m"}, "wandb_url": "https://w", "published_step": 3})
    job = lifecycle.finished(known, a_result(), START)
    assert (job.trackers, job.wandb_url, job.published_step) == ({"mlflow": "https://m"}, "https://w", 3)


def test_a_completed_attempt_completes_its_job() -> None:
    job = lifecycle.finished(at_work(), a_result(metrics=EvalMetrics(eval_loss=1.0)), START)
    assert job.status is Status.COMPLETED
    assert job.metrics == EvalMetrics(eval_loss=1.0)
    assert job.finished_at == START


def test_a_failed_attempt_says_why() -> None:
    failure = Failure(code="invalid_data", message="no rows")
    job = lifecycle.finished(at_work(), a_result(outcome="failed", failure=failure), START)
    assert job.status is Status.FAILED
    assert job.failure == failure.model_copy(update={"attempt": 1})


def test_a_cancel_is_obeyed_or_loses_the_race() -> None:
    cancelling = lifecycle.cancel_requested(at_work(Status.TRAINING), START)
    assert cancelling.status is Status.CANCELLING
    assert lifecycle.finished(cancelling, a_result(outcome="cancelled"), START).status is Status.CANCELLED
    assert lifecycle.finished(cancelling, a_result(outcome="failed"), START).status is Status.CANCELLED
    assert lifecycle.finished(cancelling, a_result(outcome="completed"), START).status is Status.COMPLETED


def test_cancelling_is_idempotent_but_not_after_another_end() -> None:
    cancelling = lifecycle.cancel_requested(at_work(), START)
    assert lifecycle.cancel_requested(cancelling, START) is cancelling
    cancelled = lifecycle.cancel_requested(a_job(), START)
    assert cancelled.status is Status.CANCELLED
    assert lifecycle.cancel_requested(cancelled, START) is cancelled
    with pytest.raises(Conflict, match="already completed"):
        lifecycle.cancel_requested(a_job(status=Status.COMPLETED), START)


def test_an_attempt_that_stopped_unasked_goes_back_to_the_queue() -> None:
    job = lifecycle.finished(at_work(Status.TRAINING), a_result(outcome="cancelled"), START)
    assert job.status is Status.QUEUED
    assert job.attempts[0].outcome == "preempted"
    assert lifecycle.begin_attempt(job, "fake", START).attempts[1].number == 2


def test_a_job_that_is_always_preempted_is_given_up_with_a_reason() -> None:
    job = a_job()
    for number in range(1, MOST_WITHOUT_PROGRESS + 1):
        job = lifecycle.begin_attempt(job, "fake", START)
        job = lifecycle.finished(job, a_result(number, "cancelled"), START)
    assert job.status is Status.FAILED
    assert job.failure is not None
    assert job.failure.code == "preempted"


def test_an_attempt_that_vanished_is_followed_by_another_until_it_makes_no_sense() -> None:
    job = lifecycle.vanished(at_work(Status.TRAINING), 1, START)
    assert (job.status, job.attempts[0].outcome) == (Status.QUEUED, "lost")
    for number in range(2, MOST_LOST + 1):
        job = lifecycle.vanished(lifecycle.begin_attempt(job, "fake", START), number, START)
    assert job.status is Status.FAILED
    assert job.failure is not None
    assert (job.failure.code, job.failure.attempt) == ("lost", MOST_LOST)
    assert "3 attempts in a row" in job.failure.message
    assert "memory" in job.failure.hint


def test_a_job_may_vanish_as_often_as_it_gets_further() -> None:
    job = a_job()
    for number in range(1, 20):
        job = lifecycle.begin_attempt(job, "fake", START)
        job = lifecycle.vanished(job, number, START, saved_step=10 * number)
        assert job.status is Status.QUEUED
    assert job.checkpoint is not None
    assert (job.checkpoint.step, job.checkpoint.attempt) == (190, 19)


def test_a_checkpoint_that_was_there_before_is_no_progress() -> None:
    job = lifecycle.vanished(at_work(Status.TRAINING), 1, START, saved_step=50)
    for number in range(2, 2 + MOST_LOST):
        job = lifecycle.vanished(lifecycle.begin_attempt(job, "fake", START), number, START, saved_step=50)
    assert job.status is Status.FAILED


def test_what_the_compute_tells_decides_whether_another_attempt_makes_sense() -> None:
    timeout, crash = Failure(code="timeout", message="ran into its limit"), Failure(code="internal", message="exit code 3")
    assert lifecycle.vanished(at_work(Status.TRAINING), 1, START, timeout).status is Status.QUEUED
    assert lifecycle.vanished(at_work(Status.TRAINING), 1, START, crash).status is Status.FAILED
    preempted = lifecycle.vanished(at_work(Status.TRAINING), 1, START, crash, preempted=True)
    assert (preempted.status, preempted.attempts[0].outcome) == (Status.QUEUED, "preempted")


def test_slices_that_get_further_go_on_for_ever_and_others_do_not() -> None:
    job = a_job()
    for number in range(1, 11):
        job = lifecycle.begin_attempt(job, "fake", START)
        job = lifecycle.finished(job, a_result(number, "yielded", yielded_because="time_slice", saved_step=number), START)
        assert job.status is Status.QUEUED
    for number in range(11, 11 + MOST_WITHOUT_PROGRESS):
        job = lifecycle.finished(lifecycle.begin_attempt(job, "fake", START), a_result(number, "yielded", saved_step=10), START)
    assert job.status is Status.FAILED
    assert job.failure is not None
    assert job.failure.code == "timeout"


def test_a_pause_frees_the_compute_and_keeps_the_place() -> None:
    pausing = lifecycle.pause_requested(at_work(Status.TRAINING), START)
    assert pausing.status is Status.PAUSING
    assert lifecycle.pause_requested(pausing, START) is pausing
    paused = lifecycle.finished(pausing, a_result(outcome="paused", saved_step=7), START)
    assert (paused.status, paused.attempts[0].outcome) == (Status.PAUSED, "paused")
    assert lifecycle.pause_requested(paused, START) is paused
    resumed = lifecycle.resume_requested(paused, START)
    assert resumed.status is Status.QUEUED
    assert lifecycle.resume_requested(resumed, START) is resumed


def test_a_job_that_waits_is_paused_at_once() -> None:
    assert lifecycle.pause_requested(a_job(), START).status is Status.PAUSED


@pytest.mark.parametrize("outcome", ["yielded", "cancelled"])
def test_an_attempt_that_ends_otherwise_while_pausing_is_paused_all_the_same(outcome: str) -> None:
    pausing = lifecycle.pause_requested(at_work(Status.TRAINING), START)
    assert lifecycle.finished(pausing, a_result(outcome=outcome), START).status is Status.PAUSED
    assert lifecycle.vanished(pausing, 1, START).status is Status.PAUSED
    assert lifecycle.finished(pausing, a_result(outcome="completed"), START).status is Status.COMPLETED
    assert lifecycle.finished(pausing, a_result(outcome="failed"), START).status is Status.FAILED


def test_a_pause_gives_way_to_a_cancel_and_not_the_other_way_round() -> None:
    pausing = lifecycle.pause_requested(at_work(), START)
    cancelling = lifecycle.cancel_requested(pausing, START)
    assert cancelling.status is Status.CANCELLING
    assert lifecycle.finished(cancelling, a_result(outcome="paused"), START).status is Status.CANCELLED
    with pytest.raises(Conflict, match="nothing to pause"):
        lifecycle.pause_requested(cancelling, START)


def test_a_resume_may_change_a_paused_job_and_no_other() -> None:
    longer = a_config(hyperparameters={"epochs": 9})
    paused = lifecycle.pause_requested(a_job(), START)
    resumed = lifecycle.resume_requested(paused, START, training_config=longer, hardware="big")
    assert (resumed.training_config, resumed.hardware) == (longer, "big")
    assert lifecycle.resume_requested(resumed, START, training_config=longer, hardware="big") is resumed
    with pytest.raises(Conflict, match="while it is paused"):
        lifecycle.resume_requested(at_work(), START, hardware="big")
    with pytest.raises(Conflict, match="still pausing"):
        lifecycle.resume_requested(lifecycle.pause_requested(at_work(), START), START)
    with pytest.raises(Conflict, match="nothing to resume"):
        lifecycle.resume_requested(a_job(status=Status.FAILED), START)


def test_a_failed_job_is_continued_by_a_retry_with_its_history() -> None:
    failed = lifecycle.finished(at_work(Status.TRAINING), a_result(outcome="failed", saved_step=5), START)
    retried = lifecycle.retry_requested(failed, START)
    assert (retried.status, retried.failure, retried.finished_at) == (Status.QUEUED, None, None)
    assert retried.attempts == failed.attempts
    assert retried.first_attempt == 1
    assert lifecycle.retry_requested(retried, START) is retried
    again = lifecycle.retry_requested(failed, START, from_start=True)
    assert (again.first_attempt, again.checkpoint) == (2, None)


def test_a_retry_is_for_failed_and_cancelled_jobs_that_stay() -> None:
    for job in (a_job(), at_work(), a_job(status=Status.COMPLETED), a_job(status=Status.PAUSED)):
        with pytest.raises(Conflict, match="only a failed or cancelled job"):
            lifecycle.retry_requested(job, START)
    going = lifecycle.deletion_begun(lifecycle.cancel_requested(a_job(), START), START)
    with pytest.raises(Conflict, match="being deleted"):
        lifecycle.retry_requested(going, START)


def test_attempts_are_counted_anew_when_a_person_goes_on() -> None:
    job = at_work(Status.TRAINING)
    for number in range(1, MOST_LOST + 1):
        job = lifecycle.vanished(job if number == 1 else lifecycle.begin_attempt(job, "fake", START), number, START)
    assert job.status is Status.FAILED
    job = lifecycle.begin_attempt(lifecycle.retry_requested(job, START), "fake", START)
    assert lifecycle.vanished(job, MOST_LOST + 1, START).status is Status.QUEUED


def test_checkpoints_reach_the_record_and_never_go_back() -> None:
    def saved(step: int) -> CheckpointSaved:
        return CheckpointSaved(step=step, epoch=1.0, reason="interval", size_bytes=1, save_s=0.1, upload_s=0.1)

    job = lifecycle.finished(at_work(Status.TRAINING), a_result(outcome="yielded", saved_step=5), START)
    job = lifecycle.begin_attempt(job, "fake", START)
    job = lifecycle.absorbed(job, 2, Resumed(step=5, from_attempt=1), START)
    job = lifecycle.absorbed(job, 2, saved(20), START)
    job = lifecycle.absorbed(job, 2, Resumed(step=20, from_attempt=2), START)  # back to its own, for want of memory
    assert lifecycle.absorbed(job, 2, saved(10), START) is job
    assert job.attempt is not None
    assert (job.attempt.resumed_step, job.attempt.saved_step) == (5, 20)
    assert job.checkpoint is not None
    assert job.checkpoint.step == 20


def test_a_late_word_of_an_old_attempt_changes_nothing() -> None:
    job = lifecycle.finished(at_work(Status.TRAINING), a_result(outcome="yielded"), START)
    second = lifecycle.begin_attempt(job, "fake", START)
    assert lifecycle.finished(second, a_result(1, "completed"), START) is second
    for number in (1, 3, 0, -1):
        with pytest.raises(Fenced):
            lifecycle.absorbed(second, number, PhaseChanged(phase="training"), START)


class Lives(RuleBasedStateMachine):
    """Facts arrive in any order, twice and too late; the record stays a sensible one."""

    def __init__(self) -> None:
        super().__init__()
        self.job = a_job()
        self.now = START
        self.final: Job | None = None
        self.owners: dict[int, str] = {}

    def tell(self, after: Job) -> None:
        before = self.job
        if after.status is not before.status:
            assert after.status in FOLLOWS[before.status]
        assert len(after.attempts) >= len(before.attempts)
        assert after.attempts[: len(before.attempts) - 1] == before.attempts[:-1]
        self.job = after.model_copy(update={"revision": before.revision + (after is not before)})

    def attempt(self, change: object) -> None:
        """Apply a fact that may be refused; a refusal changes nothing."""
        try:
            after = change()  # type: ignore[operator]
        except (Fenced, Conflict):
            return
        self.tell(after)

    def tick(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now

    @rule()
    def launch(self) -> None:
        self.attempt(lambda: lifecycle.begin_attempt(self.job, "fake", self.tick()))

    @rule(number=st.integers(0, 4), who=st.sampled_from("ab"))
    def claim(self, number: int, who: str) -> None:
        def claim() -> Job:
            job = lifecycle.claimed(self.job, number, who, self.tick())
            assert self.owners.setdefault(number, who) == who
            return job

        self.attempt(claim)

    @rule(number=st.integers(0, 4), phase=st.sampled_from(["downloading", "training", "uploading"]))
    def report(self, number: int, phase: str) -> None:
        self.attempt(lambda: lifecycle.absorbed(self.job, number, PhaseChanged.model_validate({"phase": phase}), self.tick()))

    @rule(number=st.integers(0, 4), outcome=st.sampled_from(OUTCOMES))
    def finish(self, number: int, outcome: str) -> None:
        self.attempt(lambda: lifecycle.finished(self.job, a_result(number, outcome), self.tick()))

    @rule(number=st.integers(0, 4))
    def vanish(self, number: int) -> None:
        self.attempt(lambda: lifecycle.vanished(self.job, number, self.tick()))

    @rule()
    def cancel(self) -> None:
        self.attempt(lambda: lifecycle.cancel_requested(self.job, self.tick()))

    @rule()
    def pause(self) -> None:
        self.attempt(lambda: lifecycle.pause_requested(self.job, self.tick()))

    @rule()
    def resume(self) -> None:
        self.attempt(lambda: lifecycle.resume_requested(self.job, self.tick()))

    @rule(from_start=st.booleans())
    def retry(self, from_start: bool) -> None:
        before = self.job
        self.attempt(lambda: lifecycle.retry_requested(self.job, self.tick(), from_start=from_start))
        if self.job.status is not before.status:
            self.final = None  # the one way out of an end, and never out of `completed`
            assert before.status in (Status.FAILED, Status.CANCELLED)

    @precondition(lambda self: self.job.status.is_final)
    @rule()
    def remember_the_end(self) -> None:
        self.final = self.final or self.job

    @invariant()
    def the_end_is_the_end(self) -> None:
        if self.final:
            assert self.job == self.final

    @invariant()
    def vain_attempts_are_bounded(self) -> None:
        unasked = [attempt.outcome in ("yielded", "preempted", "lost") for attempt in self.job.attempts[self.job.counted_from - 1 :]]
        waits = self.job.status in (Status.QUEUED, Status.PREPARING)
        assert not (waits and all(unasked) and len(unasked) >= MOST_WITHOUT_PROGRESS)  # nothing is ever saved in these lives

    @invariant()
    def an_active_job_has_a_running_attempt_and_no_other_has(self) -> None:
        running = [attempt for attempt in self.job.attempts if attempt.ended_at is None]
        assert len(running) == (1 if self.job.status.is_active else 0)

    @invariant()
    def a_failure_is_explained_and_only_a_failure(self) -> None:
        assert (self.job.failure is not None) == (self.job.status is Status.FAILED)

    @invariant()
    def what_is_final_has_an_end(self) -> None:
        assert (self.job.finished_at is not None) == self.job.status.is_final


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
