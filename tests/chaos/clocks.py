"""The service's clock jumps by up to ten minutes in both directions; the attempts' clocks are off by as much.

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
from tests.chaos.core_world import CLOUD, LAPTOP, AttemptBehavior, Deployment, Execution, SimulatedProcess, Simulation, open_simulation

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
        bad = (self.relaunched, self.fenced, self.cancels, self.refused_tokens, self.refused_links, self.wrong_status, self.unnoticed)
        return not any(bad) and self.reports > 0


def run(size: Size) -> Row:
    """Run rounds with a healthy attempt, then as many in which it is lost, for the laptop's and the cloud's deployment."""
    count = Counts()
    with ExitStack() as stack:
        for seed, place in enumerate(DEPLOYMENTS):
            world = stack.enter_context(open_simulation(place, "SQLite", seed))
            for number in range(ROUNDS[size]):
                Round(world, number, count).run_healthy()
            for number in range(ROUNDS[size]):
                Round(world, ROUNDS[size] + number, count).run_lost(silently=number % 2 == 0)
    noticed = ", ".join(f"{seconds:.0f} s ({what})" for what, seconds in sorted(count.noticed_s.items()))
    return Row(
        fault="clocks wrong by ±10 min",
        injected=f"{count.jumps:,} jumps of the service's clock over {count.reports:,} reports of attempts whose own are off as well",
        expected="leases judged by the service's clock, no early fencing",
        observed=f"{count.relaunched} relaunches, {count.fenced} reports fenced, {count.cancels} attempts ended, {count.refused_tokens} "
        f"tokens and {count.refused_links} links refused, {count.wrong_status} other ends; {count.unnoticed} ends of attempts not noticed, "
        f"the others within {noticed} of the last jump",
        passed=count.passed,
    )


def detection_bound_s(deployment: Deployment, *, silently: bool) -> float:
    """Time after which a lost attempt must be noticed: its last sign may be dated ten minutes in the future."""
    limits, turns_s = deployment.limits, 3 * deployment.interval_s
    to_ask = timedelta() if deployment.polling_is_free and not silently else limits.heartbeat_timeout
    lease = limits.lease + limits.lease_grace if silently else timedelta()
    both_wrong = 2 * MAX_OFFSET_S if silently else MAX_OFFSET_S  # the last sign, and the suspicion that follows it
    return (0.0 if deployment.polling_is_free and not silently else both_wrong) + (to_ask + lease).total_seconds() + turns_s


class Round:
    """One job under a clock that jumps."""

    def __init__(self, simulation: Simulation, number: int, count: Counts) -> None:
        self._simulation = simulation
        self._count = count
        self._chance = random.Random(number)
        self._key = f"clock {number}"
        self._over = False
        self._job_id = ""
        self._last_jump_s = simulation.timeline.now_s
        simulation.chance.seed(number)
        simulation.interleaves = True
        simulation.after_reconcile = lambda _: None
        simulation.clock_offset = timedelta()

    def run_healthy(self) -> None:
        """Train for an hour and report; the job must end as if every clock were right."""
        world, count = self._simulation, self._count
        cancels, fenced, before = world.compute.cancels, world.fenced, len(world.compute.executions)
        reports = int(TRAINING_S / REPORT_INTERVAL_S)
        self._submit(AttemptBehavior(reports=reports, clock_offset=self._random_offset()))
        world.timeline.run_until(lambda: world.is_settled(self._job_id), 2 * TRAINING_S)
        self._over = True
        count.reports += reports
        count.relaunched += len(world.compute.executions) - before - 1
        count.cancels += world.compute.cancels - cancels
        count.fenced += world.fenced - fenced
        count.wrong_status += world.record(self._job_id).status is not Status.COMPLETED
        world.timeline.run_until(lambda: False, MAX_JUMP_INTERVAL_S)  # let the last scheduled jump happen

    def run_lost(self, *, silently: bool) -> None:
        """Report for a while and disappear; with `silently`, the launcher keeps saying that the attempt runs."""
        world, count = self._simulation, self._count
        reports = self._chance.randint(4, 120)
        gone_at: list[float] = []

        def gone() -> float:
            gone_at.append(world.timeline.now_s)
            return HANG_S if silently else 0.0

        self._submit(AttemptBehavior(reports=reports, clock_offset=self._random_offset(), dies_before="result", before_result=gone))
        world.timeline.run_until(lambda: bool(gone_at), TRAINING_S)
        self._over = True
        if not gone_at:
            count.relaunched += 1  # it was given up while it still ran
            return
        since_s = max(gone_at[0], self._last_jump_s)
        bound = detection_bound_s(world.deployment, silently=silently)
        noticed = world.timeline.run_until(lambda: world.record(self._job_id).attempts[0].outcome == "lost", bound)
        count.unnoticed += not noticed
        what = f"{world.deployment.name}, {'said to run' if silently else 'ended'}"
        count.noticed_s[what] = max(count.noticed_s.get(what, 0.0), world.timeline.now_s - since_s)
        world.timeline.run_until(lambda: world.is_settled(self._job_id), 2 * TRAINING_S)

    def _submit(self, first: AttemptBehavior) -> None:
        world = self._simulation
        world.choose_behavior = lambda execution: self._choose_behavior(execution, first)
        self._job_id = world.submit(self._key).job_id
        world.timeline.start(self._run_clock_jumps())

    def _choose_behavior(self, execution: Execution, first: AttemptBehavior) -> AttemptBehavior:
        return first if execution.number == 1 else AttemptBehavior()

    def _run_clock_jumps(self) -> SimulatedProcess:
        """Set the clock to anywhere within ten minutes of the right time; issue a link before each jump and use it afterwards."""
        world = self._simulation
        while True:
            yield self._chance.uniform(2 * REPORT_INTERVAL_S, self._chance.choice((60.0, MAX_JUMP_INTERVAL_S)))
            if self._over:
                return
            link = world.tokens.sign_file_token("a/key", "file", LINK_LIFETIME_S)
            off_s = world.clock_offset.total_seconds() + self._chance.choice(JUMPS_S) * self._chance.choice((1.0, self._chance.random()))
            world.clock_offset = timedelta(seconds=min(MAX_OFFSET_S, max(-MAX_OFFSET_S, off_s)))
            self._last_jump_s = world.timeline.now_s
            self._count.jumps += 1
            self._check_tokens(link)

    def _check_tokens(self, link: str) -> None:
        world = self._simulation
        try:
            world.tokens.read_file_token(link)
        except Unauthorized:
            self._count.refused_links += 1
        for execution in world.live_executions(self._job_id):
            try:
                world.tokens.verify_attempt_token(execution.order.environment["JOB_TOKEN"], execution.job_id, execution.number)
            except Unauthorized:
                self._count.refused_tokens += 1

    def _random_offset(self) -> timedelta:
        return timedelta(seconds=self._chance.choice((-MAX_OFFSET_S, MAX_OFFSET_S, self._chance.uniform(-MAX_OFFSET_S, MAX_OFFSET_S))))
