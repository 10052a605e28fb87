"""Sends events to the service: each event goes to a file first, then in order and in batches, retried until the service has it.

Losing events never fails a training; nothing here raises into the trainer. A thread sends what the file holds and follows the service's
`next_seq`, so a batch that arrives twice or only in part causes no error.
"""

import errno
import logging
import threading
from bisect import bisect_right
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from jobs.runtime.client import RETRY_INITIAL_S, RETRY_MAX_S, Fenced, RequestRejected, ServiceClient, ServiceUnavailable
from schema.events import Directive, Event, EventBatch, EventBatchResponse, ReportedEvent
from schema.job import Progress
from schema.types import Phase

log = logging.getLogger(__name__)

MAX_BATCH_EVENTS = 500
MAX_BATCH_BYTES = 3 << 20  # of events; the service accepts a body of 4 MiB
# Events that users wait for, or that the service counts as progress: sent at once.
URGENT_EVENT_TYPES = frozenset(
    {"phase", "evaluation", "artifact", "tracker", "checkpoint_saved", "checkpoint_skipped", "checkpoint_restored"}
)


class Spool:
    """The events of an attempt in a file, one JSON line each; memory holds only the offset of each line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w+b", buffering=0)
        self._ends = [0]
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, event: ReportedEvent) -> None:
        """Store an event. Raises OSError if it cannot be written; then the file is unchanged for readers."""
        line = event.model_dump_json().encode() + b"\n"
        with self._lock:
            self._file.seek(self._ends[-1])
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "only a part of the event could be written")
            self._ends.append(self._ends[-1] + len(line))

    def read(self, first_seq: int, limit: int) -> list[ReportedEvent]:
        """At most `limit` events and MAX_BATCH_BYTES, but at least one if there is one, starting at `first_seq`."""
        with self._lock:
            last = min(first_seq + limit, len(self._ends) - 1)
            fitting = bisect_right(self._ends, self._ends[first_seq] + MAX_BATCH_BYTES) - 1
            last = min(last, max(fitting, first_seq + 1))
            self._file.seek(self._ends[first_seq])
            lines = self._file.read(self._ends[last] - self._ends[first_seq])
        return [ReportedEvent.load(line) for line in lines.splitlines()]


class Reporter:
    """Accepts events from all threads of the attempt and sends them from its own thread."""

    def __init__(
        self,
        client: ServiceClient,
        spool: Spool,
        interval_s: float,
        on_directive: Callable[[Directive], object],
        on_fenced: Callable[[], object],
        read_remaining_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._client = client
        self._spool = spool
        self._interval_s = interval_s
        self._on_directive = on_directive
        self._on_fenced = on_fenced
        self._read_remaining_s = read_remaining_s
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._all_sent = threading.Condition()
        self._acknowledged = 0
        self._rejected_before_seq = 0  # events before this number were rejected for good
        self._phase: Phase | None = None
        self._progress: Progress | None = None
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        """Start sending; an empty batch is sent as a heartbeat at every interval."""
        self._thread.start()

    def report(self, event: Event) -> None:
        """Accept an event; it is on disk when this returns, unless the disk is full or it cannot be written as JSON."""
        try:
            self._spool.append(ReportedEvent(at=datetime.now(UTC), event=event))
        except (OSError, ValueError) as error:  # ValueError: text that is not Unicode, such as a file's name
            log.error("event lost", extra={"event": event.type, "error": str(error)})
        if event.type in URGENT_EVENT_TYPES:
            self._wake.set()

    def set_progress(self, *, phase: Phase | None = None, progress: Progress | None = None) -> None:
        """Set phase and progress, which every batch carries; this is not an event. The first progress is sent at once."""
        is_first = progress is not None and self._progress is None
        self._phase = phase or self._phase
        self._progress = progress or self._progress
        if is_first:
            self._wake.set()

    def flush_soon(self) -> None:
        """Send the next batch now, for the directive in its response."""
        self._wake.set()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the service has all events; False after `timeout_s`."""
        self._wake.set()
        with self._all_sent:
            return self._all_sent.wait_for(lambda: self._acknowledged >= len(self._spool), timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop sending."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            self._send_all()
            if not self._closing.is_set():
                self._wake.wait(self._interval_s)

    def _send_all(self) -> None:
        """Send at least one batch, which may be empty: the heartbeat."""
        has_more = True
        while has_more and not self._closing.is_set():
            has_more = self._send_batch()

    def _send_batch(self) -> bool:
        """Send the next batch, waiting while the service is unavailable; True if more events remain."""
        import tenacity

        events = self._spool.read(self._acknowledged, MAX_BATCH_EVENTS)
        batch = EventBatch(first_seq=self._acknowledged, events=events, phase=self._phase, progress=self._read_progress())
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ServiceUnavailable),
            wait=tenacity.wait_exponential_jitter(multiplier=RETRY_INITIAL_S, max=RETRY_MAX_S, jitter=RETRY_INITIAL_S),
            sleep=self._wait_before_retry,
            stop=tenacity.stop_when_event_set(self._closing),
            reraise=True,
        )
        try:
            response = retrying(self._client.report, batch)
        except ServiceUnavailable:
            return False
        except RequestRejected as error:
            log.error("events rejected", extra={"first_seq": batch.first_seq, "count": len(events), "error": str(error)})
            self._rejected_before_seq = self._acknowledged + len(events)
            return self._acknowledge(self._rejected_before_seq)
        except Fenced as error:
            log.warning("attempt is fenced", extra={"error": str(error)})
            self._closing.set()
            self._on_fenced()
            return False
        return self._handle_response(response)

    def _read_progress(self) -> Progress | None:
        """The progress with the time that is left now: it passes between two steps, and after the last one."""
        progress = self._progress
        return progress and progress.model_copy(update={"remaining_s": self._read_remaining_s()})

    def _handle_response(self, response: EventBatchResponse) -> bool:
        if response.directive != "continue" and not self._closing.is_set():
            self._on_directive(response.directive)
        return self._acknowledge(max(response.next_seq, self._rejected_before_seq))

    def _acknowledge(self, seq: int) -> bool:
        """The service expects `seq` next; True if it made progress and more events remain."""
        with self._all_sent:
            previous, self._acknowledged = self._acknowledged, min(seq, len(self._spool))
            self._all_sent.notify_all()
            return self._acknowledged not in (previous, len(self._spool))  # no progress: wait for the next interval

    def _wait_before_retry(self, seconds: float) -> None:
        """Sleep between two tries; an urgent event ends it early."""
        self._wake.wait(seconds)
        self._wake.clear()
