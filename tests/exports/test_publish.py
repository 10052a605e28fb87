"""The step to the outside: all or nothing, once."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from jobs.errors import JobFailed
from jobs.publish import TRIES, Product, Publisher, artifact_key, sha256_of
from schema.job import Fidelity
from storage import ChecksumMismatch, NoSuchObject, ObjectStore, StorageError, StoredObject, StoreUnavailable, open_store
from storage.local import LocalStore


class Faulty(LocalStore):
    """A folder whose next uploads fail, as often as there are errors left."""

    def __init__(self, url: str, *errors: StorageError) -> None:
        super().__init__(url)
        self.errors = list(errors)

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        if self.errors:
            raise self.errors.pop(0)
        return super().upload(source, key, sha256=sha256)


class Mangling(LocalStore):
    """A folder on a disk that flips bytes."""

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        mangled = source.with_name("mangled")
        mangled.write_bytes(source.read_bytes()[::-1] + b"!")
        return super().upload(mangled, key, sha256=sha256)


@dataclass
class Naps:
    """Sleeps that are only counted."""

    lengths_s: list[float] = field(default_factory=list)

    def __call__(self, length_s: float) -> None:
        self.lengths_s.append(length_s)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/objects"


@pytest.fixture
def store(url: str) -> ObjectStore:
    return open_store(url)


@pytest.fixture
def naps() -> Naps:
    return Naps()


@pytest.fixture
def folder(tmp_path: Path) -> Product:
    path = tmp_path / "adapter"
    (path / "inner").mkdir(parents=True)
    (path / "a.bin").write_bytes(b"aaa")
    (path / "inner" / "b.json").write_bytes(b"{}")
    return Product(name="adapter", kind="adapter", path=path, key="trained_adapters/job-1/")


@pytest.fixture
def file(tmp_path: Path) -> Product:
    path = tmp_path / "gemma-q8_0.gguf"
    path.write_bytes(b"GGUF" * 1000)
    fidelity = Fidelity(compared_tokens=1, argmax_agreement=1.0, mean_kl_to_merged=0.0)
    return Product(name="gguf-q8_0", kind="gguf", path=path, key="gguf_models/job-1/gemma-q8_0.gguf", fidelity=fidelity)


def test_a_folder_is_published_file_by_file(store: ObjectStore, folder: Product) -> None:
    artifact = Publisher(store, "job-1", 1).publish(folder)
    assert (artifact.uri, artifact.key) == (f"{store.url}/trained_adapters/job-1/", "trained_adapters/job-1/")
    assert [(file.path, file.size_bytes) for file in artifact.files] == [("a.bin", 3), ("inner/b.json", 2)]
    assert artifact.size_bytes == 5
    assert artifact.sha256 is None
    assert store.read("trained_adapters/job-1/inner/b.json") == b"{}"


def test_a_file_is_its_own_uri(store: ObjectStore, file: Product) -> None:
    artifact = Publisher(store, "job-1", 1).publish(file)
    assert [part.path for part in artifact.files] == [""]
    assert artifact.sha256 == sha256_of(file.path)
    assert artifact.fidelity == file.fidelity
    assert store.read(artifact.key) == file.path.read_bytes()


def test_each_attempt_has_its_own_place(store: ObjectStore, file: Product) -> None:
    keys = {artifact_key("gguf", "job-1", attempt, "gemma.gguf") for attempt in (1, 2)}
    assert keys == {"gguf_models/job-1/attempt-1/gemma.gguf", "gguf_models/job-1/attempt-2/gemma.gguf"}
    assert artifact_key("adapter", "job-1", 1) == "trained_adapters/job-1/attempt-1/"


def test_what_earlier_attempts_left_is_removed_and_nothing_else(store: ObjectStore) -> None:
    kept = ["gguf_models/job-1/attempt-3/b", "merged_models/job-2/attempt-1/c", "trained_adapters/job-1/attempt-2/d"]
    for key in ("trained_adapters/job-1/attempt-1/a", "gguf_models/job-1/attempt-1/a", *kept):
        store.write(key, b"x")
    Publisher(store, "job-1", 2).clear_earlier()
    assert sorted(stored.key for stored in store.walk("")) == kept


def test_a_store_that_will_not_delete_does_not_stop_the_publishing(url: str) -> None:
    class Keeping(LocalStore):
        def walk(self, prefix: str) -> Iterator[StoredObject]:
            raise StoreUnavailable("away")

    Publisher(Keeping(url), "job-1", 2).clear_earlier()


def test_a_file_that_arrived_is_not_sent_again_for_the_sake_of_another(url: str, folder: Product, naps: Naps) -> None:
    class Counting(LocalStore):
        uploads: ClassVar[list[str]] = []

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            self.uploads.append(key)
            if key.endswith("b.json") and self.uploads.count(key) < 3:
                raise StoreUnavailable("away")
            return super().upload(source, key, sha256=sha256)

    Publisher(Counting(url), "job-1", 1, naps).publish(folder)
    assert sorted(Counting.uploads) == [folder.key + "a.bin", *[folder.key + "inner/b.json"] * 3]


def test_a_store_that_comes_back_is_waited_for(url: str, file: Product, naps: Naps) -> None:
    store = Faulty(url, StoreUnavailable("away"), ChecksumMismatch("mangled once"), StoreUnavailable("away"))
    artifact = Publisher(store, "job-1", 1, naps).publish(file)
    assert store.read(artifact.key) == file.path.read_bytes()
    assert naps.lengths_s == [0.5, 1.0, 2.0]


def test_a_store_that_loses_what_it_is_sent_is_asked_again(url: str, file: Product, naps: Naps) -> None:
    store = Faulty(url, NoSuchObject("the session is gone"))
    artifact = Publisher(store, "job-1", 1, naps).publish(file)
    assert store.read(artifact.key) == file.path.read_bytes()
    assert naps.lengths_s == [0.5]


def test_a_store_that_stays_away_fails_the_job(url: str, file: Product, naps: Naps) -> None:
    store = Faulty(url, *[StoreUnavailable("no room left")] * 100)
    with pytest.raises(JobFailed, match="no room left") as caught:
        Publisher(store, "job-1", 1, naps).publish(file)
    assert caught.value.failure.code == "upload_failed"
    assert len(naps.lengths_s) == TRIES - 1
    assert not list(store.walk(""))


def test_a_store_that_mangles_everything_shows_nothing(url: str, file: Product, naps: Naps) -> None:
    store = Mangling(url)
    with pytest.raises(JobFailed, match="changed on its way") as caught:
        Publisher(store, "job-1", 1, naps).publish(file)
    assert caught.value.failure.code == "upload_failed"
    assert not list(store.walk(""))


def test_a_refusal_is_not_repeated(store: ObjectStore, file: Product, naps: Naps) -> None:
    with pytest.raises(JobFailed, match="could not be stored"):
        Publisher(store, "job-1", 1, naps).publish(Product(name="x", kind="gguf", path=file.path, key="../outside"))
    assert naps.lengths_s == []
