"""Events reach the service in order and exactly once despite its failures; no error reaches the trainer."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobs.runtime.client import ServiceClient
from jobs.runtime.reporter import MAX_BATCH_BYTES, Reporter, Spool
from jobs.runtime.settings import Settings
from schema.events import (
    CheckpointRestored,
    CheckpointSaved,
    CheckpointSkipped,
    Event,
    MetricsLogged,
    PhaseChanged,
    ReportedEvent,
    WarningRaised,
)
from schema.job import Progress
from tests.jobs.fake_service import TOKEN, FakeService
from tests.waiting import wait_until

INTERVAL_S = 0.05
Make = Callable[..., Reporter]


class ReporterCallbacks:
    """Records the directives and the fencing that a reporter passes on."""

    def __init__(self) -> None:
        self.directives: list[str] = []
        self.fenced = threading.Event()


@pytest.fixture
def callbacks() -> ReporterCallbacks:
    return ReporterCallbacks()


@pytest.fixture
def make(service: FakeService, callbacks: ReporterCallbacks, tmp_path: Path) -> Iterator[Make]:
    """Makes and starts reporters; afterwards closes them with their spools and clients."""
    made: list[tuple[Reporter, Spool, ServiceClient]] = []

    def make(url: str | None = None, interval_s: float = INTERVAL_S) -> Reporter:
        settings = Settings("job-1", "file:///nowhere", 1, TOKEN, url or service.url, tmp_path)
        spool, client = Spool(tmp_path / "events.jsonl"), ServiceClient(settings)
        reporter = Reporter(client, spool, interval_s, callbacks.directives.append, callbacks.fenced.set)
        made.append((reporter, spool, client))
        reporter.start()
        return reporter

    yield make
    for reporter, spool, client in made:
        reporter.close()
        spool._file.close()
        client._http.close()


def point(step: int) -> MetricsLogged:
    return MetricsLogged(step=step, values={"loss": 1.0})


def steps(service: FakeService) -> list[int]:
    return [reported["event"]["step"] for reported in service.events]


def test_events_arrive_in_order_with_attempt_token(service: FakeService, make: Make) -> None:
    reporter = make()
    for step in range(50):
        reporter.report(point(step))
    assert reporter.flush(5)
    assert steps(service) == list(range(50))
    assert service.authorizations == {f"Bearer {TOKEN}"}


def test_batches_are_contiguous_and_hold_at_most_500(service: FakeService, make: Make) -> None:
    service.events_status = 503
    reporter = make()
    for step in range(1201):
        reporter.report(point(step))
    service.events_status = 200
    assert reporter.flush(10)
    assert steps(service) == list(range(1201))
    assert max(len(batch["events"]) for batch in service.batches) == 500


@pytest.mark.parametrize("status", [500, 503, 429])
def test_outage_loses_no_events(service: FakeService, make: Make, status: int) -> None:
    service.events_status = status
    reporter = make()
    for step in range(20):
        reporter.report(point(step))
    assert not reporter.flush(0.3)
    service.events_status = 200
    assert reporter.flush(5)
    assert steps(service) == list(range(20))


def test_unreachable_service_does_not_block(make: Make) -> None:
    reporter = make(url="http://127.0.0.1:9")
    began = time.monotonic()
    for step in range(100):
        reporter.report(point(step))
    assert time.monotonic() - began < 1
    assert not reporter.flush(0.1)
    reporter.close(0.5)
    assert time.monotonic() - began < 3


def test_lost_response_makes_no_duplicates(service: FakeService, make: Make) -> None:
    lost = iter([True])

    def lose_once(batch: dict[str, Any]) -> None:
        if batch["events"] and next(lost, False):
            service.events.extend(batch["events"])  # accepted, but the response is an error
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


def test_events_lost_by_service_are_sent_again(service: FakeService, make: Make) -> None:
    reporter = make()
    for step in range(5):
        reporter.report(point(step))
    assert reporter.flush(5)
    del service.events[2:]
    wait_until(lambda: len(service.events) == 5)
    assert steps(service) == list(range(5))


def test_heartbeat_without_events_carries_phase_and_progress(service: FakeService, make: Make) -> None:
    reporter = make()
    reporter.set_progress(phase="training", progress=Progress(step=3, total_steps=9, epoch=0.3, total_epochs=1))
    count = len(service.batches)
    wait_until(lambda: len(service.batches) >= count + 3)
    assert service.batches[-1]["events"] == []
    assert (service.batches[-1]["phase"], service.batches[-1]["progress"]["step"]) == ("training", 3)


@pytest.mark.parametrize(
    "urgent",
    [
        PhaseChanged(phase="training"),
        CheckpointSaved(step=1, epoch=0.5, reason="interval", size_bytes=1, save_s=0.1, upload_s=0.1),
        CheckpointSkipped(attempt=1, step=1, reason="a file is short"),
        CheckpointRestored(step=1, from_attempt=1),
    ],
    ids=lambda event: event.type,
)
def test_metrics_wait_for_interval_but_urgent_events_do_not(service: FakeService, make: Make, urgent: Event) -> None:
    reporter = make(interval_s=60)
    wait_until(lambda: service.batches)
    reporter.report(point(1))
    time.sleep(0.2)
    assert service.events == []
    reporter.report(urgent)
    wait_until(lambda: len(service.events) == 2)


def test_flush_soon_fetches_directive_before_interval(service: FakeService, make: Make, callbacks: ReporterCallbacks) -> None:
    reporter = make(interval_s=60)
    wait_until(lambda: service.batches)
    service.directive = "cancel"
    reporter.flush_soon()
    wait_until(lambda: callbacks.directives == ["cancel"])


@pytest.mark.parametrize("status", [409, 410, 401, 404])
def test_fenced_attempt_is_notified_and_sends_nothing_more(
    service: FakeService, make: Make, callbacks: ReporterCallbacks, status: int
) -> None:
    service.events_status = status
    make()
    assert callbacks.fenced.wait(5)
    count = len(service.batches)
    time.sleep(4 * INTERVAL_S)
    assert len(service.batches) == count


def test_a_directive_is_passed_on(service: FakeService, make: Make, callbacks: ReporterCallbacks) -> None:
    service.directive = "cancel"
    make()
    wait_until(lambda: "cancel" in callbacks.directives)


def test_rejected_events_do_not_block_later_ones(service: FakeService, make: Make) -> None:
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


def test_full_disk_drops_event_without_error(service: FakeService, callbacks: ReporterCallbacks, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "events.jsonl")
    spool._file.close()  # a file that cannot be written
    spool._file = Path("/dev/full").open("w+b", buffering=0)  # noqa: SIM115  # closed below
    client = ServiceClient(Settings("job-1", "file:///nowhere", 1, TOKEN, service.url, tmp_path))
    Reporter(client, spool, INTERVAL_S, callbacks.directives.append, callbacks.fenced.set).report(point(1))
    assert len(spool) == 0
    spool._file.close()
    client._http.close()


def test_batch_is_limited_by_bytes_and_has_at_least_one_event(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "events.jsonl")
    for size in (10, MAX_BATCH_BYTES // 2, MAX_BATCH_BYTES // 2, 2 * MAX_BATCH_BYTES, 10):
        spool.append(ReportedEvent(at=datetime.now(UTC), event=WarningRaised(code="x", message="y" * size)))
    counts: list[int] = []
    while sum(counts) < len(spool):
        counts.append(len(spool.read(sum(counts), 500)))
    assert counts == [2, 1, 1, 1]
    spool._file.close()


def test_event_that_is_not_unicode_is_lost_without_an_error(service: FakeService, make: Make) -> None:
    reporter = make()
    reporter.report(WarningRaised(code="x", message="\udc80"))
    reporter.report(point(1))
    assert reporter.flush(5)
