"""Bytes under keys, wherever they lie: the one adapter that the service and the jobs both hold.

Here belong the ObjectStore port and one file per kind of store. Vendor SDKs are imported inside functions.
Here belongs nothing that knows what a job is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from threading import Event
from typing import BinaryIO, Protocol, TypeVar

MAX_TRANSFERS = 8  # transfers: enough to fill a network, and each holds a part of some 16 MB in memory

Item = TypeVar("Item")
ReturnT = TypeVar("ReturnT")


@dataclass(frozen=True)
class StoredObject:
    """What is known of an object without reading it."""

    key: str
    size_bytes: int
    generation: str  # changes at every write of the key


class StorageError(Exception):
    """Base of everything that a store raises deliberately."""


class NoSuchObject(StorageError):
    """Nothing is stored under that key."""


class ObjectExists(StorageError):
    """A write that had to be the first found the key taken."""


class ChecksumMismatch(StorageError):
    """What arrived is not what was sent; nothing became visible."""


class InvalidKey(StorageError):
    """A key leaves its store, is empty, or holds characters that a store may refuse."""


class StoreUnavailable(StorageError):
    """The store did not answer, refused the credentials, or has no room."""


class StoreFull(StoreUnavailable):
    """The store has no room left."""


class ObjectStore(Protocol):
    """Bytes under `/`-separated keys. A write becomes visible whole or not at all; readers never see half an object.

    Not promised: order of concurrent writes of one key, and empty folders.
    """

    url: str

    def write(self, key: str, content: bytes, *, if_absent: bool = False) -> StoredObject:
        """Store a small object. Raises ObjectExists when `if_absent` and the key is taken."""
        ...

    def read(self, key: str) -> bytes:
        """A small object, whole. Raises NoSuchObject."""
        ...

    def open_read(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A stream over an object of any size. Raises NoSuchObject."""
        ...

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        """Store a file of any size; checked on arrival. Raises ChecksumMismatch when it is not `sha256`."""
        ...

    def download(self, key: str, target: Path) -> Path:
        """Write an object of any size to `target`, whose folder is made. Raises NoSuchObject, ChecksumMismatch."""
        ...

    def stat(self, key: str) -> StoredObject | None:
        """What is known of an object, or None."""
        ...

    def iter_objects(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose key starts with `prefix`, in key order. A prefix that ends in `/` is a folder."""
        ...

    def delete(self, key: str) -> bool:
        """Remove an object; False when there was none."""
        ...


# One line adds a store: url scheme → "module:Class", constructed with the url.
STORES = {
    "file": "storage.file:LocalStore",
    "gs": "storage.gs:GcsStore",
    "s3": "storage.s3:S3Store",
}


def open_store(url: str) -> ObjectStore:
    """The store behind a url such as file:///home/me/objects. Raises StorageError for a scheme that is not known."""
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        raise StorageError(f"no object store for {url!r}; known schemes: {', '.join(sorted(STORES))}")
    return resolve_name(STORES[scheme])(url)


def check_key(key: str) -> str:
    """The key itself, if it is one that every store accepts. Raises InvalidKey."""
    parts = key.split("/")
    if not key or len(key.encode()) > 900 or any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 or c == "\\" for c in key):
        raise InvalidKey(f"not a key: {key!r}; a key is like models/job-1/file.bin")
    return key


def delete_prefix(store: ObjectStore, prefix: str) -> list[str]:
    """Remove every object below a folder, and say which. Can be repeated until it returns nothing."""
    if not prefix.endswith("/"):
        raise InvalidKey(f"a folder ends in '/': {prefix!r}")
    keys = [stored.key for stored in store.iter_objects(prefix)]
    return [key for key, gone in zip(keys, map_concurrently(store.delete, keys), strict=True) if gone]


def upload_many(store: ObjectStore, files: Iterable[tuple[Path, str, str | None]]) -> list[StoredObject]:
    """Store files, several at a time; each is a path, a key and the sha256 it must have, and is checked on arrival.

    The first failure is raised; what has not begun by then is left out, what has is finished.
    """
    return map_concurrently(lambda file: store.upload(file[0], file[1], sha256=file[2]), list(files))


def download_many(store: ObjectStore, keys: Iterable[str], folder: Path, *, strip_prefix: str = "") -> list[Path]:
    """Bring objects to a folder, several at a time, each under its key without the prefix `below`. Fails as `upload_many` does."""
    return map_concurrently(lambda key: store.download(key, folder / check_key(key).removeprefix(strip_prefix)), list(keys))


def map_concurrently(function: Callable[[Item], ReturnT], items: Sequence[Item]) -> list[ReturnT]:
    """What `act` makes of each, several at a time, in their order. Whoever waits for it is known to every thread.

    The first failure is raised; what has not begun by then is left out, what has is finished.
    """
    if len(items) < 2:
        return [function(item) for item in items]
    failed = Event()

    def unless_failed(item: Item) -> ReturnT:
        if failed.is_set():
            raise CancelledError
        try:
            return function(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(min(MAX_TRANSFERS, len(items)), "transfer") as pool:
        started = [pool.submit(copy_context().run, unless_failed, item) for item in items]
    errors = (future.exception() for future in started)
    first = next((error for error in errors if error is not None and not isinstance(error, CancelledError)), None)
    if first is not None:
        raise first
    return [future.result() for future in started]
