"""The service dies before or after any call it makes while a job is launched, looked after and ended, and again while it recovers.

Every boundary between two calls of a port (job store, object store, secrets, compute) is one: the record may be written and the
attempt not sent, or sent and its handle not noted. What works on the compute is held against the record after every reconcile.
"""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product

from schema.job import Status
from schema.requests import ResumeRequest
from tests.chaos.campaign import Row, Size
from tests.chaos.core_world import (
    CLOUD,
    LAPTOP,
    TENANT,
    AttemptBehavior,
    Execution,
    ServiceProcess,
    SimulatedProcess,
    Simulation,
    open_simulation,
    to_timeline_s,
)
from tests.factories import make_attempt

ROUNDS: dict[Size, int] = {"full": 500, "short": 40}
MAX_ROUND_S = 3600.0  # simulated; a round takes some minutes
MAX_EXECUTIONS = 10  # a job that has had more will never end
MAX_EXTRA_CRASHES = 3  # at most, at random, while what the first one left is mended
MAX_UNKNOWN_RECONCILES = 2
# The calls by which a launch, and what may have to be mended of it, goes on.
CRASH_CALLS = (
    *("store.replace_job", "configs.write", "launcher.launch", "launcher.find_handle", "launcher.check", "launcher.cancel"),
    *("configs.read", "models.iter_objects", "launcher.get_exit_reason", "secrets.destroy"),
)
NO_CHANGES = ResumeRequest.model_validate({})


@dataclass(frozen=True)
class Scenario:
    """What happens in a round beside the crashes."""

    name: str
    behaviors: tuple[AttemptBehavior, ...] = (AttemptBehavior(),)  # of the attempts, in order; the last one for all that follow
    loses_responses: bool = False  # launches are carried out, and their answers lost
    request: str = ""  # what a caller asks for after a while
    expected_statuses: frozenset[Status] = frozenset({Status.COMPLETED})


SCENARIOS = (
    Scenario("a launch"),
    Scenario("its answer lost", loses_responses=True),
    Scenario("an attempt that dies", (AttemptBehavior(dies_before="report"), AttemptBehavior())),
    Scenario("one that dies before its claim", (AttemptBehavior(dies_before="claim"), AttemptBehavior())),
    Scenario("one whose last word is not heard", (AttemptBehavior(result_not_received=True),)),
    Scenario("one quicker than the answer to its launch", (AttemptBehavior(start_delay_s=0.0, reports=0),)),
    Scenario("one that starts late", (AttemptBehavior(start_delay_s=150.0),)),
    Scenario("one that starts late, the answer lost", (AttemptBehavior(start_delay_s=150.0),), loses_responses=True),
    Scenario(
        "a cancel", (AttemptBehavior(reports=20),), request="cancel", expected_statuses=frozenset({Status.CANCELLED, Status.COMPLETED})
    ),
    Scenario(
        "a cancel that is not listened to",
        (AttemptBehavior(reports=100, ignores_cancel=True),),
        request="cancel",
        expected_statuses=frozenset({Status.CANCELLED}),
    ),
    Scenario("a pause and a resume", (AttemptBehavior(reports=20), AttemptBehavior()), request="pause"),
)


@dataclass(frozen=True)
class CrashPoint:
    """Where the first crash of a round is: at which call of the process that takes the job in, and on which side of it."""

    call: int
    after: bool


@dataclass
class Counts:
    """What was found over all rounds."""

    crashes: Counter[str] = field(default_factory=Counter[str])
    concurrent_executions: int = 0  # jobs with two executions alive at once
    double_claims: int = 0  # attempts that two processes were given
    lost: int = 0  # jobs that did not end, or otherwise than they should
    orphans: int = 0  # executions alive after the end
    max_unknown_reconciles: int = 0  # reconciles at whose end an execution was not known that could have been found, the most of all
    oldest_orphan_s: dict[str, float] = field(default_factory=dict[str, float])
    executions: int = 0

    @property
    def passed(self) -> bool:
        bad = self.concurrent_executions + self.double_claims + self.lost + self.orphans
        return bad == 0 and self.max_unknown_reconciles <= MAX_UNKNOWN_RECONCILES


def run(size: Size) -> Row:
    """The rounds, in turn on a laptop and in the cloud, on SQLite and in memory."""
    count = Counts()
    kinds = list(product((LAPTOP, CLOUD), ("SQLite", "memory")))
    with ExitStack() as stack:
        worlds = [stack.enter_context(open_simulation(place, store, seed)) for seed, (place, store) in enumerate(kinds)]
        for number, (world, story, aim) in enumerate(_plan_rounds(worlds, ROUNDS[size])):
            Round(world, story, aim, number, count).run()
    oldest = ", ".join(f"{age_s:.0f} s ({name})" for name, age_s in sorted(count.oldest_orphan_s.items()))
    return Row(
        fault="launcher crash between its steps",
        injected=f"{ROUNDS[size]} rounds of {len(SCENARIOS)} stories with {count.crashes.total():,} crashes, "
        f"on {len(count.crashes)} sides of {len({side.partition(' ')[2] for side in count.crashes})} calls of the stores and the compute",
        expected="one live attempt per job, no orphan older than two reconciles",
        observed=f"{count.concurrent_executions} jobs with two live attempts, {count.double_claims} with two owners, {count.lost} jobs "
        f"that did not end as they should, {count.orphans} of {count.executions} executions left over; none unknown for more than "
        f"{count.max_unknown_reconciles} reconciles that could have found it, the oldest orphan {oldest}",
        passed=count.passed,
    )


def _plan_rounds(worlds: list[Simulation], rounds: int) -> Iterator[tuple[Simulation, Scenario, CrashPoint]]:
    """Every story as often as the others; the first crash in turn on every side of every kind of call that the story makes."""
    chance = random.Random(1)
    calls = {(story.name, id(world)): _record_calls(world, story) for story in SCENARIOS for world in worlds}
    for visit, index in (divmod(number, len(SCENARIOS)) for number in range(rounds)):
        story, world = SCENARIOS[index], worlds[(visit + index) % len(worlds)]
        made = calls[story.name, id(world)]
        kinds = list(product(sorted(set(made)), (False, True)))
        kind, after = kinds[(visit // len(worlds) + visit * len(worlds)) % len(kinds)]
        place = chance.choice([place for place, name in enumerate(made, start=1) if name == kind])
        yield world, story, CrashPoint(place, after)


def _record_calls(simulation: Simulation, scenario: Scenario) -> list[str]:
    """The calls that the story makes when nothing crashes, by name."""
    Round(simulation, scenario, CrashPoint(call=0, after=False), -1, Counts(), crashes=0).run()
    return list(simulation.process.call_names)


class Round:
    """One job's life, and what is counted in it."""

    def __init__(
        self,
        simulation: Simulation,
        scenario: Scenario,
        crash_point: CrashPoint,
        number: int,
        count: Counts,
        crashes: int = MAX_EXTRA_CRASHES,
    ) -> None:
        self._simulation = simulation
        self._scenario = scenario
        self._count = count
        self._chance = random.Random(number)
        self._crashes_left = self._chance.randint(0, crashes)
        self._job_id = ""
        self._request_answered = not scenario.request
        self._unknown: Counter[str] = Counter()
        self._had_concurrent_executions = False
        self._key = f"{scenario.name} {number}"
        simulation.chance.seed(number)
        simulation.interleaves = True
        simulation.choose_behavior = self._choose_behavior
        simulation.compute.loses_responses = scenario.loses_responses
        simulation.after_reconcile = self._check_executions
        simulation.next_process = self._next_process
        simulation.crash_points.clear()
        simulation.process.crash_at_call, simulation.process.crash_after_call = crash_point.call, crash_point.after
        simulation.process.calls = 0
        simulation.process.call_names.clear()

    def run(self) -> None:
        """Submit, let things happen, and count."""
        world = self._simulation
        before = len(world.compute.executions)
        self._job_id = world.submit(self._key, hf_token="hf_x").job_id
        if self._scenario.request:
            world.timeline.start(self._send_requests())
        world.timeline.run_until(lambda: self._is_over(before), MAX_ROUND_S)
        world.timeline.run_until(lambda: False, 2 * world.deployment.interval_s)  # nothing begins again
        self._update_counts(world.compute.executions[before:])

    def _is_over(self, before: int) -> bool:
        world = self._simulation
        return (self._request_answered and world.is_settled(self._job_id)) or len(world.compute.executions) > before + MAX_EXECUTIONS

    def _choose_behavior(self, execution: Execution) -> AttemptBehavior:
        """Asked when an execution begins."""
        at_work = [
            other for other in self._simulation.live_executions(execution.job_id) if not other.result_written
        ]  # with its last word it ends by itself
        self._had_concurrent_executions |= len(at_work) > 1
        courses = self._scenario.behaviors
        return courses[min(execution.number, len(courses)) - 1]

    def _next_process(self) -> ServiceProcess:
        """The next process of the service dies as well, for a while."""
        if self._crashes_left == 0:
            return ServiceProcess()
        self._crashes_left -= 1
        after = self._chance.random() < 0.5
        if self._chance.random() < 0.5:
            return ServiceProcess(crash_at_call=self._chance.randint(1, 25), crash_after_call=after)
        return ServiceProcess(crash_on=self._chance.choice(CRASH_CALLS), crash_after_call=after)

    def _send_requests(self) -> SimulatedProcess:
        """Asks after a while, until there is an answer; a pause is followed by a resume."""
        yield self._chance.choice(
            (0.05, self._chance.uniform(0, 2), self._chance.uniform(0, 4 * self._simulation.deployment.report_interval_s))
        )
        yield from self._simulation.retry_on_timeline(
            lambda jobs: (
                jobs.control.cancel(self._job_id, TENANT)
                if self._scenario.request == "cancel"
                else jobs.control.pause(self._job_id, TENANT)
            )
        )
        if self._scenario.request == "pause":
            while self._simulation.record(self._job_id).status in (Status.PREPARING, Status.TRAINING, Status.PAUSING):
                yield 1.0
            yield from self._simulation.retry_on_timeline(lambda jobs: jobs.control.resume(self._job_id, TENANT, NO_CHANGES))
        self._request_answered = True

    def _check_executions(self, started_at_s: float) -> None:
        """After a reconcile: what works although the record does not know of it, or has done with it?"""
        job = self._simulation.store.find_job(self._job_id)
        if job is None:
            return
        for execution in self._simulation.live_executions(self._job_id):
            attempt = job.attempts[execution.number - 1] if execution.number <= len(job.attempts) else make_attempt()
            findable_at = (attempt.launch_started_at or attempt.created_at) + self._simulation.deployment.limits.launch_lookup_delay
            known = attempt.handle == execution.handle and attempt.ended_at is None
            if not known and not execution.result_written and to_timeline_s(findable_at) <= started_at_s:
                self._unknown[execution.handle] += 1

    def _update_counts(self, executions: list[Execution]) -> None:
        count, job = self._count, self._simulation.record(self._job_id)
        count.executions += len(executions)
        count.crashes.update(self._simulation.crash_points)
        count.concurrent_executions += self._had_concurrent_executions
        owners = Counter(execution.number for execution in executions if execution.has_claim)
        count.double_claims += sum(number > 1 for number in owners.values())
        count.lost += not self._request_answered or job.status not in self._scenario.expected_statuses
        count.orphans += len(self._simulation.live_executions(self._job_id))
        count.max_unknown_reconciles = max(count.max_unknown_reconciles, *self._unknown.values(), 0)
        place = self._simulation.deployment.name
        for attempt in job.attempts:
            begun = [execution.started_at_s for execution in executions if execution.handle == attempt.handle]
            if begun and attempt.launched_at:
                count.oldest_orphan_s[place] = max(count.oldest_orphan_s.get(place, 0.0), to_timeline_s(attempt.launched_at) - begun[0])
