"""Objects as files below a folder: `file:///absolute/path`."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from storage import (
    ChecksumMismatch,
    InvalidKey,
    NoSuchObject,
    ObjectExists,
    StorageError,
    StoredObject,
    StoreFull,
    StoreUnavailable,
    check_key,
)

CHUNK_BYTES = 1 << 20
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INCOMING = ".incoming"  # unfinished files; in the same file system, so that a rename publishes them


class LocalStore:
    """A folder. Writes go to a temporary file that is synced to disk and renamed, so a crash leaves no partial object."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise StorageError(f"not a folder URL: {url!r}; a valid one is like file:///home/me/objects")
        self.url = url.rstrip("/")
        self.root = Path(unquote(parts.path))

    def write(self, key: str, content: bytes, *, if_absent: bool = False) -> StoredObject:
        path = self.path_for_key(key)
        with self._open_temporary() as temporary:
            temporary.stream.write(content)
            return self._publish(temporary, path, key, if_absent=if_absent)

    def read(self, key: str) -> bytes:
        with self.open_read(key) as stream:
            return stream.read()

    def open_read(self, key: str) -> AbstractContextManager[BinaryIO]:
        try:
            return self.path_for_key(key).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise NoSuchObject(f"nothing is stored at {self.url}/{key}") from error

    def read_range(self, key: str, start: int, end: int) -> bytes:
        with self.open_read(key) as stream:
            stream.seek(start)
            return stream.read(max(0, end - start))

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        path = self.path_for_key(key)
        digest = hashlib.sha256()
        with source.open("rb") as reader, self._open_temporary() as temporary:
            while chunk := reader.read(CHUNK_BYTES):
                digest.update(chunk)
                temporary.stream.write(chunk)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise ChecksumMismatch(f"{source.name} changed on its way to {self.url}/{key}: expected {sha256}, got {digest.hexdigest()}")
            return self._publish(temporary, path, key, if_absent=False)

    def download(self, key: str, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        with self.open_read(key) as reader, part.open("wb") as writer:
            shutil.copyfileobj(reader, writer, CHUNK_BYTES)
        return part.replace(target)

    def stat(self, key: str) -> StoredObject | None:
        path = self.path_for_key(key)
        try:
            return _stored_object(path, key) if path.is_file() else None
        except FileNotFoundError:
            return None

    def iter_objects(self, prefix: str) -> Iterator[StoredObject]:
        folder = self.root / prefix.rpartition("/")[0]
        if not folder.resolve().is_relative_to(self.root.resolve()):
            raise InvalidKey(f"not below the store: {prefix!r}")
        keys = (Path(parent, name).relative_to(self.root).as_posix() for parent, _, names in os.walk(folder) for name in names)
        for key in sorted(key for key in keys if key.startswith(prefix) and not key.startswith(INCOMING + "/")):
            if (stored := self.stat(key)) is not None:  # None: deleted since the folder was read
                yield stored

    def delete(self, key: str) -> bool:
        path = self.path_for_key(key)
        try:
            path.unlink()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return False
        _remove_empty_parents(path, self.root)
        return True

    def path_for_key(self, key: str) -> Path:
        """The file behind a key, which may not exist. Only this store has files."""
        path = self.root / check_key(key)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise InvalidKey(f"the key leaves the store through a link: {key!r}")
        return path

    @contextmanager
    def open_write(self, key: str) -> Generator[BinaryIO]:
        """A stream that becomes an object when the block ends without an error. Only this store has it."""
        path = self.path_for_key(key)
        with self._open_temporary() as temporary:
            yield temporary.stream
            self._publish(temporary, path, key, if_absent=False)

    @contextmanager
    def _open_temporary(self) -> Generator["_TemporaryFile"]:
        """A temporary file, deleted at the end unless it was renamed."""
        try:
            (self.root / INCOMING).mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.root / INCOMING)
        except OSError as error:
            raise _translate_error(error, self.root) from error
        try:
            with open(descriptor, "wb") as temporary:
                yield _TemporaryFile(temporary, Path(name))
        except OSError as error:
            if error.errno in (*DISK_FULL_ERRNOS, errno.EROFS):
                raise _translate_error(error, self.root) from error
            raise
        finally:
            Path(name).unlink(missing_ok=True)

    def _publish(self, temporary: "_TemporaryFile", path: Path, key: str, *, if_absent: bool) -> StoredObject:
        temporary.stream.flush()
        os.fsync(temporary.stream.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        if if_absent:
            try:
                os.link(temporary.path, path)  # unlike a rename, a link fails when the name is taken
            except FileExistsError as error:
                raise ObjectExists(f"{self.url}/{key} already exists") from error
        else:
            os.replace(temporary.path, path)
        _sync_folder(path.parent)
        return _stored_object(path, key)


@dataclass(frozen=True)
class _TemporaryFile:
    """An object that is not complete yet."""

    stream: BinaryIO
    path: Path


def _translate_error(error: OSError, root: Path) -> StoreUnavailable:
    if error.errno in DISK_FULL_ERRNOS:
        return StoreFull(f"no space left below {root}")
    return StoreUnavailable(f"cannot write below {root}: {error.strerror}")


def _stored_object(path: Path, key: str) -> StoredObject:
    stat = path.stat()
    return StoredObject(key=key, size_bytes=stat.st_size, generation=f"{stat.st_mtime_ns}-{stat.st_ino}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty_parents(path: Path, root: Path) -> None:
    for folder in path.parents:
        if folder == root:
            return
        try:
            folder.rmdir()
        except OSError:
            return
