"""The checkpoints of one job in the object store: listing, verifying, downloading, writing and deleting them.

A checkpoint is a folder of files below the number of the attempt that wrote it, and `manifest.json`, which holds their sha256 and is
written last. A folder without a manifest, or with a file that differs from it, does not count. An attempt writes below its own number
only.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from jobs.runtime.errors import JobFailed
from jobs.runtime.files import describe_file, list_files, sha256_of
from jobs.runtime.retry import retry_store, upload_with_retry
from schema.checkpoint import MANIFEST, Checkpoint
from schema.job import ArtifactFile
from schema.spec import JobSpec
from storage import (
    ChecksumMismatch,
    InvalidKey,
    NoSuchObject,
    ObjectExists,
    ObjectStore,
    StorageError,
    check_key,
    delete_prefix,
    map_concurrently,
)

log = logging.getLogger(__name__)

NOT_UPLOADED = frozenset({"training_args.bin"})  # a pickle that transformers writes and nothing reads
MAX_NAME_BYTES = 200  # of a file's name; file systems accept 255, and the name of a partial download is a little longer

ReturnT = TypeVar("ReturnT")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint in the store, as its manifest describes it."""

    key: str  # of its folder; ends in "/"
    checkpoint: Checkpoint


class CorruptCheckpoint(Exception):
    """The checkpoint differs from its manifest. The message says in what."""


def sort_for_resume(stored: Iterable[StoredCheckpoint], first_attempt: int, current_attempt: int) -> list[StoredCheckpoint]:
    """The checkpoints that an attempt may resume from, in the order to try: the latest attempt first, and in it the latest step."""
    eligible = (each for each in stored if first_attempt <= each.checkpoint.attempt <= current_attempt)
    return sorted(eligible, key=lambda each: (each.checkpoint.attempt, each.checkpoint.step), reverse=True)


def select_expired(in_order: Sequence[StoredCheckpoint], save_total_limit: int) -> list[StoredCheckpoint]:
    """The checkpoints to delete, of those that `sort_for_resume` sorted: all but the first `save_total_limit` and the best one.

    The best one has the lowest eval_loss.
    """
    measured = [each for each in in_order if each.checkpoint.eval_loss is not None]
    best = min(measured, key=lambda each: each.checkpoint.eval_loss or 0.0, default=None)
    return [each for each in in_order[save_total_limit:] if each is not best]


def validate_manifest(stored: StoredCheckpoint) -> None:
    """Raises CorruptCheckpoint if the files that the manifest names cannot be those of one folder. A manifest is untrusted input."""
    paths = [file.path for file in stored.checkpoint.files]
    for path in paths:
        try:
            check_key(stored.key + check_key(path))
        except InvalidKey as error:
            raise CorruptCheckpoint(f"its manifest names a file that leaves its folder: {path!r}") from error
    folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
    too_long = any(len(part.encode()) > MAX_NAME_BYTES for path in paths for part in path.split("/"))
    if not paths or len(set(paths)) < len(paths) or folders.intersection(paths) or too_long:
        raise CorruptCheckpoint("its manifest names no files, or files that no folder can hold")


class CheckpointStore:
    """A job's checkpoints in the object store, as one attempt uses them. Every call waits for a store that is unavailable."""

    def __init__(self, store: ObjectStore, spec: JobSpec, attempt: int, sleep: Callable[[float], None] = time.sleep) -> None:
        self._store = store
        self._spec = spec
        self._attempt = attempt
        self._sleep = sleep
        self._corrupt_keys: set[str] = set()

    def mark_corrupt(self, key: str) -> None:
        """Remember that the checkpoint in that folder differs from its manifest: it is not tried again, and may be replaced."""
        self._corrupt_keys.add(key)

    def list_for_resume(self, on_skipped: Callable[[str, str], None] = lambda _key, _reason: None) -> list[StoredCheckpoint]:
        """The checkpoints to resume from, in the order to try them. Raises JobFailed if the store stays unavailable.

        `on_skipped` is called with the folder and the reason of each checkpoint that does not count.
        """
        in_order = sort_for_resume(self._list_manifests(on_skipped), self._spec.resume_from_attempt, self._attempt)
        return [stored for stored in in_order if stored.key not in self._corrupt_keys]

    def read_manifest(self, key: str, job_id: str, attempt: int, step: int) -> StoredCheckpoint:
        """The checkpoint in a folder. Raises CorruptCheckpoint, NoSuchObject, and JobFailed if the store stays unavailable."""
        try:
            checkpoint = Checkpoint.from_verified_bytes(self._read(key + MANIFEST, lambda: self._store.read(key + MANIFEST)))
        except (ValueError, RecursionError) as error:  # RecursionError: JSON that is nested too deeply
            raise CorruptCheckpoint("its manifest cannot be read, or is not what was written") from error
        if (checkpoint.job_id, checkpoint.attempt, checkpoint.step) != (job_id, attempt, step):
            raise CorruptCheckpoint("its manifest is of another checkpoint")
        return StoredCheckpoint(key, checkpoint)

    def download(self, stored: StoredCheckpoint, target: Path) -> None:
        """Download a checkpoint into a fresh folder and compare every file with the manifest.

        Raises CorruptCheckpoint, JobFailed, and NoSuchObject if the whole checkpoint has been deleted meanwhile.
        """
        validate_manifest(stored)
        shutil.rmtree(target, ignore_errors=True)
        try:
            map_concurrently(lambda file: self._download_file(stored.key, file, target), stored.checkpoint.files)
        except (CorruptCheckpoint, NoSuchObject) as error:
            shutil.rmtree(target, ignore_errors=True)  # the checkpoint that is tried next needs the room
            manifest = stored.key + MANIFEST
            if isinstance(error, CorruptCheckpoint) or self._read(manifest, lambda: self._store.stat(manifest)) is None:
                raise
            raise CorruptCheckpoint(f"a file is missing: {error}") from error

    def write(self, key: str, folder: Path, make_manifest: Callable[[tuple[ArtifactFile, ...]], Checkpoint]) -> Checkpoint:
        """Upload a folder's files and, once all are stored, their manifest. Raises JobFailed."""
        files = tuple(describe_file(path, folder) for path in list_files(folder) if path.name not in NOT_UPLOADED)
        map_concurrently(
            lambda file: upload_with_retry(
                f"{PurePosixPath(file.path).name} could not be stored",
                self._store,
                folder / file.path,
                key + file.path,
                file.sha256,
                sleep=self._sleep,
            ),
            files,
        )
        checkpoint = make_manifest(files)
        content = checkpoint.with_checksum()
        with suppress(ObjectExists):  # our own manifest: the response to the first try was lost
            retry_store(
                "the checkpoint's manifest could not be stored",
                lambda: self._store.write(key + MANIFEST, content, if_absent=True),
                sleep=self._sleep,
            )
        return checkpoint

    def find_saved(self, key: str, step: int) -> Checkpoint | None:
        """This attempt's checkpoint of that step, if it is stored already: a training that runs out of memory repeats steps.

        An intact one is kept, because files and manifest must come from the same save. The manifest of a corrupt one is deleted, so that
        the checkpoint can be written again.
        """
        try:
            stored = self.read_manifest(key, self._spec.job_id, self._attempt, step)
            if key not in self._corrupt_keys:
                return stored.checkpoint
        except NoSuchObject:
            return None
        except CorruptCheckpoint:
            pass
        message = "the damaged checkpoint could not be replaced"
        retry_store(message, lambda: self._store.delete(key + MANIFEST), sleep=self._sleep)
        self._corrupt_keys.discard(key)
        return None

    def prune(self, newest_key: str, save_total_limit: int) -> None:
        """Delete expired and incomplete checkpoints of this and earlier attempts. Only logs a warning if it cannot.

        Deletes the manifest first, so that a checkpoint is complete or does not count.
        """
        try:
            in_order = sort_for_resume(self._list_manifests(), 1, self._attempt)
            for stored in select_expired(in_order, save_total_limit):
                self._store.delete(stored.key + MANIFEST)
                delete_prefix(self._store, stored.key)
            prefixes = (f"{self._spec.checkpoints_prefix}attempt-{number}/" for number in range(1, self._attempt + 1))
            folders = {self._folder_of(stored.key) for prefix in prefixes for stored in self._store.iter_objects(prefix)}
            for incomplete in folders - {stored.key for stored in in_order} - {newest_key}:
                delete_prefix(self._store, incomplete)
        except (StorageError, JobFailed, OSError) as error:
            log.warning("could not delete old checkpoints", extra={"error": str(error)})

    def _list_manifests(self, on_skipped: Callable[[str, str], None] = lambda _key, _reason: None) -> list[StoredCheckpoint]:
        """Every checkpoint of the job, of all attempts, whose manifest is valid. Raises JobFailed."""
        location = f"{self._store.url}/{self._spec.checkpoints_prefix}"
        keys = retry_store(
            f"the checkpoints at {location} cannot be listed",
            lambda: [stored.key for stored in self._store.iter_objects(self._spec.checkpoints_prefix)],
            code="internal",
            sleep=self._sleep,
        )
        complete_folders = [key.removesuffix(MANIFEST) for key in keys if key.endswith(f"/{MANIFEST}")]
        for folder in sorted({self._folder_of(key) for key in keys}.difference(complete_folders)):
            on_skipped(folder, "it was never finished, or its manifest is gone")  # if it is finished later, it counts from then on
        checkpoints: list[StoredCheckpoint] = []
        for folder in complete_folders:
            try:
                checkpoints.append(self.read_manifest(folder, self._spec.job_id, *parse_attempt_and_step(folder)))
            except NoSuchObject:  # deleted since it was listed
                continue
            except CorruptCheckpoint as error:
                on_skipped(folder, str(error))
        return checkpoints

    def _folder_of(self, key: str) -> str:
        """The checkpoint's folder that holds a key at any depth.

        Only parts below the job's prefix count, because a project may be named attempt-1 too.
        """
        attempt_and_step = key.removeprefix(self._spec.checkpoints_prefix).split("/")[:2]
        return f"{self._spec.checkpoints_prefix}{'/'.join(attempt_and_step)}/"

    def _download_file(self, key: str, file: ArtifactFile, target: Path) -> None:
        path = target / file.path
        self._read(key + file.path, lambda: self._store.download(key + file.path, path))
        if path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256:
            raise CorruptCheckpoint(f"{file.path} is not what its manifest says")

    def _read(self, key: str, operation: Callable[[], ReturnT]) -> ReturnT:
        """Run a read of the store. Raises NoSuchObject, JobFailed if it stays unavailable, CorruptCheckpoint for a checksum mismatch."""
        try:
            return retry_store(f"{self._store.url}/{key} cannot be read", operation, code="internal", sleep=self._sleep)
        except JobFailed as failure:
            if isinstance(failure.__cause__, ChecksumMismatch):
                raise CorruptCheckpoint(f"{key.rpartition('/')[2]} differs from the store's own checksum") from failure
            raise


def parse_attempt_and_step(folder: str) -> tuple[int, int]:
    """Attempt and step from the name of a checkpoint's folder; 0 for a part that is not a number."""
    attempt, step = (part.rpartition("-")[2] for part in folder.rstrip("/").split("/")[-2:])
    return int(attempt) if attempt.isdecimal() else 0, int(step) if step.isdecimal() else 0
