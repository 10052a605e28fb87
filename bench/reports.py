"""B5: 50 jobs report 10 metric points a second each for 20 seconds, through the endpoint that attempts use.

They report in batches every half second, as attempts on the service's machine do, and then point by point, which costs more.
"""

import asyncio
import random
import time
from dataclasses import dataclass

from bench.attempts import ClaimedAttempt, claim_attempts, load_stored_steps
from bench.context import BenchmarkContext
from bench.figures import Measurement, at_most, exactly
from bench.http import Connection, LoadResult
from bench.servers import Server, run_service
from bench.stub_trainer import make_stub_trainer

NAME = "reports"
JOBS = 50
POINTS_PER_S = 10
SECONDS = 20
POINTS_PER_JOB = POINTS_PER_S * SECONDS
SETUP_EVENTS = 1  # claim_attempts reported the training phase


@dataclass(frozen=True)
class ReportSchedule:
    """How many points a job reports at a time."""

    label: str
    batch_size: int


SCHEDULES = (ReportSchedule("batches of 5", 5), ReportSchedule("point by point", 1))


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Measure the latency of reports, and count points that cannot be read back once and in order."""
    figures: list[Measurement] = []
    for schedule in SCHEDULES:
        trainer = make_stub_trainer(context.folder / "trainer")
        async with run_service(context.folder / f"home-{schedule.batch_size}", trainer, slots=JOBS) as server:
            attempts = await claim_attempts(server, JOBS)
            cpu_before_s, started_at = server.cpu_s(), time.perf_counter()
            load = await _report_all(server, attempts, schedule)
            cpu_share = (server.cpu_s() - cpu_before_s) / (time.perf_counter() - started_at)
            wrong = [await _count_wrong_points(server, attempt) for attempt in attempts]
        figures += [
            Measurement(NAME, f"{schedule.label}: p99", load.latency_ms(99), "ms", at_most(50), f"p50 {load.latency_ms(50):.1f} ms"),
            Measurement(
                NAME,
                f"{schedule.label}: points lost, duplicated or out of order",
                sum(wrong),
                "",
                exactly(0),
                f"of {JOBS * POINTS_PER_JOB:,}",
            ),
            Measurement(NAME, f"{schedule.label}: reports rejected", load.rejected.total(), "", exactly(0)),
            Measurement(
                NAME,
                f"{schedule.label}: CPU of the service",
                cpu_share * 100,
                "%",
                note=f"{load.requests_per_s:.0f} reports/s",
            ),
        ]
    return figures


async def _report_all(server: Server, attempts: list[ClaimedAttempt], schedule: ReportSchedule) -> LoadResult:
    load = LoadResult()
    started_at = time.perf_counter()
    await asyncio.gather(*(_report_one(server, attempt, schedule, load) for attempt in attempts))
    load.elapsed_s = time.perf_counter() - started_at
    return load


async def _report_one(server: Server, attempt: ClaimedAttempt, schedule: ReportSchedule, load: LoadResult) -> None:
    """Send a job's reports on schedule. Latency counts from when a report was due, so a slow response also counts against later reports."""
    connection = Connection(server.url)
    interval_s = schedule.batch_size / POINTS_PER_S
    first_due_at = time.perf_counter() + random.Random(attempt.job_id).uniform(
        0, interval_s
    )  # so that jobs do not report at the same moments
    for number in range(POINTS_PER_JOB // schedule.batch_size):
        due_at = first_due_at + number * interval_s
        await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
        first = number * schedule.batch_size
        response = await connection.send(attempt.build_report(SETUP_EVENTS + first, range(first, first + schedule.batch_size)))
        if response.ok:
            load.latencies_s.append(time.perf_counter() - due_at)
        else:
            load.rejected[str(response.status)] += 1
    connection.close()


async def _count_wrong_points(server: Server, attempt: ClaimedAttempt) -> int:
    """How many points are missing or duplicated, at least 1 if any is out of order."""
    steps = [step for _, step in await load_stored_steps(server, attempt.job_id)]
    expected = list(range(POINTS_PER_JOB))
    return 0 if steps == expected else max(1, len(set(expected) ^ set(steps)) + len(steps) - len(set(steps)))
