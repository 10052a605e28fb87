"""Which checkpoints an attempt saves, keeps and resumes from. The store is a real folder; there is no trainer."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from jobs.runtime.batch_config import BatchConfig
from jobs.runtime.checkpoint_store import StoredCheckpoint, select_expired, sort_for_resume
from jobs.runtime.checkpoints import CheckpointInfo, Checkpoints
from jobs.runtime.errors import JobFailed
from jobs.runtime.save_policy import TrainingControlState
from schema.checkpoint import MANIFEST, Checkpoint, checkpoint_key, checkpoints_prefix
from schema.events import CheckpointRestored, CheckpointSaved, CheckpointSkipped, Event, WarningRaised
from schema.job import ExportSource
from schema.spec import JobSpec
from storage import ChecksumMismatch, NoSuchObject, ObjectStore, StoredObject, StoreUnavailable
from storage.file import LocalStore
from storage.registry import open_store
from tests.jobs.conftest import make_spec

CHECKPOINT_INFO = CheckpointInfo(
    step=10,
    total_steps=100,
    epoch=0.5,
    reason="interval",
    eval_loss=None,
    save_s=0.1,
    details={"learned": [2, 4]},
)
GOLDEN = Path(__file__).parent / "golden"  # written by the version that they name
FILES = {"adapter_model.safetensors": b"weights" * 100, "optimizer.pt": b"moments" * 200, "trainer_state.json": b"{}"}


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return make_spec(tmp_path / "objects", job_id="job-1")


@pytest.fixture
def store(spec: JobSpec) -> ObjectStore:
    return open_store(spec.stores.models)


@pytest.fixture
def emitted_events() -> list[Event]:
    return []


Make = Callable[..., Checkpoints]


@pytest.fixture
def make(spec: JobSpec, store: ObjectStore, emitted_events: list[Event], tmp_path: Path) -> Iterator[Make]:
    """Makes the Checkpoints of an attempt; arguments replace the defaults."""
    made: list[Checkpoints] = []

    def build(attempt: int = 1, **changes: Any) -> Checkpoints:
        defaults = {
            "store": store,
            "spec": spec,
            "save_total_limit": 2,
            "folder": tmp_path / f"work-{attempt}",
            "emit": emitted_events.append,
            "sleep": lambda _: None,
        }
        made.append(Checkpoints(attempt=attempt, **defaults | changes))
        return made[-1]

    yield build
    for checkpoints in made:
        checkpoints.close()


def save(checkpoints: Checkpoints, folder: Path, checkpoint_info: CheckpointInfo = CHECKPOINT_INFO, **changes: Any) -> None:
    """Submit a folder with files and wait until they are uploaded."""
    checkpoint_info = replace(checkpoint_info, **changes)
    checkpoints.submit(make_checkpoint_folder(folder, checkpoint_info.step), checkpoint_info)
    assert checkpoints.wait_until_uploaded(20)


def make_checkpoint_folder(folder: Path, step: int, content: bytes = b"") -> Path:
    checkpoint_folder = folder / f"checkpoint-{step}"
    checkpoint_folder.mkdir(parents=True)
    for name, beginning in FILES.items():
        (checkpoint_folder / name).write_bytes(beginning + str(step).encode() + content)
    return checkpoint_folder


def steps(store: ObjectStore, spec: JobSpec) -> list[tuple[int, int]]:
    """Attempt and step of every checkpoint with a manifest."""
    manifests = [
        Checkpoint.load(store.read(stored.key))
        for stored in store.iter_objects(spec.checkpoints_prefix)
        if stored.key.endswith(f"/{MANIFEST}")
    ]
    return [(checkpoint.attempt, checkpoint.step) for checkpoint in manifests]


# --- saving ----------------------------------------------------------------------------------------------------------


def test_saved_checkpoint_is_durable_and_emits_event(make: Make, emitted_events: list[Event], spec: JobSpec, tmp_path: Path) -> None:
    checkpoints = make(get_tracker_run_ids=lambda: {"wandb": "run-1"})
    save(checkpoints, tmp_path / "t")
    restored = make(attempt=2).fetch_latest()
    assert restored is not None
    assert {path.name: path.read_bytes() for path in restored.folder.iterdir()} == {
        name: content + b"10" for name, content in FILES.items()
    }
    checkpoint = restored.checkpoint
    assert (checkpoint.attempt, checkpoint.step, checkpoint.tracker_run_ids) == (1, 10, {"wandb": "run-1"})
    assert checkpoint.details == {"learned": [2, 4]}
    assert checkpoint.training_config == spec.training_config
    [saved] = [event for event in emitted_events if isinstance(event, CheckpointSaved)]
    assert (saved.step, saved.reason, saved.size_bytes, saved.save_s) == (10, "interval", checkpoint.size_bytes, 0.1)
    assert checkpoints.saved_step == 10
    assert checkpoints.max_upload_s >= saved.upload_s > 0
    assert not list((tmp_path / "t").iterdir())  # the local files are deleted


def test_pickle_files_are_not_uploaded(make: Make, store: ObjectStore, tmp_path: Path) -> None:
    folder = make_checkpoint_folder(tmp_path / "t", 10)
    (folder / "training_args.bin").write_bytes(b"pickle")
    checkpoints = make()
    checkpoints.submit(folder, CHECKPOINT_INFO)
    checkpoints.wait_until_uploaded(20)
    assert not [stored.key for stored in store.iter_objects("") if stored.key.endswith(".bin")]


def test_manifest_is_written_last(make: Make, spec: JobSpec, tmp_path: Path) -> None:
    class RecordingStore(LocalStore):
        order: ClassVar[list[str]] = []

        def write(self, key: str, content: bytes, *, if_absent: bool = False) -> StoredObject:
            self.order.append(key)
            return super().write(key, content, if_absent=if_absent)

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            assert sha256 is not None
            self.order.append(key)
            return super().upload(source, key, sha256=sha256)

    save(make(store=RecordingStore(spec.stores.models)), tmp_path / "t")
    assert sorted(RecordingStore.order[:-1]) == sorted(checkpoint_key(spec.checkpoints_prefix, 1, 10) + name for name in FILES)
    assert RecordingStore.order[-1].endswith(MANIFEST)


def test_last_and_best_checkpoints_are_kept(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    checkpoints = make()
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 2.5)):
        save(checkpoints, tmp_path / "t", step=step, eval_loss=loss)
    assert steps(store, spec) == [(1, 20), (1, 40), (1, 50)]
    assert len(list(store.iter_objects(spec.checkpoints_prefix))) == 3 * (len(FILES) + 1)


def test_incomplete_uploads_of_earlier_attempts_are_deleted(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    store.write(checkpoint_key(spec.checkpoints_prefix, 1, 5) + "optimizer.pt", b"half")
    later_key = checkpoint_key(spec.checkpoints_prefix, 3, 5) + "optimizer.pt"
    store.write(later_key, b"of a later attempt")
    save(make(attempt=2), tmp_path / "t")
    assert store.stat(checkpoint_key(spec.checkpoints_prefix, 1, 5) + "optimizer.pt") is None
    assert store.stat(later_key) is not None


@pytest.mark.parametrize("project", ["attempt-1", "attempt-7", "step-1"])
def test_cleanup_only_touches_own_job_for_any_project_name(
    make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path, project: str
) -> None:
    other_job_key = checkpoint_key(checkpoints_prefix("job-2", project), 1, 5) + "optimizer.pt"
    store.write(other_job_key, b"of another job")
    own = spec.model_copy(update={"project_id": project, "checkpoints_prefix": checkpoints_prefix("job-1", project)})
    incomplete_key = checkpoint_key(own.checkpoints_prefix, 1, 5) + "inner/optimizer.pt"
    store.write(incomplete_key, b"half")
    save(make(spec=own), tmp_path / "t")
    assert store.stat(other_job_key) is not None
    assert store.stat(incomplete_key) is None
    assert steps(store, own) == [(1, 10)]


def test_superseded_attempt_does_not_prune_newer_checkpoints(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    first, second = make(attempt=1), make(attempt=2)
    save(first, tmp_path / "1", step=10)
    for step in (20, 30):
        save(second, tmp_path / "2", step=step)
    for step in (40, 50, 60):  # the first attempt continues although it was superseded
        save(first, tmp_path / "1", step=step)
    assert [(attempt, step) for attempt, step in steps(store, spec) if attempt == 2] == [(2, 20), (2, 30)]
    restored = make(attempt=3).fetch_latest()
    assert restored is not None
    assert (restored.checkpoint.attempt, restored.checkpoint.step) == (2, 30)


def test_newer_checkpoint_replaces_pending_upload(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class SlowStore(LocalStore):
        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            begun.set()
            assert go_on.wait(20)
            return super().upload(source, key, sha256=sha256)

    checkpoints = make(store=SlowStore(spec.stores.models), save_total_limit=9)
    checkpoints.submit(make_checkpoint_folder(tmp_path / "t", 10), CHECKPOINT_INFO)
    assert begun.wait(20)
    for step in (20, 30):
        checkpoints.submit(make_checkpoint_folder(tmp_path / "t", step), replace(CHECKPOINT_INFO, step=step))
    assert checkpoints.wait_until_uploaded(0.01) is False
    go_on.set()
    assert checkpoints.wait_until_uploaded(20)
    assert steps(store, spec) == [(1, 10), (1, 30)]
    assert not list((tmp_path / "t").iterdir())


def test_upload_is_retried_and_permanent_failure_loses_one_checkpoint(
    make: Make, emitted_events: list[Event], store: ObjectStore, spec: JobSpec, tmp_path: Path
) -> None:
    class UnavailableStore(LocalStore):
        failures_left = 0

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            self.failures_left -= 1
            if self.failures_left >= 0:
                raise StoreUnavailable("away")
            return super().upload(source, key, sha256=sha256)

    unavailable_store = UnavailableStore(spec.stores.models)
    checkpoints = make(store=unavailable_store)
    unavailable_store.failures_left = 4
    save(checkpoints, tmp_path / "t", step=10)
    unavailable_store.failures_left = 1000
    save(checkpoints, tmp_path / "t", step=20)
    unavailable_store.failures_left = 0
    save(checkpoints, tmp_path / "t", step=30)
    assert steps(store, spec) == [(1, 10), (1, 30)]
    [warning] = [event for event in emitted_events if isinstance(event, WarningRaised)]
    assert (warning.code, "step 20" in warning.message, "away" in warning.message) == ("checkpoint_not_saved", True, True)


def test_saving_same_step_twice_keeps_checkpoint(
    make: Make, store: ObjectStore, spec: JobSpec, emitted_events: list[Event], tmp_path: Path
) -> None:
    checkpoints = make()
    for _ in range(2):
        save(checkpoints, tmp_path / "t")
    assert steps(store, spec) == [(1, 10)]
    assert not [event for event in emitted_events if isinstance(event, WarningRaised)]
    assert make(attempt=2).fetch_latest() is not None


@pytest.mark.parametrize("damage", [True, False])
def test_resaved_step_replaces_only_a_damaged_checkpoint(
    make: Make, spec: JobSpec, emitted_events: list[Event], tmp_path: Path, damage: bool
) -> None:
    checkpoints = make()
    for step in (10, 20):
        save(checkpoints, tmp_path / "t", step=step)
    if damage:
        (tmp_path / "objects" / checkpoint_key(spec.checkpoints_prefix, 1, 20) / "optimizer.pt").write_bytes(b"")
        assert checkpoints.fetch_latest() is not None  # as after running out of memory: step 20 is damaged, so step 10 is restored
    checkpoints.submit(make_checkpoint_folder(tmp_path / "t", 20, b" another batch size"), replace(CHECKPOINT_INFO, step=20))
    assert checkpoints.wait_until_uploaded(20)
    emitted_events.clear()
    restored = make(attempt=2).fetch_latest()
    assert restored is not None
    assert emitted_events == [CheckpointRestored(step=20, from_attempt=1)]
    assert (b"another" in (restored.folder / "optimizer.pt").read_bytes()) is damage  # an intact checkpoint is not replaced


def test_saving_works_after_unexpected_upload_error(make: Make, spec: JobSpec, tmp_path: Path) -> None:
    class FailingStore(LocalStore):
        fails = True

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            if self.fails:
                raise NoSuchObject("the session of the upload")
            return super().upload(source, key, sha256=sha256)

    failing_store = FailingStore(spec.stores.models)
    checkpoints = make(store=failing_store)
    save(checkpoints, tmp_path / "t", step=10)
    failing_store.fails = False
    save(checkpoints, tmp_path / "t", step=20)
    assert checkpoints.saved_step == 20


def test_cleanup_failure_does_not_fail_a_saved_checkpoint(make: Make, emitted_events: list[Event], spec: JobSpec, tmp_path: Path) -> None:
    class ListingFailsStore(LocalStore):
        def iter_objects(self, prefix: str) -> Iterator[StoredObject]:
            if "/attempt-1/" in prefix:
                raise FileNotFoundError("a folder was removed during the listing")
            return super().iter_objects(prefix)

    save(make(store=ListingFailsStore(spec.stores.models)), tmp_path / "t")
    assert [type(event) for event in emitted_events] == [CheckpointSaved]


def test_prune_local_deletes_pending_checkpoints(make: Make, tmp_path: Path) -> None:
    checkpoints = make(folder=tmp_path / "t")
    for step in (10, 20):
        make_checkpoint_folder(tmp_path / "t", step)
    assert checkpoints.prune_local() == 2
    assert not list((tmp_path / "t").iterdir())


# --- resuming --------------------------------------------------------------------------------------------------------


def test_latest_is_none_without_checkpoints(make: Make, emitted_events: list[Event]) -> None:
    assert make().fetch_latest() is None
    assert emitted_events == []


def test_latest_prefers_previous_attempt_and_ignores_later_attempts(make: Make, emitted_events: list[Event], tmp_path: Path) -> None:
    for attempt, step in ((1, 90), (2, 20), (2, 30), (4, 40)):
        save(make(attempt=attempt, save_total_limit=9), tmp_path / "t", step=step)
    third = make(attempt=3)
    restored = third.fetch_latest()
    assert restored is not None
    assert (restored.checkpoint.attempt, restored.checkpoint.step, third.resumed_step) == (2, 30, 30)
    assert [event for event in emitted_events if isinstance(event, CheckpointRestored)] == [CheckpointRestored(step=30, from_attempt=2)]


def test_retry_from_start_ignores_earlier_checkpoints(make: Make, spec: JobSpec, tmp_path: Path) -> None:
    save(make(attempt=1), tmp_path / "t")
    assert make(attempt=2, spec=spec.model_copy(update={"resume_from_attempt": 2})).fetch_latest() is None


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a bit flipped": flip_bit,
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped_for_previous_one(
    make: Make, emitted_events: list[Event], spec: JobSpec, tmp_path: Path, damage: str, name: str
) -> None:
    for step in (10, 20):
        save(make(), tmp_path / "t", step=step)
    emitted_events.clear()
    DAMAGES[damage](tmp_path / "objects" / checkpoint_key(spec.checkpoints_prefix, 1, 20) / name)
    restored = make(attempt=2).fetch_latest()
    assert restored is not None
    assert restored.checkpoint.step == 10
    skipped, resumed = emitted_events
    assert isinstance(skipped, CheckpointSkipped)
    assert (skipped.attempt, skipped.step, name in skipped.reason) == (1, 20, True)
    assert resumed == CheckpointRestored(step=10, from_attempt=1)


def with_valid_checksum(manifest: dict[str, Any]) -> bytes:
    """The manifest as bytes, with a checksum that matches its changed content."""
    return Checkpoint.load(json.dumps(manifest)).with_checksum()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": 20}', b"\xff", b"[" * 200_000])
def test_unreadable_manifest_is_skipped(
    make: Make, emitted_events: list[Event], store: ObjectStore, spec: JobSpec, tmp_path: Path, content: bytes
) -> None:
    for step in (10, 20):
        save(make(), tmp_path / "t", step=step)
    emitted_events.clear()
    store.write(checkpoint_key(spec.checkpoints_prefix, 1, 20) + MANIFEST, content)
    restored = make(attempt=2).fetch_latest()
    assert restored is not None
    assert restored.checkpoint.step == 10
    assert isinstance(emitted_events[0], CheckpointSkipped)
    assert (emitted_events[0].attempt, emitted_events[0].step, "its manifest cannot be read" in emitted_events[0].reason) == (1, 20, True)


def test_any_flipped_bit_in_manifest_is_detected(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    save(make(), tmp_path / "t")
    content = store.read(checkpoint_key(spec.checkpoints_prefix, 1, 10) + MANIFEST)
    for index in range(0, len(content), 5):
        flipped = bytearray(content)
        flipped[index] ^= 1 << (index % 7)
        try:
            read = Checkpoint.from_verified_bytes(bytes(flipped))
        except ValueError:
            continue
        assert read == Checkpoint.from_verified_bytes(content)  # the bit changed only white space between two values


def test_incomplete_checkpoint_is_skipped_with_event(
    make: Make, emitted_events: list[Event], store: ObjectStore, spec: JobSpec, tmp_path: Path
) -> None:
    save(make(), tmp_path / "t")
    store.write(checkpoint_key(spec.checkpoints_prefix, 1, 20) + "optimizer.pt", b"half")
    emitted_events.clear()
    restored = make(attempt=2).fetch_latest()
    assert restored is not None
    assert restored.checkpoint.step == 10
    assert isinstance(emitted_events[0], CheckpointSkipped)
    assert (emitted_events[0].attempt, emitted_events[0].step, "never finished" in emitted_events[0].reason) == (1, 20, True)


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": 3},
        {"step": 21},
        {"job_id": "job-2"},
        {"files": []},
        {"files": ["a", "a/b"]},
        {"files": ["a", "a"]},
        {"files": ["x" * 300]},
    ],
)
def test_inconsistent_manifest_is_skipped(
    make: Make, emitted_events: list[Event], store: ObjectStore, spec: JobSpec, tmp_path: Path, change: dict[str, Any]
) -> None:
    for step in (10, 20):
        save(make(), tmp_path / "t", step=step)
    emitted_events.clear()
    key = checkpoint_key(spec.checkpoints_prefix, 1, 20) + MANIFEST
    manifest = json.loads(store.read(key))
    files = {"files": [manifest["files"][0] | {"path": path} for path in change["files"]]} if "files" in change else {}
    store.write(key, with_valid_checksum(manifest | change | files))
    restored = make(attempt=2).fetch_latest()
    assert restored is not None
    assert restored.checkpoint.step == 10
    skipped, resumed = emitted_events
    assert isinstance(skipped, CheckpointSkipped)
    assert (skipped.attempt, skipped.step, "its manifest" in skipped.reason) == (1, 20, True)
    assert resumed == CheckpointRestored(step=10, from_attempt=1)


def test_checksum_mismatch_from_store_skips_checkpoint(make: Make, emitted_events: list[Event], spec: JobSpec, tmp_path: Path) -> None:
    class CorruptStore(LocalStore):
        def download(self, key: str, target: Path) -> Path:
            if key.endswith("step-00000030/optimizer.pt"):
                raise ChecksumMismatch("the content differs from what was stored")
            return super().download(key, target)

        def read(self, key: str) -> bytes:
            if key.endswith(f"step-00000020/{MANIFEST}"):
                raise ChecksumMismatch("the content differs from what was stored")
            return super().read(key)

    for step in (10, 20, 30):
        save(make(save_total_limit=9), tmp_path / "t", step=step)
    emitted_events.clear()
    restored = make(attempt=2, store=CorruptStore(spec.stores.models)).fetch_latest()
    assert restored is not None
    assert restored.checkpoint.step == 10
    assert sorted(event.step for event in emitted_events if isinstance(event, CheckpointSkipped)) == [20, 30]


def test_skipped_checkpoint_is_deleted_locally_and_reported_once(
    make: Make, emitted_events: list[Event], spec: JobSpec, tmp_path: Path
) -> None:
    for step in (10, 20):
        save(make(), tmp_path / "t", step=step)
    (tmp_path / "objects" / checkpoint_key(spec.checkpoints_prefix, 1, 20) / "optimizer.pt").write_bytes(b"")
    second = make(attempt=2)
    for _ in range(2):  # again, as after running out of memory
        assert second.fetch_latest() is not None
    assert [path.name for path in (tmp_path / "work-2").iterdir()] == ["restored-1-10"]
    assert len([event for event in emitted_events if isinstance(event, CheckpointSkipped)]) == 1


def test_checkpoint_pruned_during_download_falls_back_to_newer_one(
    make: Make, emitted_events: list[Event], spec: JobSpec, tmp_path: Path
) -> None:
    superseded = make(attempt=1, save_total_limit=1)

    class PruningStore(LocalStore):
        pruned = False

        def download(self, key: str, target: Path) -> Path:
            if not self.pruned:
                self.pruned = True
                save(superseded, tmp_path / "t", step=50)
            return super().download(key, target)

    save(superseded, tmp_path / "t", step=40)
    restored = make(attempt=2, store=PruningStore(spec.stores.models)).fetch_latest()
    assert restored is not None
    assert restored.checkpoint.step == 50
    assert not [event for event in emitted_events if isinstance(event, CheckpointSkipped)]


def test_checkpoint_completed_during_resume_is_used(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    superseded = make(attempt=1, save_total_limit=1)

    class FinishingStore(LocalStore):
        finished = False

        def download(self, key: str, target: Path) -> Path:
            if not self.finished:
                self.finished = True
                save(superseded, tmp_path / "t", step=50)  # and 40 is pruned
            return super().download(key, target)

    save(superseded, tmp_path / "t", step=40)
    store.write(checkpoint_key(spec.checkpoints_prefix, 1, 50) + "optimizer.pt", b"half")
    restored = make(attempt=2, store=FinishingStore(spec.stores.models)).fetch_latest()
    assert restored is not None
    assert restored.checkpoint.step == 50


def test_step_resaved_after_failed_upload_is_used(make: Make, spec: JobSpec, tmp_path: Path) -> None:
    class UnavailableStore(LocalStore):
        is_unavailable = False

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            if self.is_unavailable and key.endswith("trainer_state.json"):
                raise StoreUnavailable("away")
            return super().upload(source, key, sha256=sha256)

    store = UnavailableStore(spec.stores.models)
    checkpoints = make(store=store, save_total_limit=9)
    save(checkpoints, tmp_path / "t", step=10)
    store.is_unavailable = True
    save(checkpoints, tmp_path / "t", step=20)
    store.is_unavailable = False
    for expected in (10, 20):  # memory runs out twice
        restored = checkpoints.fetch_latest()
        assert restored is not None
        assert restored.checkpoint.step == expected
        save(checkpoints, tmp_path / "t", step=20)


@pytest.mark.parametrize("path", ["../../../outside", "/etc/passwd", "a/../../b", ""])
def test_manifest_path_outside_folder_is_rejected(
    make: Make, emitted_events: list[Event], store: ObjectStore, spec: JobSpec, tmp_path: Path, path: str
) -> None:
    save(make(), tmp_path / "t")
    key = checkpoint_key(spec.checkpoints_prefix, 1, 10) + MANIFEST
    manifest = json.loads(store.read(key))
    manifest["files"][0]["path"] = path
    store.write(key, with_valid_checksum(manifest))
    assert make(attempt=2).fetch_latest() is None
    skipped = emitted_events[-1]
    assert isinstance(skipped, CheckpointSkipped)
    assert "leaves its folder" in skipped.reason


def test_store_outage_is_not_reported_as_damage(make: Make, emitted_events: list[Event], spec: JobSpec, tmp_path: Path) -> None:
    class UnavailableStore(LocalStore):
        failures_left = 3

        def download(self, key: str, target: Path) -> Path:
            self.failures_left -= 1
            if self.failures_left >= 0:
                raise StoreUnavailable("away")
            return super().download(key, target)

    save(make(), tmp_path / "t")
    assert make(attempt=2, store=UnavailableStore(spec.stores.models)).fetch_latest() is not None
    permanently_unavailable = UnavailableStore(spec.stores.models)
    permanently_unavailable.failures_left = 10_000
    with pytest.raises(JobFailed, match=f"{spec.stores.models}/.* cannot be read: away"):
        make(attempt=3, store=permanently_unavailable).fetch_latest()
    assert not [event for event in emitted_events if isinstance(event, CheckpointSkipped)]


def test_fetch_returns_checkpoint_or_reports_it_missing(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    save(make(), tmp_path / "t")
    source = ExportSource(job_id="job-1", attempt=1, step=10, key=checkpoint_key(spec.checkpoints_prefix, 1, 10))
    another = make(spec=make_spec(tmp_path / "objects", job_id="job-2"), folder=tmp_path / "elsewhere")
    assert another.fetch(source).checkpoint.step == 10
    with pytest.raises(JobFailed, match="step 11 of job-1 is damaged: its manifest is of another checkpoint"):
        another.fetch(source.model_copy(update={"step": 11}))
    store.delete(source.key + "optimizer.pt")
    with pytest.raises(JobFailed, match="step 10 of job-1 is damaged"):
        another.fetch(source)
    store.delete(source.key + MANIFEST)
    with pytest.raises(JobFailed, match="step 10 of job-1 no longer exists"):
        another.fetch(source)


# --- selection without a store ----------------------------------------------------------------------------------------


def make_stored_checkpoint(attempt: int, step: int, eval_loss: float | None = None) -> StoredCheckpoint:
    body = {
        "job_id": "j",
        "attempt": attempt,
        "step": step,
        "total_steps": 9,
        "epoch": 1,
        "eval_loss": eval_loss,
        "files": [],
    }
    config = {"training_config": {"base_model_id": "a/b"}, "created_at": "2026-01-01T00:00:00Z"}
    return StoredCheckpoint(f"attempt-{attempt}/step-{step}/", Checkpoint.model_validate(body | config))


def test_checkpoint_of_version_1_is_continued_from(make: Make, spec: JobSpec, store: ObjectStore) -> None:
    for path in (GOLDEN / "checkpoint_version_1").iterdir():
        store.write(checkpoint_key(spec.checkpoints_prefix, 1, 10) + path.name, path.read_bytes())
    restored = make(attempt=2).fetch_latest()
    assert restored is not None
    batch = {"batch_size": 2, "gradient_accumulation_steps": 8}
    assert (restored.checkpoint.step, restored.checkpoint.schema_version, restored.checkpoint.details) == (10, 2, batch)
    state = TrainingControlState.read(restored.folder)
    assert (state.step, state.tokens_seen, state.details, state.evaluation_due) == (10, 640, batch, True)
    assert BatchConfig.from_details(state.details) == BatchConfig(2, 8)


def test_changed_manifest_of_version_1_is_damaged() -> None:
    content = (GOLDEN / "checkpoint_version_1" / MANIFEST).read_bytes()
    assert Checkpoint.from_verified_bytes(content).step == 10
    with pytest.raises(ValueError, match="checksum"):
        Checkpoint.from_verified_bytes(content.replace(b'"batch_size": 2', b'"batch_size": 4', 1))


def test_family_without_batches_has_no_details(make: Make, spec: JobSpec, tmp_path: Path) -> None:
    save(make(), tmp_path / "t", replace(CHECKPOINT_INFO, details={}))
    restored = make(attempt=2).fetch_latest()
    assert restored is not None
    assert restored.checkpoint.details == TrainingControlState().details == {}
    with pytest.raises(ValidationError):
        BatchConfig.from_details(restored.checkpoint.details)


def test_best_checkpoint_is_kept_once() -> None:
    in_order = sort_for_resume(
        [
            make_stored_checkpoint(1, 1, 2.0),
            make_stored_checkpoint(1, 2, 2.0),
            make_stored_checkpoint(2, 1),
            make_stored_checkpoint(2, 2, 9.0),
        ],
        1,
        2,
    )
    assert [stored.checkpoint.step for stored in select_expired(in_order, 1)] == [1, 1]
    assert select_expired(in_order, 4) == []
    assert select_expired([], 1) == []
