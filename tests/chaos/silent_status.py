"""The compute does not say how its executions are: unknown is not failed.

For a while its status calls answer "unknown" or not at all, and it takes no cancel. The job is well, or ends, or is cancelled or paused,
or is just being launched meanwhile; once the attempt really dies. A peer took such silence for a failure and started well jobs again.
"""

import random
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from schema.job import Status
from tests.chaos.campaign import Row, Size
from tests.chaos.core_world import CLOUD, LAPTOP, TENANT, Course, Sleeps, World, a_world

OUTAGES: dict[Size, int] = {"full": 60, "short": 20}  # on each kind of place
LONGEST_S = 120.0
MOST_S = 2 * 3600.0  # simulated, for one job
LONG_S = 3600.0  # nobody waits for the end of such an attempt


AS_USUAL = Course()


@dataclass(frozen=True)
class Story:
    """What happens during an outage."""

    name: str
    ends: Status = Status.COMPLETED
    executions: int = 1  # launches that the job needs
    course: Course = AS_USUAL
    begins: str = "while it trains"  # or "at the launch", "at the end"
    asks: str = ""  # what a caller asks for meanwhile
    trains_s: float = 330.0  # if the outage comes meanwhile: longer than that, and the silence around it
    cut_off: bool = False  # the attempt's reports are lost as well, from before the outage until after it


STORIES = (
    Story("well"),
    Story("well, and silent", cut_off=True),
    Story("ends", begins="at the end"),
    Story("ends, and nobody hears it", begins="at the end", course=Course(loses_finish=True)),
    Story("is launched", begins="at the launch"),
    Story("is launched, and starts late", begins="at the launch", course=Course(starts_in_s=LONGEST_S)),
    Story("is cancelled", Status.CANCELLED, asks="cancel", trains_s=LONG_S),
    Story("is cancelled, and does not hear it", Status.CANCELLED, asks="cancel", trains_s=LONG_S, cut_off=True),
    Story("is cancelled, and does not listen", Status.CANCELLED, asks="cancel", trains_s=LONG_S, course=Course(is_deaf=True)),
    Story("is paused", Status.PAUSED, asks="pause", trains_s=LONG_S),
    Story("dies", executions=2, begins="at the end", course=Course(dies_before="result")),
)


@dataclass
class Count:
    """What was found."""

    refused: int = 0  # calls of the compute that were not answered
    relaunched: int = 0  # executions beyond those that a job needed
    too_early: int = 0  # executions that began while nobody could know how the one before was
    overwritten: int = 0  # ended jobs that were something else later
    other_end: int = 0
    not_obeyed: int = 0  # cancels and pauses that were not carried out
    bad: list[str] = field(default_factory=list[str])

    @property
    def good(self) -> bool:
        return not self.bad


def run(size: Size) -> Row:
    """Every story in turn, on a laptop, where the compute is asked all the time, and in the cloud, where it is asked about the silent."""
    count = Count()
    with ExitStack() as stack:
        worlds = [stack.enter_context(a_world(place, "SQLite", seed)) for seed, place in enumerate((LAPTOP, CLOUD))]
        for world in worlds:
            for number in range(OUTAGES[size]):
                Round(world, STORIES[number % len(STORIES)], number, count).play()
    lost = f"{count.not_obeyed} cancels or pauses not carried out, {count.other_end} other ends"
    return Row(
        fault="the compute's status API unreachable",
        injected=f"{OUTAGES[size]} times for 1 to {LONGEST_S:.0f} s (simulated) in a laptop's rhythm and as often in the cloud's, "
        f"in {len(STORIES)} stories; {count.refused:,} of its calls not answered",
        wanted="0 relaunches, no finished job overwritten, no cancel lost",
        found=f"{count.relaunched} relaunches, {count.too_early} attempts begun while nobody could know of the last one's end, "
        f"{count.overwritten} finished jobs overwritten, {lost}" + "; ".join(["", *count.bad][:3]),
        passed=count.good,
    )


class Round:
    """One job and one outage."""

    def __init__(self, world: World, story: Story, number: int, count: Count) -> None:
        self._world = world
        self._story = story
        self._count = count
        self._chance = random.Random(number)
        self._lasts_s = self._chance.uniform(1.0, LONGEST_S)
        self._key = f"{story.name} {number}"
        self._job_id = ""
        self._is_over = False
        self._end: tuple[Status, int] | None = None
        self._overwritten = self._too_early = False
        world.chance.seed(number)
        world.interleaves = True
        world.course = lambda execution: self._course(execution.number)
        world.after_turn = lambda _: self._look()

    def play(self) -> None:
        """Submit, let the outage come and go, and count."""
        world, before = self._world, len(self._world.compute.executions)
        self._refused_before = world.compute.refused_calls
        if self._story.begins == "at the launch":
            world.compute.loses_answers = True
            world.timeline.start(self._outage())
        self._job_id = world.submit(self._key).job_id
        if self._story.begins == "while it trains":
            world.timeline.start(self._while_it_trains())
        world.timeline.run(self._is_settled, MOST_S)
        world.timeline.run(lambda: False, 10 * world.place.interval_s)  # nothing is changed afterwards
        self._look()
        self._count_up(len(world.compute.executions) - before)

    def _course(self, number: int) -> Course:
        """Asked when an execution begins."""
        if number > 1:
            self._too_early |= self._world.compute.is_away
            return Course()
        if self._story.begins == "while it trains":
            return replace(self._story.course, reports=int(self._story.trains_s / self._world.place.report_every_s))
        if self._story.begins == "at the end":
            return replace(self._story.course, at_the_end=self._goes_away)
        return self._story.course

    def _goes_away(self) -> float:
        """The outage begins; the attempt ends some time later in it."""
        self._world.timeline.start(self._outage())
        return self._chance.uniform(0, self._lasts_s)

    def _while_it_trains(self) -> Sleeps:
        """Silence before it where the story says so, so that the compute is asked in the cloud as well."""
        world = self._world
        yield self._chance.uniform(3.0, 6 * world.place.report_every_s)
        if self._story.cut_off:
            world.cut_off = True
            yield world.place.limits.silent_after.total_seconds() + self._chance.uniform(0, 10.0)
        yield from self._outage()
        if self._story.cut_off:
            yield self._chance.uniform(0, 10.0)
            world.cut_off = False

    def _outage(self) -> Sleeps:
        world = self._world
        world.compute.is_away = True
        asked_after_s = self._chance.uniform(0, self._lasts_s)
        yield asked_after_s
        if self._story.asks:
            world.timeline.start(self._ask())
        yield self._lasts_s - asked_after_s
        world.compute.is_away = world.compute.loses_answers = False
        self._is_over = True

    def _ask(self) -> Sleeps:
        job_id, cancels = self._job_id, self._story.asks == "cancel"
        yield from self._world.insisting(lambda jobs: jobs.cancel(job_id, TENANT) if cancels else jobs.pause(job_id, TENANT))

    def _is_settled(self) -> bool:
        status = self._world.record(self._job_id).status
        return self._is_over and (status.is_final or status is Status.PAUSED) and not self._world.live(self._job_id)

    def _look(self) -> None:
        """After every reconcile: what has ended stays as it was."""
        job = self._world.store.find_job(self._job_id)
        if job is None:
            return
        now = (job.status, len(job.attempts))
        if self._end is not None and now != self._end:
            self._overwritten = True
        if job.status.is_final:
            self._end = now

    def _count_up(self, executions: int) -> None:
        count, world, story = self._count, self._world, self._story
        job = world.record(self._job_id)
        count.refused += world.compute.refused_calls - self._refused_before
        wrong = job.status is not story.ends or bool(world.live(self._job_id))
        count.relaunched += executions > story.executions
        count.too_early += self._too_early
        count.overwritten += self._overwritten
        count.not_obeyed += wrong and bool(story.asks)
        count.other_end += wrong and not story.asks
        if wrong or executions > story.executions or self._too_early or self._overwritten:
            count.bad.append(f"{world.place.name}, {story.name}: {job.status} after {executions} executions")
