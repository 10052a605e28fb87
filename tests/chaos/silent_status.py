"""The compute does not say how its executions are: unknown is not failed.

For a while its status calls answer "unknown" or not at all, and it takes no cancel. The job is well, or ends, or is cancelled or paused,
or is just being launched meanwhile; once the attempt really dies. A peer took such silence for a failure and started well jobs again.
"""

import random
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from schema.job import Status
from tests.chaos.campaign import Row, Size
from tests.chaos.core_world import CLOUD, LAPTOP, TENANT, AttemptBehavior, SimulatedProcess, Simulation, open_simulation

OUTAGES: dict[Size, int] = {"full": 60, "short": 20}  # on each kind of place
MAX_OUTAGE_S = 120.0
MAX_JOB_S = 2 * 3600.0  # simulated, for one job
ENDLESS_TRAINING_S = 3600.0  # nobody waits for the end of such an attempt


DEFAULT_BEHAVIOR = AttemptBehavior()


@dataclass(frozen=True)
class Scenario:
    """What happens during an outage."""

    name: str
    expected_status: Status = Status.COMPLETED
    executions: int = 1  # launches that the job needs
    behavior: AttemptBehavior = DEFAULT_BEHAVIOR
    outage_starts: str = "while it trains"  # or "at the launch", "at the end"
    request: str = ""  # what a caller asks for meanwhile
    training_s: float = 330.0  # if the outage comes meanwhile: longer than that, and the silence around it
    reports_lost: bool = False  # the attempt's reports are lost as well, from before the outage until after it


SCENARIOS = (
    Scenario("well"),
    Scenario("well, and silent", reports_lost=True),
    Scenario("ends", outage_starts="at the end"),
    Scenario("ends, and nobody hears it", outage_starts="at the end", behavior=AttemptBehavior(result_not_received=True)),
    Scenario("is launched", outage_starts="at the launch"),
    Scenario("is launched, and starts late", outage_starts="at the launch", behavior=AttemptBehavior(start_delay_s=MAX_OUTAGE_S)),
    Scenario("is cancelled", Status.CANCELLED, request="cancel", training_s=ENDLESS_TRAINING_S),
    Scenario("is cancelled, and does not hear it", Status.CANCELLED, request="cancel", training_s=ENDLESS_TRAINING_S, reports_lost=True),
    Scenario(
        "is cancelled, and does not listen",
        Status.CANCELLED,
        request="cancel",
        training_s=ENDLESS_TRAINING_S,
        behavior=AttemptBehavior(ignores_cancel=True),
    ),
    Scenario("is paused", Status.PAUSED, request="pause", training_s=ENDLESS_TRAINING_S),
    Scenario("dies", executions=2, outage_starts="at the end", behavior=AttemptBehavior(dies_before="result")),
)


@dataclass
class Counts:
    """What was found."""

    refused: int = 0  # calls of the compute that were not answered
    relaunched: int = 0  # executions beyond those that a job needed
    too_early: int = 0  # executions that began while nobody could know how the one before was
    overwritten: int = 0  # ended jobs that were something else later
    wrong_status: int = 0
    ignored_requests: int = 0  # cancels and pauses that were not carried out
    bad: list[str] = field(default_factory=list[str])

    @property
    def passed(self) -> bool:
        return not self.bad


def run(size: Size) -> Row:
    """Every story in turn, on a laptop, where the compute is asked all the time, and in the cloud, where it is asked about the silent."""
    count = Counts()
    with ExitStack() as stack:
        worlds = [stack.enter_context(open_simulation(place, "SQLite", seed)) for seed, place in enumerate((LAPTOP, CLOUD))]
        for world in worlds:
            for number in range(OUTAGES[size]):
                Round(world, SCENARIOS[number % len(SCENARIOS)], number, count).run()
    lost = f"{count.ignored_requests} cancels or pauses not carried out, {count.wrong_status} other ends"
    return Row(
        fault="the compute's status API unreachable",
        injected=f"{OUTAGES[size]} times for 1 to {MAX_OUTAGE_S:.0f} s (simulated) in a laptop's rhythm and as often in the cloud's, "
        f"in {len(SCENARIOS)} stories; {count.refused:,} of its calls not answered",
        expected="0 relaunches, no finished job overwritten, no cancel lost",
        observed=f"{count.relaunched} relaunches, {count.too_early} attempts begun while nobody could know of the last one's end, "
        f"{count.overwritten} finished jobs overwritten, {lost}" + "; ".join(["", *count.bad][:3]),
        passed=count.passed,
    )


class Round:
    """One job and one outage."""

    def __init__(self, simulation: Simulation, scenario: Scenario, number: int, count: Counts) -> None:
        self._simulation = simulation
        self._scenario = scenario
        self._count = count
        self._chance = random.Random(number)
        self._outage_s = self._chance.uniform(1.0, MAX_OUTAGE_S)
        self._key = f"{scenario.name} {number}"
        self._job_id = ""
        self._is_over = False
        self._end: tuple[Status, int] | None = None
        self._overwritten = self._too_early = False
        simulation.chance.seed(number)
        simulation.interleaves = True
        simulation.choose_behavior = lambda execution: self._choose_behavior(execution.number)
        simulation.after_reconcile = lambda _: self._check_final_status()

    def run(self) -> None:
        """Submit, let the outage come and go, and count."""
        world, before = self._simulation, len(self._simulation.compute.executions)
        self._refused_before = world.compute.refused_calls
        if self._scenario.outage_starts == "at the launch":
            world.compute.loses_responses = True
            world.timeline.start(self._run_outage())
        self._job_id = world.submit(self._key).job_id
        if self._scenario.outage_starts == "while it trains":
            world.timeline.start(self._run_outage_during_training())
        world.timeline.run_until(self._is_settled, MAX_JOB_S)
        world.timeline.run_until(lambda: False, 10 * world.deployment.interval_s)  # nothing is changed afterwards
        self._check_final_status()
        self._update_counts(len(world.compute.executions) - before)

    def _choose_behavior(self, number: int) -> AttemptBehavior:
        """Asked when an execution begins."""
        if number > 1:
            self._too_early |= self._simulation.compute.is_unavailable
            return AttemptBehavior()
        if self._scenario.outage_starts == "while it trains":
            return replace(self._scenario.behavior, reports=int(self._scenario.training_s / self._simulation.deployment.report_interval_s))
        if self._scenario.outage_starts == "at the end":
            return replace(self._scenario.behavior, before_result=self._start_outage)
        return self._scenario.behavior

    def _start_outage(self) -> float:
        """The outage begins; the attempt ends some time later in it."""
        self._simulation.timeline.start(self._run_outage())
        return self._chance.uniform(0, self._outage_s)

    def _run_outage_during_training(self) -> SimulatedProcess:
        """Silence before it where the story says so, so that the compute is asked in the cloud as well."""
        world = self._simulation
        yield self._chance.uniform(3.0, 6 * world.deployment.report_interval_s)
        if self._scenario.reports_lost:
            world.attempts_cut_off = True
            yield world.deployment.limits.heartbeat_timeout.total_seconds() + self._chance.uniform(0, 10.0)
        yield from self._run_outage()
        if self._scenario.reports_lost:
            yield self._chance.uniform(0, 10.0)
            world.attempts_cut_off = False

    def _run_outage(self) -> SimulatedProcess:
        world = self._simulation
        world.compute.is_unavailable = True
        asked_after_s = self._chance.uniform(0, self._outage_s)
        yield asked_after_s
        if self._scenario.request:
            world.timeline.start(self._send_request())
        yield self._outage_s - asked_after_s
        world.compute.is_unavailable = world.compute.loses_responses = False
        self._is_over = True

    def _send_request(self) -> SimulatedProcess:
        job_id, cancels = self._job_id, self._scenario.request == "cancel"
        yield from self._simulation.retry_on_timeline(
            lambda jobs: jobs.control.cancel(job_id, TENANT) if cancels else jobs.control.pause(job_id, TENANT)
        )

    def _is_settled(self) -> bool:
        status = self._simulation.record(self._job_id).status
        return self._is_over and (status.is_final or status is Status.PAUSED) and not self._simulation.live_executions(self._job_id)

    def _check_final_status(self) -> None:
        """After every reconcile: what has ended stays as it was."""
        job = self._simulation.store.find_job(self._job_id)
        if job is None:
            return
        now = (job.status, len(job.attempts))
        if self._end is not None and now != self._end:
            self._overwritten = True
        if job.status.is_final:
            self._end = now

    def _update_counts(self, executions: int) -> None:
        count, world, story = self._count, self._simulation, self._scenario
        job = world.record(self._job_id)
        count.refused += world.compute.refused_calls - self._refused_before
        wrong = job.status is not story.expected_status or bool(world.live_executions(self._job_id))
        count.relaunched += executions > story.executions
        count.too_early += self._too_early
        count.overwritten += self._overwritten
        count.ignored_requests += wrong and bool(story.request)
        count.wrong_status += wrong and not story.request
        if wrong or executions > story.executions or self._too_early or self._overwritten:
            count.bad.append(f"{world.deployment.name}, {story.name}: {job.status} after {executions} executions")
