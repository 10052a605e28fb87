"""Reconciling: results, lost attempts, leases, cancels, and steps taken inside a request."""

import pytest

from schema.job import Failure, Job, Status
from schema.spec import attempt_name
from service.core.errors import Fenced, Unavailable
from service.core.ports import ExecutionState, ExitReason
from storage.deadline import deadline
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness, make_batch


def test_finished_job_starts_next_without_background_task(harness: JobsHarness) -> None:
    harness.on_wake = harness.jobs.reconciliation.reconcile_job
    harness.launcher.slots = 1
    first, second = harness.submit(), harness.submit()
    assert harness.find_job(second).status is Status.QUEUED
    harness.launcher.states[f"handle of {attempt_name(first.job_id, 1)}"] = "ended"
    harness.finish(harness.write_result(first))
    assert harness.find_job(second).status is Status.PREPARING


def test_jobs_are_reconciled_concurrently_when_polling_is_slow(harness: JobsHarness) -> None:
    harness.launcher.polling_is_free = False
    harness.launcher.slots = 20
    jobs = [harness.submit() for _ in range(20)]
    assert harness.reconcile() == 20
    assert len(harness.launcher.launched) == 20
    for job in jobs[:19]:
        harness.write_result(job)
    check, unlucky = harness.launcher.check, f"handle of {attempt_name(jobs[19].job_id, 1)}"

    def fail_for_one(handle: str) -> ExecutionState:
        if handle == unlucky:
            raise Unavailable("it does not answer")
        return check(handle)

    harness.launcher.check = fail_for_one  # type: ignore[method-assign]
    assert harness.reconcile() == 19
    assert [harness.find_job(job).status for job in jobs[:19]] == [Status.COMPLETED] * 19


def test_submission_survives_failed_reconcile_step(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_unavailable(*_: object) -> list[Job]:
        raise Unavailable

    harness.on_wake = harness.jobs.reconciliation.reconcile_job
    monkeypatch.setattr(harness.store, "list_active_jobs", raise_unavailable)
    assert harness.find_job(harness.submit()).status is Status.QUEUED


def test_step_is_skipped_when_deadline_is_near(harness: JobsHarness) -> None:
    harness.on_wake = harness.jobs.reconciliation.reconcile_job
    with deadline(1.0):
        job = harness.submit()
    assert harness.find_job(job).status is Status.QUEUED


def test_result_of_ended_attempt_decides_status(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.write_result(job)
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.reconcile()
    assert harness.find_job(job).status is Status.COMPLETED


def test_attempt_without_result_is_followed_by_next_attempt(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.reconcile()
    job = harness.find_job(job)
    assert [attempt.outcome for attempt in job.attempts] == ["lost", None]
    assert attempt_name(job.job_id, 2) in harness.launcher.launched


def test_unreported_checkpoint_counts_as_progress(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.write_checkpoint(job, step=8)
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.reconcile()
    assert harness.find_job(job).checkpoint is not None
    assert harness.find_job(job).attempts[0].last_checkpoint_step == 8


def test_silent_running_attempt_gets_a_lease(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.clock.advance(3600)  # the machine slept, service and attempt alike
    harness.reconcile()
    assert harness.find_job(job).attempts[0].suspected_at == harness.clock.now
    harness.clock.advance(299)
    harness.reconcile()
    assert harness.launcher.cancels == []
    harness.report(job, 1, make_batch())
    harness.clock.advance(59)
    harness.reconcile()
    assert harness.launcher.cancels == []
    assert harness.find_job(job).status is Status.TRAINING


def test_silent_attempt_is_killed_then_marked_lost(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.clock.advance(61)
    harness.reconcile()
    harness.clock.advance(300)
    harness.reconcile()
    assert [force for _, force in harness.launcher.cancels] == [True]
    assert harness.find_job(job).status is Status.TRAINING  # its compute may still run
    harness.clock.advance(60)
    harness.reconcile()
    assert [attempt.outcome for attempt in harness.find_job(job).attempts] == ["lost", None]
    with pytest.raises(Fenced):
        harness.report(job, 1, make_batch())


def test_unclaimed_attempt_is_marked_lost_after_timeout(harness: JobsHarness) -> None:
    job = harness.submit()
    harness.reconcile()
    for minutes in (9, 2):  # its machine may still be starting; then it is suspected
        harness.clock.advance(60 * minutes)
        harness.reconcile()
    assert harness.find_job(job).attempts[0].suspected_at == harness.clock.now
    harness.clock.advance(60 * 6)
    harness.reconcile()
    assert [attempt.outcome for attempt in harness.find_job(job).attempts] == ["lost", None]
    with pytest.raises(Fenced):
        harness.claim(job, 1, "p")


def test_heartbeat_clears_suspicion(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.clock.advance(61)
    harness.reconcile()
    harness.clock.advance(200)
    harness.report(job, 1, make_batch())
    harness.clock.advance(150)  # silent again, and more than a lease after the first suspicion
    harness.reconcile()
    assert harness.launcher.cancels == []
    assert harness.find_job(job).attempts[0].suspected_at == harness.clock.now


def test_clock_jump_does_not_restore_suspicion(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.clock.advance(600)  # the clock jumps ahead, so the attempt seems silent
    harness.reconcile()
    harness.report(job, 1, make_batch())
    assert harness.find_job(job).attempts[0].suspected_at is None
    harness.clock.advance(-600)
    for _ in range(30):
        harness.clock.advance(15)
        harness.report(job, 1, make_batch())
    harness.clock.advance(600)
    harness.reconcile()
    assert harness.launcher.cancels == []
    assert len(harness.find_job(job).attempts) == 1


@pytest.mark.parametrize(("preempted", "status"), [(False, Status.FAILED), (True, Status.PREPARING)])  # the next attempt
def test_exit_reason_decides_retry_or_failure(harness: JobsHarness, preempted: bool, status: Status) -> None:
    job = harness.start_training()
    handle = f"handle of {attempt_name(job.job_id, 1)}"
    harness.launcher.states[handle] = "ended"
    harness.launcher.exit_reasons[handle] = ExitReason(Failure(code="out_of_memory", message="16 GiB were not enough"), preempted)
    harness.reconcile()
    job = harness.find_job(job)
    assert job.status is status
    failure = job.attempts[0].failure
    assert failure is not None
    assert (failure.code, failure.attempt) == ("out_of_memory", 1)


def test_end_is_not_handled_while_exit_reason_is_unavailable(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_unavailable(_: str) -> ExitReason | None:
        raise Unavailable

    job = harness.start_training()
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    monkeypatch.setattr(harness.launcher, "get_exit_reason", raise_unavailable)
    harness.reconcile()
    assert harness.find_job(job).status is Status.TRAINING


def test_unknown_is_not_failed(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "unknown"
    for _ in range(60):
        harness.clock.advance(120)
        harness.reconcile()
    assert harness.find_job(job).status is Status.TRAINING
    assert len(harness.launcher.launched) == 1


def test_cancel_escalates_from_directive_to_signal_to_force(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.jobs.control.cancel(PRINCIPAL, job.job_id)
    harness.reconcile()
    assert harness.launcher.cancels == []
    harness.clock.advance(1.5)
    harness.reconcile()
    assert [force for _, force in harness.launcher.cancels] == [False]
    harness.clock.advance(10)
    harness.reconcile()
    assert [force for _, force in harness.launcher.cancels] == [False, True]
    harness.launcher.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.reconcile()
    assert harness.find_job(job).status is Status.CANCELLED
