"""Attempt 1 is suspended (SIGSTOP) on an unreachable machine: it sends nothing, cannot be killed, and its launcher reports it as running.

The service's clock advances until the lease ends; attempt 2 does the work; then attempt 1 resumes. None of its later writes may count.
The service is the real one over HTTP; the attempts are real processes of `jobs.run` with a light trainer.
"""

import contextlib
import hashlib
import logging
import os
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
from service.adapters.launchers.cloud_run.launcher import LIMITS as CLOUD_LIMITS
from service.adapters.launchers.local.launcher import LocalLauncher
from service.bootstrap import Services
from service.core.ports import ExecutionState, LaunchRequest
from service.core.principals import LOCAL_PRINCIPAL
from service.main import create_app
from service.settings import Settings
from tests.chaos.campaign import CampaignError, Row, Size
from tests.chaos.service import ROWS, make_light_trainer, make_train_request
from tests.local_token import local_headers
from tests.waiting import wait_until

ROUNDS: dict[Size, int] = {"full": 50, "short": 4}
TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.0005
# Exit codes of a resumed attempt. 0: it had nothing to do, or its result did not count; 1: the files that it was uploading had been
# deleted; 11: it learned that it is superseded.
RESUMED_EXIT_CODES = {0, 1, 11}
RECONCILE_INTERVAL_S = 0.1
RECONCILE_WAIT_S = 2.0  # enough for a few passes of the reconciler on a busy machine
PRINCIPAL = LOCAL_PRINCIPAL

# Points after which an attempt is suspended, as seen from outside, with a delay of up to JITTER_S.
STOP_POINTS = ("launched", "claimed", "training", "uploading")
JITTER_S = 0.05


class UnreachableLauncher(LocalLauncher):
    """The local launcher with unreachable attempts, which it reports as running and cannot end."""

    name = "unreachable"
    limits = CLOUD_LIMITS
    unreachable: set[str]
    processes: dict[str, "subprocess.Popen[bytes]"]

    def launch(self, launch_request: LaunchRequest) -> str:
        handle = super().launch(launch_request)
        if not hasattr(self, "processes"):  # the launcher is built by the service, with its own arguments
            self.processes, self.unreachable = {}, set()
        self.processes[launch_request.name] = self._children[handle]
        return handle

    def check(self, handle: str) -> ExecutionState:
        return "running" if handle in self.unreachable else super().check(handle)

    def cancel(self, handle: str, *, force: bool) -> None:
        if handle not in self.unreachable:
            super().cancel(handle, force=force)


@dataclass
class Counts:
    """What was counted over all rounds."""

    rounds: int = 0
    suspended: Counter[str] = field(default_factory=Counter[str])
    accepted_writes: int = 0  # changes of the record, or events, by attempt 1 after it was given up
    stale_artifacts: int = 0
    damaged: int = 0  # published files that differ from the record
    exit_codes: Counter[int] = field(default_factory=Counter[int])  # of resumed attempts
    failures: list[str] = field(default_factory=list[str])

    @property
    def passed(self) -> bool:
        return (self.accepted_writes, self.stale_artifacts, self.damaged, self.failures) == (0, 0, 0, []) and set(
            self.exit_codes
        ) <= RESUMED_EXIT_CODES


def run(size: Size) -> Row:
    """Run one job after the other in one service."""
    counts, rng = Counts(), random.Random(20)
    with tempfile.TemporaryDirectory(prefix="chaos-zombies-") as folder, run_service(Path(folder)) as running:
        while counts.rounds < ROUNDS[size]:
            running.run_round(STOP_POINTS[counts.rounds % len(STOP_POINTS)], rng, counts)
    stop_points = ", ".join(f"{number} {stop_point}" for stop_point, number in counts.suspended.items())
    return Row(
        fault="attempt 1 suspended past its lease, attempt 2 finishes, attempt 1 resumed",
        injected=f"{counts.rounds} interleavings, suspended when it was {stop_points}",
        expected="0 writes of attempt 1 accepted; artifacts from 2 only",
        observed=f"{counts.accepted_writes} writes accepted, artifacts of attempt 1 in {counts.stale_artifacts} jobs, {counts.damaged} "
        f"damaged; resumed attempts ended with {dict(counts.exit_codes)}" + "; ".join(["", *counts.failures][:3]),
        passed=counts.passed,
    )


class RunningService:
    """A running service in this process, and its clock."""

    def __init__(self, url: str, services: Services, advance_clock: Callable[[timedelta], None]) -> None:
        self._http = httpx2.Client(base_url=url, headers=local_headers(services.settings.home_folder), timeout=TIMEOUT_S)
        self._services = services
        self._advance_clock = advance_clock
        self._dataset_id: str = self._http.post("/datasets", files={"file": ("rows.jsonl", ROWS)}).json()["processed_dataset_id"]

    @property
    def launcher(self) -> UnreachableLauncher:
        launcher = self._services.launchers.get("unreachable")
        assert isinstance(launcher, UnreachableLauncher)
        return launcher

    def run_round(self, stop_point: str, rng: random.Random, counts: Counts) -> None:
        """Run one job: suspend attempt 1, let attempt 2 finish, resume attempt 1 and check what it wrote."""
        job_id = self._http.post("/train", json=make_train_request(self._dataset_id)).json()["job_id"]
        if not self._suspend_at(stop_point, job_id, rng.uniform(0, JITTER_S)):
            return  # it finished first, and its result counts
        first = self.launcher.processes[attempt_name(job_id, 1)]
        try:
            self._expire_lease(job_id)
            wait_until(lambda: self._job(job_id)["status"] == "completed", TIMEOUT_S, description="the end of attempt 2")
            before = self._read_state(job_id)
            first.send_signal(signal.SIGCONT)
            exit_code = first.wait(TIMEOUT_S)
        finally:
            first.kill()  # even if it was never resumed
        counts.rounds += 1
        counts.suspended[stop_point] += 1
        counts.exit_codes[exit_code] += 1
        counts.accepted_writes += self._read_state(job_id) != before
        self._check_artifacts(job_id, counts)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _suspend_at(self, stop_point: str, job_id: str, delay_s: float) -> bool:
        """Suspend attempt 1 shortly after that point. False when it already wrote its result."""
        wait_until(
            lambda: self._has_reached(stop_point, job_id),
            TIMEOUT_S,
            interval_s=POLL_INTERVAL_S,
            description=f"attempt 1 of {job_id} {stop_point}",
        )
        time.sleep(delay_s)
        process = self.launcher.processes[attempt_name(job_id, 1)]
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: _process_state(process.pid) in ("T", "Z", ""), TIMEOUT_S, interval_s=POLL_INTERVAL_S, description="the stop")
        attempt = self._services.jobs.repository.find(PRINCIPAL, job_id).attempts[0]
        if process.poll() is not None or attempt.ended_at or self._services.buckets.configs.stat(result_key(job_id, 1)):
            process.send_signal(signal.SIGCONT)
            return False
        self.launcher.unreachable.add(attempt.handle or "")
        return True

    def _has_reached(self, stop_point: str, job_id: str) -> bool:
        attempt = self._services.jobs.repository.find(PRINCIPAL, job_id).attempt
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
                return any(True for _ in self._services.buckets.models.iter_objects(f"trained_adapters/{job_id}/"))

    def _expire_lease(self, job_id: str) -> None:
        """Advance the clock through silence, suspicion, lease and grace period, each seen by the reconciler.

        A report sent just before the suspension may arrive only now; then all of this starts again.
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
        return self._services.jobs.repository.find(PRINCIPAL, job_id).attempts

    def _read_state(self, job_id: str) -> tuple[Any, ...]:
        """Everything that the service stores about a job: its record, events and manifest."""
        events = [(stored.attempt, stored.seq) for stored in self._services.store.list_events(job_id, 0, 10_000)]
        manifest = self._services.buckets.models.read(manifest_key(job_id))
        return self._services.jobs.repository.find(PRINCIPAL, job_id), events, manifest

    def _check_artifacts(self, job_id: str, counts: Counts) -> None:
        job = self._services.jobs.repository.find(PRINCIPAL, job_id)
        models = self._services.buckets.models
        manifest = PublishManifest.load(models.read(manifest_key(job_id)))
        if not job.artifacts or manifest.artifacts != job.artifacts:
            counts.failures.append(
                f"{job_id} has published {len(job.artifacts)} artifacts, and its manifest names {len(manifest.artifacts)}"
            )
        stale = [artifact for artifact in job.artifacts if "/attempt-2/" not in artifact.key]
        counts.stale_artifacts += bool(stale) or manifest.attempt != 2
        for artifact in job.artifacts:
            contents = ((file, models.read(artifact.file_key(file))) for file in artifact.files)
            counts.damaged += sum(hashlib.sha256(content).hexdigest() != file.sha256 for file, content in contents)

    def _job(self, job_id: str) -> dict[str, Any]:
        return self._http.get(f"/jobs/{job_id}").json()


@contextlib.contextmanager
def run_service(folder: Path) -> Iterator[RunningService]:
    """Run the service in a thread, with the cloud's limits and a clock that can be advanced."""
    LAUNCHERS["unreachable"] = f"{__name__}:UnreachableLauncher"
    offset = timedelta()

    def clock() -> datetime:
        return datetime.now(UTC) + offset

    def advance_clock(duration: timedelta) -> None:
        nonlocal offset
        offset += duration + timedelta(seconds=1)

    port = _free_port()
    os.environ |= make_light_trainer(folder / "trainer") | {"TUNESMITH_LOCAL_MAX_CONCURRENT_JOBS": "8"}
    settings = Settings.model_validate(
        {"home": folder / "home", "port": port, "launchers": ("unreachable",)}
        | {"HF_HUB_OFFLINE": True, "reconcile_interval_s": RECONCILE_INTERVAL_S}
    )
    app = create_app(settings, clock)
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, name="service", daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), TIMEOUT_S, description="the service")
    if not thread.is_alive():
        raise CampaignError("the service did not start")
    running = RunningService(f"http://127.0.0.1:{port}", app.state.services, advance_clock)
    try:
        yield running
    finally:
        running.close()
        server.should_exit = True
        thread.join(TIMEOUT_S)
        log.setLevel(level)
        del LAUNCHERS["unreachable"]


def _wait_for_reconcile(condition: Callable[[], bool]) -> bool:
    """Whether the reconciler makes the condition true within a few passes."""
    until_s = time.monotonic() + RECONCILE_WAIT_S
    while not condition() and time.monotonic() < until_s:
        time.sleep(RECONCILE_WAIT_S / 100)
    return condition()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _process_state(pid: int) -> str:
    """The kernel's state of a process: T is stopped, Z has ended, empty means that there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
