"""Events reach the service in order and once each, whatever the service does meanwhile; and nothing reaches the trainer."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.client import ServiceClient
from jobs.report import Reporter, Spool
from jobs.settings import Settings
from schema.events import CheckpointSaved, CheckpointSkipped, Event, Metrics, PhaseChanged, Resumed
from schema.job import Progress
from tests.jobs.fake_service import TOKEN, FakeService

INTERVAL_S = 0.05
Make = Callable[..., Reporter]


class Heard:
    """What a reporter passes on."""

    def __init__(self) -> None:
        self.directives: list[str] = []
        self.fenced = threading.Event()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def make(service: FakeService, heard: Heard, tmp_path: Path) -> Iterator[Make]:
    """Makes started reporters; closes them, and what only the end of a process closes."""
    made: list[tuple[Reporter, Spool, ServiceClient]] = []

    def make(url: str | None = None, interval_s: float = INTERVAL_S) -> Reporter:
        settings = Settings("job-1", "file:///nowhere", 1, TOKEN, url or service.url, tmp_path)
        spool, client = Spool(tmp_path / "events.jsonl"), ServiceClient(settings)
        reporter = Reporter(client, spool, interval_s, heard.directives.append, heard.fenced.set)
        made.append((reporter, spool, client))
        reporter.start()
        return reporter

    yield make
    for reporter, spool, client in made:
        reporter.close()
        spool._file.close()
        client._http.close()


def point(step: int) -> Metrics:
    return Metrics(step=step, values={"loss": 1.0})


def steps(service: FakeService) -> list[int]:
    return [told["event"]["step"] for told in service.events]


def wait_for(true: Callable[[], Any], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_events_arrive_in_order_with_the_attempt_s_token(service: FakeService, make: Make) -> None:
    reporter = make()
    for step in range(50):
        reporter.report(point(step))
    assert reporter.flush(5)
    assert steps(service) == list(range(50))
    assert service.authorizations == {f"Bearer {TOKEN}"}


def test_batches_are_numbered_from_zero_without_a_gap_and_hold_at_most_500(service: FakeService, make: Make) -> None:
    service.events_status = 503
    reporter = make()
    for step in range(1201):
        reporter.report(point(step))
    service.events_status = 200
    assert reporter.flush(10)
    assert steps(service) == list(range(1201))
    assert max(len(batch["events"]) for batch in service.batches) == 500


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_service_that_is_away_loses_nothing(service: FakeService, make: Make, status: int) -> None:
    service.events_status = status
    reporter = make()
    for step in range(20):
        reporter.report(point(step))
    assert not reporter.flush(0.3)
    service.events_status = 200
    assert reporter.flush(5)
    assert steps(service) == list(range(20))


def test_a_service_that_does_not_exist_holds_nobody_up(make: Make) -> None:
    reporter = make(url="http://127.0.0.1:9")
    began = time.monotonic()
    for step in range(100):
        reporter.report(point(step))
    assert time.monotonic() - began < 1
    assert not reporter.flush(0.1)
    reporter.close(0.5)
    assert time.monotonic() - began < 3


def test_an_answer_that_was_lost_makes_no_duplicate(service: FakeService, make: Make) -> None:
    lost = iter([True])

    def lose_once(batch: dict[str, Any]) -> None:
        if batch["events"] and next(lost, False):
            service.events.extend(batch["events"])  # taken, but the answer is an error
            service.events_status = 503
        else:
            service.events_status = 200

    service.on_events = lose_once
    reporter = make()
    for step in range(5):
        reporter.report(point(step))
    assert reporter.flush(5)
    assert steps(service) == list(range(5))
    assert [batch["first_seq"] for batch in service.batches if batch["events"]][:2] == [0, 0]


def test_a_service_that_forgot_events_gets_them_again(service: FakeService, make: Make) -> None:
    reporter = make()
    for step in range(5):
        reporter.report(point(step))
    assert reporter.flush(5)
    del service.events[2:]
    wait_for(lambda: len(service.events) == 5)
    assert steps(service) == list(range(5))


def test_without_events_there_is_a_sign_of_life_that_says_where_the_attempt_is(service: FakeService, make: Make) -> None:
    reporter = make()
    reporter.place(phase="training", progress=Progress(step=3, total_steps=9, epoch=0.3, total_epochs=1))
    count = len(service.batches)
    wait_for(lambda: len(service.batches) >= count + 3)
    assert service.batches[-1]["events"] == []
    assert (service.batches[-1]["phase"], service.batches[-1]["progress"]["step"]) == ("training", 3)


@pytest.mark.parametrize(
    "urgent",
    [
        PhaseChanged(phase="training"),
        CheckpointSaved(step=1, epoch=0.5, reason="interval", size_bytes=1, save_s=0.1, upload_s=0.1),
        CheckpointSkipped(attempt=1, step=1, why="a file is short"),
        Resumed(step=1, from_attempt=1),
    ],
    ids=lambda event: event.type,
)
def test_a_point_waits_for_the_interval_and_what_somebody_waits_for_does_not(service: FakeService, make: Make, urgent: Event) -> None:
    reporter = make(interval_s=60)
    wait_for(lambda: service.batches)
    reporter.report(point(1))
    time.sleep(0.2)
    assert service.events == []
    reporter.report(urgent)
    wait_for(lambda: len(service.events) == 2)


def test_whoever_must_know_now_what_the_service_wants_need_not_wait_for_the_interval(
    service: FakeService, make: Make, heard: Heard
) -> None:
    reporter = make(interval_s=60)
    wait_for(lambda: service.batches)
    service.directive = "cancel"
    reporter.hurry()
    wait_for(lambda: heard.directives == ["cancel"])


@pytest.mark.parametrize("status", [409, 410, 401, 404])
def test_an_attempt_that_is_over_is_told_and_sends_nothing_more(service: FakeService, make: Make, heard: Heard, status: int) -> None:
    service.events_status = status
    make()
    assert heard.fenced.wait(5)
    count = len(service.batches)
    time.sleep(4 * INTERVAL_S)
    assert len(service.batches) == count


def test_a_directive_is_passed_on(service: FakeService, make: Make, heard: Heard) -> None:
    service.directive = "cancel"
    make()
    wait_for(lambda: "cancel" in heard.directives)


def test_events_that_the_service_will_never_take_do_not_block_those_behind_them(service: FakeService, make: Make) -> None:
    service.events_status = 422
    reporter = make()
    reporter.report(point(0))
    assert reporter.flush(5)
    service.events_status = 200
    reporter.report(point(1))
    assert reporter.flush(5)


def test_every_event_is_on_disk_before_it_is_sent(service: FakeService, make: Make, tmp_path: Path) -> None:
    service.events_status = 503
    reporter = make()
    reporter.report(point(7))
    assert '"step":7' in (tmp_path / "events.jsonl").read_text()


def test_a_full_disk_loses_the_event_and_not_the_training(service: FakeService, heard: Heard, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "events.jsonl")
    spool._file.close()  # a file that refuses
    spool._file = Path("/dev/full").open("w+b", buffering=0)  # noqa: SIM115  # closed below
    client = ServiceClient(Settings("job-1", "file:///nowhere", 1, TOKEN, service.url, tmp_path))
    Reporter(client, spool, INTERVAL_S, heard.directives.append, heard.fenced.set).report(point(1))
    assert len(spool) == 0
    spool._file.close()
    client._http.close()
