"""Object storage: bytes under keys, in a folder or a bucket. The service and the jobs share it.

The ObjectStore port with its errors, the registry, and one file per kind of store belong here. A vendor's SDK is imported only by its
own store's file, which the registry loads when a URL names its scheme. Code about jobs does not belong here.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import BinaryIO, Protocol, TypeVar

MAX_CONCURRENT_TRANSFERS = 8  # enough to saturate a network; each holds a part of about 16 MB in memory

Item = TypeVar("Item")
ReturnT = TypeVar("ReturnT")
TokenSource = Callable[[], tuple[str, datetime]]  # an access token and when it expires. Raises StorageError


@dataclass(frozen=True)
class StoredObject:
    """An object's metadata."""

    key: str
    size_bytes: int
    generation: str  # changes when the key is written again


class StorageError(Exception):
    """Base class of the errors that stores raise deliberately."""


class NoSuchObject(StorageError):
    """No object has that key."""


class ObjectExists(StorageError):
    """A write with `if_absent` found the key taken."""


class ChecksumMismatch(StorageError):
    """The bytes that arrived are not the bytes that were sent; nothing became visible."""


class InvalidKey(StorageError):
    """The key leads outside its store, is empty, or holds characters that a store may refuse."""


class StoreUnavailable(StorageError):
    """The store did not answer, refused the credentials, or has no space."""


class StoreFull(StoreUnavailable):
    """The store has no space left."""


class ObjectStore(Protocol):
    """Bytes under `/`-separated keys. A write becomes visible as a whole or not at all; a reader never sees part of one.

    Every method may raise StoreUnavailable, and InvalidKey for a key that `check_key` rejects. Not promised: the order of concurrent
    writes to one key, and empty folders.
    """

    url: str

    def write(self, key: str, content: bytes, *, if_absent: bool = False) -> StoredObject:
        """Store a small object. Raises ObjectExists when `if_absent` and the key is taken, ChecksumMismatch."""
        ...

    def read(self, key: str) -> bytes:
        """The content of a small object. Raises NoSuchObject, ChecksumMismatch."""
        ...

    def open_read(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A stream over an object of any size. Raises NoSuchObject; reading it may raise ChecksumMismatch."""
        ...

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to but not including `end`, in one request; fewer at the end of the object, none beyond it.

        No checksum covers a part of an object. Raises NoSuchObject.
        """
        ...

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        """Store a file of any size, verified on arrival. Raises ChecksumMismatch when its SHA-256 is not `sha256`."""
        ...

    def download(self, key: str, target: Path) -> Path:
        """Write an object of any size to `target`; creates its folder. Raises NoSuchObject, ChecksumMismatch."""
        ...

    def stat(self, key: str) -> StoredObject | None:
        """An object's metadata, or None."""
        ...

    def iter_objects(self, prefix: str) -> Iterator[StoredObject]:
        """The objects whose keys start with `prefix`, in key order. A prefix that ends in `/` is a folder."""
        ...

    def delete(self, key: str) -> bool:
        """Delete an object; False when there was none."""
        ...


def check_key(key: str) -> str:
    """Return the key if every store accepts it. Raises InvalidKey."""
    parts = key.split("/")
    if not key or len(key.encode()) > 900 or any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 or c == "\\" for c in key):
        raise InvalidKey(f"not a key: {key!r}; a valid one is like models/job-1/file.bin")
    return key


def delete_prefix(store: ObjectStore, prefix: str) -> list[str]:
    """Delete every object in a folder and return their keys. Can be repeated until it returns none. Raises InvalidKey, StoreUnavailable."""
    if not prefix.endswith("/"):
        raise InvalidKey(f"a folder ends in '/': {prefix!r}")
    keys = [stored.key for stored in store.iter_objects(prefix)]
    return [key for key, deleted in zip(keys, map_concurrently(store.delete, keys), strict=True) if deleted]


def map_concurrently(function: Callable[[Item], ReturnT], items: Sequence[Item]) -> list[ReturnT]:
    """Apply a function to every item, several at a time; returns the results in order. Every thread inherits the caller's deadline.

    Raises the first error in the order of the items. After an error no further call starts; those in progress finish.
    """
    if len(items) < 2:
        return [function(item) for item in items]
    failed = Event()

    def call_unless_failed(item: Item) -> ReturnT:
        if failed.is_set():
            raise CancelledError
        try:
            return function(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(min(MAX_CONCURRENT_TRANSFERS, len(items)), "transfer") as pool:
        futures = [pool.submit(copy_context().run, call_unless_failed, item) for item in items]
    errors = (future.exception() for future in futures)
    first_error = next((error for error in errors if error is not None and not isinstance(error, CancelledError)), None)
    if first_error is not None:
        raise first_error
    return [future.result() for future in futures]
