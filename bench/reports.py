"""B5: 50 jobs that report 10 metric points a second each for 20 seconds, through the endpoint that attempts use.

Twice: in batches every half second, as attempts on the service's machine report, and point by point, which is harder.
"""

import asyncio
import random
import time
from dataclasses import dataclass

from bench.attempts import ClaimedAttempt, claim_attempts, load_stored_steps
from bench.figures import Measurement, at_most, exactly
from bench.http import Connection, LoadResult
from bench.scene import BenchmarkContext
from bench.servers import Server, run_service
from bench.standin import make_stub_trainer

NAME = "reports"
JOBS = 50
POINTS_PER_S = 10
SECONDS = 20
SETUP_EVENTS = 1  # hold_attempts reported that training began


@dataclass(frozen=True)
class ReportSchedule:
    """How a job reports its points."""

    label: str
    batch_size: int


SCHEDULES = (ReportSchedule("batches of 5", 5), ReportSchedule("point by point", 1))


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Latency of a report, and whether everything reported can be read back, in order and once."""
    figures: list[Measurement] = []
    for rhythm in SCHEDULES:
        trainer = make_stub_trainer(context.folder / "trainer")
        async with run_service(context.folder / f"home-{rhythm.batch_size}", trainer, slots=JOBS) as server:
            held = await claim_attempts(server, JOBS)
            cpu_s, began = server.cpu_s(), time.perf_counter()
            done = await _report_all(server, held, rhythm)
            share = (server.cpu_s() - cpu_s) / (time.perf_counter() - began)
            lost = [await _count_wrong_points(server, attempt) for attempt in held]
        figures += [
            Measurement(NAME, f"{rhythm.label}: p99", done.latency_ms(99), "ms", at_most(50), f"p50 {done.latency_ms(50):.1f} ms"),
            Measurement(
                NAME, f"{rhythm.label}: points lost, doubled or out of order", sum(lost), "", exactly(0), f"of {JOBS * _points_per_job():,}"
            ),
            Measurement(NAME, f"{rhythm.label}: reports refused", done.rejected.total(), "", exactly(0)),
            Measurement(
                NAME,
                f"{rhythm.label}: processor of the service",
                share * 100,
                "%",
                note=f"{len(done.latencies_s) / done.elapsed_s:.0f} reports/s",
            ),
        ]
    return figures


async def _report_all(server: Server, held: list[ClaimedAttempt], schedule: ReportSchedule) -> LoadResult:
    done = LoadResult()
    began = time.perf_counter()
    await asyncio.gather(*(_report_one(server, attempt, schedule, done) for attempt in held))
    done.elapsed_s = time.perf_counter() - began
    return done


async def _report_one(server: Server, attempt: ClaimedAttempt, schedule: ReportSchedule, done: LoadResult) -> None:
    """A job's reports at their own times, each counted from when it was due: a late one is not excused by the one before."""
    connection = Connection(server.url)
    interval_s = schedule.batch_size / POINTS_PER_S
    first_due = time.perf_counter() + random.Random(attempt.job_id).uniform(0, interval_s)  # jobs do not report in step
    for number in range(_points_per_job() // schedule.batch_size):
        due = first_due + number * interval_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        first = number * schedule.batch_size
        answer = await connection.send(attempt.build_report(SETUP_EVENTS + first, range(first, first + schedule.batch_size)))
        if answer.ok:
            done.latencies_s.append(time.perf_counter() - due)
        else:
            done.rejected[str(answer.status)] += 1
    connection.close()


async def _count_wrong_points(server: Server, attempt: ClaimedAttempt) -> int:
    steps = [step for _, step in await load_stored_steps(server, attempt.job_id)]
    expected = list(range(_points_per_job()))
    return 0 if steps == expected else max(1, len(set(expected) ^ set(steps)) + len(steps) - len(set(steps)))


def _points_per_job() -> int:
    return POINTS_PER_S * SECONDS
