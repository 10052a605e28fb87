"""One of two launchers is away or hangs while the other runs jobs; the jobs of the other must not notice.

*Away*, in simulated time: every call of the launcher fails, and some launches take effect all the same. *Hung*, with real threads: a call of
the launcher does not return, under the reconciler of a laptop and under the single reconcile that a scheduler requests. Jobs run on either
launcher, or list both and prefer the one that fails.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from schema.job import Job, Status
from schema.result import Result
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.adapters.links import ServiceUrlSigner
from service.adapters.secrets.local import LocalSecretStore
from service.core.jobs.assembly import JobServices, build_job_services
from service.core.jobs.queue import MAX_PREFERENCE_WAIT
from service.core.jobs.reconciler import Reconciler
from service.core.launchers import LauncherPool
from service.core.ports import Buckets
from service.core.principals import UPKEEP_PRINCIPAL, attempt_principal
from service.core.tokens import TokenSigner
from storage.registry import open_store
from tests.chaos.campaign import Row, Size
from tests.chaos.simulation import (
    CLOUD,
    LAPTOP,
    LAUNCHER_NAMES,
    PRINCIPAL,
    AttemptBehavior,
    Execution,
    SimulatedProcess,
    Simulation,
    in_memory_folder,
    open_simulation,
    without_warnings,
)
from tests.factories import START, make_dataset, make_train_request
from tests.fakes import FakeClock, FakeLauncher
from tests.waiting import wait_until

OUTAGES: dict[Size, int] = {"full": 48, "short": 12}  # for each deployment
HANGS: dict[Size, int] = {"full": 24, "short": 4}
JOBS_EACH = 3  # on the launcher that fails, on the other one, and on both
OUTAGE_S = 900.0  # simulated; three times the duration of a job in the cloud
MAX_ROUND_S = 2 * 3600.0  # simulated
MAX_HANG_WAIT_S = 10.0  # real; the jobs of the other launcher start within a fraction of a second
SCENARIOS = ("at the launch", "while it trains", "while its attempts die")


@dataclass
class Counts:
    """What was counted over all rounds."""

    refused: int = 0  # calls of the launcher that was away
    delayed: int = 0  # jobs of the other launcher that did not end, or start, during the outage
    relaunched: int = 0  # executions beyond those that a job needed
    too_early: int = 0  # executions that followed another whose launcher was away
    wrong_end: int = 0  # jobs that did not complete after the outage
    slowest_s: dict[str, float] = field(default_factory=dict[str, float])  # the slowest job of the other launcher, for each deployment

    @property
    def passed(self) -> bool:
        return not (self.delayed or self.relaunched or self.too_early or self.wrong_end)


def run(size: Size) -> Row:
    """Run the outages with the timing of a laptop and of the cloud, then the hangs."""
    counts = Counts()
    with ExitStack() as stack:
        simulations = [stack.enter_context(open_simulation(deployment, "SQLite", seed)) for seed, deployment in enumerate((LAPTOP, CLOUD))]
        for simulation in simulations:
            for number in range(OUTAGES[size]):
                Outage(simulation, number, counts).run()
    for number in range(HANGS[size]):
        _run_hang(number, counts)
    slowest = ", ".join(f"{seconds:.0f} s ({name})" for name, seconds in counts.slowest_s.items())
    return Row(
        fault="one launcher away or hung, the other not",
        injected=f"{OUTAGES[size]} times away for {OUTAGE_S:.0f} s (simulated) in each deployment, in {len(SCENARIOS)} scenarios, "
        f"{counts.refused:,} of its calls refused; {HANGS[size]} times hung in a call",
        expected="no job of the other launcher delayed; 0 relaunches; every job completes after the outage",
        observed=f"{counts.delayed} jobs of the other launcher delayed, the slowest took {slowest}; {counts.relaunched} relaunches, "
        f"{counts.too_early} attempts started while the state of the previous one was unknown, {counts.wrong_end} jobs ended differently",
        passed=counts.passed,
    )


# --- away ------------------------------------------------------------------------------------------------------------


class Outage:
    """Jobs on both launchers and one outage of one of them."""

    def __init__(self, simulation: Simulation, number: int, counts: Counts) -> None:
        self._simulation = simulation
        self._counts = counts
        self._number = number
        self._scenario = SCENARIOS[number % len(SCENARIOS)]
        self._away = LAUNCHER_NAMES[number // len(SCENARIOS) % 2]
        self._other = LAUNCHER_NAMES[1 - LAUNCHER_NAMES.index(self._away)]
        self._too_early = 0
        simulation.rng.seed(number)
        simulation.interleaves = True
        simulation.choose_behavior = self._choose_behavior

    def run(self) -> None:
        """Submit jobs before and during the outage, and count."""
        simulation, compute = self._simulation, self._simulation.launcher
        refused = compute.refused_calls
        before = [] if self._scenario == "at the launch" else self._submit_jobs("early", self._away)
        if before:  # the outage starts when all of them train
            simulation.timeline.run_until(lambda: all(simulation.record(job_id).status is Status.TRAINING for job_id in before), MAX_ROUND_S)
        began_s = simulation.timeline.now_s
        simulation.timeline.start(self._run_outage())
        late = self._submit_jobs("late", self._away)
        both = self._submit_jobs("both", self._away, self._other)
        other = self._submit_jobs("other", self._other)
        ended_in_time = simulation.timeline.run_until(lambda: all(map(simulation.is_settled, other)), OUTAGE_S / 2)
        assert compute.away, "the outage ended before the jobs of the other launcher did"
        self._count_slowest(simulation.timeline.now_s - began_s)
        self._counts.delayed += 0 if ended_in_time else sum(not simulation.is_settled(job_id) for job_id in other)
        jobs = [*before, *late, *both, *other]
        simulation.timeline.run_until(lambda: not compute.away and all(map(simulation.is_settled, jobs)), MAX_ROUND_S)
        simulation.timeline.run_until(lambda: False, 10 * simulation.deployment.interval_s)  # nothing may start again
        self._counts.refused += compute.refused_calls - refused
        self._counts.too_early += self._too_early
        for job_id in jobs:
            needed = 2 if job_id in before and self._scenario == "while its attempts die" else 1
            executions = sum(execution.job_id == job_id for execution in compute.executions)
            self._counts.relaunched += executions > needed
            self._counts.wrong_end += simulation.record(job_id).status is not Status.COMPLETED or not simulation.is_settled(job_id)

    def _submit_jobs(self, kind: str, *launchers: str) -> list[str]:
        hardware = [f"{name}/fake" for name in launchers]
        return [self._simulation.submit(f"{kind} {self._number} {job}", hardware=hardware).job_id for job in range(JOBS_EACH)]

    def _run_outage(self) -> SimulatedProcess:
        self._simulation.launcher.away.add(self._away)
        yield OUTAGE_S
        self._simulation.launcher.away.clear()

    def _choose_behavior(self, execution: Execution) -> AttemptBehavior:
        """Called when an execution starts. Attempts that are to die do so during the outage."""
        away = self._simulation.launcher.away
        self._too_early += execution.number > 1 and bool(away)
        dies = self._scenario == "while its attempts die" and execution.launcher == self._away and execution.number == 1 and not away
        is_early = dies and self._simulation.record(execution.job_id).launchers == (self._away,) and not self._outage_is_over(execution)
        return AttemptBehavior(dies_before="report") if is_early else AttemptBehavior()

    def _outage_is_over(self, execution: Execution) -> bool:
        return self._simulation.record(execution.job_id).idempotency_key != f"early {self._number}"

    def _count_slowest(self, seconds: float) -> None:
        name = self._simulation.deployment.name
        self._counts.slowest_s[name] = max(seconds, self._counts.slowest_s.get(name, 0.0))
