"""Events reach the service in order and exactly once despite its failures; no error reaches the trainer."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from jobs.runtime.client import Fenced, ServiceClient, ServiceUnavailable
from jobs.runtime.reporter import MAX_BATCH_BYTES, Reporter, Spool
from jobs.runtime.settings import Settings
from schema.events import (
    CheckpointRestored,
    CheckpointSaved,
    CheckpointSkipped,
    Event,
    EventBatch,
    MetricsLogged,
    PhaseChanged,
    ReportedEvent,
    WarningRaised,
)
from schema.job import Progress
from schema.result import Result
from schema.spec import claimant_id
from storage import StoreUnavailable
from tests.jobs.fake_service import CLAIM_TOKEN, TOKEN, FakeService
from tests.waiting import wait_until

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
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

    def make(
        url: str | None = None, interval_s: float = INTERVAL_S, read_remaining_s: Callable[[], float | None] = lambda: None
    ) -> Reporter:
        settings = Settings("job-1", "file:///nowhere", 1, TOKEN, url or service.url, tmp_path, traceparent=TRACEPARENT)
        spool, client = Spool(tmp_path / "events.jsonl"), ServiceClient(settings)
        reporter = Reporter(client, spool, interval_s, callbacks.directives.append, callbacks.fenced.set, read_remaining_s)
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
    assert service.traceparents == {TRACEPARENT}


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


def test_every_heartbeat_carries_time_left_now(service: FakeService, make: Make) -> None:
    left_s = iter(range(1000, 0, -1))
    reporter = make(read_remaining_s=lambda: float(next(left_s)))
    reporter.set_progress(phase="merging", progress=Progress(step=9, total_steps=9, epoch=1, total_epochs=1, remaining_s=9999.0))

    def sent() -> list[float]:
        return [batch["progress"]["remaining_s"] for batch in service.batches if batch["progress"]]

    wait_until(lambda: len(sent()) >= 3)
    assert 1000 >= sent()[0] > sent()[1] > sent()[2]


def test_first_progress_is_sent_before_interval(service: FakeService, make: Make) -> None:
    reporter = make(interval_s=60)
    wait_until(lambda: service.batches)
    reporter.set_progress(phase="training", progress=Progress(step=1, total_steps=9, epoch=0.1, total_epochs=1))
    wait_until(lambda: service.batches[-1]["progress"])
    assert service.batches[-1]["progress"]["step"] == 1


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


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(service: FakeService, tmp_path: Path) -> Iterator[ServiceClient]:
    client = ServiceClient(Settings("job-1", "file:///nowhere", 1, TOKEN, service.url, tmp_path))
    client.claim()
    yield client
    client._http.close()


def test_calls_after_the_claim_use_its_token_and_the_claimants_secret(service: FakeService, client: ServiceClient) -> None:
    client.report(EventBatch(first_seq=0))
    assert service.authorizations == {f"Bearer {TOKEN}", f"Bearer {CLAIM_TOKEN}"}
    [secret] = service.claims
    assert service.claimants == {secret}
    assert len(secret) == 64
    assert client.claimant == claimant_id(secret) != secret


def test_newest_token_of_an_answer_is_used(service: FakeService, client: ServiceClient) -> None:
    service.next_token = "newer-token"
    client.report(EventBatch(first_seq=0))
    client.report(EventBatch(first_seq=0))
    assert "Bearer newer-token" in service.authorizations
    assert client.redact("newer-token") == "**********"


def test_expired_token_is_replaced_after_a_long_silence(service: FakeService, client: ServiceClient) -> None:
    service.expired.add(f"Bearer {CLAIM_TOKEN}")
    assert client.report(EventBatch(first_seq=0)).directive == "continue"
    assert (service.tokens, len(service.batches)) == (1, 1)
    service.expired.add("Bearer renewed-token-1")
    assert client.finish(make_result(), 2)
    assert service.tokens == 2


@pytest.mark.parametrize("status", [401, 403, 404, 409])
def test_attempt_that_gets_no_new_token_is_fenced(service: FakeService, client: ServiceClient, status: int) -> None:
    service.expired.add(f"Bearer {CLAIM_TOKEN}")
    service.token_status = status
    with pytest.raises(Fenced):
        client.report(EventBatch(first_seq=0))
    assert not client.finish(make_result(), 2)


def test_renewal_waits_for_an_unavailable_service(service: FakeService, client: ServiceClient) -> None:
    service.expired.add(f"Bearer {CLAIM_TOKEN}")
    service.token_status = 503
    with pytest.raises(ServiceUnavailable):
        client.report(EventBatch(first_seq=0))


def test_store_tokens_come_from_the_service_if_it_issues_them(service: FakeService, client: ServiceClient) -> None:
    assert not client.issues_store_tokens()
    with pytest.raises(StoreUnavailable):
        client.fetch_store_token()
    service.credentials = {"kind": "google", "token": "ya29.narrow", "expires_at": "2026-01-01T00:00:00Z"}
    assert client.issues_store_tokens()
    assert client.fetch_store_token() == ("ya29.narrow", datetime(2026, 1, 1, tzinfo=UTC))
    service.expired.add(f"Bearer {CLAIM_TOKEN}")
    service.token_status = 409
    with pytest.raises(StoreUnavailable, match="409"):
        client.fetch_store_token()


def make_result() -> Result:
    now = datetime.now(UTC)
    return Result(job_id="job-1", attempt=1, outcome="completed", started_at=now, finished_at=now)


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)  # httpcore leaves it open
def test_attempt_reports_through_the_services_socket_and_sends_nothing_to_its_port(service: FakeService, tmp_path: Path) -> None:
    """Another user of the machine may listen on the port after the service was killed."""
    with TemporaryDirectory() as folder, FakeService(socket=Path(folder, "s")) as own:
        settings = Settings("job-1", "file:///nowhere", 1, TOKEN, service.url, tmp_path, service_socket=Path(folder, "s"))
        client = ServiceClient(settings)
        client.claim()
        client.report(EventBatch(first_seq=0))
        assert client.finish(make_result(), 2)
        assert own.hosts == {service.url.removeprefix("http://")}
        client._http.close()
        own.close()
        client = ServiceClient(settings)
        with pytest.raises(ServiceUnavailable):
            client.report(EventBatch(first_seq=0))
        client._http.close()
    assert (len(own.batches), service.claims, service.batches, service.results, service.authorizations) == (1, [], [], [], set())
