"""The service crashes before or after any call that it makes while it launches, reconciles and ends a job, and again while it recovers.

Every boundary between two calls of a port (job store, object store, secrets, launcher) is covered: for example, the record is written
but the launch is not sent, or the launch is sent but its handle is not stored. After every reconcile, executions are compared with records.
"""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product

from schema.job import Status
from schema.requests import ResumeRequest
from service.core.principals import LOCAL_PRINCIPAL as PRINCIPAL
from tests.chaos.campaign import Row, Size
from tests.chaos.simulation import (
    CLOUD,
    LAPTOP,
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
MAX_ROUND_S = 3600.0  # simulated; a round takes a few minutes
MAX_EXECUTIONS = 10  # a job with more executions will never end
MAX_EXTRA_CRASHES = 3  # at random, during the recovery from the first
MAX_UNKNOWN_RECONCILES = 2
# The calls of a launch and of its recovery.
CRASH_CALLS = (
    *("store.replace_job", "configs.write", "launcher.launch", "launcher.find_handle", "launcher.check", "launcher.cancel"),
    *("configs.read", "models.iter_objects", "launcher.get_exit_reason", "secrets.destroy"),
)
NO_CHANGES = ResumeRequest.model_validate({})


@dataclass(frozen=True)
class Scenario:
    """What happens in a round besides the crashes."""

    name: str
    behaviors: tuple[AttemptBehavior, ...] = (AttemptBehavior(),)  # of the attempts, in order; the last one repeats
    loses_responses: bool = False  # launches succeed and their responses are lost
    request: str = ""  # a request that a client sends after a while
    expected_statuses: frozenset[Status] = frozenset({Status.COMPLETED})


SCENARIOS = (
    Scenario("launch"),
    Scenario("launch response lost", loses_responses=True),
    Scenario("attempt dies", (AttemptBehavior(dies_before="report"), AttemptBehavior())),
    Scenario("attempt dies before its claim", (AttemptBehavior(dies_before="claim"), AttemptBehavior())),
    Scenario("result not received", (AttemptBehavior(result_not_received=True),)),
    Scenario("attempt ends before the launch response", (AttemptBehavior(start_delay_s=0.0, reports=0),)),
    Scenario("attempt starts late", (AttemptBehavior(start_delay_s=150.0),)),
    Scenario("attempt starts late, launch response lost", (AttemptBehavior(start_delay_s=150.0),), loses_responses=True),
    Scenario("cancel", (AttemptBehavior(reports=20),), request="cancel", expected_statuses=frozenset({Status.CANCELLED, Status.COMPLETED})),
    Scenario(
        "cancel ignored by the attempt",
        (AttemptBehavior(reports=100, ignores_cancel=True),),
        request="cancel",
        expected_statuses=frozenset({Status.CANCELLED}),
    ),
    Scenario("pause and resume", (AttemptBehavior(reports=20), AttemptBehavior()), request="pause"),
)


@dataclass(frozen=True)
class CrashPoint:
    """The first crash of a round: at which call of the process that accepts the job, and before or after it."""

    call: int
    after: bool


@dataclass
class Counts:
    """What was counted over all rounds."""

    crashes: Counter[str] = field(default_factory=Counter[str])
    concurrent_executions: int = 0  # jobs with two live executions
    double_claims: int = 0  # attempts that two processes claimed
    lost: int = 0  # jobs that did not end, or ended in the wrong status
    orphans: int = 0  # executions alive after the end
    max_unknown_reconciles: int = 0  # the largest number of reconciles that missed a visible execution
    oldest_orphan_s: dict[str, float] = field(default_factory=dict[str, float])
    executions: int = 0

    @property
    def passed(self) -> bool:
        failures = self.concurrent_executions + self.double_claims + self.lost + self.orphans
        return failures == 0 and self.max_unknown_reconciles <= MAX_UNKNOWN_RECONCILES


def run(size: Size) -> Row:
    """Run the rounds alternately as laptop and cloud, on SQLite and in memory."""
    counts = Counts()
    kinds = list(product((LAPTOP, CLOUD), ("SQLite", "memory")))
    with ExitStack() as stack:
        simulations = [stack.enter_context(open_simulation(deployment, store, seed)) for seed, (deployment, store) in enumerate(kinds)]
        for number, (simulation, scenario, crash_point) in enumerate(_plan_rounds(simulations, ROUNDS[size])):
            Round(simulation, scenario, crash_point, number, counts).run()
    oldest = ", ".join(f"{age_s:.0f} s ({name})" for name, age_s in sorted(counts.oldest_orphan_s.items()))
    return Row(
        fault="launcher crash between its steps",
        injected=f"{ROUNDS[size]} rounds of {len(SCENARIOS)} scenarios with {counts.crashes.total():,} crashes, "
        f"on {len(counts.crashes)} sides of {len({side.partition(' ')[2] for side in counts.crashes})} calls of stores and launcher",
        expected="one live attempt per job, no orphan older than two reconciles",
        observed=f"{counts.concurrent_executions} jobs with two live attempts, {counts.double_claims} with two owners, {counts.lost} jobs "
        f"with a wrong end, {counts.orphans} of {counts.executions} executions left over; none unknown for more than "
        f"{counts.max_unknown_reconciles} reconciles that could have found it, the oldest orphan {oldest}",
        passed=counts.passed,
    )


def _plan_rounds(simulations: list[Simulation], rounds: int) -> Iterator[tuple[Simulation, Scenario, CrashPoint]]:
    """Every scenario equally often; the first crash cycles through both sides of every call that the scenario makes."""
    rng = random.Random(1)
    calls = {(scenario.name, id(simulation)): _record_calls(simulation, scenario) for scenario in SCENARIOS for simulation in simulations}
    for visit, index in (divmod(number, len(SCENARIOS)) for number in range(rounds)):
        scenario, simulation = SCENARIOS[index], simulations[(visit + index) % len(simulations)]
        call_names = calls[scenario.name, id(simulation)]
        crash_points = list(product(sorted(set(call_names)), (False, True)))
        crash_call, after = crash_points[(visit // len(simulations) + visit * len(simulations)) % len(crash_points)]
        call = rng.choice([number for number, name in enumerate(call_names, start=1) if name == crash_call])
        yield simulation, scenario, CrashPoint(call, after)


def _record_calls(simulation: Simulation, scenario: Scenario) -> list[str]:
    """The names of the calls that the scenario makes without a crash."""
    Round(simulation, scenario, CrashPoint(call=0, after=False), -1, Counts(), crashes=0).run()
    return list(simulation.process.call_names)


class Round:
    """One job and its counts."""

    def __init__(
        self,
        simulation: Simulation,
        scenario: Scenario,
        crash_point: CrashPoint,
        number: int,
        counts: Counts,
        crashes: int = MAX_EXTRA_CRASHES,
    ) -> None:
        self._simulation = simulation
        self._scenario = scenario
        self._counts = counts
        self._rng = random.Random(number)
        self._crashes_left = self._rng.randint(0, crashes)
        self._job_id = ""
        self._request_answered = not scenario.request
        self._unknown: Counter[str] = Counter()
        self._had_concurrent_executions = False
        self._key = f"{scenario.name} {number}"
        simulation.rng.seed(number)
        simulation.interleaves = True
        simulation.choose_behavior = self._choose_behavior
        simulation.launcher.loses_responses = scenario.loses_responses
        simulation.after_reconcile = self._check_executions
        simulation.next_process = self._next_process
        simulation.crash_points.clear()
        simulation.process.crash_at_call, simulation.process.crash_after_call = crash_point.call, crash_point.after
        simulation.process.calls = 0
        simulation.process.call_names.clear()

    def run(self) -> None:
        """Submit the job, run the scenario and count."""
        simulation = self._simulation
        before = len(simulation.launcher.executions)
        self._job_id = simulation.submit(self._key, hf_token="hf_x").job_id
        if self._scenario.request:
            simulation.timeline.start(self._send_requests())
        simulation.timeline.run_until(lambda: self._is_over(before), MAX_ROUND_S)
        simulation.timeline.run_until(lambda: False, 2 * simulation.deployment.interval_s)  # nothing may start again
        self._update_counts(simulation.launcher.executions[before:])

    def _is_over(self, before: int) -> bool:
        simulation = self._simulation
        return (self._request_answered and simulation.is_settled(self._job_id)) or len(
            simulation.launcher.executions
        ) > before + MAX_EXECUTIONS

    def _choose_behavior(self, execution: Execution) -> AttemptBehavior:
        """Called when an execution starts."""
        # An execution whose result is stored ends by itself.
        working = [other for other in self._simulation.live_executions(execution.job_id) if not other.result_written]
        self._had_concurrent_executions |= len(working) > 1
        behaviors = self._scenario.behaviors
        return behaviors[min(execution.number, len(behaviors)) - 1]

    def _next_process(self) -> ServiceProcess:
        """Make the next process of the service crash as well, at most a few times."""
        if self._crashes_left == 0:
            return ServiceProcess()
        self._crashes_left -= 1
        after = self._rng.random() < 0.5
        if self._rng.random() < 0.5:
            return ServiceProcess(crash_at_call=self._rng.randint(1, 25), crash_after_call=after)
        return ServiceProcess(crash_on=self._rng.choice(CRASH_CALLS), crash_after_call=after)

    def _send_requests(self) -> SimulatedProcess:
        """Send the request after a while and repeat it until there is an answer; resume after a pause."""
        yield self._rng.choice((0.05, self._rng.uniform(0, 2), self._rng.uniform(0, 4 * self._simulation.deployment.report_interval_s)))
        yield from self._simulation.retry_on_timeline(
            lambda jobs: (
                jobs.control.cancel(PRINCIPAL, self._job_id)
                if self._scenario.request == "cancel"
                else jobs.control.pause(PRINCIPAL, self._job_id)
            )
        )
        if self._scenario.request == "pause":
            while self._simulation.record(self._job_id).status in (Status.PREPARING, Status.TRAINING, Status.PAUSING):
                yield 1.0
            yield from self._simulation.retry_on_timeline(lambda jobs: jobs.control.resume(PRINCIPAL, self._job_id, NO_CHANGES))
        self._request_answered = True

    def _check_executions(self, started_at_s: float) -> None:
        """After a reconcile, find executions that the record does not know or that belong to finished attempts."""
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
        counts, job = self._counts, self._simulation.record(self._job_id)
        counts.executions += len(executions)
        counts.crashes.update(self._simulation.crash_points)
        counts.concurrent_executions += self._had_concurrent_executions
        owners = Counter(execution.number for execution in executions if execution.has_claim)
        counts.double_claims += sum(number > 1 for number in owners.values())
        counts.lost += not self._request_answered or job.status not in self._scenario.expected_statuses
        counts.orphans += len(self._simulation.live_executions(self._job_id))
        counts.max_unknown_reconciles = max(counts.max_unknown_reconciles, *self._unknown.values(), 0)
        deployment = self._simulation.deployment.name
        for attempt in job.attempts:
            started_at_s = [execution.started_at_s for execution in executions if execution.handle == attempt.handle]
            if started_at_s and attempt.launched_at:
                counts.oldest_orphan_s[deployment] = max(
                    counts.oldest_orphan_s.get(deployment, 0.0), to_timeline_s(attempt.launched_at) - started_at_s[0]
                )
