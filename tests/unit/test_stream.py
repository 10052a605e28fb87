"""Following events: no client can move what another one gets, and a feed that cannot go on disconnects its clients."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest
from starlette.testclient import TestClient

from schema.events import WarningRaised
from schema.job import Job
from service.api.stream import FeedKey, Feeds, FollowerLimits
from service.core.errors import TooManyFollowers, Unavailable
from tests.unit.api_harness import get_error, get_services, start_attempt
from tests.unit.jobs_harness import OTHER_PRINCIPAL, PRINCIPAL, JobsHarness, make_batch

TIMEOUT_S = 20.0
HUGE_IDS = [2**53, 2**63 - 1, 10**30]


def make_feeds(harness: JobsHarness, in_all: int = 1000, per_job: int = 1000) -> Feeds:
    return Feeds(harness.jobs.repository, 0.01, FollowerLimits(in_all, per_job))


def warn(harness: JobsHarness, job: Job, seq: int) -> None:
    harness.report(job, 1, make_batch(WarningRaised(code="w", message=f"{seq}"), first_seq=seq))


class Follower:
    """A client that follows a job and collects the numbers of the warnings that it gets."""

    def __init__(self, harness: JobsHarness, feeds: Feeds, job: Job, after: int = 0) -> None:
        newest = harness.store.find_last_cursor(job.job_id)
        self.seqs: list[int] = []
        self.done = False
        self._stream = feeds.follow(PRINCIPAL, job.job_id, after, newest)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async for text in self._stream:
            self.done = self.done or b"event: done" in text
            rows = [orjson.loads(line[6:]) for line in text.splitlines() if line.startswith(b"data: ")]
            self.seqs += [row["seq"] for row in rows if row.get("event", {}).get("type") == "warning"]

    async def wait_for(self, count: int) -> None:
        while len(self.seqs) < count:
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def run_in_time() -> None:
        await asyncio.wait_for(scenario(), TIMEOUT_S)

    asyncio.run(run_in_time())


@pytest.mark.parametrize("huge", HUGE_IDS)
def test_position_of_one_client_does_not_move_another(harness: JobsHarness, huge: int) -> None:
    job = harness.start_training()
    for seq in (1, 2):
        warn(harness, job, seq)

    async def scenario() -> None:
        feeds = make_feeds(harness)
        poisoner, honest = Follower(harness, feeds, job, huge), Follower(harness, feeds, job)
        await honest.wait_for(2)
        warn(harness, job, 3)
        await honest.wait_for(3)
        await poisoner.wait_for(1)
        assert (honest.seqs, poisoner.seqs) == ([1, 2, 3], [3])
        harness.finish(harness.write_result(job))
        await asyncio.gather(honest.task, poisoner.task)
        assert honest.done
        assert poisoner.done

    run(scenario)


def test_client_ahead_of_the_feed_gets_each_event_once(harness: JobsHarness) -> None:
    job = harness.start_training()
    warn(harness, job, 1)

    async def scenario() -> None:
        feeds = make_feeds(harness)
        first = Follower(harness, feeds, job)
        await first.wait_for(1)
        warn(harness, job, 2)
        warn(harness, job, 3)
        ahead = Follower(harness, feeds, job, after=harness.store.list_events(job.job_id)[-2].cursor)
        harness.finish(harness.write_result(job))
        await asyncio.gather(first.task, ahead.task)
        assert (first.seqs, ahead.seqs) == ([1, 2, 3], [3])

    run(scenario)


def test_five_hundred_clients_get_every_event_with_one_reader(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.start_training()

    async def scenario() -> None:
        feeds = make_feeds(harness)
        followers = [Follower(harness, feeds, job) for _ in range(500)]
        await asyncio.sleep(0)
        for seq in range(1, 6):
            warn(harness, job, seq)
        harness.finish(harness.write_result(job))
        await asyncio.gather(*(follower.task for follower in followers))
        assert {tuple(follower.seqs) for follower in followers} == {(1, 2, 3, 4, 5)}
        assert list_feeds(feeds) == []

    run(scenario)


def test_reader_that_dies_disconnects_clients_and_the_next_one_is_served(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.start_training()

    async def scenario() -> None:
        feeds = make_feeds(harness)
        follower = Follower(harness, feeds, job)
        await asyncio.sleep(0.05)
        with monkeypatch.context() as patch:
            patch.setattr(harness.store, "list_events", fail_with(RecursionError))
            await follower.task
        assert not follower.done  # the job has not ended: the client must come back
        assert list_feeds(feeds) == []
        warn(harness, job, 1)
        again = Follower(harness, feeds, job)
        await again.wait_for(1)
        await again.close()

    run(scenario)


def test_unavailable_store_only_delays_events(harness: JobsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job = harness.start_training()

    async def scenario() -> None:
        follower = Follower(harness, make_feeds(harness), job)
        with monkeypatch.context() as patch:
            patch.setattr(harness.store, "list_events", fail_with(Unavailable))
            await asyncio.sleep(0.05)
        warn(harness, job, 1)
        await follower.wait_for(1)
        await follower.close()

    run(scenario)


def test_clients_beyond_the_limits_are_refused(harness: JobsHarness) -> None:
    job, other = harness.start_training(), harness.submit()

    async def scenario() -> None:
        feeds = make_feeds(harness, in_all=3, per_job=2)
        followers = [Follower(harness, feeds, job) for _ in range(2)]
        await asyncio.sleep(0.02)
        with pytest.raises(TooManyFollowers, match=job.job_id):
            feeds.check_room(PRINCIPAL, job.job_id)
        feeds.check_room(PRINCIPAL, other.job_id)
        feeds.check_room(OTHER_PRINCIPAL, job.job_id)  # another tenant's clients do not count
        followers.append(Follower(harness, feeds, other))
        await asyncio.sleep(0.02)
        with pytest.raises(TooManyFollowers, match="this service"):
            feeds.check_room(PRINCIPAL, other.job_id)
        for follower in followers:
            await follower.close()
        feeds.check_room(PRINCIPAL, job.job_id)

    run(scenario)


def test_client_of_another_tenant_shares_no_feed(harness: JobsHarness) -> None:
    job = harness.start_training()

    async def scenario() -> None:
        feeds = make_feeds(harness)
        follower = Follower(harness, feeds, job)
        foreign = feeds.follow(replace(OTHER_PRINCIPAL), job.job_id, 0, 0)
        reading = asyncio.ensure_future(collect(foreign))
        await asyncio.sleep(0.02)
        warn(harness, job, 1)
        await follower.wait_for(1)
        assert await reading == [b"event: done\ndata: {}\n\n"]  # for it there is no such job
        await follower.close()

    run(scenario)


@pytest.fixture(scope="module")
def job_id(readonly_client: TestClient, readonly_dataset_id: str) -> str:
    """A job with an attempt that has written a log."""
    job_id = start_attempt(readonly_client, readonly_dataset_id)
    log = get_services(readonly_client).settings.home_folder / f"attempts/{job_id}.1.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("output\n")
    return job_id


@pytest.mark.parametrize("event_id", ["9007199254740993", "9223372036854775807", "1" + "0" * 15 + "0" * 4, "-1", "1.5", "x"])
def test_event_id_out_of_range_is_rejected(readonly_client: TestClient, job_id: str, event_id: str) -> None:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": event_id}
    assert readonly_client.get(f"/jobs/{job_id}/events", headers=headers).status_code in (400, 422)
    get_error(readonly_client.get(f"/jobs/{job_id}/events", params={"after": event_id}), 422)


@pytest.mark.parametrize("number", ["9007199254740992", "1099511627776", "9223372036854775808", "1" + "0" * 400, "-1", "NaN", "1e3", ""])
@pytest.mark.parametrize(
    "path",
    ["/events?after={}", "/events?limit={}", "/logs?offset={}", "/logs?attempt={}", "/logs?limit={}", "/checkpoints/{}/export"],
)
def test_extreme_number_is_a_client_error_or_an_empty_answer(readonly_client: TestClient, job_id: str, path: str, number: str) -> None:
    url = f"/jobs/{job_id}{path.format(number)}"
    response = readonly_client.post(url) if path.endswith("export") else readonly_client.get(url)
    assert response.status_code < 500
    assert response.status_code >= 400 or not (response.json().get("events") or response.json().get("text"))


def fail_with(error: type[Exception]) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error("a defect")

    return fail


def list_feeds(feeds: Feeds) -> list[FeedKey]:
    return list(feeds._feeds)  # pyright: ignore[reportPrivateUsage]


async def collect(stream: AsyncIterator[bytes]) -> list[bytes]:
    return [text async for text in stream]
