"""Files that callers put into the dataset store themselves, because they are too large for a request: below incoming/."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePath

from service.core.errors import InvalidRequest, NotFound, TooLarge
from service.core.links import SignedUpload, UrlSigner
from service.core.principals import LOCAL_TENANT, Principal, Scope
from service.core.quotas import QuotaChecks
from storage import InvalidKey, ObjectStore, StoredObject
from storage.file import LocalStore

INCOMING_PREFIX = "incoming/"  # of the dataset store
UPLOADS_FOLDER = "uploads/"  # of the files that the service gave a link for: nobody else uses them, so they are deleted after use
UPLOAD_LINK_TTL = timedelta(hours=6)  # until the upload begins
UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")
MAX_NAME_CHARACTERS = 100


@dataclass(frozen=True)
class UploadTicket:
    """Where a caller sends a file, and the key by which it then becomes a dataset."""

    key: str
    upload: SignedUpload
    expires_at: datetime


class IncomingFiles:
    """The files of callers in the dataset store: below incoming/, or below incoming/<tenant>/ where there are several tenants."""

    def __init__(
        self,
        objects: ObjectStore,
        *,
        signer: UrlSigner,
        quotas: QuotaChecks,
        clock: Callable[[], datetime],
        random_suffix: Callable[[], str],
        max_bytes: int,
        max_upload_bytes: int,
        by_tenant: bool = False,
    ) -> None:
        """`max_bytes` limits every file, `max_upload_bytes` those that are sent to a link."""
        self._objects = objects
        self._signer = signer
        self._quotas = quotas
        self._clock = clock
        self._random_suffix = random_suffix
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes
        self._by_tenant = by_tenant

    def find(self, principal: Principal, key: str) -> StoredObject:
        """A file of the principal's tenant. Raises InvalidRequest, NotFound, TooLarge."""
        principal.require(Scope.DATASETS_WRITE)
        prefix = self._prefix(principal)
        is_at_the_top = principal.tenant_id == LOCAL_TENANT and key.startswith(INCOMING_PREFIX) and key.count("/") == 1
        if not (key.startswith(prefix) or is_at_the_top):
            raise InvalidRequest(f"{key!r} is not below {prefix} of {self._objects.url}", hint=f"put it at {prefix}", param="incoming")
        try:
            stored = self._objects.stat(key)
        except InvalidKey as error:
            raise InvalidRequest(str(error), param="incoming") from error
        if stored is None:
            raise NotFound(f"there is no object {key!r} in {self._objects.url}", hint="put the file there first", param="incoming")
        if stored.size_bytes > self._max_bytes:
            raise TooLarge(f"{key} has {stored.size_bytes} bytes; this deployment reads at most {self._max_bytes}", param="incoming")
        return stored

    def fetch(self, principal: Principal, key: str, folder: Path) -> Path:
        """The file on this machine: where it lies, or else a copy in the folder. Raises InvalidRequest, NotFound, TooLarge."""
        self.find(principal, key)
        if isinstance(self._objects, LocalStore):
            return self._objects.path_for_key(key)
        return self._objects.download(key, folder / "source")

    def create_upload(self, principal: Principal, filename: str, size_bytes: int) -> UploadTicket:
        """A link to which the caller sends a file of that size. Raises TooLarge, QuotaExceeded, Unavailable."""
        principal.require(Scope.DATASETS_WRITE)
        most = min(self._max_bytes, self._max_upload_bytes)
        if size_bytes > most:
            message = f"{filename} has {size_bytes} bytes; this deployment reads at most {most}"
            raise TooLarge(message, hint="compress it (.gz, .zst), or split it into several datasets", param="size_bytes")
        self._quotas.check_upload(principal.tenant_id)
        key = self._make_key(principal, filename)
        seconds = int(UPLOAD_LINK_TTL.total_seconds())
        return UploadTicket(key, self._signer.sign_upload(key, size_bytes, seconds), self._clock() + UPLOAD_LINK_TTL)

    def store(self, principal: Principal, path: Path, filename: str) -> str:
        """Store a file that arrived in a request, for a job that reads it; returns its key."""
        principal.require(Scope.DATASETS_WRITE)
        key = self._make_key(principal, filename)
        self._objects.upload(path, key)
        return key

    def discard(self, principal: Principal, key: str) -> None:
        """Delete a file that was uploaded for one dataset; a file that the caller put there in another way stays."""
        principal.require(Scope.DATASETS_WRITE)
        if key.startswith(self._prefix(principal) + UPLOADS_FOLDER):
            self._objects.delete(key)

    def _prefix(self, principal: Principal) -> str:
        return f"{INCOMING_PREFIX}{principal.tenant_id}/" if self._by_tenant else INCOMING_PREFIX

    def _make_key(self, principal: Principal, filename: str) -> str:
        """A key that nobody can guess. It ends as the file's name does: the suffix says how to read it."""
        name = UNSAFE_CHARACTERS.sub("_", PurePath(filename).name)[-MAX_NAME_CHARACTERS:].lstrip(".") or "rows"
        return f"{self._prefix(principal)}{UPLOADS_FOLDER}{self._random_suffix()}/{name}"
