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
from tests.chaos.core_world import CLOUD, LAPTOP, TENANT, Course, Execution, Life, Sleeps, World, a_world, seconds
from tests.factories import an_attempt

ROUNDS: dict[Size, int] = {"full": 500, "short": 40}
MOST_S = 3600.0  # simulated; a round takes some minutes
MOST_EXECUTIONS = 10  # a job that has had more will never end
MORE_CRASHES = 3  # at most, at random, while what the first one left is mended
MOST_TURNS_UNKNOWN = 2
# The calls by which a launch, and what may have to be mended of it, goes on.
STEPS = (
    *("store.replace_job", "configs.write", "launcher.launch", "launcher.find", "launcher.check", "launcher.cancel"),
    *("configs.read", "models.walk", "launcher.why_ended", "secrets.destroy"),
)
NO_CHANGES = ResumeRequest.model_validate({})


@dataclass(frozen=True)
class Story:
    """What happens in a round beside the crashes."""

    name: str
    courses: tuple[Course, ...] = (Course(),)  # of the attempts, in order; the last one for all that follow
    loses_answers: bool = False  # launches are carried out, and their answers lost
    asks: str = ""  # what a caller asks for after a while
    ends: frozenset[Status] = frozenset({Status.COMPLETED})


STORIES = (
    Story("a launch"),
    Story("its answer lost", loses_answers=True),
    Story("an attempt that dies", (Course(dies_before="report"), Course())),
    Story("one that dies before its claim", (Course(dies_before="claim"), Course())),
    Story("one whose last word is not heard", (Course(loses_finish=True),)),
    Story("one quicker than the answer to its launch", (Course(starts_in_s=0.0, reports=0),)),
    Story("one that starts late", (Course(starts_in_s=150.0),)),
    Story("one that starts late, the answer lost", (Course(starts_in_s=150.0),), loses_answers=True),
    Story("a cancel", (Course(reports=20),), asks="cancel", ends=frozenset({Status.CANCELLED, Status.COMPLETED})),
    Story("a cancel that is not listened to", (Course(reports=100, is_deaf=True),), asks="cancel", ends=frozenset({Status.CANCELLED})),
    Story("a pause and a resume", (Course(reports=20), Course()), asks="pause"),
)


@dataclass(frozen=True)
class Aim:
    """Where the first crash of a round is: at which call of the process that takes the job in, and on which side of it."""

    call: int
    after: bool


@dataclass
class Count:
    """What was found over all rounds."""

    crashes: Counter[str] = field(default_factory=Counter[str])
    crowded: int = 0  # jobs with two executions alive at once
    two_owners: int = 0  # attempts that two processes were given
    lost: int = 0  # jobs that did not end, or otherwise than they should
    left_over: int = 0  # executions alive after the end
    turns_unknown: int = 0  # reconciles at whose end an execution was not known that could have been found, the most of all
    age_s: dict[str, float] = field(default_factory=dict[str, float])
    executions: int = 0

    @property
    def good(self) -> bool:
        bad = self.crowded + self.two_owners + self.lost + self.left_over
        return bad == 0 and self.turns_unknown <= MOST_TURNS_UNKNOWN


def run(size: Size) -> Row:
    """The rounds, in turn on a laptop and in the cloud, on SQLite and in memory."""
    count = Count()
    kinds = list(product((LAPTOP, CLOUD), ("SQLite", "memory")))
    with ExitStack() as stack:
        worlds = [stack.enter_context(a_world(place, store, seed)) for seed, (place, store) in enumerate(kinds)]
        for number, (world, story, aim) in enumerate(_plan(worlds, ROUNDS[size])):
            Round(world, story, aim, number, count).play()
    oldest = ", ".join(f"{age_s:.0f} s ({name})" for name, age_s in sorted(count.age_s.items()))
    return Row(
        fault="launcher crash between its steps",
        injected=f"{ROUNDS[size]} rounds of {len(STORIES)} stories with {count.crashes.total():,} crashes, "
        f"on {len(count.crashes)} sides of {len({side.partition(' ')[2] for side in count.crashes})} calls of the stores and the compute",
        wanted="one live attempt per job, no orphan older than two reconciles",
        found=f"{count.crowded} jobs with two live attempts, {count.two_owners} attempts with two owners, {count.lost} jobs that did not "
        f"end as they should, {count.left_over} of {count.executions} executions left over; none unknown for more than "
        f"{count.turns_unknown} reconciles that could have found it, the oldest orphan {oldest}",
        passed=count.good,
    )


def _plan(worlds: list[World], rounds: int) -> Iterator[tuple[World, Story, Aim]]:
    """Every story as often as the others; the first crash in turn on every side of every kind of call that the story makes."""
    chance = random.Random(1)
    calls = {(story.name, id(world)): _calls_of(world, story) for story in STORIES for world in worlds}
    for visit, index in (divmod(number, len(STORIES)) for number in range(rounds)):
        story, world = STORIES[index], worlds[(visit + index) % len(worlds)]
        made = calls[story.name, id(world)]
        kinds = list(product(sorted(set(made)), (False, True)))
        kind, after = kinds[(visit // len(worlds) + visit * len(worlds)) % len(kinds)]
        place = chance.choice([place for place, name in enumerate(made, start=1) if name == kind])
        yield world, story, Aim(place, after)


def _calls_of(world: World, story: Story) -> list[str]:
    """The calls that the story makes when nothing crashes, by name."""
    Round(world, story, Aim(call=0, after=False), -1, Count(), crashes=0).play()
    return list(world.life.made)


class Round:
    """One job's life, and what is counted in it."""

    def __init__(self, world: World, story: Story, aim: Aim, number: int, count: Count, crashes: int = MORE_CRASHES) -> None:
        self._world = world
        self._story = story
        self._count = count
        self._chance = random.Random(number)
        self._more = self._chance.randint(0, crashes)
        self._job_id = ""
        self._answered = not story.asks
        self._unknown: Counter[str] = Counter()
        self._crowded = False
        self._key = f"{story.name} {number}"
        world.chance.seed(number)
        world.interleaves = True
        world.course = self._course
        world.compute.loses_answers = story.loses_answers
        world.after_turn = self._look
        world.next_life = self._next_life
        world.deaths.clear()
        world.life.dies_at, world.life.dies_after = aim.call, aim.after
        world.life.calls = 0
        world.life.made.clear()

    def play(self) -> None:
        """Submit, let things happen, and count."""
        world = self._world
        before = len(world.compute.executions)
        self._job_id = world.submit(self._key, hf_token="hf_x").job_id
        if self._story.asks:
            world.timeline.start(self._caller())
        world.timeline.run(lambda: self._is_over(before), MOST_S)
        world.timeline.run(lambda: False, 2 * world.place.interval_s)  # nothing begins again
        self._count_up(world.compute.executions[before:])

    def _is_over(self, before: int) -> bool:
        world = self._world
        return (self._answered and world.settled(self._job_id)) or len(world.compute.executions) > before + MOST_EXECUTIONS

    def _course(self, execution: Execution) -> Course:
        """Asked when an execution begins."""
        at_work = [other for other in self._world.live(execution.job_id) if not other.spoke]  # with its last word it ends by itself
        self._crowded |= len(at_work) > 1
        courses = self._story.courses
        return courses[min(execution.number, len(courses)) - 1]

    def _next_life(self) -> Life:
        """The next process of the service dies as well, for a while."""
        if self._more == 0:
            return Life()
        self._more -= 1
        after = self._chance.random() < 0.5
        if self._chance.random() < 0.5:
            return Life(dies_at=self._chance.randint(1, 25), dies_after=after)
        return Life(dies_on=self._chance.choice(STEPS), dies_after=after)

    def _caller(self) -> Sleeps:
        """Asks after a while, until there is an answer; a pause is followed by a resume."""
        yield self._chance.choice((0.05, self._chance.uniform(0, 2), self._chance.uniform(0, 4 * self._world.place.report_every_s)))
        yield from self._world.insisting(
            lambda jobs: jobs.cancel(self._job_id, TENANT) if self._story.asks == "cancel" else jobs.pause(self._job_id, TENANT)
        )
        if self._story.asks == "pause":
            while self._world.record(self._job_id).status in (Status.PREPARING, Status.TRAINING, Status.PAUSING):
                yield 1.0
            yield from self._world.insisting(lambda jobs: jobs.resume(self._job_id, TENANT, NO_CHANGES))
        self._answered = True

    def _look(self, began_s: float) -> None:
        """After a reconcile: what works although the record does not know of it, or has done with it?"""
        job = self._world.store.find_job(self._job_id)
        if job is None:
            return
        for execution in self._world.live(self._job_id):
            attempt = job.attempts[execution.number - 1] if execution.number <= len(job.attempts) else an_attempt()
            findable_at = (attempt.launch_began_at or attempt.created_at) + self._world.place.limits.launch_lookup
            known = attempt.handle == execution.handle and attempt.ended_at is None
            if not known and not execution.spoke and seconds(findable_at) <= began_s:
                self._unknown[execution.handle] += 1

    def _count_up(self, executions: list[Execution]) -> None:
        count, job = self._count, self._world.record(self._job_id)
        count.executions += len(executions)
        count.crashes.update(self._world.deaths)
        count.crowded += self._crowded
        owners = Counter(execution.number for execution in executions if execution.owner)
        count.two_owners += sum(number > 1 for number in owners.values())
        count.lost += not self._answered or job.status not in self._story.ends
        count.left_over += len(self._world.live(self._job_id))
        count.turns_unknown = max(count.turns_unknown, *self._unknown.values(), 0)
        place = self._world.place.name
        for attempt in job.attempts:
            begun = [execution.began_s for execution in executions if execution.handle == attempt.handle]
            if begun and attempt.launched_at:
                count.age_s[place] = max(count.age_s.get(place, 0.0), seconds(attempt.launched_at) - begun[0])
