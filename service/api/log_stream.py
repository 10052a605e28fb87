"""Following the output of a job's attempts as it is written, as server-sent events or as plain text."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import orjson

from service.api.stream import Feeds, run_in_thread
from service.core.errors import InvalidRequest
from service.core.jobs.assembly import JobServices
from service.core.principals import Principal

POLL_S = 0.25
PAGE_BYTES = 1 << 16
MAX_ATTEMPT = 10_000
MAX_OFFSET = 1 << 40  # file systems refuse to seek beyond some TiB


@dataclass(frozen=True)
class LogChunk:
    """A part of an attempt's output, and where the next part begins (bytes)."""

    attempt: int
    text: str
    next_offset: int


@dataclass(frozen=True)
class LogFollower:
    """A client that follows the output of a job: of one attempt, or without `only_attempt` of each attempt in turn."""

    feeds: Feeds
    jobs: JobServices
    principal: Principal
    job_id: str
    only_attempt: int | None
    first_attempt: int  # 0: there is none yet
    offset: int

    async def follow_as_text(self) -> AsyncIterator[str]:
        """The output as it is."""
        async for chunk in self._follow():
            if chunk:
                yield chunk.text

    async def follow_as_events(self) -> AsyncIterator[bytes]:
        """Server-sent events, each with the position after it as its id; at last one `done`."""
        async for chunk in self._follow():
            yield _render(chunk) if chunk else b"event: done\ndata: {}\n\n"

    async def _follow(self) -> AsyncIterator[LogChunk | None]:
        """The output in whole lines where it has any; None when nothing can follow. Ends without it when the service stops."""
        with self.feeds.count(self.principal, self.job_id):
            number, offset = self.first_attempt, self.offset
            while not self.feeds.is_stopping:
                job = await run_in_thread(self.jobs.repository.find_or_none, self.principal, self.job_id)
                newest = len(job.attempts) if job else 0
                number = number or newest
                chunk = await run_in_thread(self._read, number, offset) if job and number else None
                if chunk and chunk.text:
                    offset = chunk.next_offset
                    yield chunk
                elif number < newest and self.only_attempt is None:
                    number, offset = number + 1, 0
                elif job is None or job.status.is_final or number < newest:
                    yield None
                    return
                else:
                    await asyncio.sleep(POLL_S)

    def _read(self, number: int, offset: int) -> LogChunk:
        _, page = self.jobs.queries.read_log(self.principal, self.job_id, number, offset, PAGE_BYTES, whole_lines=True)
        return LogChunk(number, page.text, page.next_offset)


def parse_log_position(text: str) -> tuple[int, int]:
    """The attempt and the offset of a Last-Event-ID. Raises InvalidRequest."""
    attempt, _, offset = text.partition(":")
    if not all(part.isascii() and part.isdigit() for part in (attempt, offset)):
        raise InvalidRequest(
            f"Last-Event-ID must be the id of an event of this stream, such as 1:4096; not {text!r}", param="Last-Event-ID"
        )
    if not (1 <= int(attempt) <= MAX_ATTEMPT and int(offset) <= MAX_OFFSET):
        raise InvalidRequest(f"no event of this stream has the id {text}", param="Last-Event-ID")
    return int(attempt), int(offset)


def _render(chunk: LogChunk) -> bytes:
    data = orjson.dumps({"text": chunk.text, "attempt": chunk.attempt, "offset": chunk.next_offset})
    return b"id: %d:%d\nevent: log\ndata: %s\n\n" % (chunk.attempt, chunk.next_offset, data)
