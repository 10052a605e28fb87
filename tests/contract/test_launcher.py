"""What every launcher promises. The attempt is a small program that stands where `jobs.run` stands."""

import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
import pytest

from infra.loopback.cloud_run import CloudRun
from service.adapters.launchers import LAUNCHERS
from service.adapters.launchers.cloud_run import CloudRunLauncher
from service.adapters.launchers.local import LocalLauncher
from service.core.errors import LaunchFailed, Unsupported
from service.core.ports import Launcher, LaunchOrder, LogsElsewhere, LogSource

# Says what it sees, gives a sign that it is at work, then obeys a word: sleeps, ignores signals, or ends.
ATTEMPT = """
import os, pathlib, signal, sys, time
def told(number):
    pathlib.Path(os.environ["SIGNS"], f"{sys.argv[2]}.{signal.Signals(number).name}").touch()
    os._exit(1)
print("attempt", sys.argv[2], "é", os.environ["JOB_TOKEN"][:2], flush=True)
manner = os.environ.get("MANNER", "sleep")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN if manner == "deaf" else lambda number, frame: told(number))
pathlib.Path(os.environ["JOB_WORKDIR"]).mkdir(exist_ok=True)  # as jobs.run: not every launcher makes it
told_us = sorted(f"{name}={value}" for name, value in os.environ.items())
pathlib.Path(os.environ["JOB_WORKDIR"], "environment").write_text("\\n".join(told_us))
pathlib.Path(os.environ["SIGNS"], sys.argv[2]).touch()
if manner != "end": time.sleep(60)
"""
PROBE = 'print(\'{"device": "cpu", "device_name": "test", "gguf": true, "flash_attention_2": false}\')'


class Build(Protocol):
    def __call__(self, slots: int = 2) -> Launcher: ...


@dataclass(frozen=True)
class Compute:
    """Where attempts run: `build` makes a launcher for it, and makes another one when the service comes again."""

    folder: Path
    build: Build

    def ready(self, name: str = "job-1.1") -> Callable[[], bool]:
        """Whether the attempt is at work."""
        return (self.folder / "signs" / name).exists


def inherited(folder: Path) -> dict[str, str]:
    """What attempts inherit, and the program that stands for `jobs.run` to run."""
    for name in ("signs", "source/jobs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs = folder / "source/jobs"
    (jobs / "__init__.py").touch()
    (jobs / "run.py").write_text(ATTEMPT)
    (jobs / "probe.py").write_text(PROBE)
    return {"PATH": os.environ["PATH"], "SIGNS": str(folder / "signs")}


def local(folder: Path, slots: int = 2, time_limit_s: float | None = None) -> LocalLauncher:
    environment = inherited(folder)
    return LocalLauncher(
        home=folder / "home",
        python=Path(sys.executable),
        source=folder / "source",
        service_url="http://127.0.0.1:1",
        max_concurrent_jobs=slots,
        environment=environment,
        time_limit_s=time_limit_s,
    )


@contextmanager
def on_this_machine(folder: Path) -> Generator[Compute]:
    yield Compute(folder, lambda slots=2: local(folder, slots))


@contextmanager
def on_cloud_run(folder: Path) -> Generator[Compute]:
    environment, command = inherited(folder), [sys.executable, "-m", "jobs.run"]
    with CloudRun(folder / "run", {"llm": command}, environment=environment, cwd=folder / "source", grace_s=0.5) as cloud_run:
        for profile in ("l4", "cpu"):
            cloud_run.create_job(f"projects/demo/locations/here/jobs/tunesmith-{profile}", "llm")

        def build(slots: int = 2) -> CloudRunLauncher:
            return CloudRunLauncher(
                project_id="demo",
                region="here",
                profiles=("l4", "cpu"),
                service_url="http://127.0.0.1:1",
                service_audience=None,
                max_concurrent_jobs=slots,
                time_limit_s=600,
                emulator_host=cloud_run.host,
            )

        yield Compute(folder, build)


COMPUTES: dict[str, Callable[[Path], AbstractContextManager[Compute]]] = {"local": on_this_machine, "cloud-run": on_cloud_run}


def test_every_registered_launcher_is_under_contract() -> None:
    assert set(COMPUTES) == set(LAUNCHERS)


@dataclass
class _Closing:
    """Builds launchers, and closes them when the test is over."""

    build: Build
    made: list[Launcher] = field(default_factory=list[Launcher])

    def __call__(self, slots: int = 2) -> Launcher:
        self.made.append(self.build(slots))
        return self.made[-1]


@pytest.fixture(params=sorted(LAUNCHERS))
def compute(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Compute]:
    with COMPUTES[request.param](tmp_path) as compute:
        closing = _Closing(compute.build)
        yield Compute(compute.folder, closing)
        for launcher in closing.made:
            launcher.close()


def an_order(name: str = "job-1.1", **environment: str) -> LaunchOrder:
    return LaunchOrder(name=name, job_id=name.partition(".")[0], attempt=1, environment={"JOB_TOKEN": "tk-secret", **environment})


def until(true: Callable[[], bool], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_a_launched_attempt_runs_until_it_ends(compute: Compute) -> None:
    launcher = compute.build()
    handle = launcher.launch(an_order(MANNER="sleep"))
    assert launcher.check(handle) == "running"
    launcher.cancel(handle, force=True)
    until(lambda: launcher.check(handle) == "ended")


def test_an_attempt_that_ends_by_itself_is_ended(compute: Compute) -> None:
    launcher = compute.build()
    handle = launcher.launch(an_order(MANNER="end"))
    until(lambda: launcher.check(handle) == "ended")


def test_an_attempt_is_found_by_its_name_also_by_the_next_service(compute: Compute) -> None:
    launcher = compute.build()
    handle = launcher.launch(an_order())
    until(compute.ready())
    assert launcher.find("job-1.1") == handle
    assert launcher.find("job-1.2") is None
    another = compute.build()
    assert another.find("job-1.1") == handle
    assert another.check(handle) == "running"


def test_asking_an_attempt_to_stop_is_enough_for_one_that_listens(compute: Compute) -> None:
    launcher = compute.build()
    handle = launcher.launch(an_order())
    until(compute.ready())
    launcher.cancel(handle, force=False)
    until(lambda: launcher.check(handle) == "ended")


def test_one_that_does_not_listen_is_ended_by_force(compute: Compute) -> None:
    launcher = compute.build()
    handle = launcher.launch(an_order(MANNER="deaf"))
    until(compute.ready())
    launcher.cancel(handle, force=False)
    assert launcher.check(handle) == "running"
    launcher.cancel(handle, force=True)
    until(lambda: launcher.check(handle) == "ended")


def test_cancelling_what_has_ended_is_harmless(compute: Compute) -> None:
    launcher = compute.build()
    handle = launcher.launch(an_order(MANNER="end"))
    until(lambda: launcher.check(handle) == "ended")
    launcher.cancel(handle, force=True)


def test_slots_are_taken_and_given_back(compute: Compute) -> None:
    launcher = compute.build(slots=2)
    assert launcher.free_slots(active=0) == 2
    handle = launcher.launch(an_order())
    until(lambda: launcher.free_slots(active=1) == 1)
    launcher.cancel(handle, force=True)
    until(lambda: launcher.free_slots(active=0) == 2)


def test_what_an_attempt_says_can_be_read_here_or_somewhere(compute: Compute) -> None:
    launcher = compute.build()
    handle = launcher.launch(an_order(MANNER="end"))
    until(lambda: launcher.check(handle) == "ended")
    assert isinstance(launcher, LogSource) or (isinstance(launcher, LogsElsewhere) and launcher.where_logs(handle))


def test_a_name_is_not_found_by_a_part_of_it(compute: Compute) -> None:
    launcher = compute.build()
    launcher.launch(an_order("job-1.11"))
    until(compute.ready("job-1.11"))
    assert launcher.find("job-1.1") is None
    assert launcher.find("ob-1.11") is None


def test_after_closing_every_attempt_has_ended_or_is_found_by_the_next_service(compute: Compute) -> None:
    launcher = compute.build()
    handles = {name: launcher.launch(an_order(name)) for name in ("job-1.1", "job-2.1")}
    for name in handles:
        until(compute.ready(name))
    launcher.close()
    another = compute.build()
    for name, handle in handles.items():
        assert another.check(handle) == "ended" or another.find(name) == handle


def test_it_knows_its_hardware(compute: Compute) -> None:
    launcher = compute.build()
    assert launcher.hardware() == launcher.hardware(launcher.profiles[0])
    for profile in launcher.profiles:
        hardware = launcher.hardware(profile)
        assert hardware.gguf
        assert "sft" in hardware.trainer_types


def test_hardware_that_there_is_not_is_refused_by_naming_what_there_is(compute: Compute) -> None:
    launcher = compute.build()
    with pytest.raises(Unsupported, match=launcher.profiles[0]):
        launcher.hardware("quantum")


def test_closing_takes_the_compute_away_and_cancels_nothing(compute: Compute) -> None:
    launcher = compute.build()
    launcher.launch(an_order())
    until(compute.ready())
    launcher.close()
    assert not compute.ready("job-1.1.SIGINT")()


# --- on this machine -------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> Iterator[LocalLauncher]:
    launcher = local(tmp_path)
    yield launcher
    launcher.close()


def ready(launcher: LocalLauncher, name: str = "job-1.1") -> Callable[[], bool]:
    return lambda: log_of(launcher, name).endswith("\n")


def log_of(launcher: LocalLauncher, name: str = "job-1.1") -> str:
    page = launcher.read_log(name, 0, 10_000)
    return page.text if page else ""


def test_logs_come_in_pages_and_are_forgotten_on_request(here: LocalLauncher) -> None:
    assert here.read_log("job-1.1", 0, 10) is None
    handle = here.launch(an_order(MANNER="end"))
    until(lambda: here.check(handle) == "ended")
    whole = log_of(here)
    assert whole.startswith("attempt job-1.1 é tk")
    pages, offset = "", 0
    while page := here.read_log("job-1.1", offset, 3):
        if page.next_offset == offset:
            break
        pages, offset = pages + page.text, page.next_offset
    assert pages == whole
    assert here.forget_log("job-1.1")
    assert here.read_log("job-1.1", 0, 10) is None
    assert not here.forget_log("job-1.1")


def test_a_cancel_and_the_end_of_the_service_are_told_apart(tmp_path: Path, here: LocalLauncher) -> None:
    handle = here.launch(an_order("job-1.1"))
    here.launch(an_order("job-2.1"))
    until(ready(here, "job-1.1"))
    until(ready(here, "job-2.1"))
    here.cancel(handle, force=False)
    until((tmp_path / "signs/job-1.1.SIGINT").exists)
    here.close()
    assert (tmp_path / "signs/job-2.1.SIGTERM").exists()


@pytest.mark.parametrize(("time_limit_s", "told"), [(None, []), (90.0, ["JOB_TIME_LIMIT_S=90.0"])])
def test_an_attempt_is_told_its_time_limit(tmp_path: Path, time_limit_s: float | None, told: list[str]) -> None:
    launcher = local(tmp_path, time_limit_s=time_limit_s)
    launcher.launch(an_order(MANNER="end"))
    until((tmp_path / "signs/job-1.1").exists)
    seen = (tmp_path / "home/attempts/job-1.1/environment").read_text().split("\n")
    assert [line for line in seen if line.startswith("JOB_TIME_LIMIT_S")] == told
    launcher.close()


def test_closing_leaves_nothing_behind(here: LocalLauncher) -> None:
    handles = [here.launch(an_order("job-1.1")), here.launch(an_order("job-2.1"))]
    until(ready(here, "job-2.1"))
    here.close()
    assert [here.check(handle) for handle in handles] == ["ended", "ended"]


def test_a_missing_trainer_environment_is_a_refusal_that_says_what_to_do(tmp_path: Path) -> None:
    launcher = local(tmp_path)
    launcher._python = tmp_path / "nowhere"  # type: ignore[attr-defined]
    with pytest.raises(LaunchFailed) as refusal:
        launcher.launch(an_order())
    assert "make setup" in refusal.value.hint


def test_no_secret_is_on_the_command_line_and_no_credential_is_inherited(tmp_path: Path) -> None:
    launcher = local(tmp_path)
    handle = launcher.launch(an_order())
    workdir = tmp_path / "home/attempts/job-1.1"
    until((tmp_path / "signs/job-1.1").exists)
    process = psutil.Process(int(handle.partition("@")[0]))
    assert "tk-secret" not in " ".join(process.cmdline())
    seen = [line.partition("=")[0] for line in (workdir / "environment").read_text().split("\n")]
    assert not [name for name in seen if "KEY" in name or "PASSWORD" in name or "AWS" in name]
    assert {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} <= set(seen)
    assert os.getpgid(process.pid) == process.pid
    launcher.close()


def test_a_pid_used_by_somebody_else_is_not_the_attempt(tmp_path: Path) -> None:
    launcher = local(tmp_path)
    assert launcher.check(f"{os.getpid()}@1.00") == "ended"
    launcher.cancel(f"{os.getpid()}@1.00", force=True)  # would end this test
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_attempt_of_the_same_name_in_another_home_is_left_alone(tmp_path: Path) -> None:
    ours, theirs = local(tmp_path / "ours"), local(tmp_path / "theirs")
    handle = theirs.launch(an_order())
    until(ready(theirs))
    ours.launch(an_order())
    until(ready(ours))
    ours.close()
    assert theirs.check(handle) == "running"
    assert ours.find("job-1.1") is None
    assert theirs.find("job-1.1") == handle
    theirs.close()
