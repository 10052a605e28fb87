"""The launcher does not know the state of its executions; unknown must not count as failed.

During an outage its status calls return "unknown" or fail, and it accepts no cancel. Meanwhile the job is healthy, ends, is canceled,
paused or launched; in one scenario the attempt really dies. A service that treats silence as failure would restart healthy jobs.
"""

import random
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from schema.job import Status
from tests.chaos.campaign import Row, Size
from tests.chaos.simulation import CLOUD, LAPTOP, PRINCIPAL, AttemptBehavior, SimulatedProcess, Simulation, open_simulation

OUTAGES: dict[Size, int] = {"full": 60, "short": 20}  # for each deployment
MAX_OUTAGE_S = 120.0
MAX_JOB_S = 2 * 3600.0  # simulated, for one job
ENDLESS_TRAINING_S = 3600.0  # no round waits for the end of such an attempt


DEFAULT_BEHAVIOR = AttemptBehavior()


@dataclass(frozen=True)
class Scenario:
    """What happens during an outage."""

    name: str
    expected_status: Status = Status.COMPLETED
    executions: int = 1  # launches that the job needs
    behavior: AttemptBehavior = DEFAULT_BEHAVIOR
    outage_starts: str = "while it trains"  # or "at the launch", "at the end"
    request: str = ""  # a request that a client sends during the outage
    training_s: float = 330.0  # longer than the outage and the silence around it
    reports_lost: bool = False  # the attempt's reports are lost as well, from before the outage until after it


SCENARIOS = (
    Scenario("healthy"),
    Scenario("healthy, reports lost", reports_lost=True),
    Scenario("ends", outage_starts="at the end"),
    Scenario("ends, result not received", outage_starts="at the end", behavior=AttemptBehavior(result_not_received=True)),
    Scenario("is launched", outage_starts="at the launch"),
    Scenario("is launched, starts late", outage_starts="at the launch", behavior=AttemptBehavior(start_delay_s=MAX_OUTAGE_S)),
    Scenario("is cancelled", Status.CANCELLED, request="cancel", training_s=ENDLESS_TRAINING_S),
    Scenario("is cancelled, reports lost", Status.CANCELLED, request="cancel", training_s=ENDLESS_TRAINING_S, reports_lost=True),
    Scenario(
        "is cancelled, ignores it",
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
    """What was counted over all rounds."""

    refused: int = 0  # calls of the launcher that failed
    relaunched: int = 0  # executions beyond those that a job needed
    too_early: int = 0  # executions that started while the state of the previous one was unknown
    overwritten: int = 0  # final jobs whose status changed later
    wrong_status: int = 0
    ignored_requests: int = 0  # cancels and pauses without effect
    failures: list[str] = field(default_factory=list[str])

    @property
    def passed(self) -> bool:
        return not self.failures


def run(size: Size) -> Row:
    """Run every scenario on a laptop, which polls the launcher constantly, and in the cloud, which polls it only for silent attempts."""
    counts = Counts()
    with ExitStack() as stack:
        simulations = [stack.enter_context(open_simulation(deployment, "SQLite", seed)) for seed, deployment in enumerate((LAPTOP, CLOUD))]
        for simulation in simulations:
            for number in range(OUTAGES[size]):
                Round(simulation, SCENARIOS[number % len(SCENARIOS)], number, counts).run()
    lost = f"{counts.ignored_requests} cancels or pauses not carried out, {counts.wrong_status} jobs ended differently"
    return Row(
        fault="the launcher's status API unreachable",
        injected=f"{OUTAGES[size]} times for 1 to {MAX_OUTAGE_S:.0f} s (simulated) in each deployment, "
        f"in {len(SCENARIOS)} scenarios; {counts.refused:,} of its calls not answered",
        expected="0 relaunches, no finished job overwritten, no cancel lost",
        observed=f"{counts.relaunched} relaunches, {counts.too_early} attempts started while the state of the previous one was unknown, "
        f"{counts.overwritten} finished jobs overwritten, {lost}" + "; ".join(["", *counts.failures][:3]),
        passed=counts.passed,
    )


class Round:
    """One job and one outage."""

    def __init__(self, simulation: Simulation, scenario: Scenario, number: int, counts: Counts) -> None:
        self._simulation = simulation
        self._scenario = scenario
        self._counts = counts
        self._rng = random.Random(number)
        self._outage_s = self._rng.uniform(1.0, MAX_OUTAGE_S)
        self._key = f"{scenario.name} {number}"
        self._job_id = ""
        self._is_over = False
        self._final_state: tuple[Status, int] | None = None
        self._overwritten = self._too_early = False
        simulation.rng.seed(number)
        simulation.interleaves = True
        simulation.choose_behavior = lambda execution: self._choose_behavior(execution.number)
        simulation.after_reconcile = lambda _: self._check_final_status()

    def run(self) -> None:
        """Submit the job, run the outage and count."""
        simulation, before = self._simulation, len(self._simulation.launcher.executions)
        self._refused_before = simulation.launcher.refused_calls
        if self._scenario.outage_starts == "at the launch":
            simulation.launcher.loses_responses = True
            simulation.timeline.start(self._run_outage())
        self._job_id = simulation.submit(self._key).job_id
        if self._scenario.outage_starts == "while it trains":
            simulation.timeline.start(self._run_outage_during_training())
        simulation.timeline.run_until(self._is_settled, MAX_JOB_S)
        simulation.timeline.run_until(lambda: False, 10 * simulation.deployment.interval_s)  # the job must not change afterwards
        self._check_final_status()
        self._update_counts(len(simulation.launcher.executions) - before)

    def _choose_behavior(self, number: int) -> AttemptBehavior:
        """Called when an execution starts."""
        if number > 1:
            self._too_early |= self._simulation.launcher.is_unavailable
            return AttemptBehavior()
        if self._scenario.outage_starts == "while it trains":
            return replace(self._scenario.behavior, reports=int(self._scenario.training_s / self._simulation.deployment.report_interval_s))
        if self._scenario.outage_starts == "at the end":
            return replace(self._scenario.behavior, before_result=self._start_outage)
        return self._scenario.behavior

    def _start_outage(self) -> float:
        """Start the outage; the attempt ends some time later during it."""
        self._simulation.timeline.start(self._run_outage())
        return self._rng.uniform(0, self._outage_s)

    def _run_outage_during_training(self) -> SimulatedProcess:
        """With lost reports, silence starts before the outage, so that the cloud polls the launcher as well."""
        simulation = self._simulation
        yield self._rng.uniform(3.0, 6 * simulation.deployment.report_interval_s)
        if self._scenario.reports_lost:
            simulation.attempts_cut_off = True
            yield simulation.deployment.limits.heartbeat_timeout.total_seconds() + self._rng.uniform(0, 10.0)
        yield from self._run_outage()
        if self._scenario.reports_lost:
            yield self._rng.uniform(0, 10.0)
            simulation.attempts_cut_off = False

    def _run_outage(self) -> SimulatedProcess:
        simulation = self._simulation
        simulation.launcher.is_unavailable = True
        request_after_s = self._rng.uniform(0, self._outage_s)
        yield request_after_s
        if self._scenario.request:
            simulation.timeline.start(self._send_request())
        yield self._outage_s - request_after_s
        simulation.launcher.is_unavailable = simulation.launcher.loses_responses = False
        self._is_over = True

    def _send_request(self) -> SimulatedProcess:
        job_id, cancels = self._job_id, self._scenario.request == "cancel"
        yield from self._simulation.retry_on_timeline(
            lambda jobs: jobs.control.cancel(PRINCIPAL, job_id) if cancels else jobs.control.pause(PRINCIPAL, job_id)
        )

    def _is_settled(self) -> bool:
        status = self._simulation.record(self._job_id).status
        return self._is_over and (status.is_final or status is Status.PAUSED) and not self._simulation.live_executions(self._job_id)

    def _check_final_status(self) -> None:
        """After every reconcile, a final status must be unchanged."""
        job = self._simulation.store.find_job(self._job_id)
        if job is None:
            return
        state = (job.status, len(job.attempts))
        if self._final_state is not None and state != self._final_state:
            self._overwritten = True
        if job.status.is_final:
            self._final_state = state

    def _update_counts(self, executions: int) -> None:
        counts, simulation, scenario = self._counts, self._simulation, self._scenario
        job = simulation.record(self._job_id)
        counts.refused += simulation.launcher.refused_calls - self._refused_before
        wrong = job.status is not scenario.expected_status or bool(simulation.live_executions(self._job_id))
        counts.relaunched += executions > scenario.executions
        counts.too_early += self._too_early
        counts.overwritten += self._overwritten
        counts.ignored_requests += wrong and bool(scenario.request)
        counts.wrong_status += wrong and not scenario.request
        if wrong or executions > scenario.executions or self._too_early or self._overwritten:
            counts.failures.append(f"{simulation.deployment.name}, {scenario.name}: {job.status} after {executions} executions")
