"""B6: 200 clients follow one job over server-sent events, at 100 events a second for 15 seconds.

Twenty of them are disconnected at different moments and reconnect with the last event id that they received. Each client must
receive each event once, in order. Lag is the time from when the attempt sends an event until it reaches a client.
"""

import asyncio
import re
import time
from dataclasses import dataclass, field

from bench.attempts import ClaimedAttempt, claim_attempts, load_stored_steps
from bench.context import BenchmarkContext
from bench.figures import Measurement, at_most, exactly, percentile
from bench.http import Connection, Request
from bench.servers import Server, run_service
from bench.stub_trainer import make_stub_trainer

NAME = "streams"
CLIENTS = 200
RECONNECTS = 20
BATCHES_PER_S = 10
BATCH = 10
SECONDS = 15
DRAIN_TIMEOUT_S = 10
EVENT_ID = re.compile(rb"^id: (\d+)$", re.MULTILINE)


@dataclass
class Listener:
    """A client, with the id and arrival time of each event."""

    disconnect_after_s: float | None = None
    received: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    connections: int = 0
    ended: bool = False


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Completeness, lag, and CPU and memory of the service."""
    trainer = make_stub_trainer(context.folder / "trainer")
    async with run_service(context.folder / "home", trainer) as server:
        [attempt] = await claim_attempts(server, 1)
        listeners = [Listener(_disconnect_after_s(number)) for number in range(CLIENTS)]
        cpu_before_s, started_at = server.cpu_s(), time.perf_counter()
        async with asyncio.timeout(SECONDS * 2 + DRAIN_TIMEOUT_S), asyncio.TaskGroup() as group:
            for listener in listeners:
                group.create_task(_listen(server, attempt.job_id, listener))
            await asyncio.sleep(1)  # all clients are connected
            sent_at = await _send_reports(server, attempt)
            await _send_result(server, attempt)
        cpu_share = (server.cpu_s() - cpu_before_s) / (time.perf_counter() - started_at)
        stored = await load_stored_steps(server, attempt.job_id)
        rss_mb = server.rss_mb()
    return _figures(listeners, stored, sent_at, cpu_share, rss_mb)


def _figures(
    listeners: list[Listener], stored: list[tuple[int, int]], sent_at: dict[int, float], cpu_share: float, rss_mb: float
) -> list[Measurement]:
    step_of = dict(stored)
    wrong = sum(_count_wrong_events(listener, step_of, len(sent_at)) for listener in listeners)
    lags_s = [at - sent_at[step_of[event]] for listener in listeners for event, at in listener.received if event in step_of]
    reconnects = sum(listener.connections - 1 for listener in listeners)
    return [
        Measurement(
            NAME,
            "events lost, duplicated or out of order",
            wrong,
            "",
            exactly(0),
            f"of {CLIENTS * len(sent_at):,}, {reconnects} reconnects",
        ),
        Measurement(NAME, "lag p99", percentile(lags_s, 99) * 1000, "ms", at_most(250), f"p50 {percentile(lags_s, 50) * 1000:.0f} ms"),
        Measurement(NAME, "CPU of the service", cpu_share * 100, "%", note=f"{rss_mb:.0f} MB afterwards"),
    ]


def _count_wrong_events(listener: Listener, step_of: dict[int, int], expected: int) -> int:
    """How many metric events are missing or duplicated, at least 1 if any is out of order. Status events are ignored."""
    steps = [step_of[event] for event, _ in listener.received if event in step_of]
    if steps == list(range(expected)):
        return 0
    return max(1, expected - len(set(steps)) + len(steps) - len(set(steps)))


def _disconnect_after_s(number: int) -> float | None:
    """When a client is disconnected, spread over the time in which events are sent; None for a client that stays connected."""
    return 1 + SECONDS * (number + 0.5) / RECONNECTS if number < RECONNECTS else None


async def _listen(server: Server, job_id: str, listener: Listener) -> None:
    started_at = time.perf_counter()
    while not listener.ended:
        timeout_s = None  # only the first connection is cut
        if listener.disconnect_after_s is not None and not listener.connections:
            timeout_s = listener.disconnect_after_s - (time.perf_counter() - started_at)
        try:
            async with asyncio.timeout(timeout_s):
                await _read_stream(server, job_id, listener)
        except TimeoutError:
            continue  # disconnected: reconnect from the last id


async def _read_stream(server: Server, job_id: str, listener: Listener) -> None:
    """Read one connection until it is cut or the service ends the stream."""
    headers = {"Accept": "text/event-stream"}
    if listener.received:
        headers["Last-Event-ID"] = str(listener.received[-1][0])
    listener.connections += 1
    connection = Connection(server.url)
    unfinished = b""
    try:
        async for chunk in connection.stream(Request("GET", f"/jobs/{job_id}/events", headers=headers)):
            now = time.time()
            complete, end, unfinished = (unfinished + chunk).rpartition(b"\n\n")
            listener.received += [(int(event), now) for event in EVENT_ID.findall(complete)]
            listener.ended = listener.ended or b"event: done" in complete + end
    finally:
        connection.close()


async def _send_reports(server: Server, attempt: ClaimedAttempt) -> dict[int, float]:
    """Send the batches on schedule; returns when each step was sent."""
    sent_at: dict[int, float] = {}
    connection = Connection(server.url)
    started_at = time.perf_counter()
    for number in range(SECONDS * BATCHES_PER_S):
        await asyncio.sleep(max(0.0, started_at + number / BATCHES_PER_S - time.perf_counter()))
        steps = range(number * BATCH, (number + 1) * BATCH)
        sent_at |= dict.fromkeys(steps, time.time())
        (await connection.send(attempt.build_report(1 + steps.start, steps))).json()
    connection.close()
    return sent_at


async def _send_result(server: Server, attempt: ClaimedAttempt) -> None:
    """Send the attempt's result, so that the streams end by themselves."""
    moment = "2026-01-01T00:00:00Z"
    result = {"job_id": attempt.job_id, "attempt": 1, "outcome": "completed", "started_at": moment, "finished_at": moment}
    connection = Connection(server.url)
    answer = await connection.send(attempt.build_request("result", result))
    connection.close()
    if not answer.ok:
        raise ValueError(f"the service answered the result with {answer.status}: {answer.body[:300]!r}")
