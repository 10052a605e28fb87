"""Following a job's events and progress as they happen: one reader of the store per job, however many clients follow.

A reader starts at the store's newest event, never at a position that a client named, and clients that are further back read for
themselves up to it. So no client can move what another one gets.
"""

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import anyio.to_thread
import orjson

from schema.job import Job
from service.api.responses import event_row
from service.core.errors import TooManyFollowers, Unavailable
from service.core.event_store import StoredEvent
from service.core.jobs.queries import MAX_PAGE_BYTES
from service.core.jobs.repository import JobRepository
from service.core.principals import Principal

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

PAGE_SIZE = 1000
MAX_BUFFERED_CHUNKS = 200  # a client that lags behind further reads from the store again
MAX_BUFFERED_BYTES = 8 << 20

FeedKey = tuple[str, str]  # the tenant and the job: a client of another tenant can never share a feed


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a blocking function without blocking the event loop."""
    return await anyio.to_thread.run_sync(functools.partial(function, *args, **kwargs))


@dataclass(frozen=True)
class _Chunk:
    """Events rendered once for all clients, up to `last_cursor`."""

    last_cursor: int
    text: bytes


@dataclass
class _Feed:
    """What was read for the clients of one job. `chunks` maps a cursor to the chunk that follows it."""

    cursor: int
    progress: bytes = b""  # of the newest heartbeat, rendered; empty: there is none of the current attempt
    chunks: dict[int, _Chunk] = field(default_factory=dict[int, _Chunk])
    clients: int = 0
    ended: bool = False
    failed: bool = False  # its reader died, or the service stops; clients are disconnected, and follow again through a new feed
    updated: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None

    def add(self, rows: list[StoredEvent]) -> None:
        self.chunks[self.cursor] = _Chunk(rows[-1].cursor, _render(rows))
        self.cursor = rows[-1].cursor
        while len(self.chunks) > 1 and (
            len(self.chunks) > MAX_BUFFERED_CHUNKS or sum(len(chunk.text) for chunk in self.chunks.values()) > MAX_BUFFERED_BYTES
        ):
            del self.chunks[next(iter(self.chunks))]

    def notify(self) -> None:
        self.updated.set()
        self.updated = asyncio.Event()


@dataclass(frozen=True)
class FollowerLimits:
    """How many clients may follow at the same time."""

    in_all: int
    per_job: int


class Feeds:
    """The jobs that clients of this process follow now."""

    def __init__(self, repository: JobRepository, poll_s: float, limits: FollowerLimits) -> None:
        """`poll_s` is how late an event may be. Each poll reads, per followed job, its record, its new events and its heartbeat."""
        self.is_stopping = False
        self._poll_s = poll_s
        self._repository = repository
        self._limits = limits
        self._feeds: dict[FeedKey, _Feed] = {}
        self._followers: Counter[FeedKey] = Counter()

    def check_room(self, principal: Principal, job_id: str) -> None:
        """Raise TooManyFollowers unless one more client may follow the events or the log of the job."""
        if self._followers.total() >= self._limits.in_all:
            raise TooManyFollowers("too many clients follow jobs of this service now", hint="poll GET /jobs/{id}/events instead")
        if self._followers[_key(principal, job_id)] >= self._limits.per_job:
            raise TooManyFollowers(f"too many clients follow {job_id} now", hint="poll GET /jobs/{id}/events instead")

    async def follow(self, principal: Principal, job_id: str, after: int, newest: int) -> AsyncIterator[bytes]:
        """Server-sent events after the cursor `after`, until the job is final and all its events were sent; then one `done`.

        Between them, `progress` without an id: at the beginning, and whenever the heartbeat reports another phase or progress.
        `newest` is the cursor of the store's newest event, which the caller has just read; a cursor beyond it means that one.
        """
        cursor, progress = min(after, newest), b""
        with self.count(principal, job_id):
            feed = self._join(principal, job_id, newest)
            try:
                while True:
                    updated = feed.updated
                    if cursor < feed.cursor:
                        chunk = feed.chunks.get(cursor) or await self._read_chunk(job_id, cursor, feed.cursor)
                        if chunk is None:
                            await asyncio.sleep(self._poll_s)
                            continue
                        cursor = chunk.last_cursor
                        yield chunk.text
                    elif feed.failed:
                        return
                    elif feed.progress not in (b"", progress):
                        progress = feed.progress
                        yield progress
                    elif feed.ended:
                        yield b"event: done\ndata: {}\n\n"
                        return
                    else:
                        await updated.wait()
            finally:
                self._leave(_key(principal, job_id), feed)

    def stop(self) -> None:
        """Disconnect all clients soon, because the service stops. They follow again when it is back."""
        self.is_stopping = True
        for feed in self._feeds.values():
            feed.failed = feed.ended = True
            feed.notify()

    @contextmanager
    def count(self, principal: Principal, job_id: str) -> Generator[None]:
        """Count one client that follows the job."""
        key = _key(principal, job_id)
        self._followers[key] += 1
        try:
            yield
        finally:
            self._followers[key] -= 1
            if not self._followers[key]:
                del self._followers[key]

    def _join(self, principal: Principal, job_id: str, newest: int) -> _Feed:
        key = _key(principal, job_id)
        feed = self._feeds.get(key)
        if feed is None or feed.ended:
            feed = self._feeds[key] = _Feed(cursor=newest)
            feed.task = asyncio.create_task(self._read(principal, job_id, feed))
        feed.clients += 1
        return feed

    def _leave(self, key: FeedKey, feed: _Feed) -> None:
        feed.clients -= 1
        if feed.clients == 0:
            if feed.task:
                feed.task.cancel()
            if self._feeds.get(key) is feed:
                del self._feeds[key]

    async def _read(self, principal: Principal, job_id: str, feed: _Feed) -> None:
        try:
            await self._read_until_end(principal, job_id, feed)
        except Exception:  # clients would otherwise wait forever for a reader that is gone
            log.exception("events cannot be followed", extra={"job_id": job_id})
            feed.failed = feed.ended = True
            feed.notify()

    async def _read_until_end(self, principal: Principal, job_id: str, feed: _Feed) -> None:
        while not feed.ended:
            rows, progress = list[StoredEvent](), feed.progress
            try:
                rows, progress, feed.ended = await run_in_thread(self._next_page, principal, job_id, feed.cursor)
            except Unavailable as error:
                log.warning("events cannot be read now", extra={"job_id": job_id, "error": error.message})
            if rows:
                feed.add(rows)
            if rows or feed.ended or progress != feed.progress:
                feed.progress = progress
                feed.notify()
            if len(rows) < PAGE_SIZE and not feed.ended:
                await asyncio.sleep(self._poll_s)

    def _next_page(self, principal: Principal, job_id: str, after: int) -> tuple[list[StoredEvent], bytes, bool]:
        """The next events, the progress, and whether all events have been read. The status is read first, so that none is missed."""
        job = self._repository.find_or_none(principal, job_id)
        if job is None:
            return [], b"", True
        rows = self._repository.store.list_events(job_id, after, PAGE_SIZE, MAX_PAGE_BYTES)
        return rows, self._read_progress(job), job.status.is_final and not rows

    def _read_progress(self, job: Job) -> bytes:
        """What the current attempt reported last, as a server-sent event. A job that no attempt runs costs no read."""
        heartbeat = self._repository.find_heartbeat(job) if job.status.is_active else None
        if heartbeat is None or (heartbeat.phase is None and heartbeat.progress is None):
            return b""
        progress = heartbeat.progress.model_dump(mode="json") if heartbeat.progress else None
        return b"event: progress\ndata: %s\n\n" % orjson.dumps({"phase": heartbeat.phase, "progress": progress})

    async def _read_chunk(self, job_id: str, after: int, until: int) -> _Chunk | None:
        """A chunk for a client that joined later, or fell behind the buffered chunks; None while the store does not answer."""
        try:
            page = await run_in_thread(self._repository.store.list_events, job_id, after, PAGE_SIZE, MAX_PAGE_BYTES)
        except Unavailable as error:
            log.warning("events cannot be read now", extra={"job_id": job_id, "error": error.message})
            return None
        rows = [row for row in page if row.cursor <= until]
        return _Chunk(rows[-1].cursor if rows else until, _render(rows))


def _key(principal: Principal, job_id: str) -> FeedKey:
    return principal.tenant_id, job_id


# Any: the fields depend on the event; each row is plain JSON already.
def _render(rows: list[StoredEvent]) -> bytes:
    return b"".join(_render_one(event_row(row)) for row in rows)


def _render_one(row: dict[str, Any]) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (row["id"], row["event"]["type"].encode(), orjson.dumps(row))
