"""The local launcher ends attempts that take too much memory or too many processes, with all their processes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.adapters.launchers.local.attempt_limits import AttemptLimits, check_limits, default_memory_limit, list_members
from service.adapters.launchers.local.launcher import LocalLauncher
from tests.contract.test_launcher import make_attempt_environment, make_environments, make_launch_request
from tests.waiting import wait_until

MIB = 1 << 20
HOLD_MEMORY = "held = bytearray(b'x' * (300 << 20)); import time; time.sleep(60)"
# The second child leaves the tree of its parent, but not its session.
START_PROCESSES = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
children = [subprocess.Popen(sleep) for _ in range(2)]
subprocess.run([sys.executable, "-c", f"import subprocess; subprocess.Popen({sleep!r})"])
time.sleep(60)
"""
MAP_FILE = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    total = sum(mapped[::4096])
    open(sys.argv[1] + ".read", "w").close()
    time.sleep(60)
"""


class Launchers:
    """Local launchers whose attempts run a script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[LocalLauncher] = []

    def make(self, script: str, limits: AttemptLimits) -> LocalLauncher:
        variables = make_attempt_environment(self.folder)
        (self.folder / "source/jobs/run.py").write_text(script)
        launcher = LocalLauncher(
            home=self.folder / "home",
            environments=make_environments(self.folder, variables),
            source=self.folder / "source",
            service_url="http://127.0.0.1:1",
            max_concurrent_jobs=2,
            variables=variables,
            attempt_limits=limits,
        )
        self.made.append(launcher)
        return launcher


@pytest.fixture
def launchers(tmp_path: Path) -> Iterator[Launchers]:
    launchers = Launchers(tmp_path)
    yield launchers
    for launcher in launchers.made:
        for process in launcher._running_attempts():
            process.kill()
        launcher.close()


def test_attempt_that_holds_too_much_memory_is_ended_with_a_reason(launchers: Launchers) -> None:
    launcher = launchers.make(HOLD_MEMORY, AttemptLimits(memory_bytes=200 * MIB, processes=10))
    handle = launcher.launch(make_launch_request())
    wait_until(lambda: launcher.check(handle) == "ended")
    reason = launcher.get_exit_reason(handle)
    assert reason is not None
    assert (reason.failure.code, reason.preempted) == ("out_of_memory", False)
    assert "the limit is 0.2 GB" in reason.failure.message
    assert "TUNESMITH_LOCAL_MEMORY_LIMIT_BYTES" in reason.failure.hint


def test_attempt_of_an_earlier_service_is_watched_too(launchers: Launchers) -> None:
    first = launchers.make(HOLD_MEMORY, AttemptLimits(memory_bytes=1 << 40, processes=10))
    handle = first.launch(make_launch_request())
    second = launchers.make(HOLD_MEMORY, AttemptLimits(memory_bytes=200 * MIB, processes=10))
    assert second.check(handle) == "running"
    wait_until(lambda: second.get_exit_reason(handle) is not None)


def test_attempt_with_too_many_processes_is_ended_with_all_of_them(launchers: Launchers) -> None:
    launcher = launchers.make(START_PROCESSES, AttemptLimits(memory_bytes=1 << 40, processes=3))
    handle = launcher.launch(make_launch_request())
    session = int(handle.partition("@")[0])
    wait_until(lambda: launcher.check(handle) == "ended")
    reason = launcher.get_exit_reason(handle)
    assert reason is not None
    assert "4 processes; the limit is 3" in reason.failure.message
    wait_until(lambda: not [pid for pid in list_session(session) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE])


def list_session(session: int) -> list[int]:
    output = subprocess.run(["ps", "-s", str(session), "-o", "pid="], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in output.split() if psutil.pid_exists(int(pid))]


def test_mapped_files_do_not_count_as_held_memory(tmp_path: Path) -> None:
    """Weights are mapped from disk; the kernel drops their pages when it needs the memory."""
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(200 * MIB))
    with subprocess.Popen([sys.executable, "-c", MAP_FILE, str(weights)]) as child:
        wait_until((tmp_path / "weights.read").exists)
        members = list_members(psutil.Process(child.pid))
        assert sum(member.memory_info().rss for member in members.values()) > 150 * MIB
        assert check_limits(members, AttemptLimits(memory_bytes=150 * MIB, processes=1)) is None
        child.kill()


def test_attempt_within_its_limits_has_no_exit_reason(launchers: Launchers) -> None:
    launcher = launchers.make("pass", AttemptLimits(memory_bytes=1 << 40, processes=10))
    handle = launcher.launch(make_launch_request())
    wait_until(lambda: launcher.check(handle) == "ended")
    assert launcher.get_exit_reason(handle) is None


def test_default_is_most_of_the_memory() -> None:
    assert 0 < default_memory_limit() < psutil.virtual_memory().total
