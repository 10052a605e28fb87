"""Uploads what an attempt exported, below the attempt's own number; the store verifies each file on arrival.

Uploading publishes nothing: the attempt's result names the files, and the service accepts the result of the current attempt only.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from jobs.runtime.context import JobContext
from jobs.runtime.files import describe_file, list_files
from jobs.runtime.retry import upload_with_retry
from schema.job import Artifact, ArtifactFile
from schema.spec import artifact_key
from schema.types import ArtifactKind
from storage import ObjectStore, StorageError, delete_prefix, map_concurrently

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportedArtifact:
    """A finished file or folder on this machine and the key to upload it to. The key of a folder ends in "/"."""

    name: str
    kind: ArtifactKind
    path: Path
    key: str
    fidelity: Mapping[str, JsonValue] | None = None  # what the family measured of it, if anything
    hub_folder: str = ""  # where its files go in a repository on the Hub: "" is the root, a folder ends in "/"
    companions: tuple[Path, ...] = ()  # files that belong beside a single file, and go wherever it goes

    def list_files(self) -> list[tuple[Path, Path]]:
        """Each file, and what its path is relative to: the artifact's folder, the file itself, or the file's folder for a companion."""
        return [*((path, self.path) for path in list_files(self.path)), *((path, path.parent) for path in self.companions)]


def upload_artifacts(exported_artifacts: Sequence[ExportedArtifact], context: JobContext) -> tuple[Artifact, ...]:
    """Upload everything that an attempt exported, after deleting what earlier attempts left. Raises JobFailed `upload_failed`, Stopped."""
    context.enter_phase("uploading")
    uploader = ArtifactUploader(context.stores.models, context.spec.job_id, context.attempt)
    uploader.delete_previous_attempts(context.spec.training_config.artifact_folders())
    artifacts: list[Artifact] = []
    for exported in exported_artifacts:
        context.check_stop()
        artifacts.append(uploader.upload(exported))
        context.log_artifact(artifacts[-1])
    context.check_stop()
    return tuple(artifacts)


@dataclass(frozen=True)
class ArtifactUploader:
    """Uploads for one attempt of one job."""

    store: ObjectStore
    job_id: str
    attempt: int
    sleep: Callable[[float], None] = time.sleep

    def delete_previous_attempts(self, folders: Sequence[str]) -> None:
        """Delete what earlier attempts uploaded to `folders` and never published. What cannot be deleted stays until the job is deleted."""
        earlier = [artifact_key(folder, self.job_id, number) for folder in sorted(folders) for number in range(1, self.attempt)]
        try:
            for prefix in earlier:
                delete_prefix(self.store, prefix)
        except StorageError as error:
            log.warning("could not delete files of earlier attempts", extra={"error": str(error)})

    def upload(self, exported: ExportedArtifact) -> Artifact:
        """Upload an exported artifact; each file that does not arrive intact is retried by itself. Raises JobFailed."""
        files = [(path, describe_file(path, root)) for path, root in exported.list_files()]
        artifact = Artifact(
            name=exported.name,
            kind=exported.kind,
            uri=f"{self.store.url}/{exported.key}",
            key=exported.key,
            size_bytes=sum(file.size_bytes for _, file in files),
            files=[file for _, file in files],
            fidelity=None if exported.fidelity is None else dict(exported.fidelity),
        )
        map_concurrently(lambda pair: self._upload_file(artifact, *pair), files)
        return artifact

    def _upload_file(self, artifact: Artifact, path: Path, file: ArtifactFile) -> None:
        message = f"{artifact.name} could not be stored"
        upload_with_retry(message, self.store, path, artifact.file_key(file), file.sha256, sleep=self.sleep)
