"""Launchers side by side: what a request may ask for, which launcher takes a job, and what happens when one refuses."""

import pytest
from pydantic import ValidationError

from schema.job import Job, Status
from schema.placement import Placement
from schema.requests import ResumeRequest
from schema.spec import attempt_name
from service.core.errors import InvalidRequest, LaunchFailed, NoCapacity, Unsupported
from service.core.launchers import LauncherPool
from service.core.principals import UPKEEP_PRINCIPAL
from tests.factories import make_manifest, make_train_request
from tests.fakes import FakeLauncher, PullLauncher
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness


@pytest.fixture
def cloud() -> FakeLauncher:
    return FakeLauncher("cloud", ("l4", "cpu"))


@pytest.fixture
def box() -> FakeLauncher:
    return FakeLauncher("box", ("rtx", "cpu"))


@pytest.fixture
def harness(tmp_path_factory: pytest.TempPathFactory, cloud: FakeLauncher, box: FakeLauncher) -> JobsHarness:
    return JobsHarness(tmp_path_factory.mktemp("two-launchers"), launchers=[cloud, box])


def hardware_of(job: Job) -> list[str]:
    return [placement.hardware for placement in job.placements]


def used_hardware(harness: JobsHarness, job: Job) -> str:
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    return attempt.placement.hardware


# --- what a request may ask for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "placements"),
    [
        (None, ["cloud/l4"]),
        ("l4", ["cloud/l4"]),
        ("rtx", ["box/rtx"]),
        ("box/cpu", ["box/cpu"]),
        (["rtx", "cloud/cpu", "l4"], ["box/rtx", "cloud/cpu", "cloud/l4"]),
    ],
)
def test_hardware_becomes_an_ordered_list_of_placements(harness: JobsHarness, hardware: object, placements: list[str]) -> None:
    job = harness.submit(hardware=hardware)
    assert hardware_of(job) == placements
    assert {placement.environment for placement in job.placements} == {"llm"}


@pytest.mark.parametrize(
    ("hardware", "error", "message"),
    [
        ("cpu", InvalidRequest, "several launchers have hardware 'cpu'; name one: cloud/cpu or box/cpu"),
        ("tpu", Unsupported, "no hardware 'tpu'; this deployment has: l4, cloud/cpu, rtx, box/cpu"),
        ("moon/l4", Unsupported, "no launcher 'moon'; this deployment has: cloud, box"),
        ("box/l4", Unsupported, "no hardware 'box/l4'"),
        (["l4", "cloud/l4"], InvalidRequest, "names the same profile twice"),
    ],
)
def test_unknown_or_ambiguous_hardware_is_refused(harness: JobsHarness, hardware: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as excinfo:
        harness.submit(hardware=hardware)
    assert getattr(excinfo.value, "param", None) == "hardware"


def test_launcher_without_the_environment_is_refused_and_skipped_as_default(harness: JobsHarness, cloud: FakeLauncher) -> None:
    cloud.manifests = {"vision": make_manifest(environment="vision")}
    assert hardware_of(harness.submit()) == ["box/rtx"]
    with pytest.raises(Unsupported, match="environment 'llm', which launcher 'cloud' does not have; it has: vision") as excinfo:
        harness.submit(hardware="l4")
    assert "make setup-llm" in excinfo.value.hint


@pytest.mark.parametrize(
    ("hardware", "message"),
    [
        ("a b", "'a b' is no such name"),
        (3, "3 is no such name"),
        ([], "names 1 to 8 profiles, not 0"),
        (["l4"] * 9, "not 9"),
        ([["l4"]], "is no such name"),
        ("a/b/c", "is no such name"),
    ],
)
def test_malformed_hardware_is_one_error_at_its_field(hardware: object, message: str) -> None:
    with pytest.raises(ValidationError) as excinfo:
        make_train_request(hardware=hardware)
    [error] = excinfo.value.errors()
    assert (error["loc"], message in error["msg"]) == (("hardware",), True)


def test_two_launchers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="different names"):
        LauncherPool([FakeLauncher(), FakeLauncher()])


# --- which launcher takes a job --------------------------------------------------------------------------------------


def test_each_job_runs_on_its_own_launcher(harness: JobsHarness, cloud: FakeLauncher, box: FakeLauncher) -> None:
    first, second = harness.submit(hardware="l4"), harness.submit(hardware="rtx")
    harness.reconcile()
    assert (list(cloud.launched), list(box.launched)) == ([attempt_name(first.job_id, 1)], [attempt_name(second.job_id, 1)])
    assert cloud.launched[attempt_name(first.job_id, 1)].profile == "l4"


def test_preferred_launcher_takes_a_job_and_a_full_one_passes_it_on_at_once(
    harness: JobsHarness, cloud: FakeLauncher, box: FakeLauncher
) -> None:
    cloud.slots = 1
    jobs = [harness.submit(hardware=["l4", "rtx"]) for _ in range(3)]
    for _ in range(2):  # the box learns in the first round that the cloud is full
        harness.reconcile()
    assert [used_hardware(harness, job) for job in jobs] == ["cloud/l4", "box/rtx", "box/rtx"]


def test_silent_preferred_launcher_loses_a_job_after_a_minute(harness: JobsHarness, box: FakeLauncher) -> None:
    job = harness.submit(hardware=["l4", "rtx"])
    reconcile_only(harness, "box")
    assert harness.find_job(job).status is Status.QUEUED  # the cloud may take it
    harness.clock.advance(60)
    reconcile_only(harness, "box")
    assert used_hardware(harness, job) == "box/rtx"


def reconcile_only(harness: JobsHarness, launcher: str) -> None:
    harness.jobs.reconciliation.reconcile_launcher(UPKEEP_PRINCIPAL, launcher)


def test_jobs_that_prefer_a_silent_launcher_hide_no_others(harness: JobsHarness, box: FakeLauncher) -> None:
    for _ in range(120):
        harness.submit(hardware=["l4", "rtx"])
    last = harness.submit(hardware="rtx")
    box.slots = 1
    reconcile_only(harness, "box")
    assert used_hardware(harness, last) == "box/rtx"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refused_attempt_moves_to_the_next_placement(harness: JobsHarness, cloud: FakeLauncher, box: FakeLauncher) -> None:
    cloud.refusal = NoCapacity("no L4 is free", hint="ask for more")
    job = harness.submit(hardware=["l4", "rtx"])
    for _ in range(2):
        harness.reconcile()
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert (attempt.number, attempt.placement.hardware, attempt.pending_reason) == (1, "box/rtx", None)
    assert [(refusal.placement.hardware, refusal.reason, refusal.permanent) for refusal in attempt.refusals] == [
        ("cloud/l4", "no L4 is free ask for more", False)
    ]
    assert list(box.launched) == [attempt_name(job.job_id, 1)]


def test_attempt_refused_everywhere_waits_and_starts_again_at_the_first(
    harness: JobsHarness, cloud: FakeLauncher, box: FakeLauncher
) -> None:
    cloud.refusal = box.refusal = NoCapacity("no room")
    job = harness.submit(hardware=["l4", "rtx"])
    for _ in range(3):
        harness.reconcile()
    assert harness.jobs.queries.get_refreshed(PRINCIPAL, job.job_id).pending_reason == "no room"
    cloud.refusal = box.refusal = None
    harness.clock.advance(6)
    harness.reconcile()
    assert used_hardware(harness, job) == "cloud/l4"
    assert len(cloud.launched) + len(box.launched) == 1


def test_attempt_refused_for_good_everywhere_fails_with_every_reason(harness: JobsHarness, cloud: FakeLauncher, box: FakeLauncher) -> None:
    cloud.refusal, box.refusal = LaunchFailed("no such job"), LaunchFailed("no such machine")
    job = harness.submit(hardware=["l4", "rtx"])
    for _ in range(2):
        harness.reconcile()
    failure = harness.find_job(job).failure
    assert failure is not None
    assert (failure.code, failure.message) == ("launch_failed", "cloud/l4: no such job; box/rtx: no such machine")


def test_placement_refused_for_good_is_not_tried_again(harness: JobsHarness, cloud: FakeLauncher, box: FakeLauncher) -> None:
    cloud.refusal, box.refusal = LaunchFailed("no such job"), NoCapacity("busy")
    job = harness.submit(hardware=["l4", "rtx"])
    for _ in range(2):
        harness.reconcile()
    cloud.refusal = box.refusal = None
    harness.clock.advance(6)
    harness.reconcile()
    assert used_hardware(harness, job) == "box/rtx"


@pytest.mark.parametrize("stop", ["cancel", "pause"])
def test_attempt_passed_on_and_stopped_is_not_started(harness: JobsHarness, cloud: FakeLauncher, box: FakeLauncher, stop: str) -> None:
    cloud.refusal = NoCapacity("no room")
    job = harness.submit(hardware=["l4", "rtx"])
    reconcile_only(harness, "cloud")
    (harness.jobs.control.cancel if stop == "cancel" else harness.jobs.control.pause)(PRINCIPAL, job.job_id)
    harness.reconcile()
    assert harness.find_job(job).status is (Status.CANCELLED if stop == "cancel" else Status.PAUSED)
    assert box.launched == {}


# --- moving between launchers ----------------------------------------------------------------------------------------


def test_paused_job_resumes_on_another_launcher(harness: JobsHarness, cloud: FakeLauncher, box: FakeLauncher) -> None:
    job = harness.start_training()
    harness.jobs.control.pause(PRINCIPAL, job.job_id)
    harness.finish(harness.write_result(job, "paused", last_checkpoint_step=5))
    harness.jobs.control.resume(PRINCIPAL, job.job_id, ResumeRequest.model_validate({"hardware": "rtx"}))
    harness.reconcile()
    job = harness.find_job(job)
    assert [attempt.placement.hardware for attempt in job.attempts] == ["cloud/l4", "box/rtx"]
    assert list(box.launched) == [attempt_name(job.job_id, 2)]


def test_launcher_is_asked_only_about_its_own_attempts(harness: JobsHarness, cloud: FakeLauncher, box: FakeLauncher) -> None:
    job = harness.submit(hardware="rtx")
    harness.reconcile()
    box.states[f"handle of {attempt_name(job.job_id, 1)}"] = "ended"
    harness.reconcile()  # FakeLauncher raises AssertionError for a handle that it did not return
    assert [attempt.outcome for attempt in harness.find_job(job).attempts] == ["lost", None]
    harness.jobs.control.cancel(PRINCIPAL, job.job_id)
    harness.clock.advance(10)
    harness.reconcile()
    assert (cloud.cancels, len(box.cancels)) == ([], 1)


def test_queued_job_of_a_removed_launcher_says_what_helps(harness: JobsHarness) -> None:
    job = harness.submit()
    gone = Placement(launcher="gone", profile="l4", environment="llm")
    harness.store.replace_job(job.model_copy(update={"placements": (gone,)}))
    reason = harness.jobs.queries.get_refreshed(PRINCIPAL, job.job_id).pending_reason
    assert reason is not None
    assert "no launcher for gone/l4" in reason
    harness.reconcile()
    assert harness.find_job(job).status is Status.QUEUED


def test_silent_attempt_of_a_removed_launcher_ends_after_a_lease(harness: JobsHarness) -> None:
    job = harness.start_training()
    attempt = job.attempts[0].model_copy(update={"placement": Placement(launcher="gone", profile="l4", environment="llm")})
    harness.store.replace_job(job.model_copy(update={"attempts": (attempt,)}))
    assert harness.jobs.reconciliation.reconcile_removed_launchers(UPKEEP_PRINCIPAL) == 0
    harness.clock.advance(6 * 60)
    assert harness.jobs.reconciliation.reconcile_removed_launchers(UPKEEP_PRINCIPAL) == 1
    assert harness.find_job(job).attempts[0].outcome == "lost"


# --- a launcher whose machines ask for work --------------------------------------------------------------------------


@pytest.fixture
def pull() -> PullLauncher:
    return PullLauncher("agent", ("my-box",))


def test_offered_attempt_waits_for_any_time_until_a_machine_takes_it(tmp_path_factory: pytest.TempPathFactory, pull: PullLauncher) -> None:
    harness = JobsHarness(tmp_path_factory.mktemp("pull"), launchers=[pull])
    job = harness.submit()
    harness.reconcile()
    harness.clock.advance(3600 * 24)
    harness.reconcile()
    view = harness.jobs.queries.get_refreshed(PRINCIPAL, job.job_id)
    assert (view.job.status, view.pending_reason) == (Status.PREPARING, "waits until a machine of agent takes it")
    request = pull.take_offer()
    assert request is not None
    harness.claim(job, request.attempt, "my box")
    harness.reconcile()
    attempt = harness.find_job(job).attempt
    assert attempt is not None
    assert (attempt.claimed_by, attempt.pending_reason, attempt.outcome) == ("my box", None, None)
    assert pull.take_offer() is None


@pytest.mark.parametrize(("stop", "status"), [("cancel", Status.CANCELLED), ("pause", Status.PAUSED)])
def test_offered_attempt_is_withdrawn_when_its_job_stops(
    tmp_path_factory: pytest.TempPathFactory, pull: PullLauncher, stop: str, status: Status
) -> None:
    harness = JobsHarness(tmp_path_factory.mktemp("pull"), launchers=[pull])
    job = harness.submit()
    harness.reconcile()
    harness.reconcile()
    (harness.jobs.control.cancel if stop == "cancel" else harness.jobs.control.pause)(PRINCIPAL, job.job_id)
    for _ in range(2):
        harness.reconcile()
    assert harness.find_job(job).status is status
    assert pull.take_offer() is None
