"""Live progress in the stream of events: what the heartbeat reports, never stored, read once for all clients of a job."""

import asyncio
from collections.abc import AsyncIterator

import orjson
import pytest

from schema.events import EventBatch, WarningRaised
from schema.job import Job, Progress
from service.api.stream import Feeds, FollowerLimits
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness, make_batch
from tests.unit.test_stream import fail_with, run

START = {"step": 1, "total_steps": 8, "epoch": 0.1, "total_epochs": 1.0}


def make_feeds(harness: JobsHarness) -> Feeds:
    return Feeds(harness.jobs.repository, 0.01, FollowerLimits(100, 100))


def beat(harness: JobsHarness, job: Job, step: int, phase: str = "training") -> None:
    harness.report(job, 1, EventBatch(first_seq=0, phase=phase, progress=Progress.model_validate(START | {"step": step, "loss": 2.5})))


class Stream:
    """The server-sent events of one client, as (name, id, data)."""

    def __init__(self, harness: JobsHarness, feeds: Feeds, job: Job, after: int = 0) -> None:
        self._stream: AsyncIterator[bytes] = feeds.follow(PRINCIPAL, job.job_id, after, harness.store.find_last_cursor(job.job_id))

    async def read(self) -> list[dict[str, str]]:
        """The events of the next chunk; empty at the end."""
        text = (await anext(self._stream, b"")).decode()
        return [dict(line.split(": ", 1) for line in event.splitlines()) for event in text.strip().split("\n\n") if event]

    async def read_until(self, name: str) -> dict[str, str]:
        while events := await self.read():
            for event in events:
                if event["event"] == name:
                    return event
        raise AssertionError(f"the stream ended without {name}")


def test_progress_is_sent_at_the_beginning_and_when_it_changes(harness: JobsHarness) -> None:
    job = harness.start_training()
    beat(harness, job, 1)

    async def scenario() -> None:
        stream = Stream(harness, make_feeds(harness), job)
        first = await stream.read_until("progress")
        assert "id" not in first
        data = orjson.loads(first["data"])
        assert (data["phase"], data["progress"]["step"], data["progress"]["loss"]) == ("training", 1, 2.5)
        beat(harness, job, 1)  # the same again
        beat(harness, job, 2)
        assert orjson.loads((await stream.read_until("progress"))["data"])["progress"]["step"] == 2
        beat(harness, job, 2, phase="evaluating")
        assert orjson.loads((await stream.read_until("progress"))["data"])["phase"] == "evaluating"
        harness.finish(harness.write_result(job))
        assert await stream.read_until("done")
        assert await stream.read() == []

    run(scenario)
    assert "progress" not in {stored.event.type for stored in harness.store.list_events(job.job_id)}


def test_progress_comes_after_the_events_that_were_stored_before(harness: JobsHarness) -> None:
    job = harness.start_training()
    harness.report(job, 1, make_batch(WarningRaised(code="w", message="m"), first_seq=1))
    beat(harness, job, 1)

    async def scenario() -> None:
        feeds = make_feeds(harness)
        for _ in range(2):  # a client that joins later begins with the events, too
            stream = Stream(harness, feeds, job)
            assert "warning" in [event["event"] for event in await stream.read()]
            assert [event["event"] for event in await stream.read()] == ["progress"]

    run(scenario)


def test_all_clients_of_a_job_share_one_reader_of_the_heartbeat(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.start_training()
    beat(harness, job, 1)
    reads: list[str] = []
    find = harness.store.find_heartbeat

    def count(job_id: str) -> object:
        reads.append(job_id)
        return find(job_id)

    async def scenario() -> None:
        feeds = Feeds(harness.jobs.repository, 60.0, FollowerLimits(100, 100))  # the reader polls once
        streams = [Stream(harness, feeds, job) for _ in range(50)]
        monkeypatch.setattr(harness.store, "find_heartbeat", count)
        for event in await asyncio.gather(*(stream.read_until("progress") for stream in streams)):
            assert orjson.loads(event["data"])["progress"]["step"] == 1
        assert reads == [job.job_id]

    run(scenario)


def test_job_without_an_attempt_costs_no_read_of_a_heartbeat(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.submit()

    async def scenario() -> None:
        monkeypatch.setattr(harness.store, "find_heartbeat", fail_with(RecursionError))  # would end the stream
        stream = Stream(harness, make_feeds(harness), job)
        harness.jobs.control.cancel(PRINCIPAL, job.job_id)
        assert await stream.read_until("done")

    run(scenario)


def test_progress_of_an_earlier_attempt_is_not_sent(harness: JobsHarness) -> None:
    job = harness.start_training()
    beat(harness, job, 5)
    harness.jobs.control.pause(PRINCIPAL, job.job_id)
    harness.finish(harness.write_result(job, "paused"))

    async def scenario() -> None:
        stream = Stream(harness, make_feeds(harness), job)
        harness.jobs.control.cancel(PRINCIPAL, job.job_id)
        names: list[str] = []
        while events := await stream.read():
            names += [event["event"] for event in events]
        assert "progress" not in names

    run(scenario)


def test_stopping_service_disconnects_clients_without_done(harness: JobsHarness) -> None:
    job = harness.start_training()

    async def scenario() -> None:
        feeds = make_feeds(harness)
        stream = Stream(harness, feeds, job)
        rest = asyncio.ensure_future(collect_names(stream))
        await asyncio.sleep(0.05)
        feeds.stop()
        assert "done" not in await rest

    run(scenario)


async def collect_names(stream: Stream) -> list[str]:
    names: list[str] = []
    while events := await stream.read():
        names += [event["event"] for event in events]
    return names
