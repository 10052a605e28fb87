"""Reads the curves of jobs for callers, from a cache of what was read before: events are only appended, so a call reads the new ones.

The cache belongs to the process. Several processes read the same events; a deleted job is not found before the cache is asked.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from schema.job import Job
from service.core.errors import Unavailable
from service.core.jobs.curves import Curves, CurveView, Selection
from service.core.jobs.queries import MAX_PAGE_BYTES
from service.core.jobs.repository import JobRepository
from service.core.principals import Principal, Scope
from storage.deadline import remaining_s

MAX_CACHE_BYTES = 64 << 20
PAGE_EVENTS = 1000
ANSWER_S = 1.0  # of a request's time, kept for the answer and for reading one more page
READ_S = 60.0  # without a deadline

CacheKey = tuple[str, str, str]  # tenant, job, and when it was created: a deleted job's id could be used again


@dataclass
class _Entry:
    curves: Curves = field(default_factory=Curves)
    lock: threading.Lock = field(default_factory=threading.Lock)


class JobMetrics:
    """The curves of jobs."""

    def __init__(self, repository: JobRepository, max_cache_bytes: int = MAX_CACHE_BYTES) -> None:
        self._repository = repository
        self._max_cache_bytes = max_cache_bytes
        self._entries: OrderedDict[CacheKey, _Entry] = OrderedDict()  # the one that was used longest ago first
        self._lock = threading.Lock()

    def read(self, principal: Principal, job_id: str, selection: Selection) -> CurveView:
        """The selected part of a job's curves. Raises NotFound, and Unavailable while the events are still being read.

        What was read until then is kept, so that a call that is repeated succeeds, however many events there are.
        """
        principal.require(Scope.JOBS_READ)
        job = self._repository.find(principal, job_id)
        entry = self._use_entry(job)
        if not entry.lock.acquire(timeout=max(0.0, remaining_s(READ_S) - ANSWER_S)):
            raise _still_reading(job)
        try:
            self._read_new_events(job, entry.curves)
            return entry.curves.view(selection)
        finally:
            entry.lock.release()
            self._make_room()

    def _use_entry(self, job: Job) -> _Entry:
        key = (job.tenant_id, job.job_id, job.created_at.isoformat())
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            return entry

    def _read_new_events(self, job: Job, curves: Curves) -> None:
        while rows := self._repository.store.list_events(job.job_id, curves.cursor, PAGE_EVENTS, MAX_PAGE_BYTES):
            for row in rows:
                curves.add(row)
            if remaining_s(READ_S) < ANSWER_S:
                raise _still_reading(job)

    def _make_room(self) -> None:
        """Forget the curves that were used longest ago, until the rest fits. The newest stay, or they could never be read to the end."""
        with self._lock:
            total_bytes = sum(entry.curves.size_bytes for entry in self._entries.values())
            while total_bytes > self._max_cache_bytes and len(self._entries) > 1:
                _, entry = self._entries.popitem(last=False)
                total_bytes -= entry.curves.size_bytes


def _still_reading(job: Job) -> Unavailable:
    return Unavailable(f"the metrics of {job.job_id} are still being read", hint="repeat the call; it continues where this one ended")
