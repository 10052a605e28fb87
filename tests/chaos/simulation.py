"""The core of the service in simulated time: real stores, a fake launcher, simulated attempts and a service that crashes.

No code really sleeps. Everything that waits is scheduled on one timeline; the service's clock is the timeline's time plus an
offset. The service's ports are wrapped: during every call, other simulated processes may run, and the service may crash before or after
any call as with `kill -9`. A new process then continues with the same stores.
"""

import heapq
import logging
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

from schema.capabilities import EnvironmentManifest
from schema.events import EventBatch, MetricsLogged, PhaseChanged, ReportedEvent
from schema.job import Job
from schema.result import Result
from schema.spec import result_key
from service.adapters.jobstores.memory import MemoryJobStore
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.adapters.launchers.cloud_run.launcher import LIMITS as CLOUD_LIMITS
from service.adapters.links import ServiceUrlSigner
from service.adapters.secrets.local import LocalSecretStore
from service.core.errors import Conflict, Fenced, Unavailable
from service.core.jobs.assembly import JobServices, build_job_services
from service.core.launchers import LauncherPool
from service.core.limits import Limits
from service.core.ports import Buckets, ExecutionState, JobStore, LaunchRequest
from service.core.principals import LOCAL_PRINCIPAL, UPKEEP_PRINCIPAL, Principal, attempt_principal
from service.core.tokens import TokenSigner
from storage.registry import open_store
from tests.factories import START, make_dataset, make_manifest, make_profile, make_train_request

PRINCIPAL = LOCAL_PRINCIPAL
LAUNCHER_NAMES = ("first", "second")  # side by side; jobs prefer them in turn
MEMORY_BACKED = Path("/dev/shm")  # a round writes and syncs dozens of small files
RETRY_S = 0.5
FINISH_TRIES = 20
CANCEL_DELAY_S = 0.5  # from the cancel to the end of the attempt
KILL_DELAY_S = 10.0  # until Cloud Run kills an attempt that ignores SIGTERM
WAKE_DELAY_S = 0.05  # as in the reconciler

Answer = TypeVar("Answer")
SimulatedProcess = Generator[float, None, None]  # yields how long it sleeps, in seconds


class Crash(BaseException):
    """The service's process ends here, as with `kill -9`."""


class ServiceDown(Exception):
    """The service did not answer."""


# --- time ------------------------------------------------------------------------------------------------------------


class Timeline:
    """Simulated seconds and the actions that are scheduled on them."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def schedule(self, delay_s: float, action: Callable[[], None]) -> None:
        """Schedule an action after a delay."""
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._order), action))

    def start(self, process: SimulatedProcess) -> None:
        """Run a process that yields how long it sleeps."""
        delay_s = next(process, None)
        if delay_s is not None:
            self.schedule(delay_s, lambda: self.start(process))

    def advance(self, seconds: float) -> None:
        """Advance the time without running actions."""
        self.now_s += seconds

    def run_next_due(self) -> bool:
        """Run the next due action; False when none is due."""
        if not self._due or self._due[0][0] > self.now_s:
            return False
        heapq.heappop(self._due)[2]()
        return True

    def run_until(self, condition: Callable[[], bool], max_s: float) -> bool:
        """Advance until the condition is true; False when it is not after the limit."""
        end_s = self.now_s + max_s
        while not condition():
            if not self._due or self._due[0][0] > end_s:
                self.now_s = end_s
                return condition()
            self.now_s = max(self.now_s, self._due[0][0])
            self.run_next_due()
        return True


@dataclass(frozen=True)
class Deployment:
    """How a deployment reconciles its jobs."""

    name: str
    limits: Limits
    interval_s: float  # between two reconciles
    polling_is_free: bool  # a laptop: one service, whose reconciler can be woken; otherwise several independent services
    report_interval_s: float
    max_call_s: float  # the longest duration of a call of a port
    max_visibility_delay_s: float  # the longest time until a new execution is found by its name


LAPTOP = Deployment("laptop", Limits(), 1.0, polling_is_free=True, report_interval_s=0.5, max_call_s=0.02, max_visibility_delay_s=0.0)
CLOUD = Deployment("cloud", CLOUD_LIMITS, 60.0, polling_is_free=False, report_interval_s=15.0, max_call_s=0.5, max_visibility_delay_s=20.0)


# --- the launcher ----------------------------------------------------------------------------------------------------


@dataclass
class Execution:
    """An execution of the launcher: a simulated process, alive or not."""

    launcher: str
    launch_request: LaunchRequest
    handle: str
    started_at_s: float
    visible_at_s: float
    alive: bool = True
    has_claim: bool = False  # it got the claim
    result_written: bool = False  # its result is stored
    stop_requested: bool = False

    @property
    def job_id(self) -> str:
        return self.launch_request.job_id

    @property
    def number(self) -> int:
        return self.launch_request.attempt

    @property
    def principal(self) -> Principal:
        return attempt_principal(self.job_id, self.number)

    @property
    def claimant(self) -> str:
        return f"process of {self.handle}"


class Compute:
    """The executions of all launchers, on the timeline. Status calls can fail, and the response to a launch can be lost."""

    def __init__(self, deployment: Deployment, timeline: Timeline, rng: random.Random) -> None:
        self.polling_is_free = deployment.polling_is_free
        self.executions: list[Execution] = []
        self.on_launch: Callable[[Execution], None] = lambda _: None
        self.is_unavailable = False
        self.away: set[str] = set()  # launchers that do not answer, while the others do
        self.loses_responses = False
        self.refused_calls = 0  # during outages
        self.cancels = 0
        self._deployment = deployment
        self._timeline = timeline
        self._rng = rng

    def launch(self, launcher: str, launch_request: LaunchRequest) -> str:
        now_s = self._timeline.now_s
        visible_s = now_s + self._rng.uniform(0, self._deployment.max_visibility_delay_s)
        if launcher in self.away and self.answers():  # else the launch takes effect and its response is lost
            self.check_available(launcher)
        execution = Execution(launcher, launch_request, f"execution {len(self.executions)} of {launch_request.name}", now_s, visible_s)
        self.executions.append(execution)
        self.on_launch(execution)
        if self.loses_responses or launcher in self.away:
            self.refused_calls += launcher in self.away
            raise Unavailable("the response was lost")
        return execution.handle

    def find_handle(self, launcher: str, name: str) -> str | None:
        self.check_available(launcher)
        visible = [
            execution
            for execution in self.executions
            if (execution.launcher, execution.launch_request.name) == (launcher, name) and execution.visible_at_s <= self._timeline.now_s
        ]
        if self.polling_is_free:
            visible = [execution for execution in visible if execution.alive]  # a local process that ended is not listed
        return min(visible, key=lambda execution: not execution.alive).handle if visible else None

    def check(self, launcher: str, handle: str) -> ExecutionState:
        if self._is_away(launcher) and self.answers():
            self.refused_calls += 1
            return "unknown"
        self.check_available(launcher)
        return "running" if self.find_execution(launcher, handle).alive else "ended"

    def cancel(self, launcher: str, handle: str, *, force: bool) -> None:
        self.check_available(launcher)
        execution = self.find_execution(launcher, handle)
        execution.stop_requested = True
        self.cancels += 1
        if self.polling_is_free and force:
            execution.alive = False
        elif not self.polling_is_free:
            self._timeline.schedule(KILL_DELAY_S, lambda: self.end(execution))

    def end(self, execution: Execution) -> None:
        """End the process."""
        execution.alive = False

    def check_available(self, launcher: str) -> None:
        """Raise Unavailable during an outage of the launcher."""
        if self._is_away(launcher):
            self.refused_calls += 1
            raise Unavailable("the launcher does not answer")

    def find_execution(self, launcher: str, handle: str) -> Execution:
        """The execution of a handle, about which only the launcher that returned it may be asked."""
        execution = next(execution for execution in self.executions if execution.handle == handle)
        assert execution.launcher == launcher, f"{launcher} is asked about {handle!r} of {execution.launcher}"
        return execution

    def answers(self) -> bool:
        """Whether a call during an outage may answer all the same."""
        return self._rng.random() < 0.5

    def _is_away(self, launcher: str) -> bool:
        return self.is_unavailable or launcher in self.away


class FakeLauncher:
    """One launcher of the compute."""

    def __init__(self, name: str, compute: Compute, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.polling_is_free = compute.polling_is_free
        self.profiles = {"fake": make_profile()}
        self._compute = compute

    def list_environments(self) -> dict[str, EnvironmentManifest]:
        return {"llm": make_manifest()}

    def launch(self, launch_request: LaunchRequest) -> str:
        return self._compute.launch(self.name, launch_request)

    def find_handle(self, name: str) -> str | None:
        return self._compute.find_handle(self.name, name)

    def check(self, handle: str) -> ExecutionState:
        return self._compute.check(self.name, handle)

    def cancel(self, handle: str, *, force: bool) -> None:
        self._compute.cancel(self.name, handle, force=force)

    def count_free_slots(self, active_jobs: int) -> int:
        return 10

    def ping(self) -> None:
        self._compute.check_available(self.name)

    def close(self) -> None:
        return None


class FakeCloudLauncher(FakeLauncher):
    """A launcher with `get_exit_reason`, which knows no reasons. During an outage, some calls may still answer."""

    def get_exit_reason(self, handle: str) -> None:
        self._compute.find_execution(self.name, handle)
        if self._compute.answers():
            self._compute.check_available(self.name)


# --- the service -----------------------------------------------------------------------------------------------------


@dataclass
class ServiceProcess:
    """One process of the service, which counts its calls and crashes at one of them."""

    crash_at_call: int | None = None  # at this call of a port, counted from 1
    crash_on: str = ""  # or at the first call of this name
    crash_after_call: bool = False  # after the call took effect, before its response is used
    calls: int = 0
    has_crashed: bool = False
    crash_point: str = ""
    call_names: list[str] = field(default_factory=list[str])  # names of the calls
    before_call: Callable[[], None] = lambda: None

    def call(self, name: str, action: Callable[[], Answer]) -> Answer:
        """Make a call. Raises Crash."""
        if self.has_crashed:
            raise Crash(name)
        self.calls += 1
        self.call_names.append(name)
        crashes = self.calls == self.crash_at_call or name == self.crash_on
        self.before_call()
        if self.has_crashed:  # it crashed elsewhere in the meantime
            raise Crash(name)
        if crashes and not self.crash_after_call:
            self._crash(f"before {name}")
        result = action()
        if crashes:
            self._crash(f"after {name}")
        return result

    def _crash(self, crash_point: str) -> None:
        self.has_crashed, self.crash_point = True, crash_point
        raise Crash(crash_point)


class PortProxy:
    """A port whose calls pass through a ServiceProcess. The names are the port's own."""

    def __init__(self, name: str, port: object, process: ServiceProcess) -> None:
        for attribute in dir(port):
            if not attribute.startswith("_"):
                setattr(self, attribute, _wrap_attribute(f"{name}.{attribute}", getattr(port, attribute), process))


# Any: the arguments and results of any port's method.
def _wrap_attribute(name: str, attribute: Any, process: ServiceProcess) -> Any:
    if not callable(attribute):
        return attribute
    return lambda *args, **named: process.call(name, lambda: attribute(*args, **named))


@dataclass(frozen=True)
class AttemptBehavior:
    """What a simulated attempt does."""

    start_delay_s: float = 2.0
    reports: int = 14  # takes longer than the grace period of a launch: 7 s on a laptop, 210 s in the cloud
    outcome: str = "completed"
    dies_before: str = ""  # "claim", "report" or "result": it disappears before this call
    ignores_cancel: bool = False  # it does not react to a cancel
    result_not_received: bool = False  # the service never receives its result
    before_result: Callable[[], float] = lambda: 0.0  # called before the result; returns how long the result then takes
    clock_offset: timedelta = timedelta()


class Simulation:
    """Everything that outlives the service, the running service, and its clients and attempts."""

    def __init__(self, folder: Path, deployment: Deployment, store: JobStore, seed: int = 0) -> None:
        self.deployment = deployment
        self.rng = random.Random(seed)
        self.timeline = Timeline()
        self.clock_offset = timedelta()
        self.store = store
        self.objects = open_store((folder / "objects").as_uri())
        self.secrets = LocalSecretStore(folder / "secrets")
        self.launcher = Compute(deployment, self.timeline, self.rng)
        self.launcher.on_launch = lambda execution: self.timeline.start(self._run_attempt(execution))
        self.tokens = TokenSigner(b"k" * 32, self.clock)
        self.choose_behavior: Callable[[Execution], AttemptBehavior] = lambda _: AttemptBehavior()
        self.fenced = 0  # attempts that learned that they are superseded
        self.reconcile_count = 0
        self.after_reconcile: Callable[[float], None] = lambda _: None  # gets the time at which the reconcile started
        self.next_process: Callable[[], ServiceProcess] = ServiceProcess  # makes the next process of the service
        self.crash_points: list[str] = []
        self.interleaves = False
        self.attempts_cut_off = False  # attempts cannot reach the service
        self._suffixes = count(1)
        self._submissions = count()
        self._depth = 0
        self._reconciling = False
        self._start_process()
        self.timeline.start(self._reconciler())

    def clock(self) -> datetime:
        """The service's clock."""
        return START + timedelta(seconds=self.timeline.now_s) + self.clock_offset

    def call_service(self, operation: Callable[[JobServices], Answer]) -> Answer:
        """Call the running process of the service. Raises ServiceDown and the service's errors."""
        if self.jobs is None:
            raise ServiceDown
        try:
            return operation(self.jobs)
        except Crash:
            self._handle_crash()
            raise ServiceDown from None
        except Unavailable as error:
            raise ServiceDown from error

    def call_with_retry(self, operation: Callable[[JobServices], Answer]) -> Answer:
        """Repeat a call until there is an answer."""
        while True:
            try:
                return self.call_service(operation)
            except ServiceDown:
                self.timeline.run_until(lambda: False, RETRY_S)

    def retry_on_timeline(self, operation: Callable[[JobServices], object]) -> SimulatedProcess:
        """Like `call_with_retry` for a process on the timeline; a Conflict, because the job ended, counts as an answer."""
        while True:
            try:
                self.call_service(operation)
                return
            except Conflict:
                return
            except ServiceDown:
                yield RETRY_S

    def submit(self, key: str, **changes: object) -> Job:
        """Submit with an idempotency key until there is an answer, as Tunesmith's client does. Jobs list both launchers, unless told."""
        preferred = [f"{name}/fake" for name in sorted(LAUNCHER_NAMES, reverse=next(self._submissions) % 2 == 1)]
        request = make_train_request(**{"hardware": preferred} | changes)
        return self.call_with_retry(lambda jobs: jobs.submission.submit(PRINCIPAL, request, key))

    def record(self, job_id: str) -> Job:
        """The stored job, whether or not the service runs."""
        job = self.store.find_job(job_id)
        assert job is not None, f"{job_id} is not stored"
        return job

    def live_executions(self, job_id: str) -> list[Execution]:
        """The live executions of the job."""
        return [execution for execution in self.launcher.executions if execution.alive and execution.job_id == job_id]

    def is_settled(self, job_id: str) -> bool:
        """Whether the job has ended and nothing runs for it."""
        return self.record(job_id).status.is_final and not self.live_executions(job_id)

    # --- the service's processes

    def _start_process(self) -> None:
        self.process = self.next_process()
        self.process.before_call = self._advance_between_calls
        ports = {"store": self.store, "secrets": self.secrets}
        launcher_class = FakeLauncher if self.deployment.polling_is_free else FakeCloudLauncher
        launchers = [launcher_class(name, self.launcher, self.deployment.limits) for name in LAUNCHER_NAMES]
        objects = dict.fromkeys(("configs", "models", "datasets"), self.objects)
        # Any: a proxy has the names of whatever port is behind it.
        proxies: dict[str, Any] = {name: PortProxy(name, port, self.process) for name, port in ports.items()}
        pool: list[Any] = [PortProxy("launcher", launcher, self.process) for launcher in launchers]
        buckets: dict[str, Any] = {name: PortProxy(name, store, self.process) for name, store in objects.items()}
        self.jobs: JobServices | None = build_job_services(
            **proxies,
            launchers=LauncherPool(pool),
            buckets=Buckets(**buckets),
            url_signer=ServiceUrlSigner(self.tokens),
            tokens=self.tokens,
            deployment_id="simulation",
            clock=self.clock,
            random_suffix=lambda: f"{next(self._suffixes):04x}",
            wake=self._wake,
        )

    def _handle_crash(self) -> None:
        """Start a new process a moment after the crash; it reconciles at once."""
        if self.jobs is None or not self.process.has_crashed:
            return
        self.jobs = None
        self.crash_points.append(self.process.crash_point)
        self.timeline.schedule(self.rng.uniform(0, 3.0), self._restart_after_crash)

    def _restart_after_crash(self) -> None:
        self._start_process()
        if self.deployment.polling_is_free:
            self._reconcile()

    def _wake(self, job_id: str) -> None:
        if self.deployment.polling_is_free:
            self.timeline.schedule(WAKE_DELAY_S, self._reconcile)
        elif self.jobs is not None:
            self.jobs.reconciliation.reconcile_job(job_id)

    def _reconciler(self) -> SimulatedProcess:
        while True:
            yield self.deployment.interval_s
            self._reconcile()

    def _reconcile(self) -> None:
        if self.jobs is None or (self._reconciling and self.deployment.polling_is_free):
            return
        began_s, self._reconciling = self.timeline.now_s, True
        try:
            for name in LAUNCHER_NAMES:  # one after the other: a simulation has no threads
                self.jobs.reconciliation.reconcile_launcher(UPKEEP_PRINCIPAL, name)
        except Crash:
            self._handle_crash()
        else:
            self.reconcile_count += 1
            self.after_reconcile(began_s)
        finally:
            self._reconciling = False

    def _advance_between_calls(self) -> None:
        """A call takes time in which attempts, callers and other processes of the service act."""
        self.timeline.advance(self.rng.uniform(0, self.deployment.max_call_s))
        if self.interleaves and self._depth < 2 and self.rng.random() < 0.3:
            self._depth += 1
            try:
                self.timeline.run_next_due()
            finally:
                self._depth -= 1

    # --- the attempts

    def _run_attempt(self, execution: Execution) -> SimulatedProcess:
        """Run an attempt from its start to its end."""
        behavior = self.choose_behavior(execution)
        yield behavior.start_delay_s
        try:
            yield from self._claim_and_train(execution, behavior)
        except Fenced:
            self.fenced += 1
        self.launcher.end(execution)

    def _claim_and_train(self, execution: Execution, behavior: AttemptBehavior) -> SimulatedProcess:
        if behavior.dies_before == "claim":
            return
        yield from self._claim(execution)
        outcome = yield from self._train(execution, behavior)
        yield behavior.before_result()
        if behavior.dies_before == "result" or not execution.alive or not execution.has_claim:
            return
        result = self._write_result(execution, outcome)
        for _ in range(0 if behavior.result_not_received else FINISH_TRIES):
            if self._call_as_attempt(lambda jobs: jobs.attempts.finish(execution.principal, result)):
                return
            yield RETRY_S

    def _claim(self, execution: Execution) -> SimulatedProcess:
        """Claim the attempt, however long the service is unavailable. Raises Fenced."""
        while execution.alive and not execution.stop_requested and not execution.has_claim:
            execution.has_claim = (
                self._call_as_attempt(
                    lambda jobs: jobs.attempts.claim(execution.principal, execution.job_id, execution.number, execution.claimant)
                )
                is not None
            )
            yield 0.0 if execution.has_claim else RETRY_S

    def _train(self, execution: Execution, behavior: AttemptBehavior) -> Generator[float, None, str]:
        """Report until the training is over or a stop is requested; return the outcome. The service may be unavailable meanwhile."""
        seq = 0
        for beat in range(behavior.reports + 1):
            if behavior.dies_before == "report" and beat == behavior.reports:
                self.launcher.end(execution)
            if not execution.alive:
                return ""
            batch = self._make_batch(seq, behavior)
            response = self._call_as_attempt(
                lambda jobs, batch=batch: jobs.attempts.report(
                    execution.principal, execution.job_id, execution.number, batch, execution.claimant
                )
            )
            seq = response.next_seq if response else seq
            if response and response.directive != "continue" and not behavior.ignores_cancel:
                yield CANCEL_DELAY_S
                return "paused" if response.directive == "pause" else "cancelled"
            yield from self._wait_for_next_report(execution, behavior)
            if execution.stop_requested and not behavior.ignores_cancel:
                return "cancelled"
        return behavior.outcome

    def _wait_for_next_report(self, execution: Execution, behavior: AttemptBehavior) -> SimulatedProcess:
        """Sleep until the next report; a signal ends the sleep."""
        until_s = self.timeline.now_s + self.deployment.report_interval_s
        while self.timeline.now_s < until_s and execution.alive and (behavior.ignores_cancel or not execution.stop_requested):
            yield min(CANCEL_DELAY_S, max(0.01, until_s - self.timeline.now_s))

    def _call_as_attempt(self, operation: Callable[[JobServices], Answer]) -> Answer | None:
        """The service's answer to an attempt; None when there is none. Raises Fenced."""
        try:
            return None if self.attempts_cut_off else self.call_service(operation)
        except ServiceDown:
            return None

    def _make_batch(self, seq: int, behavior: AttemptBehavior) -> EventBatch:
        """The phase `training` until the service received it; then a metric. Timestamps come from the attempt's clock."""
        at = START + timedelta(seconds=self.timeline.now_s) + behavior.clock_offset
        event = MetricsLogged(step=seq, values={"loss": 1.0}) if seq else PhaseChanged(phase="training")
        return EventBatch(first_seq=seq, events=[ReportedEvent(at=at, event=event)], phase="training")

    def _write_result(self, execution: Execution, outcome: str) -> Result:
        body = {"job_id": execution.job_id, "attempt": execution.number, "claimant": execution.claimant, "outcome": outcome}
        result = Result.model_validate(body | {"started_at": START, "finished_at": START})
        self.objects.write(result_key(execution.job_id, execution.number), result.model_dump_json().encode())
        execution.result_written = True
        return result


def to_timeline_s(moment: datetime) -> float:
    """Convert a time of a correct clock to timeline seconds."""
    return (moment - START).total_seconds()


@contextmanager
def in_memory_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder, in memory where the machine has such a file system: the order of writes is tested, not the disk."""
    parent = MEMORY_BACKED if MEMORY_BACKED.is_dir() else None
    with TemporaryDirectory(prefix=prefix, dir=parent) as folder:
        yield Path(folder)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence the service's warnings, which the injected faults cause."""
    log = logging.getLogger("service")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def open_simulation(deployment: Deployment, store: str, seed: int = 0) -> Iterator[Simulation]:
    """Open a Simulation. `store`: "SQLite" or "memory"."""
    with in_memory_folder("chaos-core-") as folder, without_warnings():
        job_store = cast(JobStore, SqliteJobStore(folder / "tunesmith.db") if store == "SQLite" else MemoryJobStore())
        job_store.create_dataset(make_dataset())
        try:
            yield Simulation(folder, deployment, job_store, seed)
        finally:
            job_store.close()
