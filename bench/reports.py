"""B5: 50 jobs that report 10 metric points a second each for 20 seconds, through the endpoint that attempts use.

Twice: in batches every half second, as attempts on the service's machine report, and point by point, which is harder.
"""

import asyncio
import random
import time
from dataclasses import dataclass

from bench.attempts import HeldAttempt, hold_attempts, stored_steps
from bench.figures import Figure, at_most, exactly
from bench.http import Connection, Load
from bench.scene import Scene
from bench.servers import Server, service
from bench.standin import stand_in_trainer

NAME = "reports"
JOBS = 50
POINTS_PER_S = 10
SECONDS = 20
EVENTS_BEFORE = 1  # hold_attempts reported that training began


@dataclass(frozen=True)
class Rhythm:
    """How a job reports its points."""

    words: str
    batch: int


RHYTHMS = (Rhythm("batches of 5", 5), Rhythm("point by point", 1))


async def measure(scene: Scene) -> list[Figure]:
    """Latency of a report, and whether everything reported can be read back, in order and once."""
    figures: list[Figure] = []
    for rhythm in RHYTHMS:
        trainer = stand_in_trainer(scene.folder / "trainer")
        async with service(scene.folder / f"home-{rhythm.batch}", trainer, slots=JOBS) as server:
            held = await hold_attempts(server, JOBS)
            cpu_s, began = server.cpu_s(), time.perf_counter()
            done = await _report_all(server, held, rhythm)
            share = (server.cpu_s() - cpu_s) / (time.perf_counter() - began)
            lost = [await _wrong(server, attempt) for attempt in held]
        figures += [
            Figure(NAME, f"{rhythm.words}: p99", done.milliseconds(99), "ms", at_most(50), f"p50 {done.milliseconds(50):.1f} ms"),
            Figure(NAME, f"{rhythm.words}: points lost, doubled or out of order", sum(lost), "", exactly(0), f"of {JOBS * _points():,}"),
            Figure(NAME, f"{rhythm.words}: reports refused", done.refused.total(), "", exactly(0)),
            Figure(
                NAME,
                f"{rhythm.words}: processor of the service",
                share * 100,
                "%",
                note=f"{len(done.latencies_s) / done.took_s:.0f} reports/s",
            ),
        ]
    return figures


async def _report_all(server: Server, held: list[HeldAttempt], rhythm: Rhythm) -> Load:
    done = Load()
    began = time.perf_counter()
    await asyncio.gather(*(_report_one(server, attempt, rhythm, done) for attempt in held))
    done.took_s = time.perf_counter() - began
    return done


async def _report_one(server: Server, attempt: HeldAttempt, rhythm: Rhythm, done: Load) -> None:
    """A job's reports at their own times, each counted from when it was due: a late one is not excused by the one before."""
    connection = Connection(server.url)
    interval_s = rhythm.batch / POINTS_PER_S
    first_due = time.perf_counter() + random.Random(attempt.job_id).uniform(0, interval_s)  # jobs do not report in step
    for number in range(_points() // rhythm.batch):
        due = first_due + number * interval_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        first = number * rhythm.batch
        answer = await connection.send(attempt.report(EVENTS_BEFORE + first, range(first, first + rhythm.batch)))
        if answer.ok:
            done.latencies_s.append(time.perf_counter() - due)
        else:
            done.refused[str(answer.status)] += 1
    connection.close()


async def _wrong(server: Server, attempt: HeldAttempt) -> int:
    steps = [step for _, step in await stored_steps(server, attempt.job_id)]
    expected = list(range(_points()))
    return 0 if steps == expected else max(1, len(set(expected) ^ set(steps)) + len(steps) - len(set(steps)))


def _points() -> int:
    return POINTS_PER_S * SECONDS
