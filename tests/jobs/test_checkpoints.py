"""What an attempt finds to go on from, and what it leaves: over a real folder, without a trainer."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jobs.checkpoints import Checkpoints, Mark, Stored, resume_order, to_prune
from jobs.errors import JobFailed
from schema.checkpoint import MANIFEST, Checkpoint, checkpoint_key, checkpoints_prefix
from schema.events import CheckpointSaved, CheckpointSkipped, Event, Resumed, Warned
from schema.job import ExportSource
from schema.spec import JobSpec
from storage import ChecksumMismatch, NoSuchObject, ObjectStore, StoredObject, StoreUnavailable, open_store
from storage.local import LocalStore
from tests.jobs.conftest import a_spec

A_MARK = Mark(
    step=10,
    total_steps=100,
    epoch=0.5,
    reason="interval",
    eval_loss=None,
    batch_size=2,
    gradient_accumulation_steps=4,
    save_s=0.1,
)
FILES = {"adapter_model.safetensors": b"weights" * 100, "optimizer.pt": b"moments" * 200, "trainer_state.json": b"{}"}


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return a_spec(tmp_path / "objects", job_id="job-1")


@pytest.fixture
def store(spec: JobSpec) -> ObjectStore:
    return open_store(spec.stores.models)


@pytest.fixture
def told() -> list[Event]:
    return []


Make = Callable[..., Checkpoints]


@pytest.fixture
def make(spec: JobSpec, store: ObjectStore, told: list[Event], tmp_path: Path) -> Iterator[Make]:
    """Makes the checkpoints of an attempt; whatever is given takes the place of what it would have."""
    made: list[Checkpoints] = []

    def build(attempt: int = 1, **changes: Any) -> Checkpoints:
        given = {
            "store": store,
            "spec": spec,
            "keep": 2,
            "folder": tmp_path / f"work-{attempt}",
            "tell": told.append,
            "sleep": lambda _: None,
        }
        made.append(Checkpoints(attempt=attempt, **given | changes))
        return made[-1]

    yield build
    for checkpoints in made:
        checkpoints.close()


def save(checkpoints: Checkpoints, folder: Path, mark: Mark = A_MARK, **changes: Any) -> None:
    """Hand over a folder with files, and wait until they are durable."""
    mark = replace(mark, **changes)
    checkpoints.keep(a_folder(folder, mark.step), mark)
    assert checkpoints.settle(20)


def a_folder(folder: Path, step: int, content: bytes = b"") -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    for name, beginning in FILES.items():
        (made / name).write_bytes(beginning + str(step).encode() + content)
    return made


def steps(store: ObjectStore, spec: JobSpec) -> list[tuple[int, int]]:
    """Attempt and step of what counts."""
    found = [Checkpoint.load(store.read(stored.key)) for stored in store.walk(spec.checkpoints) if stored.key.endswith(f"/{MANIFEST}")]
    return [(checkpoint.attempt, checkpoint.step) for checkpoint in found]


# --- keeping ---------------------------------------------------------------------------------------------------------


def test_what_is_handed_over_becomes_durable_and_is_told(make: Make, told: list[Event], spec: JobSpec, tmp_path: Path) -> None:
    checkpoints = make(trackers=lambda: {"wandb": "run-1"})
    save(checkpoints, tmp_path / "t")
    restored = make(attempt=2).newest()
    assert restored is not None
    assert {path.name: path.read_bytes() for path in restored.folder.iterdir()} == {
        name: content + b"10" for name, content in FILES.items()
    }
    kept = restored.checkpoint
    assert (kept.attempt, kept.step, kept.batch_size, kept.trackers) == (1, 10, 2, {"wandb": "run-1"})
    assert kept.training_config == spec.training_config
    [saved] = [event for event in told if isinstance(event, CheckpointSaved)]
    assert (saved.step, saved.reason, saved.size_bytes, saved.save_s) == (10, "interval", kept.size_bytes, 0.1)
    assert checkpoints.saved_step == 10
    assert checkpoints.cost_s >= saved.upload_s > 0
    assert not list((tmp_path / "t").iterdir())  # the disk is given back


def test_a_pickle_that_nobody_reads_stays_here(make: Make, store: ObjectStore, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "t", 10)
    (folder / "training_args.bin").write_bytes(b"pickle")
    checkpoints = make()
    checkpoints.keep(folder, A_MARK)
    checkpoints.settle(20)
    assert not [stored.key for stored in store.walk("") if stored.key.endswith(".bin")]


def test_the_manifest_comes_last(make: Make, spec: JobSpec, tmp_path: Path) -> None:
    class Watching(LocalStore):
        order: ClassVar[list[str]] = []

        def write(self, key: str, content: bytes, *, if_absent: bool = False) -> StoredObject:
            self.order.append(key)
            return super().write(key, content, if_absent=if_absent)

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            assert sha256 is not None
            self.order.append(key)
            return super().upload(source, key, sha256=sha256)

    save(make(store=Watching(spec.stores.models)), tmp_path / "t")
    assert sorted(Watching.order[:-1]) == sorted(checkpoint_key(spec.checkpoints, 1, 10) + name for name in FILES)
    assert Watching.order[-1].endswith(MANIFEST)


def test_the_last_ones_and_the_best_are_kept(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    checkpoints = make()
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 2.5)):
        save(checkpoints, tmp_path / "t", step=step, eval_loss=loss)
    assert steps(store, spec) == [(1, 20), (1, 40), (1, 50)]
    assert len(list(store.walk(spec.checkpoints))) == 3 * (len(FILES) + 1)


def test_what_an_attempt_left_unfinished_is_cleared_by_the_next(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    store.write(checkpoint_key(spec.checkpoints, 1, 5) + "optimizer.pt", b"half")
    later = checkpoint_key(spec.checkpoints, 3, 5) + "optimizer.pt"
    store.write(later, b"of an attempt after mine")
    save(make(attempt=2), tmp_path / "t")
    assert store.stat(checkpoint_key(spec.checkpoints, 1, 5) + "optimizer.pt") is None
    assert store.stat(later) is not None


@pytest.mark.parametrize("project", ["attempt-1", "attempt-7", "step-1"])
def test_what_is_tidied_is_the_job_s_own_whatever_its_project_is_called(
    make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path, project: str
) -> None:
    another = checkpoint_key(checkpoints_prefix("job-2", project), 1, 5) + "optimizer.pt"
    store.write(another, b"of another job")
    own = spec.model_copy(update={"project_id": project, "checkpoints": checkpoints_prefix("job-1", project)})
    half = checkpoint_key(own.checkpoints, 1, 5) + "inner/optimizer.pt"
    store.write(half, b"half")
    save(make(spec=own), tmp_path / "t")
    assert store.stat(another) is not None
    assert store.stat(half) is None
    assert steps(store, own) == [(1, 10)]


def test_an_attempt_that_was_given_up_touches_nothing_of_its_successor(
    make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path
) -> None:
    first, second = make(attempt=1), make(attempt=2)
    save(first, tmp_path / "1", step=10)
    for step in (20, 30):
        save(second, tmp_path / "2", step=step)
    for step in (40, 50, 60):  # woken
        save(first, tmp_path / "1", step=step)
    assert [found for found in steps(store, spec) if found[0] == 2] == [(2, 20), (2, 30)]
    restored = make(attempt=3).newest()
    assert restored is not None
    assert (restored.checkpoint.attempt, restored.checkpoint.step) == (2, 30)


def test_one_that_waits_gives_way_to_a_newer_one(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(LocalStore):
        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            begun.set()
            assert go_on.wait(20)
            return super().upload(source, key, sha256=sha256)

    checkpoints = make(store=Slow(spec.stores.models), keep=9)
    checkpoints.keep(a_folder(tmp_path / "t", 10), A_MARK)
    assert begun.wait(20)
    for step in (20, 30):
        checkpoints.keep(a_folder(tmp_path / "t", step), replace(A_MARK, step=step))
    assert checkpoints.settle(0.01) is False
    go_on.set()
    assert checkpoints.settle(20)
    assert steps(store, spec) == [(1, 10), (1, 30)]
    assert not list((tmp_path / "t").iterdir())


def test_a_store_that_comes_back_is_waited_for_and_one_that_does_not_costs_the_checkpoint_alone(
    make: Make, told: list[Event], store: ObjectStore, spec: JobSpec, tmp_path: Path
) -> None:
    class Away(LocalStore):
        times = 0

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            self.times -= 1
            if self.times >= 0:
                raise StoreUnavailable("away")
            return super().upload(source, key, sha256=sha256)

    away = Away(spec.stores.models)
    checkpoints = make(store=away)
    away.times = 4
    save(checkpoints, tmp_path / "t", step=10)
    away.times = 1000
    save(checkpoints, tmp_path / "t", step=20)
    away.times = 0
    save(checkpoints, tmp_path / "t", step=30)
    assert steps(store, spec) == [(1, 10), (1, 30)]
    [warning] = [event for event in told if isinstance(event, Warned)]
    assert (warning.code, "step 20" in warning.message, "away" in warning.message) == ("checkpoint_not_saved", True, True)


def test_a_step_that_is_saved_twice_is_saved(make: Make, store: ObjectStore, spec: JobSpec, told: list[Event], tmp_path: Path) -> None:
    checkpoints = make()
    for _ in range(2):
        save(checkpoints, tmp_path / "t")
    assert steps(store, spec) == [(1, 10)]
    assert not [event for event in told if isinstance(event, Warned)]
    assert make(attempt=2).newest() is not None


@pytest.mark.parametrize("damage", [True, False])
def test_a_step_that_is_made_again_with_a_smaller_batch_can_be_gone_on_from(
    make: Make, spec: JobSpec, told: list[Event], tmp_path: Path, damage: bool
) -> None:
    checkpoints = make()
    for step in (10, 20):
        save(checkpoints, tmp_path / "t", step=step)
    if damage:
        (tmp_path / "objects" / checkpoint_key(spec.checkpoints, 1, 20) / "optimizer.pt").write_bytes(b"")
        assert checkpoints.newest() is not None  # memory ran out, and step 20 could not be gone on from
    checkpoints.keep(a_folder(tmp_path / "t", 20, b" another batch size"), replace(A_MARK, step=20))
    assert checkpoints.settle(20)
    told.clear()
    restored = make(attempt=2).newest()
    assert restored is not None
    assert told == [Resumed(step=20, from_attempt=1)]
    assert (b"another" in (restored.folder / "optimizer.pt").read_bytes()) is damage  # what is whole is left as it is


def test_what_is_handed_over_after_a_failure_that_nobody_foresaw_is_still_saved(make: Make, spec: JobSpec, tmp_path: Path) -> None:
    class Odd(LocalStore):
        odd = True

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            if self.odd:
                raise NoSuchObject("the session of the upload")
            return super().upload(source, key, sha256=sha256)

    odd = Odd(spec.stores.models)
    checkpoints = make(store=odd)
    save(checkpoints, tmp_path / "t", step=10)
    odd.odd = False
    save(checkpoints, tmp_path / "t", step=20)
    assert checkpoints.saved_step == 20


def test_a_store_that_fails_while_it_is_tidied_does_not_unsay_that_a_checkpoint_was_saved(
    make: Make, told: list[Event], spec: JobSpec, tmp_path: Path
) -> None:
    class Untidy(LocalStore):
        def walk(self, prefix: str) -> Iterator[StoredObject]:
            if "/attempt-1/" in prefix:
                raise FileNotFoundError("a folder that was removed this moment")
            return super().walk(prefix)

    save(make(store=Untidy(spec.stores.models)), tmp_path / "t")
    assert [type(event) for event in told] == [CheckpointSaved]


def test_a_full_disk_is_cleared_of_what_waits(make: Make, tmp_path: Path) -> None:
    checkpoints = make(folder=tmp_path / "t")
    for step in (10, 20):
        a_folder(tmp_path / "t", step)
    assert checkpoints.prune_local() == 2
    assert not list((tmp_path / "t").iterdir())


# --- going on --------------------------------------------------------------------------------------------------------


def test_without_any_there_is_none(make: Make, told: list[Event]) -> None:
    assert make().newest() is None
    assert told == []


def test_the_newest_attempt_counts_before_the_newest_step_and_a_later_attempt_not_at_all(
    make: Make, told: list[Event], tmp_path: Path
) -> None:
    for attempt, step in ((1, 90), (2, 20), (2, 30), (4, 40)):
        save(make(attempt=attempt, keep=9), tmp_path / "t", step=step)
    third = make(attempt=3)
    restored = third.newest()
    assert restored is not None
    assert (restored.checkpoint.attempt, restored.checkpoint.step, third.resumed_step) == (2, 30, 30)
    assert [event for event in told if isinstance(event, Resumed)] == [Resumed(step=30, from_attempt=2)]


def test_a_retry_from_the_start_does_not_see_earlier_ones(make: Make, spec: JobSpec, tmp_path: Path) -> None:
    save(make(attempt=1), tmp_path / "t")
    assert make(attempt=2, spec=spec.model_copy(update={"first_attempt": 2})).newest() is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a bit flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_for_the_one_before(
    make: Make, told: list[Event], spec: JobSpec, tmp_path: Path, damage: str, name: str
) -> None:
    for step in (10, 20):
        save(make(), tmp_path / "t", step=step)
    told.clear()
    DAMAGES[damage](tmp_path / "objects" / checkpoint_key(spec.checkpoints, 1, 20) / name)
    restored = make(attempt=2).newest()
    assert restored is not None
    assert restored.checkpoint.step == 10
    skipped, resumed = told
    assert isinstance(skipped, CheckpointSkipped)
    assert (skipped.attempt, skipped.step, name in skipped.why) == (1, 20, True)
    assert resumed == Resumed(step=10, from_attempt=1)


def resealed(manifest: dict[str, Any]) -> bytes:
    """A manifest that was written by somebody who knows how."""
    return Checkpoint.load(json.dumps(manifest)).sealed()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": 20}', b"\xff", b"[" * 200_000])
def test_a_manifest_that_cannot_be_read_is_passed_over(
    make: Make, told: list[Event], store: ObjectStore, spec: JobSpec, tmp_path: Path, content: bytes
) -> None:
    for step in (10, 20):
        save(make(), tmp_path / "t", step=step)
    told.clear()
    store.write(checkpoint_key(spec.checkpoints, 1, 20) + MANIFEST, content)
    restored = make(attempt=2).newest()
    assert restored is not None
    assert restored.checkpoint.step == 10
    assert isinstance(told[0], CheckpointSkipped)
    assert (told[0].attempt, told[0].step, "its manifest cannot be read" in told[0].why) == (1, 20, True)


def test_a_single_wrong_bit_in_a_manifest_is_seen_wherever_it_is(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    save(make(), tmp_path / "t")
    content = store.read(checkpoint_key(spec.checkpoints, 1, 10) + MANIFEST)
    for place in range(0, len(content), 5):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 7)
        try:
            read = Checkpoint.unsealed(bytes(flipped))
        except ValueError:
            continue
        assert read == Checkpoint.unsealed(content)  # white space between two values


def test_one_that_was_never_finished_is_told(make: Make, told: list[Event], store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    save(make(), tmp_path / "t")
    store.write(checkpoint_key(spec.checkpoints, 1, 20) + "optimizer.pt", b"half")
    told.clear()
    restored = make(attempt=2).newest()
    assert restored is not None
    assert restored.checkpoint.step == 10
    assert isinstance(told[0], CheckpointSkipped)
    assert (told[0].attempt, told[0].step, "never finished" in told[0].why) == (1, 20, True)


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
def test_a_manifest_that_cannot_be_true_is_passed_over(
    make: Make, told: list[Event], store: ObjectStore, spec: JobSpec, tmp_path: Path, change: dict[str, Any]
) -> None:
    for step in (10, 20):
        save(make(), tmp_path / "t", step=step)
    told.clear()
    key = checkpoint_key(spec.checkpoints, 1, 20) + MANIFEST
    manifest = json.loads(store.read(key))
    files = {"files": [manifest["files"][0] | {"path": path} for path in change["files"]]} if "files" in change else {}
    store.write(key, resealed(manifest | change | files))
    restored = make(attempt=2).newest()
    assert restored is not None
    assert restored.checkpoint.step == 10
    skipped, resumed = told
    assert isinstance(skipped, CheckpointSkipped)
    assert (skipped.attempt, skipped.step, "its manifest" in skipped.why) == (1, 20, True)
    assert resumed == Resumed(step=10, from_attempt=1)


def test_what_the_store_itself_says_is_damaged_is_passed_over(make: Make, told: list[Event], spec: JobSpec, tmp_path: Path) -> None:
    class Rotten(LocalStore):
        def download(self, key: str, target: Path) -> Path:
            if key.endswith("step-00000030/optimizer.pt"):
                raise ChecksumMismatch("not what was stored")
            return super().download(key, target)

        def read(self, key: str) -> bytes:
            if key.endswith(f"step-00000020/{MANIFEST}"):
                raise ChecksumMismatch("not what was stored")
            return super().read(key)

    for step in (10, 20, 30):
        save(make(keep=9), tmp_path / "t", step=step)
    told.clear()
    restored = make(attempt=2, store=Rotten(spec.stores.models)).newest()
    assert restored is not None
    assert restored.checkpoint.step == 10
    assert sorted(event.step for event in told if isinstance(event, CheckpointSkipped)) == [20, 30]


def test_what_was_passed_over_is_removed_from_this_machine_and_told_once(
    make: Make, told: list[Event], spec: JobSpec, tmp_path: Path
) -> None:
    for step in (10, 20):
        save(make(), tmp_path / "t", step=step)
    (tmp_path / "objects" / checkpoint_key(spec.checkpoints, 1, 20) / "optimizer.pt").write_bytes(b"")
    second = make(attempt=2)
    for _ in range(2):  # once more after a lack of memory
        assert second.newest() is not None
    assert [path.name for path in (tmp_path / "work-2").iterdir()] == ["restored-1-10"]
    assert len([event for event in told if isinstance(event, CheckpointSkipped)]) == 1


def test_one_that_is_pruned_while_it_is_fetched_gives_way_to_the_one_it_was_pruned_for(
    make: Make, told: list[Event], spec: JobSpec, tmp_path: Path
) -> None:
    woken = make(attempt=1, keep=1)

    class Pruned(LocalStore):
        pruned = False

        def download(self, key: str, target: Path) -> Path:
            if not self.pruned:
                self.pruned = True
                save(woken, tmp_path / "t", step=50)
            return super().download(key, target)

    save(woken, tmp_path / "t", step=40)
    restored = make(attempt=2, store=Pruned(spec.stores.models)).newest()
    assert restored is not None
    assert restored.checkpoint.step == 50
    assert not [event for event in told if isinstance(event, CheckpointSkipped)]


def test_one_that_was_still_being_saved_when_it_was_passed_over_counts_once_it_is_there(
    make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path
) -> None:
    woken = make(attempt=1, keep=1)

    class Finishing(LocalStore):
        finished = False

        def download(self, key: str, target: Path) -> Path:
            if not self.finished:
                self.finished = True
                save(woken, tmp_path / "t", step=50)  # and 40 is pruned
            return super().download(key, target)

    save(woken, tmp_path / "t", step=40)
    store.write(checkpoint_key(spec.checkpoints, 1, 50) + "optimizer.pt", b"half")
    restored = make(attempt=2, store=Finishing(spec.stores.models)).newest()
    assert restored is not None
    assert restored.checkpoint.step == 50


def test_a_step_whose_upload_failed_counts_when_it_was_saved_the_second_time(make: Make, spec: JobSpec, tmp_path: Path) -> None:
    class Away(LocalStore):
        away = False

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            if self.away and key.endswith("trainer_state.json"):
                raise StoreUnavailable("away")
            return super().upload(source, key, sha256=sha256)

    store = Away(spec.stores.models)
    checkpoints = make(store=store, keep=9)
    save(checkpoints, tmp_path / "t", step=10)
    store.away = True
    save(checkpoints, tmp_path / "t", step=20)
    store.away = False
    for expected in (10, 20):  # memory runs out twice
        restored = checkpoints.newest()
        assert restored is not None
        assert restored.checkpoint.step == expected
        save(checkpoints, tmp_path / "t", step=20)


@pytest.mark.parametrize("path", ["../../../outside", "/etc/passwd", "a/../../b", ""])
def test_a_manifest_that_points_outside_its_folder_is_not_followed(
    make: Make, told: list[Event], store: ObjectStore, spec: JobSpec, tmp_path: Path, path: str
) -> None:
    save(make(), tmp_path / "t")
    key = checkpoint_key(spec.checkpoints, 1, 10) + MANIFEST
    manifest = json.loads(store.read(key))
    manifest["files"][0]["path"] = path
    store.write(key, resealed(manifest))
    assert make(attempt=2).newest() is None
    skipped = told[-1]
    assert isinstance(skipped, CheckpointSkipped)
    assert "leaves its folder" in skipped.why


def test_a_store_that_is_away_is_no_damage(make: Make, told: list[Event], spec: JobSpec, tmp_path: Path) -> None:
    class Away(LocalStore):
        times = 3

        def download(self, key: str, target: Path) -> Path:
            self.times -= 1
            if self.times >= 0:
                raise StoreUnavailable("away")
            return super().download(key, target)

    save(make(), tmp_path / "t")
    assert make(attempt=2, store=Away(spec.stores.models)).newest() is not None
    for_good = Away(spec.stores.models)
    for_good.times = 10_000
    with pytest.raises(JobFailed, match=f"{spec.stores.models}/.* cannot be read: away"):
        make(attempt=3, store=for_good).newest()
    assert not [event for event in told if isinstance(event, CheckpointSkipped)]


def test_one_is_fetched_for_an_export_or_said_to_be_gone(make: Make, store: ObjectStore, spec: JobSpec, tmp_path: Path) -> None:
    save(make(), tmp_path / "t")
    source = ExportSource(job_id="job-1", attempt=1, step=10, key=checkpoint_key(spec.checkpoints, 1, 10))
    another = make(spec=a_spec(tmp_path / "objects", job_id="job-2"), folder=tmp_path / "elsewhere")
    assert another.fetch(source).checkpoint.step == 10
    with pytest.raises(JobFailed, match="step 11 of job-1 is damaged: its manifest is of another checkpoint"):
        another.fetch(source.model_copy(update={"step": 11}))
    store.delete(source.key + "optimizer.pt")
    with pytest.raises(JobFailed, match="step 10 of job-1 is damaged"):
        another.fetch(source)
    store.delete(source.key + MANIFEST)
    with pytest.raises(JobFailed, match="step 10 of job-1 is not there any more"):
        another.fetch(source)


# --- what is decided without a store ---------------------------------------------------------------------------------


def a_stored(attempt: int, step: int, eval_loss: float | None = None) -> Stored:
    body = {
        "job_id": "j",
        "attempt": attempt,
        "step": step,
        "total_steps": 9,
        "epoch": 1,
        "eval_loss": eval_loss,
        "batch_size": 1,
        "files": [],
    }
    config = {"gradient_accumulation_steps": 1, "training_config": {"base_model_id": "a/b"}, "created_at": "2026-01-01T00:00:00Z"}
    return Stored(f"attempt-{attempt}/step-{step}/", Checkpoint.model_validate(body | config))


def test_the_best_is_kept_once() -> None:
    in_order = resume_order([a_stored(1, 1, 2.0), a_stored(1, 2, 2.0), a_stored(2, 1), a_stored(2, 2, 9.0)], 1, 2)
    assert [found.checkpoint.step for found in to_prune(in_order, 1)] == [1, 1]
    assert to_prune(in_order, 4) == []
    assert to_prune([], 1) == []
