"""The service's clock jumps back and forth by up to ten minutes, and the attempts' clocks are wrong by as much.

An attempt that reports is never doubted for long, let alone ended; its token works, and so does a link that was given before a jump.
One that has really gone is noticed all the same, a bounded time after the last jump.
"""

import random
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta

from schema.job import Status
from service.core.errors import Unauthorized
from tests.chaos.campaign import Row, Size
from tests.chaos.core_world import CLOUD, LAPTOP, Course, Execution, Place, Sleeps, World, a_world

ROUNDS: dict[Size, int] = {"full": 20, "short": 3}  # on each kind of place
OFF_S = 600.0
REPORT_EVERY_S = 15.0
TRAINS_S = 3600.0  # simulated
LONGEST_PAUSE_S = 900.0  # between two jumps; the shortest is as long as it takes to report twice
FOR_EVER_S = 1e6
LINK_S = 900  # how long a link is given for, by default
PLACES = (replace(LAPTOP, report_every_s=REPORT_EVERY_S), CLOUD)
JUMPS_S = (-OFF_S, -OFF_S / 2, OFF_S / 2, OFF_S)


@dataclass
class Count:
    """What was found."""

    jumps: int = 0
    reports: int = 0
    relaunched: int = 0
    fenced: int = 0
    cancels: int = 0  # attempts that the compute was told to end
    refused_tokens: int = 0
    refused_links: int = 0
    other_end: int = 0
    unnoticed: int = 0  # attempts that had gone, and of which that was not known within the bound
    noticed_s: dict[str, float] = field(default_factory=dict[str, float])  # after the last jump at most

    @property
    def good(self) -> bool:
        bad = (self.relaunched, self.fenced, self.cancels, self.refused_tokens, self.refused_links, self.other_end, self.unnoticed)
        return not any(bad) and self.reports > 0


def run(size: Size) -> Row:
    """Rounds in which the attempt is well, then as many in which it goes, on a laptop and in the cloud."""
    count = Count()
    with ExitStack() as stack:
        for seed, place in enumerate(PLACES):
            world = stack.enter_context(a_world(place, "SQLite", seed))
            for number in range(ROUNDS[size]):
                Round(world, number, count).stays_well()
            for number in range(ROUNDS[size]):
                Round(world, ROUNDS[size] + number, count).goes(silently=number % 2 == 0)
    noticed = ", ".join(f"{seconds:.0f} s ({what})" for what, seconds in sorted(count.noticed_s.items()))
    return Row(
        fault="clocks wrong by ±10 min",
        injected=f"{count.jumps:,} jumps of the service's clock over {count.reports:,} reports of attempts whose own are off as well",
        wanted="leases judged by the service's clock, no early fencing",
        found=f"{count.relaunched} relaunches, {count.fenced} reports fenced, {count.cancels} well attempts ended, {count.refused_tokens} "
        f"tokens and {count.refused_links} links refused, {count.other_end} other ends; {count.unnoticed} ends of attempts not noticed, "
        f"the others within {noticed} of the last jump",
        passed=count.good,
    )


def bound_s(place: Place, *, silently: bool) -> float:
    """Until when the end of an attempt is noticed: its last sign may have been noted ten minutes in the future."""
    limits, turns_s = place.limits, 3 * place.interval_s
    to_ask = timedelta() if place.check_is_cheap and not silently else limits.silent_after
    lease = limits.lease + limits.lease_grace if silently else timedelta()
    both_wrong = 2 * OFF_S if silently else OFF_S  # the last sign, and the doubt that follows it
    return (0.0 if place.check_is_cheap and not silently else both_wrong) + (to_ask + lease).total_seconds() + turns_s


class Round:
    """One job under a clock that jumps."""

    def __init__(self, world: World, number: int, count: Count) -> None:
        self._world = world
        self._count = count
        self._chance = random.Random(number)
        self._key = f"clock {number}"
        self._over = False
        self._job_id = ""
        self._last_jump_s = world.timeline.now_s
        world.chance.seed(number)
        world.interleaves = True
        world.after_turn = lambda _: None
        world.clock_off = timedelta()

    def stays_well(self) -> None:
        """It trains for an hour, reports, and ends as if every clock were right."""
        world, count = self._world, self._count
        cancels, fenced, before = world.compute.cancels, world.fenced, len(world.compute.executions)
        reports = int(TRAINS_S / REPORT_EVERY_S)
        self._begin(Course(reports=reports, clock_off=self._off()))
        world.timeline.run(lambda: world.settled(self._job_id), 2 * TRAINS_S)
        self._over = True
        count.reports += reports
        count.relaunched += len(world.compute.executions) - before - 1
        count.cancels += world.compute.cancels - cancels
        count.fenced += world.fenced - fenced
        count.other_end += world.record(self._job_id).status is not Status.COMPLETED
        world.timeline.run(lambda: False, LONGEST_PAUSE_S)  # the last jumper goes home

    def goes(self, *, silently: bool) -> None:
        """It reports for a while and is gone; `silently`: its compute goes on to say that it runs."""
        world, count = self._world, self._count
        reports = self._chance.randint(4, 120)
        gone_at: list[float] = []

        def gone() -> float:
            gone_at.append(world.timeline.now_s)
            return FOR_EVER_S if silently else 0.0

        self._begin(Course(reports=reports, clock_off=self._off(), dies_before="result", at_the_end=gone))
        world.timeline.run(lambda: bool(gone_at), TRAINS_S)
        self._over = True
        if not gone_at:
            count.relaunched += 1  # it was given up before it went
            return
        since_s = max(gone_at[0], self._last_jump_s)
        bound = bound_s(world.place, silently=silently)
        noticed = world.timeline.run(lambda: world.record(self._job_id).attempts[0].outcome == "lost", bound)
        count.unnoticed += not noticed
        what = f"{world.place.name}, {'said to run' if silently else 'ended'}"
        count.noticed_s[what] = max(count.noticed_s.get(what, 0.0), world.timeline.now_s - since_s)
        world.timeline.run(lambda: world.settled(self._job_id), 2 * TRAINS_S)

    def _begin(self, first: Course) -> None:
        world = self._world
        world.course = lambda execution: self._watched(execution, first)
        self._job_id = world.submit(self._key).job_id
        world.timeline.start(self._jumps())

    def _watched(self, execution: Execution, first: Course) -> Course:
        return first if execution.number == 1 else Course()

    def _jumps(self) -> Sleeps:
        """Anywhere within ten minutes of the right time; before each jump a link is given, and after it used."""
        world = self._world
        while True:
            yield self._chance.uniform(2 * REPORT_EVERY_S, self._chance.choice((60.0, LONGEST_PAUSE_S)))
            if self._over:
                return
            link = world.tokens.file_token("a/key", "file", LINK_S)
            off_s = world.clock_off.total_seconds() + self._chance.choice(JUMPS_S) * self._chance.choice((1.0, self._chance.random()))
            world.clock_off = timedelta(seconds=min(OFF_S, max(-OFF_S, off_s)))
            self._last_jump_s = world.timeline.now_s
            self._count.jumps += 1
            self._try_tokens(link)

    def _try_tokens(self, link: str) -> None:
        world = self._world
        try:
            world.tokens.read_file_token(link)
        except Unauthorized:
            self._count.refused_links += 1
        for execution in world.live(self._job_id):
            try:
                world.tokens.check_attempt(execution.order.environment["JOB_TOKEN"], execution.job_id, execution.number)
            except Unauthorized:
                self._count.refused_tokens += 1

    def _off(self) -> timedelta:
        return timedelta(seconds=self._chance.choice((-OFF_S, OFF_S, self._chance.uniform(-OFF_S, OFF_S))))
