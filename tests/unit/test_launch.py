"""Launching queued jobs: once each, with the spec and the attempt's token."""

import pytest

from schema.job import Status
from schema.spec import JobSpec, attempt_name, spec_key
from service.core.errors import LaunchFailed, Unauthorized, Unavailable
from storage import StoreUnavailable
from tests.factories import make_dataset
from tests.unit.jobs_harness import JobsHarness, make_batch


def test_queued_job_launches_once_with_spec_and_launch_token(harness: JobsHarness) -> None:
    job = harness.submit()
    harness.reconcile()
    harness.reconcile()
    [launch_request] = harness.launcher.launched.values()
    assert launch_request.name == attempt_name(job.job_id, 1)
    assert launch_request.variables["HF_ENDPOINT"] == "https://hub.example"
    harness.tokens.verify_launch_token(launch_request.variables["JOB_TOKEN"], job.job_id, 1)
    with pytest.raises(Unauthorized):
        harness.tokens.verify_launch_token(launch_request.variables["JOB_TOKEN"], job.job_id, 2)
    spec = JobSpec.load(harness.objects.read(spec_key(job.job_id)))
    assert (spec.job_id, spec.training_config) == (job.job_id, job.training_config)
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.handle == f"handle of {launch_request.name}"


def test_attempt_continues_the_trace_of_its_job(harness: JobsHarness) -> None:
    job = harness.submit()
    stored = harness.find_job(job)
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    harness.store.replace_job(stored.model_copy(update={"traceparent": traceparent}))
    harness.reconcile()
    [launch_request] = harness.launcher.launched.values()
    assert launch_request.variables["TRACEPARENT"] == traceparent


def test_oldest_queued_job_launches_first(harness: JobsHarness) -> None:
    harness.launcher.slots = 1
    jobs = []
    for _ in range(3):
        jobs.append(harness.submit())
        harness.clock.advance(1)
    harness.reconcile()
    assert [harness.find_job(job).status for job in jobs] == [Status.PREPARING, Status.QUEUED, Status.QUEUED]
    harness.launcher.states[f"handle of {attempt_name(jobs[0].job_id, 1)}"] = "ended"
    harness.write_result(jobs[0])
    harness.reconcile()
    harness.reconcile()
    assert [harness.find_job(job).status for job in jobs] == [Status.COMPLETED, Status.PREPARING, Status.QUEUED]


def test_launch_failure_fails_job_with_reason(harness: JobsHarness) -> None:
    harness.launcher.refusal = LaunchFailed("no such machine", hint="make setup")
    job = harness.submit(hf_token="hf_x")
    harness.reconcile()
    job = harness.find_job(job)
    assert job.status is Status.FAILED
    assert job.failure is not None
    assert (job.failure.code, job.failure.message, job.failure.hint) == ("launch_failed", "no such machine", "make setup")
    assert list(harness.secrets.iter_job_ids()) == []


def test_launch_with_lost_response_is_not_repeated(harness: JobsHarness) -> None:
    harness.launcher.loses_response = True
    job = harness.submit()
    harness.reconcile()
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.handle is None
    harness.launcher.loses_response = False
    harness.clock.advance(60)
    harness.reconcile()  # FakeLauncher fails the test when it is called twice
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.handle is not None


def test_missing_launch_is_retried(harness: JobsHarness) -> None:
    harness.launcher.refusal = Unavailable("not now")
    job = harness.submit()
    harness.reconcile()
    harness.launcher.refusal = None
    harness.reconcile()
    assert harness.launcher.launched == {}  # too early: another process may be launching it
    harness.clock.advance(60)
    harness.reconcile()
    assert list(harness.launcher.launched) == [attempt_name(job.job_id, 1)]


def test_one_failing_job_does_not_block_others(harness: JobsHarness) -> None:
    first = harness.submit()
    harness.store.delete_dataset("dataset_1")
    harness.store.create_dataset(make_dataset("dataset_2"))
    second = harness.submit(processed_dataset_id="dataset_2")
    harness.reconcile()
    assert harness.find_job(first).status is Status.FAILED
    assert harness.find_job(second).status is Status.PREPARING


def test_pending_launch_shows_reason_until_launched(harness: JobsHarness) -> None:
    harness.launcher.refusal = Unavailable("no L4 is free", hint="ask for more")
    job = harness.submit()
    harness.reconcile()
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.pending_reason == "no L4 is free ask for more"
    harness.launcher.refusal = None
    harness.clock.advance(60)
    harness.reconcile()
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.pending_reason is None
    assert attempt.handle is not None


def test_missing_bucket_delays_launch_with_reason(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_unavailable(*_: object, **__: object) -> None:
        raise StoreUnavailable("no bucket configs")

    with monkeypatch.context() as patch:
        patch.setattr(harness.objects, "write", raise_unavailable)
        job = harness.submit()
        harness.reconcile()
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert attempt.pending_reason == "no bucket configs"
    assert harness.launcher.launched == {}
    harness.clock.advance(60)
    harness.reconcile()
    assert list(harness.launcher.launched) == [attempt_name(job.job_id, 1)]


def test_concurrent_reconcilers_launch_attempt_once(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.launcher.refusal = Unavailable("not now")
    harness.submit()
    harness.reconcile()
    harness.launcher.refusal = None
    harness.clock.advance(60)
    lookups = []

    def find_during_other_reconcile(name: str) -> str | None:
        lookups.append(name)
        if len(lookups) == 1:
            harness.reconcile()  # another instance, between this one's lookup and its launch
        return None

    monkeypatch.setattr(harness.launcher, "find_handle", find_during_other_reconcile)
    harness.reconcile()  # FakeLauncher fails the test when it is called twice
    assert len(lookups) == 2
    assert len(harness.launcher.launched) == 1


def test_claimed_attempt_is_not_launched_again(harness: JobsHarness) -> None:
    harness.launcher.refusal = Unavailable("the response was lost")
    job = harness.submit()
    harness.reconcile()
    harness.launcher.refusal = None
    harness.claim(job, 1, "p")
    harness.report(job, 1, make_batch())
    harness.clock.advance(30)
    harness.reconcile()
    assert harness.launcher.launched == {}
    assert harness.find_job(job).status is Status.PREPARING
    harness.clock.advance(61)  # without another report
    harness.reconcile()
    assert harness.find_job(job).attempts[0].outcome == "lost"


def test_submission_launches_immediately_without_background_task(harness: JobsHarness) -> None:
    harness.on_wake = harness.jobs.reconciliation.reconcile_job
    job = harness.submit()
    assert list(harness.launcher.launched) == [attempt_name(job.job_id, 1)]
    assert harness.find_job(job).status is Status.PREPARING
