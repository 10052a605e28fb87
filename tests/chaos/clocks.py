"""The service's clock jumps by up to ten minutes in both directions; the attempts' clocks are wrong by up to ten minutes.

An attempt that reports must never stay suspected or be ended; its token works, and so does a link that was issued before a jump.
An attempt that really ended must be noticed within a bounded time after the last jump.
"""

import random
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta

from schema.job import Status
from service.core.errors import Unauthorized
from tests.chaos.campaign import Row, Size
from tests.chaos.simulation import CLOUD, LAPTOP, AttemptBehavior, Deployment, Execution, SimulatedProcess, Simulation, open_simulation

ROUNDS: dict[Size, int] = {"full": 20, "short": 3}  # for each deployment
MAX_OFFSET_S = 600.0
REPORT_INTERVAL_S = 15.0
TRAINING_S = 3600.0  # simulated
MAX_JUMP_INTERVAL_S = 900.0  # between two jumps; the shortest interval covers two reports
HANG_S = 1e6
LINK_LIFETIME_S = 900  # the default lifetime of a link
DEPLOYMENTS = (replace(LAPTOP, report_interval_s=REPORT_INTERVAL_S), CLOUD)
JUMPS_S = (-MAX_OFFSET_S, -MAX_OFFSET_S / 2, MAX_OFFSET_S / 2, MAX_OFFSET_S)


@dataclass
class Counts:
    """What was counted over all rounds."""

    jumps: int = 0
    reports: int = 0
    relaunched: int = 0
    fenced: int = 0
    cancels: int = 0  # attempts that the launcher was asked to end
    refused_tokens: int = 0
    refused_links: int = 0
    wrong_status: int = 0
    unnoticed: int = 0  # lost attempts that were not noticed within the bound
    noticed_s: dict[str, float] = field(default_factory=dict[str, float])  # the longest time after the last jump

    @property
    def passed(self) -> bool:
        failures = (self.relaunched, self.fenced, self.cancels, self.refused_tokens, self.refused_links, self.wrong_status, self.unnoticed)
        return not any(failures) and self.reports > 0


def run(size: Size) -> Row:
    """Run rounds with a healthy attempt, then as many with a lost one, in each deployment."""
    counts = Counts()
    with ExitStack() as stack:
        for seed, deployment in enumerate(DEPLOYMENTS):
            simulation = stack.enter_context(open_simulation(deployment, "SQLite", seed))
            for number in range(ROUNDS[size]):
                Round(simulation, number, counts).run_healthy()
            for number in range(ROUNDS[size]):
                Round(simulation, ROUNDS[size] + number, counts).run_lost(silently=number % 2 == 0)
    noticed = ", ".join(f"{seconds:.0f} s ({kind})" for kind, seconds in sorted(counts.noticed_s.items()))
    return Row(
        fault="clocks wrong by ±10 min",
        injected=f"{counts.jumps:,} jumps of the service's clock over {counts.reports:,} reports of attempts whose clocks are also wrong",
        expected="leases judged by the service's clock, no early fencing",
        observed=f"{counts.relaunched} relaunches, {counts.fenced} reports fenced, {counts.cancels} attempts ended, "
        f"{counts.refused_tokens} tokens and {counts.refused_links} links refused, {counts.wrong_status} jobs ended differently; "
        f"{counts.unnoticed} lost attempts not noticed, the others within {noticed} of the last jump",
        passed=counts.passed,
    )


def detection_bound_s(deployment: Deployment, *, silently: bool) -> float:
    """Time after which a lost attempt must be noticed: its last report may be dated ten minutes in the future."""
    limits, reconciles_s = deployment.limits, 3 * deployment.interval_s
    until_checked = timedelta() if deployment.polling_is_free and not silently else limits.heartbeat_timeout
    lease = limits.lease + limits.lease_grace if silently else timedelta()
    clock_error_s = 2 * MAX_OFFSET_S if silently else MAX_OFFSET_S  # the time of the last report, and that of the suspicion
    return (0.0 if deployment.polling_is_free and not silently else clock_error_s) + (until_checked + lease).total_seconds() + reconciles_s


class Round:
    """One job under a clock that jumps."""

    def __init__(self, simulation: Simulation, number: int, counts: Counts) -> None:
        self._simulation = simulation
        self._counts = counts
        self._rng = random.Random(number)
        self._key = f"clock {number}"
        self._is_over = False
        self._job_id = ""
        self._last_jump_s = simulation.timeline.now_s
        simulation.rng.seed(number)
        simulation.interleaves = True
        simulation.after_reconcile = lambda _: None
        simulation.clock_offset = timedelta()

    def run_healthy(self) -> None:
        """Train for an hour and report; the job must end as if every clock were right."""
        simulation, counts = self._simulation, self._counts
        cancels, fenced, before = simulation.launcher.cancels, simulation.fenced, len(simulation.launcher.executions)
        reports = int(TRAINING_S / REPORT_INTERVAL_S)
        self._submit(AttemptBehavior(reports=reports, clock_offset=self._random_offset()))
        simulation.timeline.run_until(lambda: simulation.is_settled(self._job_id), 2 * TRAINING_S)
        self._is_over = True
        counts.reports += reports
        counts.relaunched += len(simulation.launcher.executions) - before - 1
        counts.cancels += simulation.launcher.cancels - cancels
        counts.fenced += simulation.fenced - fenced
        counts.wrong_status += simulation.record(self._job_id).status is not Status.COMPLETED
        simulation.timeline.run_until(lambda: False, MAX_JUMP_INTERVAL_S)  # let the last scheduled jump happen

    def run_lost(self, *, silently: bool) -> None:
        """Report for a while and disappear; with `silently`, the launcher keeps reporting that the attempt runs."""
        simulation, counts = self._simulation, self._counts
        reports = self._rng.randint(4, 120)
        disappeared_at_s: list[float] = []

        def disappear() -> float:
            disappeared_at_s.append(simulation.timeline.now_s)
            return HANG_S if silently else 0.0

        self._submit(AttemptBehavior(reports=reports, clock_offset=self._random_offset(), dies_before="result", before_result=disappear))
        simulation.timeline.run_until(lambda: bool(disappeared_at_s), TRAINING_S)
        self._is_over = True
        if not disappeared_at_s:
            counts.relaunched += 1  # the service gave it up while it still ran
            return
        since_s = max(disappeared_at_s[0], self._last_jump_s)
        bound = detection_bound_s(simulation.deployment, silently=silently)
        noticed = simulation.timeline.run_until(lambda: simulation.record(self._job_id).attempts[0].outcome == "lost", bound)
        counts.unnoticed += not noticed
        kind = f"{simulation.deployment.name}, {'reported as running' if silently else 'ended'}"
        counts.noticed_s[kind] = max(counts.noticed_s.get(kind, 0.0), simulation.timeline.now_s - since_s)
        simulation.timeline.run_until(lambda: simulation.is_settled(self._job_id), 2 * TRAINING_S)

    def _submit(self, first: AttemptBehavior) -> None:
        simulation = self._simulation
        simulation.choose_behavior = lambda execution: self._choose_behavior(execution, first)
        self._job_id = simulation.submit(self._key).job_id
        simulation.timeline.start(self._run_clock_jumps())

    def _choose_behavior(self, execution: Execution, first: AttemptBehavior) -> AttemptBehavior:
        return first if execution.number == 1 else AttemptBehavior()

    def _run_clock_jumps(self) -> SimulatedProcess:
        """Set the clock to any time within ten minutes of the right time; issue a link before each jump and use it afterwards."""
        simulation = self._simulation
        while True:
            yield self._rng.uniform(2 * REPORT_INTERVAL_S, self._rng.choice((60.0, MAX_JUMP_INTERVAL_S)))
            if self._is_over:
                return
            link = simulation.tokens.sign_file_token("a/key", "file", LINK_LIFETIME_S)
            offset_s = simulation.clock_offset.total_seconds() + self._rng.choice(JUMPS_S) * self._rng.choice((1.0, self._rng.random()))
            simulation.clock_offset = timedelta(seconds=min(MAX_OFFSET_S, max(-MAX_OFFSET_S, offset_s)))
            self._last_jump_s = simulation.timeline.now_s
            self._counts.jumps += 1
            self._check_tokens(link)

    def _check_tokens(self, link: str) -> None:
        simulation = self._simulation
        try:
            simulation.tokens.read_file_token(link)
        except Unauthorized:
            self._counts.refused_links += 1
        for execution in simulation.live_executions(self._job_id):
            try:
                simulation.tokens.verify_launch_token(execution.launch_request.variables["JOB_TOKEN"], execution.job_id, execution.number)
            except Unauthorized:
                self._counts.refused_tokens += 1

    def _random_offset(self) -> timedelta:
        return timedelta(seconds=self._rng.choice((-MAX_OFFSET_S, MAX_OFFSET_S, self._rng.uniform(-MAX_OFFSET_S, MAX_OFFSET_S))))
