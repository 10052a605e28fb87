"""Attempt 1 is stopped (SIGSTOP) and its machine cut off: it answers nobody, cannot be killed, and its compute says that it runs.

Its lease runs out, by the service's clock, which is moved on; attempt 2 does the work; then attempt 1 is woken. Whatever it does from
then on must not count. The service is the real one over HTTP, the attempts are real processes of `jobs.run` with a light trainer.
"""

import contextlib
import hashlib
import logging
import random
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from schema.job import Attempt
from schema.result import PublishManifest
from schema.spec import attempt_name, manifest_key, result_key
from service.adapters.launchers import LAUNCHERS
from service.adapters.launchers.local import LocalLauncher
from service.bootstrap import CLOUD_LIMITS, Services
from service.core.ports import ExecutionState, LaunchRequest
from service.main import create_app
from service.settings import Settings
from tests.chaos.campaign import CampaignError, Row, Size
from tests.chaos.service import ROWS, make_light_trainer, make_train_request, wait_until

ROUNDS: dict[Size, int] = {"full": 50, "short": 4}
TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.0005
# How the woken may end: it found nothing to do, or said a last word that did not count; the files it was uploading had been cleared
# away; it was told that it is over.
RESUMED_EXIT_CODES = {0, 1, 11}
RECONCILE_INTERVAL_S = 0.1
RECONCILE_WAIT_S = 2.0  # enough for some turns of the reconciler on a busy machine
TENANT = "local"

# The places of an attempt's life at which it is stopped, by what can be seen of them from outside; then it is let go on for up to JITTER_S.
STOP_POINTS = ("launched", "claimed", "training", "uploading")
JITTER_S = 0.05


class UnreachableLauncher(LocalLauncher):
    """The local launcher, of whose attempts some are on a machine that nobody reaches: it says that they run, and ends none of them."""

    name = "unreachable"
    unreachable: set[str]
    processes: dict[str, "subprocess.Popen[bytes]"]

    def launch(self, order: LaunchRequest) -> str:
        handle = super().launch(order)
        if not hasattr(self, "processes"):  # the launcher is built by the service, with its own arguments
            self.processes, self.unreachable = {}, set()
        self.processes[order.name] = self._children[handle]
        return handle

    def check(self, handle: str) -> ExecutionState:
        return "running" if handle in self.unreachable else super().check(handle)

    def cancel(self, handle: str, *, force: bool) -> None:
        if handle not in self.unreachable:
            super().cancel(handle, force=force)


@dataclass
class Counts:
    """What was found."""

    rounds: int = 0
    stopped: Counter[str] = field(default_factory=Counter[str])
    accepted_writes: int = 0  # changes of the record, or events, that attempt 1 made after it was given up
    stale_artifacts: int = 0
    damaged: int = 0  # published files that are not what the record says
    exit_codes: Counter[int] = field(default_factory=Counter[int])  # exit codes of the woken
    bad: list[str] = field(default_factory=list[str])

    @property
    def passed(self) -> bool:
        return (self.accepted_writes, self.stale_artifacts, self.damaged, self.bad) == (0, 0, 0, []) and set(
            self.exit_codes
        ) <= RESUMED_EXIT_CODES


def run(size: Size) -> Row:
    """One job after the other in one service."""
    count, chance = Counts(), random.Random(20)
    with tempfile.TemporaryDirectory(prefix="chaos-zombies-") as folder, run_service(Path(folder)) as scene:
        while count.rounds < ROUNDS[size]:
            scene.run_round(STOP_POINTS[count.rounds % len(STOP_POINTS)], chance, count)
    places = ", ".join(f"{number} {place}" for place, number in count.stopped.items())
    return Row(
        fault="attempt 1 stopped past its lease, attempt 2 finishes, attempt 1 woken",
        injected=f"{count.rounds} interleavings, stopped when it was {places}",
        expected="0 writes of attempt 1 accepted; artifacts from 2 only",
        observed=f"{count.accepted_writes} writes accepted, artifacts of attempt 1 in {count.stale_artifacts} jobs, {count.damaged} "
        f"damaged; the woken ended with {dict(count.exit_codes)}" + "; ".join(["", *count.bad][:3]),
        passed=count.passed,
    )


class RunningService:
    """A service at work in this process, and its clock."""

    def __init__(self, url: str, parts: Services, advance_clock: Callable[[timedelta], None]) -> None:
        self._http = httpx2.Client(base_url=url, timeout=TIMEOUT_S)
        self._parts = parts
        self._advance_clock = advance_clock
        self._dataset_id: str = self._http.post("/datasets", files={"file": ("rows.jsonl", ROWS)}).json()["processed_dataset_id"]

    @property
    def launcher(self) -> UnreachableLauncher:
        launcher = self._parts.launcher
        assert isinstance(launcher, UnreachableLauncher)
        return launcher

    def run_round(self, stop_point: str, chance: random.Random, count: Counts) -> None:
        """One job: stop attempt 1 there, let attempt 2 do the work, wake attempt 1, and look at what it did."""
        job_id = self._http.post("/train", json=make_train_request(self._dataset_id)).json()["job_id"]
        if not self._suspend_at(stop_point, job_id, chance.uniform(0, JITTER_S)):
            return  # it was quicker, and its last word counts
        first = self.launcher.processes[attempt_name(job_id, 1)]
        try:
            self._expire_lease(job_id)
            wait_until(lambda: self._job(job_id)["status"] == "completed", TIMEOUT_S, "the end of attempt 2")
            before = self._read_state(job_id)
            first.send_signal(signal.SIGCONT)
            code = first.wait(TIMEOUT_S)
        finally:
            first.kill()  # also what was never woken
        count.rounds += 1
        count.stopped[stop_point] += 1
        count.exit_codes[code] += 1
        count.accepted_writes += self._read_state(job_id) != before
        self._check_artifacts(job_id, count)

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def _suspend_at(self, stop_point: str, job_id: str, delay_s: float) -> bool:
        """Stop attempt 1 a little after that place. False when it has spoken its last word by then."""
        wait_until(lambda: self._has_reached(stop_point, job_id), TIMEOUT_S, f"attempt 1 of {job_id} {stop_point}", POLL_INTERVAL_S)
        time.sleep(delay_s)
        process = self.launcher.processes[attempt_name(job_id, 1)]
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: _process_state(process.pid) in ("T", "Z", ""), TIMEOUT_S, "the stop", POLL_INTERVAL_S)
        attempt = self._parts.jobs.repository.find(job_id, TENANT).attempts[0]
        if process.poll() is not None or attempt.ended_at or self._parts.buckets.configs.stat(result_key(job_id, 1)):
            process.send_signal(signal.SIGCONT)
            return False
        self.launcher.unreachable.add(attempt.handle or "")
        return True

    def _has_reached(self, stop_point: str, job_id: str) -> bool:
        attempt = self._parts.jobs.repository.find(job_id, TENANT).attempt
        if attempt is None or attempt.handle is None or attempt_name(job_id, 1) not in getattr(self.launcher, "processes", {}):
            return False
        match stop_point:
            case "launched":
                return True
            case "claimed":
                return attempt.claimed_by is not None
            case "training":
                return self._job(job_id)["status"] in ("training", "completed")
            case _:
                return any(True for _ in self._parts.buckets.models.iter_objects(f"trained_adapters/{job_id}/"))

    def _expire_lease(self, job_id: str) -> None:
        """Time passes: it is silent, it is doubted, its lease runs out, and so does the grace. Each is seen by the reconciler.

        What it said just before it was stopped may be heard only now, and then all of it begins anew.
        """
        limits, until_s = CLOUD_LIMITS, time.monotonic() + TIMEOUT_S
        while len(self._attempts(job_id)) < 2:
            self._advance_clock(max(limits.heartbeat_timeout, limits.start_timeout))
            if _wait_for_reconcile(lambda: self._attempts(job_id)[0].suspected_at is not None):
                self._advance_clock(limits.lease + limits.lease_grace)
                _wait_for_reconcile(lambda: len(self._attempts(job_id)) == 2)
            if time.monotonic() > until_s:
                raise CampaignError(f"attempt 1 of {job_id} was not given up within {TIMEOUT_S:.0f} s")

    def _attempts(self, job_id: str) -> tuple[Attempt, ...]:
        return self._parts.jobs.repository.find(job_id, TENANT).attempts

    def _read_state(self, job_id: str) -> tuple[Any, ...]:
        """All that the service knows and shows of a job: its record, its events, its manifest."""
        events = [(stored.attempt, stored.seq) for stored in self._parts.store.list_events(job_id, 0, 10_000)]
        manifest = self._parts.buckets.models.read(manifest_key(job_id))
        return self._parts.jobs.repository.find(job_id, TENANT), events, manifest

    def _check_artifacts(self, job_id: str, count: Counts) -> None:
        job = self._parts.jobs.repository.find(job_id, TENANT)
        models = self._parts.buckets.models
        manifest = PublishManifest.load(models.read(manifest_key(job_id)))
        if not job.artifacts or manifest.artifacts != job.artifacts:
            count.bad.append(f"{job_id} has published {len(job.artifacts)} artifacts, and its manifest names {len(manifest.artifacts)}")
        of_1 = [artifact for artifact in job.artifacts if "/attempt-2/" not in artifact.key]
        count.stale_artifacts += bool(of_1) or manifest.attempt != 2
        for artifact in job.artifacts:
            contents = ((file, models.read(artifact.key + file.path)) for file in artifact.files)
            count.damaged += sum(hashlib.sha256(content).hexdigest() != file.sha256 for file, content in contents)

    def _job(self, job_id: str) -> dict[str, Any]:
        return self._http.get(f"/jobs/{job_id}").json()


@contextlib.contextmanager
def run_service(folder: Path) -> Iterator[RunningService]:
    """The service in a thread, with the limits of the cloud, on a clock that can be moved on."""
    LAUNCHERS["unreachable"] = f"{__name__}:UnreachableLauncher"
    ahead = timedelta()

    def clock() -> datetime:
        return datetime.now(UTC) + ahead

    def skip(by: timedelta) -> None:
        nonlocal ahead
        ahead += by + timedelta(seconds=1)

    port = _free_port()
    settings = Settings.model_validate(
        {"home": folder / "home", "port": port, "launcher": "unreachable", "trainer_python": make_light_trainer(folder / "trainer")}
        | {"HF_HUB_OFFLINE": True, "max_concurrent_jobs": 8, "reconcile_interval_s": RECONCILE_INTERVAL_S}
    )
    app = create_app(settings, clock)
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, name="service", daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), TIMEOUT_S, "the service")
    if not thread.is_alive():
        raise CampaignError("the service did not start")
    scene = RunningService(f"http://127.0.0.1:{port}", app.state.services, skip)
    try:
        yield scene
    finally:
        scene.close()
        server.should_exit = True
        thread.join(TIMEOUT_S)
        log.setLevel(level)
        del LAUNCHERS["unreachable"]


def _wait_for_reconcile(condition: Callable[[], bool]) -> bool:
    """Whether the reconciler brings it about in some of its turns."""
    until_s = time.monotonic() + RECONCILE_WAIT_S
    while not condition() and time.monotonic() < until_s:
        time.sleep(RECONCILE_WAIT_S / 100)
    return condition()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _process_state(pid: int) -> str:
    """What the kernel says of a process: T is stopped, Z has ended; empty, there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
