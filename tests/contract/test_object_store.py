"""What every object store promises."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import STORES, ChecksumMismatch, InvalidKey, NoSuchObject, ObjectExists, ObjectStore, StorageError, delete_below, open_store

BUILDERS: dict[str, Callable[[Path], ObjectStore]] = {
    "file": lambda folder: open_store((folder / "objects with space").as_uri()),
}


def test_every_registered_store_is_under_contract() -> None:
    assert set(BUILDERS) == set(STORES)


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return BUILDERS[request.param](tmp_path)


def test_what_is_written_is_read(store: ObjectStore) -> None:
    written = store.write("a/b.bin", b"\x00bytes")
    assert store.read("a/b.bin") == b"\x00bytes"
    assert store.stat("a/b.bin") == written
    assert written.size_bytes == 6


def test_a_write_replaces_and_gets_another_generation(store: ObjectStore) -> None:
    first = store.write("a", b"1")
    second = store.write("a", b"2")
    assert store.read("a") == b"2"
    assert first.generation != second.generation


def test_the_first_writer_wins_when_it_must_be_the_first(store: ObjectStore) -> None:
    store.write("a", b"1", if_absent=True)
    with pytest.raises(ObjectExists):
        store.write("a", b"2", if_absent=True)
    assert store.read("a") == b"1"


def test_of_many_first_writers_exactly_one_wins(store: ObjectStore) -> None:
    def write(n: int) -> bool:
        try:
            store.write("a", str(n).encode(), if_absent=True)
        except ObjectExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(write, range(32))) == 1


def test_nothing_is_there_until_it_is_written(store: ObjectStore, tmp_path: Path) -> None:
    assert store.stat("a") is None
    for read in (store.read, store.open_read, lambda key: store.download(key, tmp_path / "x")):
        with pytest.raises(NoSuchObject):
            read("a")
    assert not (tmp_path / "x").exists()


def test_a_folder_is_not_an_object(store: ObjectStore) -> None:
    store.write("a/b", b"1")
    assert store.stat("a") is None
    with pytest.raises(NoSuchObject):
        store.read("a")


def test_files_go_up_and_come_down_whole(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 20_000)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    store.upload(source, "models/m.bin", sha256=digest)
    assert store.download("models/m.bin", tmp_path / "deep/er/copy").read_bytes() == source.read_bytes()
    with store.open_read("models/m.bin") as stream:
        assert stream.read(3) == b"\x00\x01\x02"


def test_a_file_that_arrives_changed_does_not_become_visible(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"changed on its way")
    with pytest.raises(ChecksumMismatch):
        store.upload(source, "m", sha256="0" * 64)
    assert store.stat("m") is None
    assert list(store.walk("")) == []


def test_a_walk_finds_what_is_below_a_prefix_in_order(store: ObjectStore) -> None:
    for key in ("b/2", "b/1/x", "ba", "a"):
        store.write(key, b"")
    assert [stored.key for stored in store.walk("b/")] == ["b/1/x", "b/2"]
    assert [stored.key for stored in store.walk("b")] == ["b/1/x", "b/2", "ba"]
    assert [stored.key for stored in store.walk("c/")] == []


def test_deleting_is_repeatable_and_says_what_was_there(store: ObjectStore) -> None:
    store.write("a/1", b"")
    assert store.delete("a/1")
    assert not store.delete("a/1")


def test_deleting_below_a_folder_leaves_its_neighbours(store: ObjectStore) -> None:
    for key in ("jobs/1/a", "jobs/1/b/c", "jobs/10/a"):
        store.write(key, b"")
    assert delete_below(store, "jobs/1/") == ["jobs/1/a", "jobs/1/b/c"]
    assert delete_below(store, "jobs/1/") == []
    assert [stored.key for stored in store.walk("jobs/")] == ["jobs/10/a"]


def test_a_prefix_without_a_slash_is_not_a_folder_to_delete(store: ObjectStore) -> None:
    with pytest.raises(InvalidKey):
        delete_below(store, "jobs/1")


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../../b", "./a", "a\\b", "a\nb", "a\x00b", "x" * 901])
def test_a_key_that_could_mean_something_else_is_refused(store: ObjectStore, key: str) -> None:
    for use in (store.read, store.stat, store.delete, lambda key: store.write(key, b"")):
        with pytest.raises(InvalidKey):
            use(key)


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(StorageError, match=r"known schemes: .*file"):
        open_store("ftp://x")


def test_a_link_out_of_a_local_store_is_not_followed(tmp_path: Path) -> None:
    store = open_store((tmp_path / "objects").as_uri())
    store.write("a/b", b"")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "objects/a/link").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidKey):
        store.read("a/link")
