"""What every launcher promises. A small program in place of `jobs.run` is the attempt."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import psutil
import pytest

from infra.loopback.cloud_run.server import CloudRun
from service.adapters.launchers import LAUNCHERS
from service.adapters.launchers.cloud_run.launcher import CloudRunLauncher
from service.adapters.launchers.local.environments import LocalEnvironments
from service.adapters.launchers.local.launcher import LocalLauncher
from service.core.errors import LaunchFailed, Unavailable
from service.core.ports import ExitReasonReader, Launcher, LaunchRequest, LogLocator, LogReader, SlotReserver
from tests.waiting import wait_until

# Writes its environment and a marker file, then sleeps, ignores signals or ends, according to BEHAVIOR.
ATTEMPT_SCRIPT = """
import os, pathlib, signal, sys, time
def record_signal(number):
    pathlib.Path(os.environ["MARKERS_FOLDER"], f"{sys.argv[2]}.{signal.Signals(number).name}").touch()
    os._exit(1)
print("attempt", sys.argv[2], "é", os.environ["JOB_TOKEN"][:2], flush=True)
behavior = os.environ.get("BEHAVIOR", "sleep")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN if behavior == "ignore_signals" else lambda number, frame: record_signal(number))
pathlib.Path(os.environ["JOB_WORKDIR"]).mkdir(exist_ok=True)  # like jobs.run: not every launcher creates it
environment = sorted(f"{name}={value}" for name, value in os.environ.items())
pathlib.Path(os.environ["JOB_WORKDIR"], "environment").write_text("\\n".join(environment))
pathlib.Path(os.environ["MARKERS_FOLDER"], sys.argv[2]).touch()
if behavior != "end": time.sleep(60)
"""
# Writes a manifest, and counts how often it was called.
PROBE_SCRIPT = """
import json, os, pathlib, sys, time
with open(os.path.join(os.environ["MARKERS_FOLDER"], "probes"), "a") as probes: probes.write("x")
time.sleep(0.2)
families = {"llm": {"trainer_types": ["sft"], "features": {"gguf": True}}}
manifest = {"environment": sys.argv[1], "python": "3.11", "families": families}
pathlib.Path(sys.argv[3]).write_text(json.dumps(manifest))
"""


class LauncherFactory(Protocol):
    def __call__(self, slots: int = 2) -> Launcher: ...


@dataclass(frozen=True)
class LauncherHarness:
    """An environment in which attempts run. `make_launcher` creates a launcher; a second call stands for a restarted service."""

    folder: Path
    make_launcher: LauncherFactory

    def is_attempt_ready(self, name: str = "job-1.1") -> Callable[[], bool]:
        """A function that returns whether the attempt is running."""
        return (self.folder / "markers" / name).exists


def make_attempt_environment(folder: Path) -> dict[str, str]:
    """Write the program that replaces `jobs.run`; returns the environment that attempts inherit."""
    for name in ("markers", "source/jobs/runtime"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs = folder / "source/jobs"
    for package in (jobs, jobs / "runtime"):
        (package / "__init__.py").touch()
    (jobs / "run.py").write_text(ATTEMPT_SCRIPT)
    (jobs / "runtime/probe.py").write_text(PROBE_SCRIPT)
    interpreter = folder / "venvs/llm/bin/python"
    if not interpreter.exists():
        interpreter.parent.mkdir(parents=True)
        interpreter.symlink_to(sys.executable)
    (folder / "venvs/llm/lib/python3.11/site-packages").mkdir(parents=True, exist_ok=True)
    (folder / "environments/llm").mkdir(parents=True, exist_ok=True)
    return {"PATH": os.environ["PATH"], "MARKERS_FOLDER": str(folder / "markers")}


def make_local_launcher(folder: Path, slots: int = 2, time_limit_s: float | None = None) -> LocalLauncher:
    environment = make_attempt_environment(folder)
    return LocalLauncher(
        home=folder / "home",
        environments=make_environments(folder, environment),
        source=folder / "source",
        service_url="http://127.0.0.1:1",
        max_concurrent_jobs=slots,
        variables=environment,
        time_limit_s=time_limit_s,
    )


def make_environments(folder: Path, variables: dict[str, str]) -> LocalEnvironments:
    return LocalEnvironments(
        environments=folder / "environments", venvs=folder / "venvs", source=folder / "source", variables=variables, wait_s=30
    )


def count_probes(folder: Path) -> int:
    probes = folder / "markers/probes"
    return len(probes.read_text()) if probes.exists() else 0


@contextmanager
def run_local_harness(folder: Path) -> Generator[LauncherHarness]:
    yield LauncherHarness(folder, lambda slots=2: make_local_launcher(folder, slots))


@contextmanager
def run_cloud_run_harness(folder: Path) -> Generator[LauncherHarness]:
    environment, command = make_attempt_environment(folder), [sys.executable, "-m", "jobs.run"]
    with CloudRun(folder / "run", {"llm": command}, environment=environment, cwd=folder / "source", grace_s=0.5) as cloud_run:
        manifest = {"environment": "llm", "python": "3.12", "families": {"llm": {"trainer_types": ["sft"]}}}
        (folder / "environments/llm/capabilities.json").write_text(json.dumps(manifest))
        for profile in ("l4", "cpu"):
            cloud_run.create_job(f"projects/demo/locations/here/jobs/tunesmith-{profile}", "llm")

        def build(slots: int = 2) -> CloudRunLauncher:
            return CloudRunLauncher(
                project_id="demo",
                region="here",
                profiles=("l4", "cpu"),
                environments=folder / "environments",
                service_url="http://127.0.0.1:1",
                service_audience=None,
                max_concurrent_jobs=slots,
                time_limit_s=600,
                emulator_host=cloud_run.host,
            )

        yield LauncherHarness(folder, build)


HARNESSES: dict[str, Callable[[Path], AbstractContextManager[LauncherHarness]]] = {
    "local": run_local_harness,
    "cloud-run": run_cloud_run_harness,
}


def test_every_registered_launcher_is_covered() -> None:
    assert set(HARNESSES) == set(LAUNCHERS)


@dataclass
class _LauncherRecorder:
    """Creates launchers and remembers them, to be closed after the test."""

    make_launcher: LauncherFactory
    launchers: list[Launcher] = field(default_factory=list[Launcher])

    def __call__(self, slots: int = 2) -> Launcher:
        self.launchers.append(self.make_launcher(slots))
        return self.launchers[-1]


@pytest.fixture(params=sorted(LAUNCHERS))
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LauncherHarness]:
    with HARNESSES[request.param](tmp_path) as harness:
        recorder = _LauncherRecorder(harness.make_launcher)
        yield LauncherHarness(harness.folder, recorder)
        for launcher in recorder.launchers:
            launcher.close()


def make_launch_request(name: str = "job-1.1", profile: str = "cpu", environment: str = "llm", **variables: str) -> LaunchRequest:
    """`profile` is ignored by the local launcher, which has only one."""
    return LaunchRequest(
        name=name,
        job_id=name.partition(".")[0],
        attempt=1,
        profile=profile,
        environment=environment,
        variables={"JOB_TOKEN": "tk-secret", **variables},
    )


def test_launched_attempt_runs_until_cancelled(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
    assert launcher.check(handle) == "running"
    launcher.cancel(handle, force=True)
    wait_until(lambda: launcher.check(handle) == "ended")


def test_finished_attempt_is_ended(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    handle = launcher.launch(make_launch_request(BEHAVIOR="end"))
    wait_until(lambda: launcher.check(handle) == "ended")


def test_new_launcher_finds_attempt_by_name(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    handle = launcher.launch(make_launch_request())
    wait_until(harness.is_attempt_ready())
    assert launcher.find_handle("job-1.1") == handle
    assert launcher.find_handle("job-1.2") is None
    another = harness.make_launcher()
    assert another.find_handle("job-1.1") == handle
    assert another.check(handle) == "running"


def test_graceful_cancel_ends_cooperative_attempt(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    handle = launcher.launch(make_launch_request())
    wait_until(harness.is_attempt_ready())
    launcher.cancel(handle, force=False)
    wait_until(lambda: launcher.check(handle) == "ended")


def test_forced_cancel_ends_uncooperative_attempt(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    handle = launcher.launch(make_launch_request(BEHAVIOR="ignore_signals"))
    wait_until(harness.is_attempt_ready())
    launcher.cancel(handle, force=False)
    assert launcher.check(handle) == "running"
    launcher.cancel(handle, force=True)
    wait_until(lambda: launcher.check(handle) == "ended")


def test_cancelling_ended_attempt_is_harmless(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    handle = launcher.launch(make_launch_request(BEHAVIOR="end"))
    wait_until(lambda: launcher.check(handle) == "ended")
    launcher.cancel(handle, force=True)


def test_slots_are_taken_and_released(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher(slots=2)
    assert launcher.count_free_slots(active_jobs=0) == 2
    handle = launcher.launch(make_launch_request())
    wait_until(lambda: launcher.count_free_slots(active_jobs=1) == 1)
    launcher.cancel(handle, force=True)
    wait_until(lambda: launcher.count_free_slots(active_jobs=0) == 2)


def test_ingestions_have_slots_of_their_own(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher(slots=2)
    if not isinstance(launcher, SlotReserver):
        return
    [environment] = launcher.reserved_environments
    interpreter = harness.folder / f"venvs/{environment}/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    request = replace(make_launch_request("job-2.1"), environment=environment)
    handle = launcher.launch(request)
    wait_until(lambda: launcher.count_free_reserved_slots(environment) == 0)
    assert launcher.count_free_slots(active_jobs=1) == 2
    launcher.launch(make_launch_request("job-1.1"))
    wait_until(lambda: launcher.count_free_slots(active_jobs=2) == 1)
    assert launcher.count_free_reserved_slots(environment) == 0
    launcher.cancel(handle, force=True)
    wait_until(lambda: launcher.count_free_reserved_slots(environment) == 1)
    assert launcher.count_free_slots(active_jobs=1) == 1


def test_attempt_log_is_readable_or_located(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    handle = launcher.launch(make_launch_request(BEHAVIOR="end"))
    wait_until(lambda: launcher.check(handle) == "ended")
    assert isinstance(launcher, LogReader) or (isinstance(launcher, LogLocator) and launcher.log_location(handle))


def test_find_requires_full_name(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    launcher.launch(make_launch_request("job-1.11"))
    wait_until(harness.is_attempt_ready("job-1.11"))
    assert launcher.find_handle("job-1.1") is None
    assert launcher.find_handle("ob-1.11") is None


def test_closed_launcher_leaves_no_unreachable_attempt(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    handles = {name: launcher.launch(make_launch_request(name)) for name in ("job-1.1", "job-2.1")}
    for name in handles:
        wait_until(harness.is_attempt_ready(name))
    launcher.close()
    another = harness.make_launcher()
    for name, handle in handles.items():
        assert another.check(handle) == "ended" or another.find_handle(name) == handle


def test_profiles_are_named_and_describe_a_device(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    assert launcher.profiles
    for name, profile in launcher.profiles.items():
        assert (profile.name, profile.device in ("cpu", "cuda"), bool(profile.device_name)) == (name, True, True)
        assert (profile.gpus > 0) == (profile.device == "cuda")


def test_environments_are_read_from_their_manifests(harness: LauncherHarness) -> None:
    environments = harness.make_launcher().list_environments()
    assert {name: manifest.environment for name, manifest in environments.items()} == {"llm": "llm"}
    assert environments["llm"].families["llm"].trainer_types == ("sft",)


def test_ping_passes_while_attempts_could_be_launched(harness: LauncherHarness) -> None:
    harness.make_launcher().ping()


@pytest.mark.parametrize(
    "handle", ["handle of job-1.1", "projects/p/locations/r/jobs/tunesmith-l4/executions/x", "123@1.5", "hf-jobs/abc", ""]
)
def test_foreign_handle_is_never_ended_nor_touched(harness: LauncherHarness, handle: str) -> None:
    launcher = harness.make_launcher()
    own = launcher.launch(make_launch_request())
    wait_until(harness.is_attempt_ready())
    if type(handle) is type(own) and _has_form_of(own, handle):
        return  # in the form of its own handles: an attempt that has ended
    assert launcher.check(handle) == "unknown"
    launcher.cancel(handle, force=True)
    assert not isinstance(launcher, ExitReasonReader) or launcher.get_exit_reason(handle) is None
    assert launcher.check(own) == "running"


def _has_form_of(own: str, handle: str) -> bool:
    return re.sub(r"[\w-]+", "x", own) == re.sub(r"[\w-]+", "x", handle)


def test_close_does_not_cancel_attempts(harness: LauncherHarness) -> None:
    launcher = harness.make_launcher()
    launcher.launch(make_launch_request())
    wait_until(harness.is_attempt_ready())
    launcher.close()
    assert not harness.is_attempt_ready("job-1.1.SIGINT")()


# --- the local launcher ----------------------------------------------------------------------------------------------


@pytest.fixture
def local_launcher(tmp_path: Path) -> Iterator[LocalLauncher]:
    launcher = make_local_launcher(tmp_path)
    yield launcher
    launcher.close()


def is_attempt_ready(launcher: LocalLauncher, name: str = "job-1.1") -> Callable[[], bool]:
    return lambda: read_whole_log(launcher, name).endswith("\n")


def read_whole_log(launcher: LocalLauncher, name: str = "job-1.1") -> str:
    page = launcher.read_log(name, 0, 10_000)
    return page.text if page else ""


def test_log_pages_and_log_deletion(local_launcher: LocalLauncher) -> None:
    assert local_launcher.read_log("job-1.1", 0, 10) is None
    handle = local_launcher.launch(make_launch_request(BEHAVIOR="end"))
    wait_until(lambda: local_launcher.check(handle) == "ended")
    whole = read_whole_log(local_launcher)
    assert whole.startswith("attempt job-1.1 é tk")
    pages, offset = "", 0
    while page := local_launcher.read_log("job-1.1", offset, 3):
        if page.next_offset == offset:
            break
        pages, offset = pages + page.text, page.next_offset
    assert pages == whole
    assert local_launcher.delete_log("job-1.1")
    assert local_launcher.read_log("job-1.1", 0, 10) is None
    assert not local_launcher.delete_log("job-1.1")


def test_cancel_and_service_shutdown_use_different_signals(tmp_path: Path, local_launcher: LocalLauncher) -> None:
    handle = local_launcher.launch(make_launch_request("job-1.1"))
    local_launcher.launch(make_launch_request("job-2.1"))
    wait_until(is_attempt_ready(local_launcher, "job-1.1"))
    wait_until(is_attempt_ready(local_launcher, "job-2.1"))
    local_launcher.cancel(handle, force=False)
    wait_until((tmp_path / "markers/job-1.1.SIGINT").exists)
    local_launcher.close()
    assert (tmp_path / "markers/job-2.1.SIGTERM").exists()


@pytest.mark.parametrize(("time_limit_s", "variables"), [(None, []), (90.0, ["JOB_TIME_LIMIT_S=90.0"])])
def test_attempt_receives_time_limit(tmp_path: Path, time_limit_s: float | None, variables: list[str]) -> None:
    launcher = make_local_launcher(tmp_path, time_limit_s=time_limit_s)
    launcher.launch(make_launch_request(BEHAVIOR="end"))
    wait_until((tmp_path / "markers/job-1.1").exists)
    variables_seen = (tmp_path / "home/attempts/job-1.1/environment").read_text().split("\n")
    assert [line for line in variables_seen if line.startswith("JOB_TIME_LIMIT_S")] == variables
    launcher.close()


def test_close_ends_all_local_attempts(local_launcher: LocalLauncher) -> None:
    handles = [local_launcher.launch(make_launch_request("job-1.1")), local_launcher.launch(make_launch_request("job-2.1"))]
    wait_until(is_attempt_ready(local_launcher, "job-2.1"))
    local_launcher.close()
    assert [local_launcher.check(handle) for handle in handles] == ["ended", "ended"]


def test_missing_trainer_environment_fails_launch_with_hint(tmp_path: Path) -> None:
    launcher = make_local_launcher(tmp_path)
    with pytest.raises(LaunchFailed) as excinfo:
        launcher.launch(make_launch_request(environment="vision"))
    assert "make setup-vision" in excinfo.value.hint


def test_installing_a_package_probes_the_environment_again_and_concurrent_requests_only_once(tmp_path: Path) -> None:
    launcher = make_local_launcher(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: launcher.list_environments(), range(8)))
    assert all(answer == answers[0] for answer in answers)
    assert count_probes(tmp_path) == 1
    later = (tmp_path / "environments/llm/capabilities.json").stat().st_mtime + 10
    os.utime(tmp_path / "venvs/llm/lib/python3.11/site-packages", (later, later))
    launcher.list_environments()
    assert count_probes(tmp_path) == 2


def test_environment_that_does_not_work_is_unavailable_with_hint(tmp_path: Path) -> None:
    launcher = make_local_launcher(tmp_path)
    (tmp_path / "source/jobs/runtime/probe.py").write_text("raise SystemExit('broken')")
    with pytest.raises(Unavailable, match="does not work") as excinfo:
        launcher.list_environments()
    assert "make setup" in excinfo.value.hint
    with pytest.raises(Unavailable):
        launcher.ping()


def test_machine_without_any_environment_is_unavailable(tmp_path: Path) -> None:
    launcher = make_local_launcher(tmp_path)
    (tmp_path / "venvs/llm/bin/python").unlink()
    with pytest.raises(Unavailable, match="no trainer environment is installed"):
        launcher.ping()


def test_gpu_is_described_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "NVIDIA L4, 23034, 8.9"\necho "NVIDIA L4, [N/A], 8.9"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    profile = make_local_launcher(tmp_path).profiles["local"]
    assert (profile.device, profile.device_name, profile.gpus) == ("cuda", "NVIDIA L4", 2)
    assert (profile.gpu_memory_bytes, profile.compute_capability) == (23034 << 20, 8.9)


def test_attempt_process_exposes_no_secrets(tmp_path: Path) -> None:
    launcher = make_local_launcher(tmp_path)
    handle = launcher.launch(make_launch_request())
    workdir = tmp_path / "home/attempts/job-1.1"
    wait_until((tmp_path / "markers/job-1.1").exists)
    process = psutil.Process(int(handle.partition("@")[0]))
    assert "tk-secret" not in " ".join(process.cmdline())
    names = [line.partition("=")[0] for line in (workdir / "environment").read_text().split("\n")]
    assert not [name for name in names if "KEY" in name or "PASSWORD" in name or "AWS" in name]
    assert {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} <= set(names)
    assert os.getpgid(process.pid) == process.pid
    launcher.close()


def test_reused_pid_is_not_the_attempt(tmp_path: Path) -> None:
    launcher = make_local_launcher(tmp_path)
    assert launcher.check(f"{os.getpid()}@1.00") == "ended"
    launcher.cancel(f"{os.getpid()}@1.00", force=True)  # would end the test itself
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_same_attempt_name_in_other_home_is_ignored(tmp_path: Path) -> None:
    ours, theirs = make_local_launcher(tmp_path / "ours"), make_local_launcher(tmp_path / "theirs")
    handle = theirs.launch(make_launch_request())
    wait_until(is_attempt_ready(theirs))
    ours.launch(make_launch_request())
    wait_until(is_attempt_ready(ours))
    ours.close()
    assert theirs.check(handle) == "running"
    assert ours.find_handle("job-1.1") is None
    assert theirs.find_handle("job-1.1") == handle
    theirs.close()
