"""What the network stores share: bucket URLs, timeouts, retries, and reading in ranges with a checksum over the whole."""

import io
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit

from storage import ChecksumMismatch, InvalidKey, StorageError, StoreUnavailable, check_key
from storage.deadline import remaining_s

CONNECT_TIMEOUT_S = 3.05  # just over TCP's first retransmission
READ_TIMEOUT_S = 30.0  # without receiving a byte
MAX_RETRY_S = 120.0  # the longest outage that a call survives; API requests set shorter deadlines
INITIAL_BACKOFF_S = 0.1
MAX_BACKOFF_S = 8.0
PART_BYTES = 16 << 20  # held in memory at a time, and sent again when a connection breaks
FIRST_RANGE_BYTES = 1 << 20  # one request for a small object, and reading only the beginning stays cheap

BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")  # accepted by every vendor

ReturnT = TypeVar("ReturnT")


class TransientStoreError(StoreUnavailable):
    """The store did not answer or is too busy; a retry may succeed."""


class Digest(Protocol):
    """An incremental checksum, such as hashlib's."""

    def update(self, chunk: bytes, /) -> None:
        """Add bytes."""
        ...

    def digest(self) -> bytes:
        """The checksum of all bytes added so far."""
        ...


@dataclass(frozen=True)
class StoredDigest:
    """The checksum that the store keeps of a whole object."""

    new_digest: Callable[[], Digest]
    digest: bytes


@dataclass(frozen=True)
class BucketLocation:
    """A bucket and the folder in it that holds a store's keys."""

    scheme: str
    bucket: str
    folder: str  # "" or "some/folder/"

    @classmethod
    def parse(cls, url: str, scheme: str) -> "BucketLocation":
        """Parse a URL. Raises StorageError for one that is not like gs://bucket or gs://bucket/folder."""
        parts = urlsplit(url)
        folder = parts.path.strip("/")
        if parts.scheme != scheme or not BUCKET.fullmatch(parts.netloc) or parts.query or parts.fragment:
            raise StorageError(f"not a bucket URL: {url!r}; a valid one is like {scheme}://bucket or {scheme}://bucket/folder")
        return cls(scheme, parts.netloc, check_key(folder) + "/" if folder else "")

    @property
    def url(self) -> str:
        """The canonical form."""
        return f"{self.scheme}://{self.bucket}/{self.folder}".rstrip("/")

    def object_name(self, key: str) -> str:
        """The object's name in the bucket. Raises InvalidKey."""
        return self.folder + check_key(key)

    def key_from_object_name(self, name: str) -> str | None:
        """The key of an object in the bucket; None for an object whose name is not a valid key, which another writer put there."""
        try:
            return check_key(name.removeprefix(self.folder))
        except InvalidKey:
            return None


def retry_transient(function: Callable[[], ReturnT]) -> ReturnT:
    """Call a function; repeat it with growing pauses while it raises TransientStoreError and the caller's deadline allows."""
    give_up_at = time.monotonic() + remaining_s(MAX_RETRY_S)
    for pause_s in _backoff_delays_s():
        try:
            return function()
        except TransientStoreError:
            if time.monotonic() + pause_s >= give_up_at:
                raise
            time.sleep(pause_s)
    raise AssertionError("the loop ends by returning or raising")


def retry_on_checksum_mismatch(function: Callable[[], ReturnT]) -> ReturnT:
    """Call a function; repeat it once after a ChecksumMismatch: the network damages bytes more often than the store."""
    try:
        return function()
    except ChecksumMismatch:
        return function()


def checked_stream(size_bytes: int, fetch: Callable[[int, int], bytes], expected_digest: StoredDigest | None, name: str) -> BinaryIO:
    """An object as a stream. `fetch(start, end)` returns the bytes from `start` up to but not including `end`.

    Raises ChecksumMismatch before it returns the last bytes of an object that does not match `expected_digest`.
    """
    # BufferedReader is a BinaryIO in all but its declaration.
    return io.BufferedReader(_RangeReader(size_bytes, fetch, expected_digest, name), 1 << 16)  # pyright: ignore[reportReturnType]


def save_to_file(open_read: Callable[[], AbstractContextManager[BinaryIO]], target: Path) -> Path:
    """Save a stream as a file. The file appears only after the whole stream was read and its checksum verified."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        retry_on_checksum_mismatch(lambda: _copy(open_read, part))
        return part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def check_sha256(source: Path, expected: str | None, actual: str, url: str) -> None:
    """Raises ChecksumMismatch when a file's SHA-256 is not the one its sender expects."""
    if expected is not None and actual != expected:
        raise ChecksumMismatch(f"{source.name} changed on its way to {url}: expected {expected}, got {actual}")


class _RangeReader(io.RawIOBase):
    """Reads an object range by range, each larger than the one before."""

    def __init__(self, size_bytes: int, fetch: Callable[[int, int], bytes], expected_digest: StoredDigest | None, name: str) -> None:
        self._size = size_bytes
        self._fetch = fetch
        self._expected_digest = expected_digest
        self._digest = expected_digest.new_digest() if expected_digest else None
        self._name = name
        self._range = memoryview(b"")  # fetched, not yet handed out
        self._fetched = 0
        self._length = FIRST_RANGE_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview", /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self._range and self._fetched < self._size:
            self._range = memoryview(self._next_range())
        count = min(len(buffer), len(self._range))
        buffer[:count] = self._range[:count]
        self._range = self._range[count:]
        return count

    def _next_range(self) -> bytes:
        end = min(self._size, self._fetched + self._length)
        fetched = self._fetch(self._fetched, end)
        if len(fetched) != end - self._fetched:
            raise ChecksumMismatch(f"{self._name} arrived truncated: {len(fetched)} bytes of {end - self._fetched} from {self._fetched}")
        self._fetched = end
        self._length = min(PART_BYTES, 2 * self._length)
        if self._digest and self._expected_digest:
            self._digest.update(fetched)
            if end == self._size and self._digest.digest() != self._expected_digest.digest:
                raise ChecksumMismatch(f"{self._name} arrived damaged: its checksum differs from the one that the store keeps")
        return fetched


def _copy(open_read: Callable[[], AbstractContextManager[BinaryIO]], target: Path) -> None:
    with open_read() as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def _backoff_delays_s() -> Iterator[float]:
    pause_s = INITIAL_BACKOFF_S
    while True:
        yield random.uniform(pause_s / 2, pause_s)  # noqa: S311  # so that many clients do not retry together
        pause_s = min(MAX_BACKOFF_S, 2 * pause_s)
