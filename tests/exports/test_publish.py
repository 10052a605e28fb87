"""The step to the outside: all or nothing, once."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs.errors import JobFailed
from jobs.publish import TRIES, Product, Publisher, sha256_of
from schema.job import Artifact, Fidelity
from schema.result import PublishManifest
from schema.spec import manifest_key
from storage import ChecksumMismatch, ObjectStore, StorageError, StoredObject, StoreUnavailable, open_store
from storage.local import LocalStore

MANIFEST = manifest_key("job-1")


class Faulty(LocalStore):
    """A folder whose next calls fail, as often as there are errors left; a write may fail after it was done."""

    def __init__(self, url: str, *errors: StorageError, after_the_write: bool = False) -> None:
        super().__init__(url)
        self.errors = list(errors)
        self.after_the_write = after_the_write

    def write(self, key: str, content: bytes, *, if_absent: bool = False) -> StoredObject:
        if not self.after_the_write:
            self._fail()
        stored = super().write(key, content, if_absent=if_absent)
        self._fail()
        return stored

    def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
        self._fail()
        return super().upload(source, key, sha256=sha256)

    def _fail(self) -> None:
        if self.errors:
            raise self.errors.pop(0)


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


def test_nothing_is_visible_before_the_manifest(store: ObjectStore, file: Product) -> None:
    publisher = Publisher(store, "job-1", 1)
    artifact = publisher.publish(file)
    assert store.stat(MANIFEST) is None
    publisher.write_manifest((artifact,))
    manifest = PublishManifest.load(store.read(MANIFEST))
    assert (manifest.job_id, manifest.attempt, manifest.artifacts) == ("job-1", 1, (artifact,))


def test_the_second_attempt_to_publish_is_told(store: ObjectStore, file: Product) -> None:
    first, second = Publisher(store, "job-1", 1), Publisher(store, "job-1", 2)
    first.write_manifest((first.publish(file),))
    for act in (second.refuse_if_published, lambda: second.write_manifest(())):
        with pytest.raises(JobFailed, match="attempt 1 has published this job already") as caught:
            act()
        assert caught.value.failure.code == "upload_failed"
    assert PublishManifest.load(store.read(MANIFEST)).attempt == 1


def test_the_same_attempt_may_repeat_itself(store: ObjectStore) -> None:
    publisher = Publisher(store, "job-1", 1)
    written = publisher.write_manifest(())
    publisher.refuse_if_published()
    assert publisher.write_manifest(()) == written


def test_a_manifest_whose_answer_was_lost_is_our_own(url: str, naps: Naps) -> None:
    store = Faulty(url, StoreUnavailable("gone after the write"), after_the_write=True)
    manifest = Publisher(store, "job-1", 1, naps).write_manifest(())
    assert manifest == PublishManifest.load(store.read(MANIFEST))
    assert len(naps.lengths_s) == 1


def test_a_store_that_comes_back_is_waited_for(url: str, file: Product, naps: Naps) -> None:
    store = Faulty(url, StoreUnavailable("away"), ChecksumMismatch("mangled once"), StoreUnavailable("away"))
    artifact = Publisher(store, "job-1", 1, naps).publish(file)
    assert store.read(artifact.key) == file.path.read_bytes()
    assert naps.lengths_s == [0.5, 1.0, 2.0]


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


def test_a_manifest_that_cannot_be_written_fails_the_job(url: str, naps: Naps) -> None:
    store = Faulty(url, *[StoreUnavailable("read-only")] * 100)
    artifacts: tuple[Artifact, ...] = ()
    with pytest.raises(JobFailed, match="the manifest could not be stored: read-only"):
        Publisher(store, "job-1", 1, naps).write_manifest(artifacts)
    assert store.stat(MANIFEST) is None
