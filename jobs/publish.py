"""The step to the outside: files first, each verified on arrival, then the manifest that makes them visible.

Readers believe only the manifest. It is created once, so that of two attempts only one can publish.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from jobs.errors import JobFailed
from schema.job import Artifact, ArtifactFile, ArtifactKind, Fidelity
from schema.result import PublishManifest
from schema.spec import manifest_key
from storage import ChecksumMismatch, ObjectExists, ObjectStore, StorageError, StoreUnavailable, upload_many

log = logging.getLogger(__name__)

TRIES = 5
RETRY_FIRST_S = 0.5
RETRY_MOST_S = 15.0  # 0.5 + 1 + 2 + 4: eight seconds in all, a store's restart

Done = TypeVar("Done")


@dataclass(frozen=True)
class Product:
    """A finished file or folder on this machine, and where it goes. The key of a folder ends in "/"."""

    name: str
    kind: ArtifactKind
    path: Path
    key: str
    fidelity: Fidelity | None = None


@dataclass(frozen=True)
class Publisher:
    """Publishes for one attempt of one job."""

    store: ObjectStore
    job_id: str
    attempt: int
    sleep: Callable[[float], None] = time.sleep

    def refuse_if_published(self) -> None:
        """Raises JobFailed when another attempt has published: its files lie where ours would go."""
        manifest = self._existing_manifest()
        if manifest is not None and manifest.attempt != self.attempt:
            raise _taken(manifest)

    def publish(self, product: Product) -> Artifact:
        """Upload a product, every file checked on arrival; not visible before the manifest. Raises JobFailed."""
        files = [_described(path, product) for path in _files(product.path)]
        moves = [(product.path / file.path if file.path else product.path, product.key + file.path, file.sha256) for file in files]
        self._patiently(product.name, lambda: upload_many(self.store, moves))
        return Artifact(
            name=product.name,
            kind=product.kind,
            uri=f"{self.store.url}/{product.key}",
            key=product.key,
            size_bytes=sum(file.size_bytes for file in files),
            files=files,
            fidelity=product.fidelity,
        )

    def write_manifest(self, artifacts: tuple[Artifact, ...]) -> PublishManifest:
        """Make the artifacts visible; returns the manifest that counts. Raises JobFailed when another attempt was first."""
        manifest = PublishManifest(job_id=self.job_id, attempt=self.attempt, artifacts=artifacts, created_at=datetime.now(UTC))
        content = manifest.model_dump_json(indent=1).encode()
        key = manifest_key(self.job_id)
        try:
            self._patiently("the manifest", lambda: self.store.write(key, content, if_absent=True))
        except ObjectExists:
            return self._ours()
        return manifest

    def _ours(self) -> PublishManifest:
        """The manifest that was there already: our own, when a write succeeded whose answer was lost."""
        manifest = self._existing_manifest()
        if manifest is None:
            raise JobFailed("upload_failed", "the job was deleted while its files were being published")
        if manifest.attempt != self.attempt:
            raise _taken(manifest)
        return manifest

    def _existing_manifest(self) -> PublishManifest | None:
        key = manifest_key(self.job_id)
        if self._patiently("the manifest", lambda: self.store.stat(key)) is None:
            return None
        return PublishManifest.load(self._patiently("the manifest", lambda: self.store.read(key)))

    def _patiently(self, what: str, act: Callable[[], Done]) -> Done:
        """Try again while the store is away or mangles what it gets. Raises JobFailed, and ObjectExists as it is."""
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((StoreUnavailable, ChecksumMismatch)),
            wait=tenacity.wait_exponential(RETRY_FIRST_S, RETRY_MOST_S),
            stop=tenacity.stop_after_attempt(TRIES),
            sleep=self.sleep,
            reraise=True,
        )
        try:
            return retrying(act)
        except ObjectExists:
            raise
        except (StorageError, OSError) as error:
            log.error("store failed", extra={"what": what, "error": str(error)})
            message = f"{what} could not be stored: {error}"
            raise JobFailed("upload_failed", message, "check the room and the permissions of the store, then retry the job") from error


def sha256_of(path: Path) -> str:
    """The digest of a file of any size."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _described(path: Path, product: Product) -> ArtifactFile:
    relative = path.relative_to(product.path).as_posix() if product.path.is_dir() else ""
    return ArtifactFile(path=relative, size_bytes=path.stat().st_size, sha256=sha256_of(path))


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _taken(manifest: PublishManifest) -> JobFailed:
    message = f"attempt {manifest.attempt} has published this job already, at {manifest.created_at:%Y-%m-%d %H:%M:%S} UTC"
    return JobFailed("upload_failed", message, "download what it published, or start a new job")
