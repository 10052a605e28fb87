"""Three launchers in one service, on SQLite and Firestore: one hangs, one is full, one is well. The well one's jobs are not delayed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from schema.job import Job, Status
from schema.spec import attempt_name
from service.adapters.jobstores.firestore.store import FirestoreJobStore
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.core.jobs.reconciler import Reconciler
from service.core.ports import JobStore
from service.core.principals import UPKEEP_PRINCIPAL
from tests.fakes import FakeLauncher
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness
from tests.waiting import wait_until

JOBS = 5


@pytest.fixture(params=["sqlite", "firestore"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    """Both stores that a deployment uses."""
    if request.param == "sqlite":
        store: JobStore = SqliteJobStore(tmp_path / "jobs.db")
    else:
        store = FirestoreJobStore(project_id=request.getfixturevalue("firestore_project"))
    yield store
    store.close()


class Hang:
    """Blocks every call until the test ends."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        self.released.wait()


@contextmanager
def run_reconciler(harness: JobsHarness, hang: Hang) -> Iterator[Reconciler]:
    reconciler = Reconciler(
        lambda name: harness.jobs.reconciliation.reconcile_launcher(UPKEEP_PRINCIPAL, name),
        [launcher.name for launcher in harness.launchers],
        interval_s=0.05,
    )
    harness.on_wake = reconciler.wake
    reconciler.start()
    try:
        yield reconciler
    finally:
        hang.released.set()
        reconciler.stop()


def test_hanging_and_full_launchers_delay_no_job_of_a_well_one(store: JobStore, tmp_path: Path) -> None:
    hang = Hang()
    hanging, full, well = FakeLauncher("hanging"), FakeLauncher("full", slots=0), FakeLauncher("well", slots=JOBS)
    hanging.on_call = hang
    harness = JobsHarness(tmp_path, launchers=[hanging, full, well], store=store)

    def status_of(job: Job) -> Status:
        return harness.jobs.repository.find(PRINCIPAL, job.job_id).status

    with run_reconciler(harness, hang):
        stuck = [harness.submit(hardware="hanging/fake") for _ in range(JOBS)]
        waiting = [harness.submit(hardware="full/fake") for _ in range(JOBS)]
        wait_until(lambda: hang.calls > 0)
        jobs = [harness.submit(hardware="well/fake") for _ in range(JOBS)]
        wait_until(lambda: len(well.launched) == JOBS)
        for job in jobs:
            harness.write_result(job)
        wait_until(lambda: all(status_of(job) is Status.COMPLETED for job in jobs))
        assert hang.calls == 1  # which has not returned
        assert [status_of(job) for job in stuck] == [Status.PREPARING, *[Status.QUEUED] * (JOBS - 1)]
        assert [status_of(job) for job in waiting] == [Status.QUEUED] * JOBS
        full.slots = JOBS
        wait_until(lambda: len(full.launched) == JOBS)
    assert set(well.launched) == {attempt_name(job.job_id, 1) for job in jobs}


def test_one_request_reconciles_every_launcher_and_waits_for_the_slowest(store: JobStore, tmp_path: Path) -> None:
    slow, well = FakeLauncher("slow"), FakeLauncher("well")
    harness = JobsHarness(tmp_path, launchers=[slow, well], store=store)
    slow.on_call = lambda: wait_until(lambda: len(well.launched) == JOBS)  # would never end if the launchers took turns
    jobs = [harness.submit(hardware=f"{name}/fake") for name in ("slow", *["well"] * JOBS)]
    assert harness.reconcile() == len(jobs)
    assert (len(slow.launched), len(well.launched)) == (1, JOBS)


@pytest.mark.parametrize("preferred", ["full/fake", "hanging/fake"])
def test_job_with_a_second_choice_does_not_stay_behind_its_first(store: JobStore, tmp_path: Path, preferred: str) -> None:
    hang = Hang()
    hanging, full, well = FakeLauncher("hanging"), FakeLauncher("full", slots=0), FakeLauncher("well", slots=JOBS)
    hanging.on_call = hang
    harness = JobsHarness(tmp_path, launchers=[hanging, full, well], store=store)
    with run_reconciler(harness, hang):
        blocker = harness.submit(hardware="hanging/fake")  # the launcher hangs in this job's launch
        wait_until(lambda: hang.calls > 0)
        job = harness.submit(hardware=[preferred, "well/fake"])
        harness.clock.advance(61)  # a launcher that does not answer is waited for a minute
        wait_until(lambda: len(well.launched) == 1)
        assert list(well.launched) == [attempt_name(job.job_id, 1)]
        assert harness.find_job(blocker).status is Status.PREPARING
