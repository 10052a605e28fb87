"""One of two launchers is away or hangs while the other runs jobs; the jobs of the other must not notice.

*Away*, in simulated time: every call of the launcher fails, and some launches take effect all the same. *Hung*, with real threads: a call
of the launcher does not return, under the reconciler of a laptop and under the single reconcile that a scheduler requests. Jobs run on
either launcher, or list both and prefer the one that fails.
"""

import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product

from schema.job import Job, Status
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.core.jobs.queue import MAX_PREFERENCE_WAIT
from service.core.jobs.reconciler import Reconciler
from service.core.principals import UPKEEP_PRINCIPAL
from tests.chaos.campaign import Row, Size
from tests.chaos.simulation import (
    CLOUD,
    LAPTOP,
    LAUNCHER_NAMES,
    AttemptBehavior,
    Execution,
    SimulatedProcess,
    Simulation,
    in_memory_folder,
    open_simulation,
    without_warnings,
)
from tests.fakes import FakeLauncher
from tests.unit.jobs_harness import JobsHarness
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
        run_hang(number, counts)
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
        self._has_begun = False
        simulation.rng.seed(number)
        simulation.interleaves = True
        simulation.choose_behavior = self._choose_behavior

    def run(self) -> None:
        """Submit jobs before and during the outage, and count."""
        simulation, compute = self._simulation, self._simulation.launcher
        refused = compute.refused_calls
        before = [] if self._scenario == "at the launch" else self._submit_jobs("early", self._away)
        if before:  # the outage starts when all of them train
            simulation.timeline.run_until(
                lambda: all(simulation.record(job_id).status is Status.TRAINING for job_id in before), MAX_ROUND_S
            )
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
            completed = simulation.record(job_id).status is Status.COMPLETED and simulation.is_settled(job_id)
            self._counts.wrong_end += not completed or executions < needed  # fewer: the attempt that was to die did not

    def _submit_jobs(self, kind: str, *launchers: str) -> list[str]:
        hardware = [f"{name}/fake" for name in launchers]
        return [self._simulation.submit(f"{kind} {self._number} {job}", hardware=hardware).job_id for job in range(JOBS_EACH)]

    def _run_outage(self) -> SimulatedProcess:
        self._has_begun = True
        self._simulation.launcher.away.add(self._away)
        yield OUTAGE_S
        self._simulation.launcher.away.clear()

    def _choose_behavior(self, execution: Execution) -> AttemptBehavior:
        """Called when an execution starts."""
        self._too_early += execution.number > 1 and execution.launcher in self._simulation.launcher.away
        dies = self._scenario == "while its attempts die" and not self._has_begun
        return AttemptBehavior(dies_before="report") if dies else AttemptBehavior()

    def _count_slowest(self, seconds: float) -> None:
        name = self._simulation.deployment.name
        self._counts.slowest_s[name] = max(seconds, self._counts.slowest_s.get(name, 0.0))


# --- hung ------------------------------------------------------------------------------------------------------------


def run_hang(number: int, counts: Counts) -> None:
    """Jobs on both launchers while one hangs in its next call, at a launch or with an attempt that runs."""
    hung_index, has_reconciler, hangs_at_launch = list(product((0, 1), (True, False), (True, False)))[number % 8]
    launchers = [FakeLauncher(name) for name in LAUNCHER_NAMES]
    hung, other = launchers[hung_index], launchers[1 - hung_index]
    with in_memory_folder("chaos-hang-") as folder, without_warnings():
        store = SqliteJobStore(folder / "tunesmith.db")
        try:
            harness = JobsHarness(folder, launchers=launchers, store=store)
            Hang(harness, hung, other, counts).run(has_reconciler=has_reconciler, hangs_at_launch=hangs_at_launch)
        finally:
            store.close()


class Hang:
    """One call of a launcher that does not return until it is released."""

    def __init__(self, harness: JobsHarness, hung: FakeLauncher, other: FakeLauncher, counts: Counts) -> None:
        self._harness = harness
        self._hung = hung
        self._other = other
        self._counts = counts
        self._is_hanging, self._released = threading.Event(), threading.Event()

    def run(self, *, has_reconciler: bool, hangs_at_launch: bool) -> None:
        """Submit, hang, look at the other launcher's jobs, release and count."""
        harness = self._harness
        on_hung = [] if hangs_at_launch else self._submit_jobs(self._hung)
        harness.reconcile()
        self._hung.on_call = self._hang
        on_hung += self._submit_jobs(self._hung)
        on_other = self._submit_jobs(self._other)
        reconciler = Reconciler(self._reconcile_launcher, LAUNCHER_NAMES, interval_s=0.05)
        request = threading.Thread(target=harness.reconcile)  # a scheduler's, which waits for the launcher that hangs
        if has_reconciler:
            reconciler.start()
        else:
            request.start()
        on_both: list[Job] = []
        try:
            assert self._is_hanging.wait(MAX_HANG_WAIT_S), "the launcher was not called"
            self._counts.delayed += self._count_not_launched(on_other)
            on_both = self._submit_jobs(self._hung, self._other)
            if has_reconciler:  # one request has read the queue before these jobs were in it
                harness.clock.advance(MAX_PREFERENCE_WAIT.total_seconds())
                self._counts.delayed += self._count_not_launched(on_both)
            assert not self._released.is_set()
        finally:
            self._released.set()
            reconciler.stop()
            if not has_reconciler:
                request.join()
        harness.reconcile()
        self._complete_jobs([*on_hung, *on_other, *on_both])

    def _hang(self) -> None:
        self._is_hanging.set()
        self._released.wait()

    def _reconcile_launcher(self, name: str) -> int:
        return self._harness.jobs.reconciliation.reconcile_launcher(UPKEEP_PRINCIPAL, name)

    def _submit_jobs(self, *launchers: FakeLauncher) -> list[Job]:
        hardware = [f"{launcher.name}/fake" for launcher in launchers]
        return [self._harness.submit(hardware=hardware) for _ in range(JOBS_EACH)]

    def _count_not_launched(self, jobs: list[Job]) -> int:
        """How many of the jobs the other launcher does not start while the first one hangs."""
        ids = {job.job_id for job in jobs}
        try:
            wait_until(lambda: ids <= {request.job_id for request in list(self._other.launched.values())}, MAX_HANG_WAIT_S)
        except TimeoutError:
            return len(ids - {request.job_id for request in self._other.launched.values()})
        return 0

    def _complete_jobs(self, jobs: list[Job]) -> None:
        """Let every attempt report its result; each job has exactly one, on one launcher."""
        launches = Counter(request.job_id for launcher in (self._hung, self._other) for request in launcher.launched.values())
        for job in jobs:
            self._counts.relaunched += launches[job.job_id] > 1
            self._harness.claim(job, 1, "p")
            self._harness.finish(self._harness.write_result(job))
            self._counts.wrong_end += launches[job.job_id] == 0 or self._harness.find_job(job).status is not Status.COMPLETED
