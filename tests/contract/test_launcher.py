"""What every launcher promises. The attempt is a small program that stands where `jobs.run` stands."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import psutil
import pytest

from service.adapters.launchers import LAUNCHERS
from service.adapters.launchers.local import LocalLauncher
from service.core.errors import LaunchFailed
from service.core.ports import Launcher, LaunchOrder, LogSource

# Says what it sees, then obeys a word in the folder it was given: sleeps, ignores SIGTERM, or ends.
ATTEMPT = """
import os, pathlib, signal, sys, time
print("attempt", sys.argv[2], "é", os.environ["JOB_TOKEN"][:2], flush=True)
manner = os.environ.get("MANNER", "sleep")
if manner == "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(os.environ["JOB_WORKDIR"], "environment").write_text("\\n".join(sorted(os.environ)))
pathlib.Path(os.environ["JOB_WORKDIR"], "ready").touch()
if manner != "end": time.sleep(60)
"""
PROBE = 'print(\'{"device": "cpu", "device_name": "test", "gguf": true, "flash_attention_2": false}\')'


class Build(Protocol):
    def __call__(self, folder: Path, slots: int = 2) -> Launcher: ...


def local(folder: Path, slots: int = 2) -> Launcher:
    jobs = folder / "source/jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    (jobs / "__init__.py").touch()
    (jobs / "run.py").write_text(ATTEMPT)
    (jobs / "probe.py").write_text(PROBE)
    environment = {"PATH": os.environ["PATH"]}
    return LocalLauncher(
        home=folder / "home",
        python=Path(sys.executable),
        source=folder / "source",
        service_url="http://127.0.0.1:1",
        max_concurrent_jobs=slots,
        environment=environment,
    )


BUILDERS: dict[str, Build] = {"local": local}


def test_every_registered_launcher_is_under_contract() -> None:
    assert set(BUILDERS) == set(LAUNCHERS)


@pytest.fixture(params=sorted(LAUNCHERS))
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    made: list[Launcher] = []

    def build_one(**options: int) -> Launcher:
        made.append(BUILDERS[request.param](tmp_path, **options))
        return made[-1]

    yield build_one
    for launcher in made:
        launcher.close()


def an_order(name: str = "job-1.1", **environment: str) -> LaunchOrder:
    return LaunchOrder(name=name, job_id=name.partition(".")[0], attempt=1, environment={"JOB_TOKEN": "tk-secret", **environment})


def until(true: Callable[[], bool], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def log_of(launcher: Launcher, name: str = "job-1.1") -> str:
    assert isinstance(launcher, LogSource)
    page = launcher.read_log(name, 0, 10_000)
    return page.text if page else ""


def ready(launcher: Launcher, name: str = "job-1.1") -> Callable[[], bool]:
    return lambda: log_of(launcher, name).endswith("\n")


def test_a_launched_attempt_runs_until_it_ends(build: Callable[..., Launcher]) -> None:
    launcher = build()
    handle = launcher.launch(an_order(MANNER="sleep"))
    assert launcher.check(handle) == "running"
    launcher.cancel(handle, force=True)
    until(lambda: launcher.check(handle) == "ended")


def test_an_attempt_that_ends_by_itself_is_ended(build: Callable[..., Launcher]) -> None:
    launcher = build()
    handle = launcher.launch(an_order(MANNER="end"))
    until(lambda: launcher.check(handle) == "ended")


def test_an_attempt_is_found_by_its_name_also_by_the_next_service(build: Callable[..., Launcher]) -> None:
    launcher = build()
    handle = launcher.launch(an_order())
    until(ready(launcher))
    assert launcher.find("job-1.1") == handle
    assert launcher.find("job-1.2") is None
    another = build()
    assert another.find("job-1.1") == handle
    assert another.check(handle) == "running"


def test_asking_an_attempt_to_stop_is_enough_for_one_that_listens(build: Callable[..., Launcher]) -> None:
    launcher = build()
    handle = launcher.launch(an_order())
    until(ready(launcher))
    launcher.cancel(handle, force=False)
    until(lambda: launcher.check(handle) == "ended")


def test_one_that_does_not_listen_is_ended_by_force(build: Callable[..., Launcher]) -> None:
    launcher = build()
    handle = launcher.launch(an_order(MANNER="deaf"))
    until(ready(launcher))
    launcher.cancel(handle, force=False)
    assert launcher.check(handle) == "running"
    launcher.cancel(handle, force=True)
    until(lambda: launcher.check(handle) == "ended")


def test_cancelling_what_has_ended_is_harmless(build: Callable[..., Launcher]) -> None:
    launcher = build()
    handle = launcher.launch(an_order(MANNER="end"))
    until(lambda: launcher.check(handle) == "ended")
    launcher.cancel(handle, force=True)


def test_slots_are_taken_and_given_back(build: Callable[..., Launcher]) -> None:
    launcher = build(slots=2)
    assert launcher.free_slots(active=0) == 2
    handle = launcher.launch(an_order())
    until(lambda: launcher.free_slots(active=1) == 1)
    launcher.cancel(handle, force=True)
    until(lambda: launcher.free_slots(active=0) == 2)


def test_logs_come_in_pages_and_are_forgotten_on_request(build: Callable[..., Launcher]) -> None:
    launcher = build()
    assert isinstance(launcher, LogSource)
    assert launcher.read_log("job-1.1", 0, 10) is None
    launcher.launch(an_order(MANNER="end"))
    until(ready(launcher))
    whole = log_of(launcher)
    assert whole.startswith("attempt job-1.1 é tk")
    pages, offset = "", 0
    while page := launcher.read_log("job-1.1", offset, 3):
        if page.next_offset == offset:
            break
        pages, offset = pages + page.text, page.next_offset
    assert pages == whole
    assert launcher.forget_log("job-1.1")
    assert launcher.read_log("job-1.1", 0, 10) is None
    assert not launcher.forget_log("job-1.1")


def test_closing_leaves_nothing_behind(build: Callable[..., Launcher]) -> None:
    launcher = build()
    handles = [launcher.launch(an_order("job-1.1")), launcher.launch(an_order("job-2.1"))]
    until(ready(launcher, "job-2.1"))
    launcher.close()
    assert [launcher.check(handle) for handle in handles] == ["ended", "ended"]


def test_it_knows_its_hardware(build: Callable[..., Launcher]) -> None:
    hardware = build().hardware()
    assert hardware.gguf
    assert "sft" in hardware.trainer_types


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
    until(lambda: (workdir / "ready").exists())
    process = psutil.Process(int(handle.partition("@")[0]))
    assert "tk-secret" not in " ".join(process.cmdline())
    seen = (workdir / "environment").read_text().split("\n")
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
