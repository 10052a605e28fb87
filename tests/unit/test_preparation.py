"""The time limit of preparation, on launchers that are polled and on those that are asked only about silent attempts."""

import pytest

from schema.job import ExportSource, Job, Status
from service.core.jobs.preparation import DEFAULT_PREPARATION_LIMIT
from tests.unit.jobs_harness import JobsHarness, make_batch

LIMIT_S = DEFAULT_PREPARATION_LIMIT.total_seconds()


def start_preparing(harness: JobsHarness, phase: str | None, **changes: object) -> Job:
    job = harness.submit(hf_token="hf_x")
    harness.reconcile()
    harness.claim(job, 1, "p")
    report(harness, job, phase)
    record = harness.find_job(job)
    return harness.store.replace_job(record.model_copy(update=changes)) if changes else record


def report(harness: JobsHarness, job: Job, phase: str | None) -> None:
    """A heartbeat: the attempt is alive all the time."""
    harness.report(job, 1, make_batch().model_copy(update={"phase": phase}))


@pytest.mark.parametrize("polling_is_free", [True, False])
@pytest.mark.parametrize("phase", [None, "downloading", "tokenizing"])
def test_endless_preparation_fails_the_job_and_kills_the_attempt(harness: JobsHarness, phase: str | None, polling_is_free: bool) -> None:
    harness.launcher.polling_is_free = polling_is_free
    job = start_preparing(harness, phase)
    harness.clock.advance(LIMIT_S - 5)
    report(harness, job, phase)
    harness.reconcile()
    assert harness.find_job(job).status is Status.PREPARING
    harness.clock.advance(10)
    report(harness, job, phase)
    harness.reconcile()
    failed = harness.find_job(job)
    assert (failed.status, failed.attempts[0].outcome, len(failed.attempts)) == (Status.FAILED, "failed", 1)
    assert failed.failure is not None
    assert failed.failure.code == "timeout"
    assert "TUNESMITH_PREPARATION_LIMIT_S" in failed.failure.hint
    assert harness.launcher.cancels == [(failed.attempts[0].handle, True)]
    assert list(harness.secrets.iter_job_ids()) == []


@pytest.mark.parametrize("phase", ["evaluating", "training", "merging", "uploading"])
def test_later_phases_have_no_such_limit(harness: JobsHarness, phase: str) -> None:
    job = start_preparing(harness, phase)
    harness.clock.advance(LIMIT_S * 3)
    report(harness, job, phase)
    harness.reconcile()
    assert harness.find_job(job).status is Status.PREPARING


def test_export_of_a_checkpoint_has_no_such_limit(harness: JobsHarness) -> None:
    job = start_preparing(harness, "downloading", export_of=ExportSource(job_id="j", attempt=1, step=1, key="k/"))
    harness.clock.advance(LIMIT_S * 3)
    report(harness, job, "downloading")
    harness.reconcile()
    assert harness.find_job(job).status is Status.PREPARING


def test_silent_attempt_is_left_to_its_lease(harness: JobsHarness) -> None:
    job = start_preparing(harness, "downloading")
    harness.clock.advance(LIMIT_S * 3)  # its machine was asleep
    harness.reconcile()
    assert harness.find_job(job).status is Status.PREPARING
    assert harness.launcher.cancels == []
