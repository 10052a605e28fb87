"""What every object store promises."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moto.s3.models import s3_backends

from storage import (
    AT_ONCE,
    STORES,
    ChecksumMismatch,
    InvalidKey,
    NoSuchObject,
    ObjectExists,
    ObjectStore,
    StorageError,
    StoredObject,
    StoreUnavailable,
    delete_below,
    download_many,
    open_store,
    upload_many,
)
from storage.gcs import GcsStore
from storage.remote import Place
from storage.s3 import S3Store
from tests.contract.object_fixtures import NewStore, close

LARGE = bytes(range(256)) * 70_000  # 17.9 MB: several parts and ranges of every store


# Every registered store: a scheme that `new_store` cannot make fails all of them.
@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest, new_store: NewStore) -> ObjectStore:
    return new_store(request.param)


@pytest.fixture(params=["gs", "s3"])
def remote(request: pytest.FixtureRequest, new_store: NewStore) -> ObjectStore:
    return new_store(request.param)


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


def test_a_large_file_goes_up_in_parts_and_comes_down_in_ranges(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(LARGE)
    stored = store.upload(source, "m", sha256=hashlib.sha256(LARGE).hexdigest())
    assert stored.size_bytes == len(LARGE)
    assert store.stat("m") == stored
    assert store.download("m", tmp_path / "copy").read_bytes() == LARGE
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["copy", "source"]


def test_a_large_file_that_is_not_what_it_should_be_does_not_become_visible(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(LARGE)
    with pytest.raises(ChecksumMismatch):
        store.upload(source, "m", sha256="0" * 64)
    assert list(store.walk("")) == []


def test_a_stream_is_read_line_by_line(store: ObjectStore) -> None:
    lines = [b"%d\n" % number for number in range(1000)] + [b"the last has no end"]
    store.write("rows", b"".join(lines))
    with store.open_read("rows") as stream:
        assert stream.readline() == lines[0]
        assert list(stream) == lines[1:]


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed(remote: ObjectStore) -> None:
    remote.write("a", LARGE)
    with remote.open_read("a") as stream:
        stream.read(10)
        remote.write("a", LARGE[::-1])
        with pytest.raises(ChecksumMismatch, match="replaced"):
            stream.read()


def test_an_empty_object_is_an_object(store: ObjectStore, tmp_path: Path) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.download("empty", tmp_path / "copy").read_bytes() == b""


def test_keys_may_hold_what_a_url_may_not(store: ObjectStore) -> None:
    keys = sorted(["a b/ü#?%41+&=.bin", "a b/\u65e5\u672c", "a b/x%2Fy"])
    for key in keys:
        store.write(key, key.encode())
    assert [stored.key for stored in store.walk("a b/")] == keys
    assert [store.read(key).decode() for key in keys] == keys
    assert delete_below(store, "a b/") == keys


def test_many_files_go_up_and_come_down_at_once(store: ObjectStore, tmp_path: Path) -> None:
    sources = [tmp_path / f"{number}.bin" for number in range(20)]
    for source in sources:
        source.write_bytes(source.name.encode())
    stored = upload_many(store, [(path, f"m/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest()) for path in sources])
    keys = [file.key for file in stored]
    assert keys == [f"m/{path.name}" for path in sources]
    copies = download_many(store, keys, tmp_path / "copies", below="m/")
    assert copies == [tmp_path / "copies" / path.name for path in sources]
    assert [path.read_bytes() for path in copies] == [path.read_bytes() for path in sources]


def test_the_first_of_many_that_fails_is_told(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    with pytest.raises(ChecksumMismatch):
        upload_many(store, [(tmp_path / "source", f"m/{number}", "0" * 64 if number == 3 else None) for number in range(10)])
    assert store.stat("m/3") is None
    store.write("a", b"")
    with pytest.raises(NoSuchObject):
        download_many(store, ["a", "missing"], tmp_path / "copies")


def test_what_has_not_begun_when_one_fails_is_left_out(tmp_path: Path) -> None:
    class Failing:
        """Fails at once."""

        uploads = 0

        def upload(self, source: Path, key: str, *, sha256: str | None = None) -> StoredObject:
            self.uploads += 1
            raise StoreUnavailable("away")

    store = Failing()
    with pytest.raises(StoreUnavailable):
        upload_many(store, [(tmp_path, f"{number}", None) for number in range(1000)])  # pyright: ignore[reportArgumentType]
    assert store.uploads <= AT_ONCE


def test_a_walk_goes_on_behind_a_page(remote: ObjectStore) -> None:
    store = type(remote)(remote.url, page_size=3)  # pyright: ignore[reportCallIssue]
    keys = [f"f/{number:02}" for number in range(10)]
    for key in keys:
        store.write(key, b"")
    assert [stored.key for stored in store.walk("f/")] == keys
    assert delete_below(store, "f/") == keys
    assert list(remote.walk("")) == []
    close(store)


def test_more_than_a_thousand_objects_are_all_found(new_store: NewStore) -> None:
    store = new_store("s3")
    place = Place.of(store.url, "s3")
    for number in range(1001):  # straight into the server, which runs in this process
        s3_backends["123456789012"]["aws"].put_object(place.bucket, f"{place.folder}f/{number:04}", b"")
    assert len(list(store.walk("f/"))) == 1001


def test_two_folders_of_a_bucket_do_not_see_each_other(remote: ObjectStore) -> None:
    left, right = (type(remote)(f"{remote.url}/{name}/") for name in ("left", "right"))  # pyright: ignore[reportCallIssue]
    assert left.url == f"{remote.url}/left"
    left.write("a", b"1")
    assert list(right.walk("")) == []
    assert [stored.key for stored in left.walk("")] == ["a"]
    assert [stored.key for stored in remote.walk("left")] == ["left/a"]
    close(left)
    close(right)


@pytest.mark.parametrize(
    "url", ["gs://", "gs:///a", "gs://-b-", "gs://user@bucket", "s3://bucket?x=1", "s3://bucket/../other", "gs://bucket/a//b"]
)
def test_a_url_that_is_not_of_a_bucket_says_what_one_is_like(url: str) -> None:
    with pytest.raises(StorageError, match="like"):
        open_store(url)


@pytest.mark.parametrize(("url", "canonical"), [("gs://bbb/", "gs://bbb"), ("gs://bbb/a/b/", "gs://bbb/a/b")])
def test_the_url_of_a_bucket_is_written_in_one_way(url: str, canonical: str) -> None:
    assert Place.of(url, "gs").url == canonical


def test_opening_a_store_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    assert isinstance(open_store("gs://bucket"), GcsStore)
    assert isinstance(open_store("s3://bucket"), S3Store)
