"""Work in a background thread returns or raises where it is waited for, and a failed check stops a training before anything is saved."""

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.runtime.background_task import NICENESS, BackgroundTask
from jobs.runtime.errors import JobFailed
from jobs.runtime.save_policy import SavePolicy, TrainingControlState
from jobs.runtime.training_control import TrainingControl
from tests.jobs.conftest import make_context, make_spec
from tests.waiting import wait_until


def fail() -> None:
    raise JobFailed("invalid_config", "the export would fail", "leave it out")


@pytest.fixture
def make_control(store: Path, tmp_path: Path) -> Callable[[BackgroundTask[None]], TrainingControl]:
    def make(check: BackgroundTask[None]) -> TrainingControl:
        control = TrainingControl(make_context(make_spec(store), tmp_path), SavePolicy("no", 1), TrainingControlState(), total_steps=4)
        control.background_check = check
        return control

    return make


def test_task_and_its_child_processes_leave_the_processors_to_the_caller() -> None:
    def read_niceness() -> int:
        return int(subprocess.run(["nice"], capture_output=True, text=True, check=True).stdout)

    own = read_niceness()
    assert BackgroundTask("a task", read_niceness).wait() == min(19, max(own, NICENESS))
    assert read_niceness() == own


def test_task_runs_beside_the_caller_and_returns_its_result() -> None:
    may_end = threading.Event()

    def run() -> str:
        may_end.wait(10)
        return "done"

    task = BackgroundTask("a task", run)
    assert not task.is_done
    may_end.set()
    assert task.wait() == "done"
    assert task.is_done
    assert task.wait() == "done"


def test_failure_is_raised_where_task_is_waited_for() -> None:
    task = BackgroundTask("a task", fail)
    with pytest.raises(JobFailed, match="the export would fail"):
        task.wait()


def test_failed_check_stops_training_at_next_step(make_control: Callable[[BackgroundTask[None]], TrainingControl]) -> None:
    check = BackgroundTask("a check", fail)
    control = make_control(check)
    wait_until(lambda: check.is_done)
    with pytest.raises(JobFailed, match="the export would fail"):
        control.on_step_end(1, loss=1.0)


def test_training_goes_on_while_check_runs_and_saves_nothing_before_it_is_done(
    make_control: Callable[[BackgroundTask[None]], TrainingControl], tmp_path: Path
) -> None:
    may_end = threading.Event()

    def run() -> None:
        may_end.wait(10)
        fail()

    control = make_control(BackgroundTask("a check", run))
    control.on_step_end(1, loss=1.0)
    assert control.step == 1
    threading.Timer(0.1, may_end.set).start()
    with pytest.raises(JobFailed, match="the export would fail"):
        control.save(tmp_path / "checkpoint", 0.5, lambda: pytest.fail("a checkpoint was written"))


def test_passed_check_lets_training_save(make_control: Callable[[BackgroundTask[None]], TrainingControl], tmp_path: Path) -> None:
    control = make_control(BackgroundTask("a check", lambda: None))
    control.on_step_end(1, loss=1.0)
    folder = tmp_path / "checkpoint"

    def write() -> None:
        folder.mkdir()

    control.save(folder, 0.5, write)
    assert folder.is_dir()
    assert control.background_check is None
