"""The checkpoints of a job, seen from one attempt: the newest one that can be trusted, and new ones, uploaded beside the training.

A checkpoint is a folder of files below the attempt's number, and `manifest.json`, which holds their sha256 and is written last. What
has no manifest, or differs from it, does not count. An attempt writes below its own number only.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TypeVar

from jobs.runtime.artifacts import sha256_of
from jobs.runtime.errors import JobFailed
from jobs.runtime.retry import retry_store, upload_with_retry
from schema.checkpoint import MANIFEST, Checkpoint, CheckpointReason, checkpoint_key
from schema.events import CheckpointRestored, CheckpointSaved, CheckpointSkipped, Event, WarningRaised
from schema.job import ArtifactFile, ExportSource
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

NOT_UPLOADED = frozenset({"training_args.bin"})  # a pickle of the library's own, which nobody reads
MAX_NAME_BYTES = 200  # bytes of a file's name: file systems take 255, and a half-written file is called a little more

ReturnT = TypeVar("ReturnT")


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this machine, every file as its manifest says."""

    folder: Path
    checkpoint: Checkpoint


@dataclass(frozen=True)
class CheckpointInfo:
    """What the trainer says about a checkpoint that it hands over."""

    step: int
    total_steps: int
    epoch: float
    reason: CheckpointReason
    eval_loss: float | None
    batch_size: int
    gradient_accumulation_steps: int
    save_s: float  # how long the training stood still for it


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint in the store, as its manifest tells."""

    key: str  # of its folder; ends in "/"
    checkpoint: Checkpoint


@dataclass(frozen=True)
class _PendingUpload:
    folder: Path
    checkpoint_info: CheckpointInfo
    submitted_at: float


class CorruptCheckpoint(Exception):
    """The checkpoint is not what its manifest says. The message says in what."""


def sort_for_resume(stored: Iterable[StoredCheckpoint], first_attempt: int, current_attempt: int) -> list[StoredCheckpoint]:
    """What an attempt may go on from, in the order in which it tries: the newest attempt's first, and of it the newest step."""
    counting = (found for found in stored if first_attempt <= found.checkpoint.attempt <= current_attempt)
    return sorted(counting, key=lambda found: (found.checkpoint.attempt, found.checkpoint.step), reverse=True)


def select_expired(in_order: Sequence[StoredCheckpoint], save_total_limit: int) -> list[StoredCheckpoint]:
    """What nobody needs any more, of checkpoints in `resume_order`: all but the first `keep` and the best on the held-out rows."""
    measured = [found for found in in_order if found.checkpoint.eval_loss is not None]
    best = min(measured, key=lambda found: found.checkpoint.eval_loss or 0.0, default=None)
    return [found for found in in_order[save_total_limit:] if found is not best]


def validate_manifest(stored: StoredCheckpoint) -> None:
    """Raises Damaged when what the manifest names cannot be the files of one folder; it may have been written by anybody."""
    paths = [file.path for file in stored.checkpoint.files]
    for path in paths:
        try:
            check_key(stored.key + check_key(path))
        except InvalidKey as error:
            raise CorruptCheckpoint(f"its manifest names a file that leaves its folder: {path!r}") from error
    folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
    too_long = any(len(part.encode()) > MAX_NAME_BYTES for path in paths for part in path.split("/"))
    if not paths or len(set(paths)) < len(paths) or folders.intersection(paths) or too_long:
        raise CorruptCheckpoint("its manifest names no files, or such as no folder can hold")


class Checkpoints:
    """What an attempt finds and leaves. `keep` returns at once: a thread of its own makes durable what it is handed."""

    def __init__(
        self,
        *,
        store: ObjectStore,
        spec: JobSpec,
        attempt: int,
        folder: Path,
        save_total_limit: int,
        emit: Callable[[Event], None],
        get_tracker_run_ids: Callable[[], dict[str, str]] = dict,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.max_upload_s = 0.0  # the longest time from `keep` until a checkpoint was durable
        self.saved_step: int | None = None  # the newest durable step of this attempt
        self.resumed_step: int | None = None
        self._store = store
        self._spec = spec
        self._attempt = attempt
        self._folder = folder
        self._save_total_limit = save_total_limit
        self._emit = emit
        self._get_tracker_run_ids = get_tracker_run_ids
        self._clock = clock
        self._now = now
        self._sleep = sleep
        self._changed = threading.Condition()
        self._pending: _PendingUpload | None = None
        self._in_flight: _PendingUpload | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._corrupt_keys: set[str] = set()  # folders that are not what their manifest says
        self._reported_keys: set[str] = set()  # folders that were said to be passed over

    # --- going on ----------------------------------------------------------------------------------------------------

    def fetch_latest(self) -> LocalCheckpoint | None:
        """The newest checkpoint that is whole; each that is passed over is told. Raises JobFailed when the store stays away."""
        gone: set[str] = set()
        while (stored := self._latest_except(gone)) is not None:
            checkpoint = stored.checkpoint
            try:
                restored = LocalCheckpoint(self._download(stored), checkpoint)
            except CorruptCheckpoint as damage:
                self._corrupt_keys.add(stored.key)
                self._report_skipped(stored.key, str(damage))
                continue
            except NoSuchObject:  # an attempt that was given up still runs, and has pruned it for a newer one
                gone.add(stored.key)
                continue
            if checkpoint.attempt != self._attempt:  # otherwise it only goes back, for want of memory
                self.resumed_step = checkpoint.step
            self._emit(CheckpointRestored(step=checkpoint.step, from_attempt=checkpoint.attempt))
            return restored
        return None

    def fetch_best(self) -> LocalCheckpoint | None:
        """The one with the lowest eval_loss that is whole; None when no measured one can be read."""
        in_order = sort_for_resume(self._list_stored_checkpoints(), self._spec.resume_from_attempt, self._attempt)
        measured = [stored for stored in in_order if stored.checkpoint.eval_loss is not None and stored.key not in self._corrupt_keys]
        for stored in sorted(measured, key=lambda stored: stored.checkpoint.eval_loss or 0.0):
            try:
                return LocalCheckpoint(self._download(stored), stored.checkpoint)
            except CorruptCheckpoint as damage:
                self._corrupt_keys.add(stored.key)
                self._report_skipped(stored.key, str(damage))
            except NoSuchObject:
                continue
        return None

    def fetch(self, source: ExportSource) -> LocalCheckpoint:
        """Just that checkpoint, of whatever job. Raises JobFailed when it is gone or damaged."""
        hint = "GET /jobs/{id}/checkpoints lists the ones there are"
        name = f"the checkpoint of step {source.step} of {source.job_id}"
        try:
            stored = self._read_manifest(source.key, source.job_id, source.attempt, source.step)
            return LocalCheckpoint(self._download(stored), stored.checkpoint)
        except NoSuchObject as error:
            raise JobFailed("invalid_data", f"{name} is not there any more", hint) from error
        except CorruptCheckpoint as error:
            raise JobFailed("invalid_data", f"{name} is damaged: {error}", hint) from error

    # --- keeping -----------------------------------------------------------------------------------------------------

    def submit(self, folder: Path, checkpoint_info: CheckpointInfo) -> None:
        """Take a finished folder over. One that still waits for its turn is dropped for it."""
        with self._changed:
            dropped, self._pending = self._pending, _PendingUpload(folder, checkpoint_info, self._clock())
            if self._thread is None or not self._thread.is_alive():  # dead of a fault of ours: the next one must not wait for ever
                self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if dropped is not None and dropped.folder != folder:
            shutil.rmtree(dropped.folder, ignore_errors=True)

    def wait_until_uploaded(self, timeout_s: float | None = None) -> bool:
        """Wait until everything handed over is durable, or was given up; False when `patience_s` were not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: self._pending is None and self._in_flight is None, timeout_s)

    def prune_local(self) -> int:
        """The disk is full: forget everything here that is not being uploaded. Returns how many folders that were."""
        with self._changed:
            busy = self._in_flight.folder if self._in_flight else None
            self._pending = None
            self._changed.notify_all()
        found = [path for path in self._folder.glob("*") if path.is_dir() and path != busy] if self._folder.is_dir() else []
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        return len(found)

    def close(self) -> None:
        """Take nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (handed := self._take_next()) is not None:
            try:
                self._make_durable(handed)
            except (JobFailed, StorageError, OSError) as error:
                message = f"the checkpoint of step {handed.checkpoint_info.step} was not saved, the training goes on: {error}"
                self._emit(WarningRaised(code="checkpoint_not_saved", message=message))
            finally:
                shutil.rmtree(handed.folder, ignore_errors=True)
                with self._changed:
                    self._in_flight = None
                    self._changed.notify_all()

    def _take_next(self) -> _PendingUpload | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pending is not None or self._closed)
            if self._pending is None:
                return None
            self._in_flight, self._pending = self._pending, None
            return self._in_flight

    def _make_durable(self, handed: _PendingUpload) -> None:
        mark = handed.checkpoint_info
        key = checkpoint_key(self._spec.checkpoints_prefix, self._attempt, mark.step)
        checkpoint = self._existing(key, mark.step) or self._store_files(handed, key)
        upload_s = self._clock() - handed.submitted_at
        self.max_upload_s = max(self.max_upload_s, upload_s)
        self.saved_step = max(mark.step, self.saved_step or 0)
        told = {"step": mark.step, "epoch": mark.epoch, "reason": mark.reason, "size_bytes": checkpoint.size_bytes, "save_s": mark.save_s}
        self._emit(CheckpointSaved.model_validate(told | {"upload_s": upload_s}))
        self._prune(key)

    def _existing(self, key: str, step: int) -> Checkpoint | None:
        """The same step, when it was made before a lack of memory: it stays, for files and manifest must be of one making.

        One that was found damaged gives way, its manifest first.
        """
        try:
            stored = self._read_manifest(key, self._spec.job_id, self._attempt, step)
            if key not in self._corrupt_keys:
                return stored.checkpoint
        except NoSuchObject:
            return None
        except CorruptCheckpoint:
            pass  # its manifest cannot be believed
        what = "the damaged checkpoint could not be replaced"
        retry_store(what, lambda: self._store.delete(key + MANIFEST), sleep=self._sleep)
        self._corrupt_keys.discard(key)
        return None

    def _store_files(self, handed: _PendingUpload, key: str) -> Checkpoint:
        """The files, and when all of them are there the manifest. Raises JobFailed."""
        files = tuple(_describe_file(path, handed.folder) for path in _list_files(handed.folder))
        map_concurrently(lambda file: self._upload(handed.folder / file.path, key + file.path, file.sha256), files)
        checkpoint = self._build_manifest(handed.checkpoint_info, files)
        content = checkpoint.with_checksum()
        with suppress(ObjectExists):  # our own, whose answer was lost
            retry_store(
                "the checkpoint's manifest could not be stored",
                lambda: self._store.write(key + MANIFEST, content, if_absent=True),
                sleep=self._sleep,
            )
        return checkpoint

    def _upload(self, path: Path, key: str, sha256: str) -> None:
        upload_with_retry(f"{path.name} could not be stored", self._store, path, key, sha256, sleep=self._sleep)

    def _build_manifest(self, checkpoint_info: CheckpointInfo, files: tuple[ArtifactFile, ...]) -> Checkpoint:
        return Checkpoint(
            job_id=self._spec.job_id,
            attempt=self._attempt,
            step=checkpoint_info.step,
            total_steps=checkpoint_info.total_steps,
            epoch=checkpoint_info.epoch,
            reason=checkpoint_info.reason,
            eval_loss=checkpoint_info.eval_loss,
            batch_size=checkpoint_info.batch_size,
            gradient_accumulation_steps=checkpoint_info.gradient_accumulation_steps,
            tracker_run_ids=self._get_tracker_run_ids(),
            training_config=self._spec.training_config,
            files=files,
            created_at=self._now(),
        )

    def _prune(self, newest: str) -> None:
        """Remove what nobody needs: the manifest first, so that a checkpoint is whole or not there. Only warns when it cannot."""
        try:
            in_order = sort_for_resume(self._list_stored_checkpoints(), 1, self._attempt)
            known = {stored.key for stored in in_order} | {newest}
            for stored in select_expired(in_order, self._save_total_limit):
                self._store.delete(stored.key + MANIFEST)
                delete_prefix(self._store, stored.key)
            for key in self._incomplete_prefixes(known):
                delete_prefix(self._store, key)
        except (StorageError, JobFailed, OSError) as error:
            log.warning("old checkpoints stay", extra={"error": str(error)})

    def _incomplete_prefixes(self, known: set[str]) -> set[str]:
        """Folders of this and earlier attempts that never got their manifest."""
        below = (f"{self._spec.checkpoints_prefix}attempt-{number}/" for number in range(1, self._attempt + 1))
        return {self._folder_of(stored.key) for prefix in below for stored in self._store.iter_objects(prefix)} - known

    # --- the store ---------------------------------------------------------------------------------------------------

    def _latest_except(self, gone: set[str]) -> StoredCheckpoint | None:
        """What to go on from, of what is there now and has not been passed over. Raises JobFailed when the store stays away."""
        in_order = sort_for_resume(self._list_stored_checkpoints(report_skipped=True), self._spec.resume_from_attempt, self._attempt)
        return next((stored for stored in in_order if stored.key not in gone | self._corrupt_keys), None)

    def _report_skipped(self, key: str, why: str) -> None:
        """Tell of it, once, if it would have counted."""
        attempt, step = _parse_attempt_and_step(key)
        if key not in self._reported_keys and self._spec.resume_from_attempt <= attempt <= self._attempt:
            self._reported_keys.add(key)
            self._emit(CheckpointSkipped(attempt=attempt, step=step, reason=why))

    def _list_stored_checkpoints(self, *, report_skipped: bool = False) -> list[StoredCheckpoint]:
        """Every checkpoint with a manifest that can be believed. Raises JobFailed when the store stays away."""
        where = f"{self._store.url}/{self._spec.checkpoints_prefix}"
        keys = retry_store(f"the checkpoints at {where} cannot be listed", self._list_keys, code="internal", sleep=self._sleep)
        folders = [key.removesuffix(MANIFEST) for key in keys if key.endswith(f"/{MANIFEST}")]
        if report_skipped:
            for folder in sorted({self._folder_of(key) for key in keys}.difference(folders)):  # one may yet be finished, and counts then
                self._report_skipped(folder, "it was never finished, or its manifest is gone")
        return [stored for folder in folders if (stored := self._read_or_skip(folder, report_skipped=report_skipped)) is not None]

    def _list_keys(self) -> list[str]:
        return [stored.key for stored in self._store.iter_objects(self._spec.checkpoints_prefix)]

    def _folder_of(self, key: str) -> str:
        """The checkpoint's folder that a key lies in, at whatever depth. Never above it: a project may be called attempt-1 as well."""
        below = key.removeprefix(self._spec.checkpoints_prefix).split("/")[:2]
        return f"{self._spec.checkpoints_prefix}{'/'.join(below)}/"

    def _read_or_skip(self, key: str, *, report_skipped: bool) -> StoredCheckpoint | None:
        attempt, step = _parse_attempt_and_step(key)
        try:
            return self._read_manifest(key, self._spec.job_id, attempt, step)
        except NoSuchObject:  # removed this very moment
            return None
        except CorruptCheckpoint as damage:
            if report_skipped:
                self._report_skipped(key, str(damage))
            return None

    def _read_manifest(self, key: str, job_id: str, attempt: int, step: int) -> StoredCheckpoint:
        """What the manifest in a folder says. Raises Damaged, NoSuchObject, and JobFailed when the store stays away."""
        try:
            checkpoint = Checkpoint.from_verified_bytes(self._read_store(key + MANIFEST, lambda: self._store.read(key + MANIFEST)))
        except (ValueError, RecursionError) as error:  # brackets in brackets without end
            raise CorruptCheckpoint("its manifest cannot be read, or is not what was written") from error
        if (checkpoint.job_id, checkpoint.attempt, checkpoint.step) != (job_id, attempt, step):
            raise CorruptCheckpoint("its manifest is of another checkpoint")
        return StoredCheckpoint(key, checkpoint)

    def _download(self, stored: StoredCheckpoint) -> Path:
        """Its files in a fresh folder, each compared with the manifest. Raises Damaged, JobFailed; NoSuchObject when all of it is gone."""
        validate_manifest(stored)
        target = self._folder / f"restored-{stored.checkpoint.attempt}-{stored.checkpoint.step}"
        shutil.rmtree(target, ignore_errors=True)
        try:
            map_concurrently(lambda file: self._download_file(stored.key, file, target), stored.checkpoint.files)
        except (CorruptCheckpoint, NoSuchObject) as error:
            shutil.rmtree(target, ignore_errors=True)  # as large as the one that is taken instead
            manifest = stored.key + MANIFEST
            if isinstance(error, CorruptCheckpoint) or self._read_store(manifest, lambda: self._store.stat(manifest)) is None:
                raise
            raise CorruptCheckpoint(f"a file is missing: {error}") from error
        return target

    def _download_file(self, key: str, file: ArtifactFile, target: Path) -> None:
        path = target / file.path
        self._read_store(key + file.path, lambda: self._store.download(key + file.path, path))
        if path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256:
            raise CorruptCheckpoint(f"{file.path} is not what its manifest says")

    def _read_store(self, key: str, operation: Callable[[], ReturnT]) -> ReturnT:
        """What the store answers. Raises NoSuchObject, JobFailed when it stays away, and Damaged when it says that it holds other bytes."""
        try:
            return retry_store(f"{self._store.url}/{key} cannot be read", operation, code="internal", sleep=self._sleep)
        except JobFailed as failure:
            if isinstance(failure.__cause__, ChecksumMismatch):
                raise CorruptCheckpoint(f"{key.rpartition('/')[2]} differs from the store's own checksum") from failure
            raise


def _parse_attempt_and_step(folder: str) -> tuple[int, int]:
    """Attempt and step, from the name of a folder; 0 for what cannot be read."""
    attempt, step = (part.rpartition("-")[2] for part in folder.rstrip("/").split("/")[-2:])
    return int(attempt) if attempt.isdecimal() else 0, int(step) if step.isdecimal() else 0


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_UPLOADED)


def _describe_file(path: Path, folder: Path) -> ArtifactFile:
    return ArtifactFile(path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, sha256=sha256_of(path))
