"""The checkpoints of one attempt: the one to resume from, and new ones, which a thread uploads while the training continues.

`checkpoint_store.py` knows how checkpoints are laid out in the object store and which of them count.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue

from jobs.runtime.checkpoint_store import CheckpointStore, CorruptCheckpoint, StoredCheckpoint, parse_attempt_and_step
from jobs.runtime.errors import JobFailed
from schema.checkpoint import Checkpoint, CheckpointReason, checkpoint_key
from schema.events import CheckpointRestored, CheckpointSaved, CheckpointSkipped, Event, WarningRaised
from schema.job import ArtifactFile, ExportSource
from schema.spec import JobSpec
from storage import NoSuchObject, ObjectStore, StorageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this machine; every file has been compared with its manifest."""

    folder: Path
    checkpoint: Checkpoint


@dataclass(frozen=True)
class CheckpointInfo:
    """What the trainer knows about a checkpoint that it submits."""

    step: int
    total_steps: int
    epoch: float
    reason: CheckpointReason
    eval_loss: float | None
    save_s: float  # how long the save blocked the training
    details: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])  # the family's own


@dataclass(frozen=True)
class _PendingUpload:
    folder: Path
    checkpoint_info: CheckpointInfo
    submitted_at: float


class Checkpoints:
    """The checkpoints that an attempt resumes from and saves. `submit` returns at once; a thread uploads what was submitted."""

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
        self.max_upload_s = 0.0  # the longest time from `submit` until a checkpoint was durable
        self.saved_step: int | None = None  # the newest durable step of this attempt
        self.resumed_step: int | None = None
        self._store = CheckpointStore(store, spec, attempt, sleep)
        self._spec = spec
        self._attempt = attempt
        self._folder = folder
        self._save_total_limit = save_total_limit
        self._emit = emit
        self._get_tracker_run_ids = get_tracker_run_ids
        self._clock = clock
        self._now = now
        self._reported_keys: set[str] = set()  # folders of checkpoints that were reported as skipped
        self._changed = threading.Condition()
        self._pending: _PendingUpload | None = None
        self._in_flight: _PendingUpload | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    # --- resuming ----------------------------------------------------------------------------------------------------

    def fetch_latest(self) -> LocalCheckpoint | None:
        """Download the newest intact checkpoint; reports each one that is skipped. Raises JobFailed if the store stays unavailable."""
        pruned: set[str] = set()
        # Listed again for each candidate: a superseded attempt that still runs may finish or prune checkpoints meanwhile.
        while stored := next((each for each in self._store.list_for_resume(self._report_skipped) if each.key not in pruned), None):
            try:
                restored = self._download(stored)
            except CorruptCheckpoint as error:
                self._skip_corrupt(stored, error)
                continue
            except NoSuchObject:
                pruned.add(stored.key)
                continue
            checkpoint = restored.checkpoint
            if checkpoint.attempt != self._attempt:  # otherwise this attempt only goes back, after running out of memory
                self.resumed_step = checkpoint.step
            self._emit(CheckpointRestored(step=checkpoint.step, from_attempt=checkpoint.attempt))
            return restored
        return None

    def fetch_best(self) -> LocalCheckpoint | None:
        """Download the intact checkpoint with the lowest eval_loss; None if no checkpoint with an eval_loss can be read."""
        measured = [stored for stored in self._store.list_for_resume() if stored.checkpoint.eval_loss is not None]
        for stored in sorted(measured, key=lambda stored: stored.checkpoint.eval_loss or 0.0):
            try:
                return self._download(stored)
            except CorruptCheckpoint as error:
                self._skip_corrupt(stored, error)
            except NoSuchObject:
                continue
        return None

    def fetch(self, source: ExportSource) -> LocalCheckpoint:
        """Download one given checkpoint, of any job. Raises JobFailed if it is gone or damaged."""
        hint = "GET /jobs/{id}/checkpoints lists the existing checkpoints"
        name = f"the checkpoint of step {source.step} of {source.job_id}"
        try:
            return self._download(self._store.read_manifest(source.key, source.job_id, source.attempt, source.step))
        except NoSuchObject as error:
            raise JobFailed("invalid_data", f"{name} no longer exists", hint) from error
        except CorruptCheckpoint as error:
            raise JobFailed("invalid_data", f"{name} is damaged: {error}", hint) from error

    def _download(self, stored: StoredCheckpoint) -> LocalCheckpoint:
        checkpoint = stored.checkpoint
        target = self._folder / f"restored-{checkpoint.attempt}-{checkpoint.step}"
        self._store.download(stored, target)
        return LocalCheckpoint(target, checkpoint)

    def _skip_corrupt(self, stored: StoredCheckpoint, error: CorruptCheckpoint) -> None:
        self._store.mark_corrupt(stored.key)
        self._report_skipped(stored.key, str(error))

    def _report_skipped(self, key: str, reason: str) -> None:
        """Report a checkpoint that does not count, once, if this attempt might have resumed from it."""
        attempt, step = parse_attempt_and_step(key)
        if key not in self._reported_keys and self._spec.resume_from_attempt <= attempt <= self._attempt:
            self._reported_keys.add(key)
            self._emit(CheckpointSkipped(attempt=attempt, step=step, reason=reason))

    # --- saving ------------------------------------------------------------------------------------------------------

    def submit(self, folder: Path, checkpoint_info: CheckpointInfo) -> None:
        """Take over a finished folder and upload it. It replaces one that still waits for its upload."""
        with self._changed:
            replaced, self._pending = self._pending, _PendingUpload(folder, checkpoint_info, self._clock())
            if self._thread is None or not self._thread.is_alive():  # a bug may have ended it; then the next checkpoint restarts it
                self._thread = threading.Thread(target=self._upload_pending, name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if replaced is not None and replaced.folder != folder:
            shutil.rmtree(replaced.folder, ignore_errors=True)

    def wait_until_uploaded(self, timeout_s: float | None = None) -> bool:
        """Wait until everything submitted is durable or has failed; False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._pending is None and self._in_flight is None, timeout_s)

    def prune_local(self) -> int:
        """Delete every local checkpoint that is not being uploaded, because the disk is full. Returns the number of folders."""
        with self._changed:
            uploading = self._in_flight.folder if self._in_flight else None
            self._pending = None
            self._changed.notify_all()
        folders = [path for path in self._folder.glob("*") if path.is_dir() and path != uploading] if self._folder.is_dir() else []
        for path in folders:
            shutil.rmtree(path, ignore_errors=True)
        return len(folders)

    def close(self) -> None:
        """End the thread after the upload it is working on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _upload_pending(self) -> None:
        """The thread: upload what was submitted, until `close`."""
        while (upload := self._take_pending()) is not None:
            try:
                self._upload(upload)
            except (JobFailed, StorageError, OSError) as error:
                message = f"the checkpoint of step {upload.checkpoint_info.step} was not saved, the training continues: {error}"
                self._emit(WarningRaised(code="checkpoint_not_saved", message=message))
            finally:
                shutil.rmtree(upload.folder, ignore_errors=True)
                with self._changed:
                    self._in_flight = None
                    self._changed.notify_all()

    def _take_pending(self) -> _PendingUpload | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pending is not None or self._closed)
            self._in_flight, self._pending = self._pending, None
            return self._in_flight

    def _upload(self, upload: _PendingUpload) -> None:
        info = upload.checkpoint_info
        key = checkpoint_key(self._spec.checkpoints_prefix, self._attempt, info.step)
        checkpoint = self._store.find_saved(key, info.step)
        if checkpoint is None:
            checkpoint = self._store.write(key, upload.folder, lambda files: self._make_manifest(info, files))
        upload_s = self._clock() - upload.submitted_at
        self.max_upload_s = max(self.max_upload_s, upload_s)
        self.saved_step = max(info.step, self.saved_step or 0)
        self._emit(
            CheckpointSaved(
                step=info.step,
                epoch=info.epoch,
                reason=info.reason,
                size_bytes=checkpoint.size_bytes,
                save_s=info.save_s,
                upload_s=upload_s,
            )
        )
        self._store.prune(key, self._save_total_limit)

    def _make_manifest(self, info: CheckpointInfo, files: tuple[ArtifactFile, ...]) -> Checkpoint:
        return Checkpoint(
            job_id=self._spec.job_id,
            attempt=self._attempt,
            step=info.step,
            total_steps=info.total_steps,
            epoch=info.epoch,
            reason=info.reason,
            eval_loss=info.eval_loss,
            details=dict(info.details),
            tracker_run_ids=self._get_tracker_run_ids(),
            training_config=self._spec.training_config,
            files=files,
            created_at=self._now(),
        )
