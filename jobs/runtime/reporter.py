"""Events on their way to the service: first to a file, then in order, in batches, as often as it takes.

Events may be lost without failing a training; nothing here raises into the trainer. A thread sends what the file holds
and follows the service's `next_seq`, so a batch that arrived twice, or only in part, does no harm.
"""

import errno
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from jobs.runtime.client import RETRY_INITIAL_S, RETRY_MAX_S, Fenced, RequestRejected, ServiceClient, ServiceUnavailable
from schema.events import Directive, Event, EventBatch, EventBatchResponse, ReportedEvent
from schema.job import Phase, Progress

log = logging.getLogger(__name__)

MAX_BATCH_EVENTS = 500
# What somebody may be waiting for, or what the service counts as progress.
URGENT_EVENT_TYPES = frozenset(
    {"status", "phase", "evaluation", "artifact", "tracker", "checkpoint_saved", "checkpoint_skipped", "checkpoint_restored"}
)


class Spool:
    """The events of an attempt, one JSON line each, in a file; memory holds only where each line begins."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w+b", buffering=0)
        self._ends = [0]
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, event: ReportedEvent) -> None:
        """Keep an event. Raises OSError when the disk refuses; then it is as if it had not happened."""
        text = event.model_dump_json().encode() + b"\n"
        with self._lock:
            self._file.seek(self._ends[-1])
            if self._file.write(text) != len(text):
                raise OSError(errno.ENOSPC, "only a part of the event could be written")
            self._ends.append(self._ends[-1] + len(text))

    def read(self, first_seq: int, limit: int) -> list[ReportedEvent]:
        """At most `limit` events from `first_seq` on."""
        with self._lock:
            last = min(first_seq + limit, len(self._ends) - 1)
            self._file.seek(self._ends[first_seq])
            text = self._file.read(self._ends[last] - self._ends[first_seq])
        return [ReportedEvent.load(part) for part in text.splitlines()]


class Reporter:
    """Takes events from the attempt's threads and sends them from one of its own."""

    def __init__(
        self,
        client: ServiceClient,
        spool: Spool,
        interval_s: float,
        on_directive: Callable[[Directive], object],
        on_fenced: Callable[[], object],
    ) -> None:
        self._client = client
        self._spool = spool
        self._interval_s = interval_s
        self._on_directive = on_directive
        self._on_fenced = on_fenced
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._all_sent = threading.Condition()
        self._acknowledged = 0
        self._rejected_before_seq = 0  # events that the service will never take
        self._phase: Phase | None = None
        self._progress: Progress | None = None
        self._thread = threading.Thread(target=self._work, name="reporter", daemon=True)

    def start(self) -> None:
        """Send from now on, and a sign of life at every interval."""
        self._thread.start()

    def report(self, event: Event) -> None:
        """Take an event; it is on disk when this returns."""
        try:
            self._spool.append(ReportedEvent(at=datetime.now(UTC), event=event))
        except OSError as error:
            log.error("event lost", extra={"event": event.type, "error": str(error)})
        if event.type in URGENT_EVENT_TYPES:
            self._wake.set()

    def set_progress(self, *, phase: Phase | None = None, progress: Progress | None = None) -> None:
        """Where the attempt is now; travels with every batch, and is no event of its own."""
        self._phase = phase or self._phase
        self._progress = progress or self._progress

    def flush_soon(self) -> None:
        """Report now, and hear what the service wants."""
        self._wake.set()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the service has everything; False when it has not after `timeout_s`."""
        self._wake.set()
        with self._all_sent:
            return self._all_sent.wait_for(lambda: self._acknowledged >= len(self._spool), timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        """Send nothing more."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            self._send_all()
            if not self._closing.is_set():
                self._wake.wait(self._interval_s)

    def _send_all(self) -> None:
        """One batch at least, so that the service hears a sign of life."""
        more = True
        while more and not self._closing.is_set():
            more = self._send_batch()

    def _send_batch(self) -> bool:
        """Send what is next, waiting for the service; True when there is more."""
        import tenacity

        events = self._spool.read(self._acknowledged, MAX_BATCH_EVENTS)
        batch = EventBatch(first_seq=self._acknowledged, events=events, phase=self._phase, progress=self._progress)
        for_ever = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ServiceUnavailable),
            wait=tenacity.wait_exponential_jitter(multiplier=RETRY_INITIAL_S, max=RETRY_MAX_S, jitter=RETRY_INITIAL_S),
            sleep=self._wait_before_retry,
            stop=tenacity.stop_when_event_set(self._closing),
            reraise=True,
        )
        try:
            answer = for_ever(self._client.report, batch)
        except ServiceUnavailable:
            return False
        except RequestRejected as error:
            log.error("events refused", extra={"first_seq": batch.first_seq, "count": len(events), "error": str(error)})
            self._rejected_before_seq = self._acknowledged + len(events)
            return self._acknowledge(self._rejected_before_seq)
        except Fenced as error:
            log.warning("the attempt is over", extra={"error": str(error)})
            self._closing.set()
            self._on_fenced()
            return False
        return self._handle_response(answer)

    def _handle_response(self, answer: EventBatchResponse) -> bool:
        if answer.directive != "continue" and not self._closing.is_set():
            self._on_directive(answer.directive)
        return self._acknowledge(max(answer.next_seq, self._rejected_before_seq))

    def _acknowledge(self, seq: int) -> bool:
        """The service wants to hear `seq` next; True when that is something new, and we have it."""
        with self._all_sent:
            before, self._acknowledged = self._acknowledged, min(seq, len(self._spool))
            self._all_sent.notify_all()
            return self._acknowledged not in (before, len(self._spool))  # a service that stands still is not pressed

    def _wait_before_retry(self, seconds: float) -> None:
        """Between two tries; something urgent cuts it short."""
        self._wake.wait(seconds)
        self._wake.clear()
