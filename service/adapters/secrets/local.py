"""Secrets as one encrypted file per job, readable only by the owner. The key is a separate file in the same folder."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from uuid import uuid4

from cryptography.fernet import Fernet, InvalidToken

from service.core.errors import Unavailable

SUFFIX = ".secret"


class LocalSecretStore:
    """A folder, mode 0700, of files, mode 0600, encrypted with Fernet (AES-128-CBC and HMAC-SHA256)."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        self._folder = folder
        self._fernet = Fernet(load_or_create_key(folder / "key", Fernet.generate_key))

    def put(self, job_id: str, secrets: Mapping[str, str]) -> None:
        encrypted = self._fernet.encrypt(json.dumps(dict(secrets)).encode())
        part = self._path(job_id).with_suffix(f".{uuid4().hex}.part")  # concurrent calls write different files
        write_private_file(part, encrypted)
        part.replace(self._path(job_id))

    def read(self, job_id: str) -> dict[str, str]:
        try:
            return json.loads(self._fernet.decrypt(self._path(job_id).read_bytes()))
        except FileNotFoundError:
            return {}
        except InvalidToken as error:
            raise Unavailable(f"the secrets of {job_id} cannot be decrypted: the key in {self._folder} has changed") from error

    def destroy(self, job_id: str) -> bool:
        try:
            self._path(job_id).unlink()
        except FileNotFoundError:
            return False
        return True

    def iter_job_ids(self) -> Iterator[str]:
        return (path.name.removesuffix(SUFFIX) for path in sorted(self._folder.glob(f"*{SUFFIX}")))

    def close(self) -> None:
        return None

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}{SUFFIX}"


def load_or_create_key(path: Path, generate: Callable[[], bytes]) -> bytes:
    """The key in a file, created at first use. Two processes that create it at the same time get the same key."""
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}")
        write_private_file(part, generate())
        try:
            os.link(part, path)  # atomic, and fails when another process was first
        except FileExistsError:
            return path.read_bytes()
        finally:
            part.unlink()
    return path.read_bytes()


def write_private_file(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read, durably. Raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
