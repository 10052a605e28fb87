"""Caps of jobs: enforced while an attempt runs, while it is silent and across attempts; and what a caller sees of them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from schema.events import CheckpointSaved, PhaseChanged, StatusChanged
from schema.job import Job, Status
from schema.requests import CloneRequest, ResumeRequest, RetryRequest
from service.api.responses import CostView, job_detail
from service.core import spending
from service.core.errors import Conflict, InvalidRequest
from tests.factories import make_profile, make_train_request
from tests.fakes import FakeLauncher, PullLauncher
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness, make_artifact, make_batch

USD_PER_HOUR = 8 * 3600 * 0.000018 + 32 * 3600 * 0.000002 + 0.67  # an L4 on Cloud Run, as docs/costs.md adds it up


def make_gpu_launcher(launcher: FakeLauncher | None = None) -> FakeLauncher:
    """A launcher whose only profile has one GPU and a known price."""
    launcher = launcher or FakeLauncher("cloud-run", ("l4",))
    launcher.profiles["l4"] = make_profile("l4", device="cuda", gpus=1)
    return launcher


@pytest.fixture
def gpu_harness(tmp_path: Path) -> JobsHarness:
    return JobsHarness(tmp_path, launchers=[make_gpu_launcher()])


def start(harness: JobsHarness, **changes: object) -> Job:
    job = harness.submit(**changes)
    harness.reconcile()
    harness.claim(job, 1, "p")
    harness.report(job, 1, make_batch(PhaseChanged(phase="training")))
    return harness.find_job(job)


def make_checkpoint_event(step: int, seconds: float) -> CheckpointSaved:
    return CheckpointSaved(step=step, epoch=1.0, reason="interval", size_bytes=1, save_s=seconds / 2, upload_s=seconds / 2)


def resume(harness: JobsHarness, job: Job, **body: object) -> Job:
    return harness.jobs.control.resume(PRINCIPAL, job.job_id, ResumeRequest.model_validate(body))


def cost_of(harness: JobsHarness, job: Job) -> CostView:
    return job_detail(harness.jobs.queries.get_refreshed(PRINCIPAL, job.job_id)).cost


def test_cost_accrues_while_the_job_runs_and_stops_with_it(gpu_harness: JobsHarness) -> None:
    job = start(gpu_harness)
    gpu_harness.clock.advance(1800)
    cost = cost_of(gpu_harness, job)
    assert (cost.gpu_seconds, cost.usd, cost.usd_per_hour) == (1800, pytest.approx(USD_PER_HOUR / 2, abs=1e-4), pytest.approx(USD_PER_HOUR))
    assert (bool(cost.source), cost.as_of) == (True, "2026-11-21")
    gpu_harness.finish(gpu_harness.write_result(job, artifacts=[make_artifact(job)]))
    gpu_harness.clock.advance(86400)
    assert cost_of(gpu_harness, job).usd == cost.usd


def test_later_price_does_not_change_what_was_spent(gpu_harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = start(gpu_harness)
    monkeypatch.setattr(spending, "find_price", lambda *_: None)  # the table of a later release
    gpu_harness.clock.advance(3600)
    assert cost_of(gpu_harness, job).usd == pytest.approx(USD_PER_HOUR, abs=1e-4)


def test_hardware_without_price_counts_gpu_seconds_only(tmp_path: Path) -> None:
    launcher = FakeLauncher("own", ("box",))
    launcher.profiles["box"] = make_profile("box", device="cuda", gpus=2)
    harness = JobsHarness(tmp_path, launchers=[launcher])
    job = start(harness)
    harness.clock.advance(100)
    cost = cost_of(harness, job)
    assert (cost.gpu_seconds, cost.usd, cost.usd_per_hour, cost.source) == (200, None, None, "")


@pytest.mark.parametrize(
    ("caps", "reason"), [({"max_gpu_seconds": 1000.0}, "gpu_seconds_cap"), ({"max_cost_usd": USD_PER_HOUR / 3.6}, "cost_cap")]
)
def test_job_pauses_with_a_checkpoint_before_its_cap(gpu_harness: JobsHarness, caps: dict[str, float], reason: str) -> None:
    job = start(gpu_harness, **caps)
    gpu_harness.clock.advance(900)
    assert gpu_harness.report(job, 1, make_batch(first_seq=1)).directive == "continue"
    gpu_harness.clock.advance(66)
    assert gpu_harness.report(job, 1, make_batch(first_seq=1)).directive == "pause"
    gpu_harness.clock.advance(20)
    gpu_harness.finish(gpu_harness.write_result(job, "paused", last_checkpoint_step=7))
    paused = gpu_harness.find_job(job)
    assert (paused.status, paused.pause_reason, paused.checkpoint and paused.checkpoint.step) == (Status.PAUSED, reason, 7)
    assert job_detail(gpu_harness.jobs.queries.describe(paused)).pause_reason == reason
    assert cost_of(gpu_harness, job).gpu_seconds == 986
    events = [stored.event for stored in gpu_harness.store.list_events(job.job_id)]
    changes = [(event.status, event.reason) for event in events if isinstance(event, StatusChanged)]
    assert changes[-2:] == [(Status.PAUSING, reason), (Status.PAUSED, reason)]


def test_longer_checkpoints_are_asked_for_earlier(gpu_harness: JobsHarness) -> None:
    job = start(gpu_harness, max_gpu_seconds=1000.0)
    gpu_harness.report(job, 1, make_batch(make_checkpoint_event(1, seconds=100), first_seq=1))
    gpu_harness.clock.advance(870)
    assert gpu_harness.report(job, 1, make_batch(first_seq=2)).directive == "continue"
    gpu_harness.clock.advance(15)
    assert gpu_harness.report(job, 1, make_batch(first_seq=2)).directive == "pause"


def test_reserve_leaves_most_of_a_small_cap_for_work(gpu_harness: JobsHarness) -> None:
    job = start(gpu_harness, max_gpu_seconds=20.0)
    gpu_harness.clock.advance(14)
    assert gpu_harness.report(job, 1, make_batch(first_seq=1)).directive == "continue"
    gpu_harness.clock.advance(2)
    assert gpu_harness.report(job, 1, make_batch(first_seq=1)).directive == "pause"


def test_silent_attempt_is_canceled_and_killed_at_the_cap(gpu_harness: JobsHarness) -> None:
    job = start(gpu_harness, max_gpu_seconds=1000.0)
    gpu_harness.clock.advance(970)
    gpu_harness.reconcile()
    assert gpu_harness.find_job(job).status is Status.PAUSING
    assert gpu_harness.launcher.cancels == []
    gpu_harness.clock.advance(30)
    gpu_harness.reconcile()
    handle = gpu_harness.find_job(job).attempts[0].handle
    assert gpu_harness.launcher.cancels == [(handle, False)]
    gpu_harness.clock.advance(gpu_harness.launcher.limits.kill_grace.total_seconds())
    gpu_harness.reconcile()
    assert gpu_harness.launcher.cancels[-1] == (handle, True)
    gpu_harness.launcher.states[str(handle)] = "ended"
    gpu_harness.reconcile()
    paused = gpu_harness.find_job(job)
    assert (paused.status, paused.pause_reason) == (Status.PAUSED, "gpu_seconds_cap")
    assert cost_of(gpu_harness, job).gpu_seconds <= 1000 + gpu_harness.launcher.limits.kill_grace.total_seconds()


def test_pause_by_a_caller_is_never_escalated_by_a_cap(gpu_harness: JobsHarness) -> None:
    job = start(gpu_harness, max_gpu_seconds=1000.0)
    gpu_harness.jobs.control.pause(PRINCIPAL, job.job_id)
    gpu_harness.clock.advance(2000)
    gpu_harness.report(job, 1, make_batch(first_seq=1))
    gpu_harness.reconcile()
    assert gpu_harness.launcher.cancels == []
    assert gpu_harness.find_job(job).pause_reason == "requested"


def test_cap_holds_across_attempts(gpu_harness: JobsHarness) -> None:
    job = start(gpu_harness, max_gpu_seconds=1000.0)
    gpu_harness.clock.advance(600)
    gpu_harness.finish(gpu_harness.write_result(job, "yielded", last_checkpoint_step=5))
    gpu_harness.clock.advance(5000)  # in the queue, which costs nothing
    gpu_harness.reconcile()
    gpu_harness.claim(job, 2, "q")
    gpu_harness.clock.advance(300)
    assert gpu_harness.report(job, 2, make_batch()).directive == "continue"
    gpu_harness.clock.advance(70)
    assert gpu_harness.report(job, 2, make_batch()).directive == "pause"


def test_queued_job_without_room_for_another_attempt_is_paused(gpu_harness: JobsHarness) -> None:
    job = start(gpu_harness, max_gpu_seconds=1000.0)
    gpu_harness.clock.advance(964)
    gpu_harness.launcher.slots = 0
    gpu_harness.finish(gpu_harness.write_result(job, "yielded", last_checkpoint_step=5))
    assert gpu_harness.find_job(job).status is Status.QUEUED
    gpu_harness.jobs.repository.change(job.job_id, lambda job, _: job.model_copy(update={"max_gpu_seconds": 970.0}))
    gpu_harness.launcher.slots = 10
    gpu_harness.reconcile()
    paused = gpu_harness.find_job(job)
    assert (paused.status, paused.pause_reason, len(paused.attempts)) == (Status.PAUSED, "gpu_seconds_cap", 1)


def test_other_jobs_are_launched_behind_a_job_without_room(tmp_path: Path) -> None:
    harness = JobsHarness(tmp_path, launchers=[make_gpu_launcher()])
    capped = start(harness, max_gpu_seconds=1000.0)
    harness.clock.advance(990)
    harness.finish(harness.write_result(capped, "yielded", last_checkpoint_step=5))
    other = harness.submit()
    harness.reconcile()
    assert harness.find_job(capped).status is Status.PAUSED
    assert harness.find_job(other).status is Status.PREPARING


def test_resume_of_capped_job_needs_a_higher_cap(gpu_harness: JobsHarness) -> None:
    job = start(gpu_harness, max_gpu_seconds=1000.0)
    gpu_harness.clock.advance(980)
    gpu_harness.report(job, 1, make_batch(first_seq=1))
    gpu_harness.finish(gpu_harness.write_result(job, "paused", last_checkpoint_step=5))
    with pytest.raises(Conflict, match="has used 980 GPU seconds") as excinfo:
        resume(gpu_harness, job)
    assert (excinfo.value.param, excinfo.value.hint) == ("max_gpu_seconds", "send a higher max_gpu_seconds")
    for too_low in (500.0, 1000.0, 1001.0):
        with pytest.raises(InvalidRequest, match="leaves too little") as refused:
            resume(gpu_harness, job, max_gpu_seconds=too_low)
        assert refused.value.param == "max_gpu_seconds"
    assert resume(gpu_harness, job, max_gpu_seconds=2000.0).max_gpu_seconds == 2000
    gpu_harness.reconcile()
    gpu_harness.claim(job, 2, "q")
    assert gpu_harness.report(job, 2, make_batch()).directive == "continue"


def test_cap_of_running_job_can_be_raised_and_lowered_but_not_below_what_is_spent(gpu_harness: JobsHarness) -> None:
    job = start(gpu_harness, max_gpu_seconds=1000.0)
    gpu_harness.clock.advance(900)
    assert resume(gpu_harness, job, max_gpu_seconds=5000.0).status is Status.TRAINING
    assert resume(gpu_harness, job, max_gpu_seconds=1200.0).max_gpu_seconds == 1200
    with pytest.raises(InvalidRequest, match="has used 900 GPU seconds"):
        resume(gpu_harness, job, max_gpu_seconds=800.0)
    gpu_harness.clock.advance(290)
    assert resume(gpu_harness, job).status is Status.TRAINING  # a repeated resume changes nothing, whatever the cap


def test_retry_counts_what_earlier_attempts_used(gpu_harness: JobsHarness) -> None:
    job = start(gpu_harness, max_cost_usd=USD_PER_HOUR)
    gpu_harness.clock.advance(3590)
    gpu_harness.finish(gpu_harness.write_result(job, "failed"))
    with pytest.raises(Conflict, match=r"has used \$1\.4"):
        gpu_harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({"from_start": True}))
    retried = gpu_harness.jobs.control.retry(PRINCIPAL, job.job_id, RetryRequest.model_validate({"max_cost_usd": 9.0}))
    assert (retried.status, retried.max_cost_usd) == (Status.QUEUED, 9)


def test_cost_cap_needs_hardware_with_a_price(tmp_path: Path) -> None:
    harness = JobsHarness(tmp_path, launchers=[make_gpu_launcher(), FakeLauncher("own", ("box",))])
    with pytest.raises(InvalidRequest, match="the price of own/box is not known") as excinfo:
        harness.submit(max_cost_usd=5.0, hardware=["l4", "box"])
    assert excinfo.value.param == "max_cost_usd"
    assert "max_gpu_seconds" in excinfo.value.hint
    job = harness.submit(max_cost_usd=5.0)
    harness.jobs.control.pause(PRINCIPAL, job.job_id)
    with pytest.raises(InvalidRequest, match="is not known") as refused:
        resume(harness, job, hardware="box")
    assert refused.value.param == "hardware"


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "5", True])
@pytest.mark.parametrize("name", ["max_cost_usd", "max_gpu_seconds"])
def test_cap_is_a_positive_number(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        make_train_request(**{name: value})


def test_clone_keeps_caps_unless_others_are_sent(gpu_harness: JobsHarness) -> None:
    job = gpu_harness.submit(max_cost_usd=5.0, max_gpu_seconds=100.0)
    clone = gpu_harness.jobs.submission.clone(PRINCIPAL, job.job_id, CloneRequest.model_validate({"max_cost_usd": 7.0}))
    assert (clone.max_cost_usd, clone.max_gpu_seconds) == (7, 100)


def test_attempt_that_waits_for_a_machine_uses_nothing(tmp_path: Path) -> None:
    launcher = PullLauncher("cloud-run", ("l4",))
    harness = JobsHarness(tmp_path, launchers=[make_gpu_launcher(launcher)])
    job = harness.submit(max_gpu_seconds=100.0)
    harness.reconcile()
    harness.reconcile()
    harness.clock.advance(5000)
    harness.reconcile()
    assert harness.find_job(job).status is Status.PREPARING
    assert cost_of(harness, job).gpu_seconds == 0
    launcher.take_offer()
    harness.claim(job, 1, "p")
    harness.clock.advance(10)
    assert cost_of(harness, job).gpu_seconds == 10


def test_price_is_that_of_the_hardware_that_takes_the_attempt(tmp_path: Path) -> None:
    full, other = make_gpu_launcher(), FakeLauncher("own", ("box",))
    other.profiles["box"] = make_profile("box", device="cuda", gpus=4)
    full.slots = 0
    harness = JobsHarness(tmp_path, launchers=[full, other])
    job = harness.submit(hardware=["cloud-run/l4", "own/box"])
    harness.reconcile()
    harness.reconcile()
    rate = harness.find_job(job).attempts[0].rate
    assert rate is not None
    assert (rate.gpus, rate.usd_per_hour) == (4, None)


def test_overrun_of_a_silent_attempt_is_bounded_by_two_reconciles(gpu_harness: JobsHarness) -> None:
    """Reconciled every minute, as on Cloud Run."""
    job = start(gpu_harness, max_gpu_seconds=1000.0)
    for seq in range(1, 16):
        gpu_harness.clock.advance(60)
        gpu_harness.report(job, 1, make_batch(make_checkpoint_event(seq, seconds=1), first_seq=seq))
    while not any(force for _, force in gpu_harness.launcher.cancels):
        gpu_harness.clock.advance(60)
        gpu_harness.reconcile()
    gpu_harness.launcher.states[str(gpu_harness.find_job(job).attempts[0].handle)] = "ended"
    gpu_harness.reconcile()
    assert gpu_harness.find_job(job).status is Status.PAUSED
    assert cost_of(gpu_harness, job).gpu_seconds <= 1000 + 2 * 60
