"""The core of the service in simulated time: real stores, a fake compute, attempts that come to their ends, and a service that dies.

Nothing here sleeps. Everybody who waits stands on one timeline; the service's clock is the timeline's plus whatever it is wrong by.
The ports of the service are tapped: every call takes a little time, others act in the meantime, and before or after any of them
the process may end as by kill −9. A new one then goes on with the same stores.
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

from schema.events import EventBatch, Metrics, PhaseChanged, ReportedEvent
from schema.job import Job
from schema.result import Result
from schema.spec import result_key
from service.adapters.jobstores.memory import MemoryJobStore
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.adapters.links import ServiceLinks
from service.adapters.secrets.local import LocalSecretStore
from service.bootstrap import CLOUD_LIMITS
from service.core.errors import Conflict, Fenced, Unavailable
from service.core.jobs import Jobs, Limits
from service.core.ports import AttemptState, Hardware, JobStore, LaunchOrder
from service.core.tokens import TokenSigner
from storage import open_store
from tests.factories import START, a_dataset, a_request, some_hardware

TENANT = "local"
MEMORY_BACKED = Path("/dev/shm")  # a round writes dozens of small files, each waited for until it is on the disk
RETRY_S = 0.5
FINISH_TRIES = 20
STOPS_IN_S = 0.5  # an attempt that hears of a cancel
KILLED_IN_S = 10.0  # one that was told by Cloud Run, and does not listen
WAKES_IN_S = 0.05  # as the reconciler does

Answer = TypeVar("Answer")
Sleeps = Generator[float, None, None]  # yields how long it sleeps


class Crash(BaseException):
    """The service's process ends here, as by kill −9."""


class Away(Exception):
    """The service did not answer."""


# --- time ------------------------------------------------------------------------------------------------------------


class Timeline:
    """Simulated seconds, and who is to act when."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def later(self, delay_s: float, act: Callable[[], None]) -> None:
        """Have somebody act after that."""
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._order), act))

    def start(self, sleeper: Sleeps) -> None:
        """Run somebody who sleeps between two deeds."""
        delay_s = next(sleeper, None)
        if delay_s is not None:
            self.later(delay_s, lambda: self.start(sleeper))

    def spend(self, seconds: float) -> None:
        """Time passes; nobody acts before they are let."""
        self.now_s += seconds

    def act_one(self) -> bool:
        """Whose time has come acts; False when it is nobody's."""
        if not self._due or self._due[0][0] > self.now_s:
            return False
        heapq.heappop(self._due)[2]()
        return True

    def run(self, until: Callable[[], bool], most_s: float) -> bool:
        """Let time pass until it is true; False when it is not after `most_s`."""
        end_s = self.now_s + most_s
        while not until():
            if not self._due or self._due[0][0] > end_s:
                self.now_s = end_s
                return until()
            self.now_s = max(self.now_s, self._due[0][0])
            self.act_one()
        return True


@dataclass(frozen=True)
class Place:
    """How a deployment looks after its jobs."""

    name: str
    limits: Limits
    interval_s: float  # between two reconciles
    check_is_cheap: bool  # a laptop: one service, whose reconciler can be woken; else several, and each steps by itself
    report_every_s: float
    call_s: float  # what a call of a port takes at most
    visible_in_s: float  # an execution is found by its name at most so long after it was begun


LAPTOP = Place("laptop", Limits(), 1.0, check_is_cheap=True, report_every_s=0.5, call_s=0.02, visible_in_s=0.0)
CLOUD = Place("cloud", CLOUD_LIMITS, 60.0, check_is_cheap=False, report_every_s=15.0, call_s=0.5, visible_in_s=20.0)


# --- the compute -----------------------------------------------------------------------------------------------------


@dataclass
class Execution:
    """What the compute runs: a process somewhere, if it still is."""

    order: LaunchOrder
    handle: str
    began_s: float
    visible_s: float
    alive: bool = True
    owner: bool = False  # it was given the claim
    spoke: bool = False  # its last word is durable
    stop_asked: bool = False

    @property
    def job_id(self) -> str:
        return self.order.job_id

    @property
    def number(self) -> int:
        return self.order.attempt


class Compute:
    """A launcher whose executions live on the timeline. Its status calls can be away, and the answer to a launch be lost."""

    name = "fake"
    profiles = ("fake",)

    def __init__(self, place: Place, timeline: Timeline, chance: random.Random) -> None:
        self.check_is_cheap = place.check_is_cheap
        self.executions: list[Execution] = []
        self.begin: Callable[[Execution], None] = lambda _: None
        self.is_away = False
        self.loses_answers = False
        self.refused_calls = 0  # while it was away
        self.cancels = 0
        self._place = place
        self._timeline = timeline
        self._chance = chance

    def launch(self, order: LaunchOrder) -> str:
        now_s = self._timeline.now_s
        visible_s = now_s + self._chance.uniform(0, self._place.visible_in_s)
        execution = Execution(order, f"execution {len(self.executions)} of {order.name}", now_s, visible_s)
        self.executions.append(execution)
        self.begin(execution)
        if self.loses_answers:
            raise Unavailable("the answer was lost")
        return execution.handle

    def find(self, name: str) -> str | None:
        self._answer()
        visible = [found for found in self.executions if found.order.name == name and found.visible_s <= self._timeline.now_s]
        if self.check_is_cheap:
            visible = [found for found in visible if found.alive]  # a process that has ended is in no list
        return min(visible, key=lambda found: not found.alive).handle if visible else None

    def check(self, handle: str) -> AttemptState:
        if self.is_away and self._chance.random() < 0.5:
            self.refused_calls += 1
            return "unknown"
        self._answer()
        return "running" if self._of(handle).alive else "ended"

    def cancel(self, handle: str, *, force: bool) -> None:
        self._answer()
        execution = self._of(handle)
        execution.stop_asked = True
        self.cancels += 1
        if self.check_is_cheap and force:
            execution.alive = False
        elif not self.check_is_cheap:
            self._timeline.later(KILLED_IN_S, lambda: self.end(execution))

    def free_slots(self, active: int) -> int:
        return 10

    def hardware(self, profile: str | None = None) -> Hardware:
        return some_hardware()

    def close(self) -> None:
        return None

    def end(self, execution: Execution) -> None:
        """The process is gone."""
        execution.alive = False

    def _answer(self) -> None:
        if self.is_away:
            self.refused_calls += 1
            raise Unavailable("the compute does not answer")

    def _of(self, handle: str) -> Execution:
        return next(found for found in self.executions if found.handle == handle)


class CloudCompute(Compute):
    """One that is asked why an execution ended, and has never seen a reason. When it is away, a part of it may still answer."""

    def why_ended(self, handle: str) -> None:
        if self._chance.random() < 0.5:
            self._answer()


# --- the service -----------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """One process of the service: how many calls it has made, and at which it dies."""

    dies_at: int | None = None  # at that call of a port, counted from 1
    dies_on: str = ""  # or at the first call of that name
    dies_after: bool = False  # when the call has been carried out, and nobody hears the answer
    calls: int = 0
    dead: bool = False
    died_at: str = ""
    made: list[str] = field(default_factory=list[str])  # calls, by name
    between: Callable[[], None] = lambda: None

    def through(self, what: str, act: Callable[[], Answer]) -> Answer:
        """Make a call. Raises Crash."""
        if self.dead:
            raise Crash(what)
        self.calls += 1
        self.made.append(what)
        its_last = self.calls == self.dies_at or what == self.dies_on
        self.between()
        if self.dead:  # it died over something else in the meantime
            raise Crash(what)
        if its_last and not self.dies_after:
            self._die(f"before {what}")
        done = act()
        if its_last:
            self._die(f"after {what}")
        return done

    def _die(self, where: str) -> None:
        self.dead, self.died_at = True, where
        raise Crash(where)


class Tapped:
    """A port whose every call goes through the life of a service. The names are the port's own."""

    def __init__(self, name: str, port: object, life: Life) -> None:
        for attribute in dir(port):
            if not attribute.startswith("_"):
                setattr(self, attribute, _tapped(f"{name}.{attribute}", getattr(port, attribute), life))


# Any: whatever the port's method takes and gives.
def _tapped(what: str, found: Any, life: Life) -> Any:
    if not callable(found):
        return found
    return lambda *args, **named: life.through(what, lambda: found(*args, **named))


@dataclass(frozen=True)
class Course:
    """What an attempt is going to do."""

    starts_in_s: float = 2.0
    reports: int = 14  # longer than a launch is left alone for: 7 s on a laptop, 210 s in the cloud
    outcome: str = "completed"
    dies_before: str = ""  # "claim", "report", "result": it vanishes without a word
    is_deaf: bool = False  # it hears no cancel
    loses_finish: bool = False  # the service never hears its last word
    at_the_end: Callable[[], float] = lambda: 0.0  # called before its last word; how long that takes it then
    clock_off: timedelta = timedelta()


class World:
    """Everything that outlives the service, the service at work, and what goes on around it."""

    def __init__(self, folder: Path, place: Place, store: JobStore, seed: int = 0) -> None:
        self.place = place
        self.chance = random.Random(seed)
        self.timeline = Timeline()
        self.clock_off = timedelta()
        self.store = store
        self.objects = open_store((folder / "objects").as_uri())
        self.secrets = LocalSecretStore(folder / "secrets")
        self.compute = (Compute if place.check_is_cheap else CloudCompute)(place, self.timeline, self.chance)
        self.compute.begin = lambda execution: self.timeline.start(self._attempt(execution))
        self.tokens = TokenSigner(b"k" * 32, self.clock)
        self.course: Callable[[Execution], Course] = lambda _: Course()
        self.fenced = 0  # attempts that were told that they are over
        self.turns = 0
        self.after_turn: Callable[[float], None] = lambda _: None  # told when the turn began
        self.next_life: Callable[[], Life] = Life  # how the next process of the service will end
        self.deaths: list[str] = []
        self.interleaves = False
        self.cut_off = False  # attempts do not reach the service
        self._tails = count(1)
        self._depth = 0
        self._turning = False
        self._restart()
        self.timeline.start(self._reconciler())

    def clock(self) -> datetime:
        """The service's."""
        return START + timedelta(seconds=self.timeline.now_s) + self.clock_off

    def ask(self, what: Callable[[Jobs], Answer]) -> Answer:
        """A request to whichever process of the service is there. Raises Away, and what the service answers."""
        if self.jobs is None:
            raise Away
        try:
            return what(self.jobs)
        except Crash:
            self._bury()
            raise Away from None
        except Unavailable as error:
            raise Away from error

    def insist(self, what: Callable[[Jobs], Answer]) -> Answer:
        """The same, repeated until there is an answer."""
        while True:
            try:
                return self.ask(what)
            except Away:
                self.timeline.run(lambda: False, RETRY_S)

    def insisting(self, what: Callable[[Jobs], object]) -> Sleeps:
        """The same for a caller who sleeps on the timeline; a job that has ended otherwise is an answer."""
        while True:
            try:
                self.ask(what)
                return
            except Conflict:
                return
            except Away:
                yield RETRY_S

    def submit(self, key: str, **changes: object) -> Job:
        """As our clients do: under a key, until there is an answer."""
        return self.insist(lambda jobs: jobs.submit(a_request(**changes), TENANT, key))

    def record(self, job_id: str) -> Job:
        """What is written, whoever is alive."""
        job = self.store.find_job(job_id)
        assert job is not None, f"{job_id} is not there"
        return job

    def live(self, job_id: str) -> list[Execution]:
        """What works at the job."""
        return [execution for execution in self.compute.executions if execution.alive and execution.job_id == job_id]

    def settled(self, job_id: str) -> bool:
        """The job has ended, and nothing works at it."""
        return self.record(job_id).status.is_final and not self.live(job_id)

    # --- the service's processes

    def _restart(self) -> None:
        self.life = self.next_life()
        self.life.between = self._between
        ports: dict[str, Any] = {"store": self.store, "secrets": self.secrets, "launcher": self.compute}
        ports |= dict.fromkeys(("configs", "models", "datasets"), self.objects)
        tapped: dict[str, Any] = {name: Tapped(name, port, self.life) for name, port in ports.items()}
        self.jobs: Jobs | None = Jobs(
            **tapped,
            links=ServiceLinks(self.tokens),
            tokens=self.tokens,
            clock=self.clock,
            random_tail=lambda: f"{next(self._tails):04x}",
            wake=self._wake,
            limits=self.place.limits,
        )

    def _bury(self) -> None:
        """The process is dead; another is started a moment later, and looks at once."""
        if self.jobs is None or not self.life.dead:
            return
        self.jobs = None
        self.deaths.append(self.life.died_at)
        self.timeline.later(self.chance.uniform(0, 3.0), self._come_back)

    def _come_back(self) -> None:
        self._restart()
        if self.place.check_is_cheap:
            self._turn()

    def _wake(self, job_id: str) -> None:
        if self.place.check_is_cheap:
            self.timeline.later(WAKES_IN_S, self._turn)
        elif self.jobs is not None:
            self.jobs.step(job_id)

    def _reconciler(self) -> Sleeps:
        while True:
            yield self.place.interval_s
            self._turn()

    def _turn(self) -> None:
        if self.jobs is None or (self._turning and self.place.check_is_cheap):
            return
        began_s, self._turning = self.timeline.now_s, True
        try:
            self.jobs.reconcile()
        except Crash:
            self._bury()
        else:
            self.turns += 1
            self.after_turn(began_s)
        finally:
            self._turning = False

    def _between(self) -> None:
        """A call takes time, in which others act: attempts, callers, another process of the service."""
        self.timeline.spend(self.chance.uniform(0, self.place.call_s))
        if self.interleaves and self._depth < 2 and self.chance.random() < 0.3:
            self._depth += 1
            try:
                self.timeline.act_one()
            finally:
                self._depth -= 1

    # --- the attempts

    def _attempt(self, execution: Execution) -> Sleeps:
        """A process from its start to its end."""
        course = self.course(execution)
        yield course.starts_in_s
        try:
            yield from self._work(execution, course)
        except Fenced:
            self.fenced += 1
        self.compute.end(execution)

    def _work(self, execution: Execution, course: Course) -> Sleeps:
        if course.dies_before == "claim":
            return
        yield from self._claim(execution)
        outcome = yield from self._train(execution, course)
        yield course.at_the_end()
        if course.dies_before == "result" or not execution.alive or not execution.owner:
            return
        result = self._write_result(execution, outcome)
        for _ in range(0 if course.loses_finish else FINISH_TRIES):
            if self._told(lambda jobs: jobs.finish(execution.job_id, result)):
                return
            yield RETRY_S

    def _claim(self, execution: Execution) -> Sleeps:
        """Own the attempt, however long the service is away. Raises Fenced."""
        claimant = f"process of {execution.handle}"
        while execution.alive and not execution.stop_asked and not execution.owner:
            execution.owner = self._told(lambda jobs: jobs.claim(execution.job_id, execution.number, claimant)) is not None
            yield 0.0 if execution.owner else RETRY_S

    def _train(self, execution: Execution, course: Course) -> Generator[float, None, str]:
        """Report until the course is run, or somebody wants it to end; what it came to. A service that is away is no reason to wait."""
        seq = 0
        for beat in range(course.reports + 1):
            if course.dies_before == "report" and beat == course.reports:
                self.compute.end(execution)
            if not execution.alive:
                return ""
            batch = self._batch(seq, course)
            answer = self._told(lambda jobs, batch=batch: jobs.report(execution.job_id, execution.number, batch))
            seq = answer.next_seq if answer else seq
            if answer and answer.directive != "continue" and not course.is_deaf:
                yield STOPS_IN_S
                return "paused" if answer.directive == "pause" else "cancelled"
            yield from self._nap(execution, course)
            if execution.stop_asked and not course.is_deaf:
                return "cancelled"
        return course.outcome

    def _nap(self, execution: Execution, course: Course) -> Sleeps:
        """Until the next report; a signal ends it."""
        until_s = self.timeline.now_s + self.place.report_every_s
        while self.timeline.now_s < until_s and execution.alive and (course.is_deaf or not execution.stop_asked):
            yield min(STOPS_IN_S, max(0.01, until_s - self.timeline.now_s))

    def _told(self, what: Callable[[Jobs], Answer]) -> Answer | None:
        """What the service answers to an attempt; None when it does not. Raises Fenced."""
        try:
            return None if self.cut_off else self.ask(what)
        except Away:
            return None

    def _batch(self, seq: int, course: Course) -> EventBatch:
        """That it trains, until the service has heard it; from then on a point of its curve. Each with the attempt's own time."""
        at = START + timedelta(seconds=self.timeline.now_s) + course.clock_off
        event = Metrics(step=seq, values={"loss": 1.0}) if seq else PhaseChanged(phase="training")
        return EventBatch(first_seq=seq, events=[ReportedEvent(at=at, event=event)], phase="training")

    def _write_result(self, execution: Execution, outcome: str) -> Result:
        body = {"job_id": execution.job_id, "attempt": execution.number, "outcome": outcome, "started_at": START, "finished_at": START}
        result = Result.model_validate(body)
        self.objects.write(result_key(execution.job_id, execution.number), result.model_dump_json().encode())
        execution.spoke = True
        return result


def seconds(moment: datetime) -> float:
    """A moment of a service whose clock is right, on the timeline."""
    return (moment - START).total_seconds()


@contextmanager
def quick_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder, in memory where the machine has such a place: what is tried here is the order of writes, not the disk."""
    where = MEMORY_BACKED if MEMORY_BACKED.is_dir() else None
    with TemporaryDirectory(prefix=prefix, dir=where) as folder:
        yield Path(folder)


@contextmanager
def without_warnings() -> Iterator[None]:
    """The service says what it gets over, which is everything that is done to it here."""
    log = logging.getLogger("service")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def a_world(place: Place, store: str, seed: int = 0) -> Iterator[World]:
    """A world of its own. `store`: "SQLite" or "memory"."""
    with quick_folder("chaos-core-") as folder, without_warnings():
        kept = cast(JobStore, SqliteJobStore(folder / "tunesmith.db") if store == "SQLite" else MemoryJobStore())
        kept.create_dataset(a_dataset())
        try:
            yield World(folder, place, kept, seed)
        finally:
            kept.close()
