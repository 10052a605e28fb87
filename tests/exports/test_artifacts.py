"""Uploads of artifacts are verified and retried, and each attempt has its own keys."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import JsonValue

from jobs.runtime.artifacts import ArtifactUploader, ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.files import sha256_of
from jobs.runtime.retry import TRIES
from schema.spec import artifact_key
from schema.training import SftConfig
from storage import ChecksumMismatch, NoSuchObject, ObjectStore, StorageError, StoredObject, StoreUnavailable
from storage.file import LocalStore
from storage.registry import open_store


class FaultyStore(LocalStore):
    """A folder store whose next uploads raise the given errors."""

    def __init__(self, url: str, *errors: StorageError) -> None:
        super().__init__(url)
        self.errors = list(errors)

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        if self.errors:
            raise self.errors.pop(0)
        return super().upload(source, key, sha256=sha256)


class CorruptingStore(LocalStore):
    """A folder store that changes the bytes it receives."""

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        mangled = source.with_name("mangled")
        mangled.write_bytes(source.read_bytes()[::-1] + b"!")
        return super().upload(mangled, key, sha256=sha256)


@dataclass
class SleepRecorder:
    """Records sleeps instead of sleeping."""

    durations_s: list[float] = field(default_factory=list)

    def __call__(self, duration_s: float) -> None:
        self.durations_s.append(duration_s)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/objects"


@pytest.fixture
def store(url: str) -> ObjectStore:
    return open_store(url)


@pytest.fixture
def sleeps() -> SleepRecorder:
    return SleepRecorder()


@pytest.fixture
def folder(tmp_path: Path) -> ExportedArtifact:
    path = tmp_path / "adapter"
    (path / "inner").mkdir(parents=True)
    (path / "a.bin").write_bytes(b"aaa")
    (path / "inner" / "b.json").write_bytes(b"{}")
    return ExportedArtifact(name="adapter", kind="adapter", path=path, key="trained_adapters/job-1/")


@pytest.fixture
def file(tmp_path: Path) -> ExportedArtifact:
    path = tmp_path / "gemma-q8_0.gguf"
    path.write_bytes(b"GGUF" * 1000)
    fidelity: dict[str, JsonValue] = {"compared_tokens": 1, "argmax_agreement": 1.0, "mean_kl_to_merged": 0.0}
    return ExportedArtifact(name="gguf-q8_0", kind="gguf", path=path, key="gguf_models/job-1/gemma-q8_0.gguf", fidelity=fidelity)


def test_a_folder_is_published_file_by_file(store: ObjectStore, folder: ExportedArtifact) -> None:
    artifact = ArtifactUploader(store, "job-1", 1).upload(folder)
    assert (artifact.uri, artifact.key) == (f"{store.url}/trained_adapters/job-1/", "trained_adapters/job-1/")
    assert [(file.path, file.size_bytes) for file in artifact.files] == [("a.bin", 3), ("inner/b.json", 2)]
    assert artifact.size_bytes == 5
    assert artifact.sha256 is None
    assert store.read("trained_adapters/job-1/inner/b.json") == b"{}"


def test_single_file_has_its_own_uri(store: ObjectStore, file: ExportedArtifact) -> None:
    artifact = ArtifactUploader(store, "job-1", 1).upload(file)
    assert [stored.path for stored in artifact.files] == [""]
    assert artifact.sha256 == sha256_of(file.path)
    assert artifact.fidelity == file.fidelity
    assert store.read(artifact.key) == file.path.read_bytes()


def test_companions_are_stored_beside_their_file(store: ObjectStore, file: ExportedArtifact, tmp_path: Path) -> None:
    modelfile = tmp_path / "gemma-q8_0.Modelfile"
    modelfile.write_text("FROM ./gemma-q8_0.gguf\n")
    artifact = ArtifactUploader(store, "job-1", 1).upload(replace(file, companions=(modelfile,)))
    assert artifact.uri == f"{store.url}/gguf_models/job-1/gemma-q8_0.gguf"
    assert [(stored.path, artifact.file_key(stored)) for stored in artifact.files] == [
        ("", "gguf_models/job-1/gemma-q8_0.gguf"),
        ("gemma-q8_0.Modelfile", "gguf_models/job-1/gemma-q8_0.Modelfile"),
    ]
    assert artifact.sha256 == sha256_of(file.path)
    assert artifact.size_bytes == file.path.stat().st_size + modelfile.stat().st_size
    assert store.read("gguf_models/job-1/gemma-q8_0.Modelfile") == modelfile.read_bytes()


def test_each_attempt_has_its_own_keys(store: ObjectStore, file: ExportedArtifact) -> None:
    keys = {artifact_key("gguf_models", "job-1", attempt, "gemma.gguf") for attempt in (1, 2)}
    assert keys == {"gguf_models/job-1/attempt-1/gemma.gguf", "gguf_models/job-1/attempt-2/gemma.gguf"}
    assert artifact_key("trained_adapters", "job-1", 1) == "trained_adapters/job-1/attempt-1/"


def test_only_artifacts_of_earlier_attempts_are_deleted(store: ObjectStore) -> None:
    kept = ["gguf_models/job-1/attempt-3/b", "merged_models/job-2/attempt-1/c", "trained_adapters/job-1/attempt-2/d"]
    for key in ("trained_adapters/job-1/attempt-1/a", "gguf_models/job-1/attempt-1/a", *kept):
        store.write(key, b"x")
    ArtifactUploader(store, "job-1", 2).delete_previous_attempts(SftConfig.artifact_folders())
    assert sorted(stored.key for stored in store.iter_objects("")) == kept


def test_cleanup_failure_does_not_fail_publishing(url: str) -> None:
    class ListingFailsStore(LocalStore):
        def iter_objects(self, prefix: str) -> Iterator[StoredObject]:
            raise StoreUnavailable("away")

    ArtifactUploader(ListingFailsStore(url), "job-1", 2).delete_previous_attempts(SftConfig.artifact_folders())


def test_uploaded_file_is_not_sent_again(url: str, folder: ExportedArtifact, sleeps: SleepRecorder) -> None:
    class CountingStore(LocalStore):
        uploads: ClassVar[list[str]] = []

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            self.uploads.append(key)
            if key.endswith("b.json") and self.uploads.count(key) < 3:
                raise StoreUnavailable("away")
            return super().upload(source, key, sha256=sha256)

    ArtifactUploader(CountingStore(url), "job-1", 1, sleeps).upload(folder)
    assert sorted(CountingStore.uploads) == [folder.key + "a.bin", *[folder.key + "inner/b.json"] * 3]


def test_temporary_outage_is_retried(url: str, file: ExportedArtifact, sleeps: SleepRecorder) -> None:
    store = FaultyStore(url, StoreUnavailable("away"), ChecksumMismatch("mangled once"), StoreUnavailable("away"))
    artifact = ArtifactUploader(store, "job-1", 1, sleeps).upload(file)
    assert store.read(artifact.key) == file.path.read_bytes()
    assert sleeps.durations_s == [0.5, 1.0, 2.0]


def test_lost_upload_session_is_retried(url: str, file: ExportedArtifact, sleeps: SleepRecorder) -> None:
    store = FaultyStore(url, NoSuchObject("the session is gone"))
    artifact = ArtifactUploader(store, "job-1", 1, sleeps).upload(file)
    assert store.read(artifact.key) == file.path.read_bytes()
    assert sleeps.durations_s == [0.5]


def test_permanent_outage_fails_the_job(url: str, file: ExportedArtifact, sleeps: SleepRecorder) -> None:
    store = FaultyStore(url, *[StoreUnavailable("no room left")] * 100)
    with pytest.raises(JobFailed, match="no room left") as caught:
        ArtifactUploader(store, "job-1", 1, sleeps).upload(file)
    assert caught.value.failure.code == "upload_failed"
    assert len(sleeps.durations_s) == TRIES - 1
    assert not list(store.iter_objects(""))


def test_corrupted_upload_is_not_visible(url: str, file: ExportedArtifact, sleeps: SleepRecorder) -> None:
    store = CorruptingStore(url)
    with pytest.raises(JobFailed, match="changed on its way") as caught:
        ArtifactUploader(store, "job-1", 1, sleeps).upload(file)
    assert caught.value.failure.code == "upload_failed"
    assert not list(store.iter_objects(""))


def test_definitive_error_is_not_retried(store: ObjectStore, file: ExportedArtifact, sleeps: SleepRecorder) -> None:
    with pytest.raises(JobFailed, match="could not be stored"):
        ArtifactUploader(store, "job-1", 1, sleeps).upload(ExportedArtifact(name="x", kind="gguf", path=file.path, key="../outside"))
    assert sleeps.durations_s == []
