"""What every object store promises."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moto.s3.models import s3_backends

from storage import (
    MAX_CONCURRENT_TRANSFERS,
    ChecksumMismatch,
    InvalidKey,
    NoSuchObject,
    ObjectExists,
    ObjectStore,
    StorageError,
    StoredObject,
    StoreUnavailable,
    delete_prefix,
    map_concurrently,
)
from storage.gs import GcsStore
from storage.registry import STORES, open_store
from storage.remote import BucketLocation
from storage.s3 import S3Store
from tests.contract.object_fixtures import StoreFactory, close_store

LARGE = bytes(range(256)) * 70_000  # 17.9 MB: several parts and ranges of every store


# Every registered store: a scheme that `new_store` cannot make fails all of them.
@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest, new_store: StoreFactory) -> ObjectStore:
    return new_store(request.param)


@pytest.fixture(params=["gs", "s3"])
def remote(request: pytest.FixtureRequest, new_store: StoreFactory) -> ObjectStore:
    return new_store(request.param)


def test_write_then_read(store: ObjectStore) -> None:
    written = store.write("a/b.bin", b"\x00bytes")
    assert store.read("a/b.bin") == b"\x00bytes"
    assert store.stat("a/b.bin") == written
    assert written.size_bytes == 6


def test_overwrite_changes_generation(store: ObjectStore) -> None:
    first = store.write("a", b"1")
    second = store.write("a", b"2")
    assert store.read("a") == b"2"
    assert first.generation != second.generation


def test_write_if_absent_fails_when_object_exists(store: ObjectStore) -> None:
    store.write("a", b"1", if_absent=True)
    with pytest.raises(ObjectExists):
        store.write("a", b"2", if_absent=True)
    assert store.read("a") == b"1"


def test_one_of_many_if_absent_writers_wins(store: ObjectStore) -> None:
    def write(n: int) -> bool:
        try:
            store.write("a", str(n).encode(), if_absent=True)
        except ObjectExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(write, range(32))) == 1


def test_missing_object_is_not_found(store: ObjectStore, tmp_path: Path) -> None:
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


def test_file_upload_and_download_round_trip(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 20_000)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    store.upload(source, "models/m.bin", sha256=digest)
    assert store.download("models/m.bin", tmp_path / "deep/er/copy").read_bytes() == source.read_bytes()
    with store.open_read("models/m.bin") as stream:
        assert stream.read(3) == b"\x00\x01\x02"


def test_upload_with_wrong_checksum_is_not_visible(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"changed in transit")
    with pytest.raises(ChecksumMismatch):
        store.upload(source, "m", sha256="0" * 64)
    assert store.stat("m") is None
    assert list(store.iter_objects("")) == []


def test_iteration_lists_prefix_in_order(store: ObjectStore) -> None:
    for key in ("b/2", "b/1/x", "ba", "a"):
        store.write(key, b"")
    assert [stored.key for stored in store.iter_objects("b/")] == ["b/1/x", "b/2"]
    assert [stored.key for stored in store.iter_objects("b")] == ["b/1/x", "b/2", "ba"]
    assert [stored.key for stored in store.iter_objects("c/")] == []


def test_delete_is_idempotent_and_reports_existence(store: ObjectStore) -> None:
    store.write("a/1", b"")
    assert store.delete("a/1")
    assert not store.delete("a/1")


def test_delete_prefix_keeps_sibling_folders(store: ObjectStore) -> None:
    for key in ("jobs/1/a", "jobs/1/b/c", "jobs/10/a"):
        store.write(key, b"")
    assert delete_prefix(store, "jobs/1/") == ["jobs/1/a", "jobs/1/b/c"]
    assert delete_prefix(store, "jobs/1/") == []
    assert [stored.key for stored in store.iter_objects("jobs/")] == ["jobs/10/a"]


def test_delete_prefix_requires_trailing_slash(store: ObjectStore) -> None:
    with pytest.raises(InvalidKey):
        delete_prefix(store, "jobs/1")


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../../b", "./a", "a\\b", "a\nb", "a\x00b", "x" * 901])
def test_ambiguous_key_is_rejected(store: ObjectStore, key: str) -> None:
    for use in (store.read, store.stat, store.delete, lambda key: store.write(key, b"")):
        with pytest.raises(InvalidKey):
            use(key)


def test_unknown_scheme_error_names_known_schemes() -> None:
    with pytest.raises(StorageError, match=r"known schemes: .*file"):
        open_store("ftp://x")


def test_symlink_out_of_local_store_is_not_followed(tmp_path: Path) -> None:
    store = open_store((tmp_path / "objects").as_uri())
    store.write("a/b", b"")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "objects/a/link").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidKey):
        store.read("a/link")


def test_large_file_uses_parts_and_ranges(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(LARGE)
    stored = store.upload(source, "m", sha256=hashlib.sha256(LARGE).hexdigest())
    assert stored.size_bytes == len(LARGE)
    assert store.stat("m") == stored
    assert store.download("m", tmp_path / "copy").read_bytes() == LARGE
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["copy", "source"]


def test_large_upload_with_wrong_checksum_is_not_visible(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(LARGE)
    with pytest.raises(ChecksumMismatch):
        store.upload(source, "m", sha256="0" * 64)
    assert list(store.iter_objects("")) == []


def test_stream_is_read_by_line(store: ObjectStore) -> None:
    lines = [b"%d\n" % number for number in range(1000)] + [b"the last has no end"]
    store.write("rows", b"".join(lines))
    with store.open_read("rows") as stream:
        assert stream.readline() == lines[0]
        assert list(stream) == lines[1:]


def test_read_of_replaced_object_never_mixes_versions(remote: ObjectStore) -> None:
    remote.write("a", LARGE)
    with remote.open_read("a") as stream:
        stream.read(10)
        remote.write("a", LARGE[::-1])
        with pytest.raises(ChecksumMismatch, match="replaced"):
            stream.read()


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(0, 3, b"012"), (4, 6, b"45"), (8, 99, b"89"), (3, 3, b""), (10, 12, b""), (50, 60, b"")]
)
def test_range_ends_at_the_end_of_the_object(store: ObjectStore, start: int, end: int, expected: bytes) -> None:
    store.write("digits", b"0123456789")
    assert store.read_range("digits", start, end) == expected


def test_range_of_missing_object_is_not_found(store: ObjectStore) -> None:
    with pytest.raises(NoSuchObject):
        store.read_range("missing", 0, 1)


def test_empty_object_exists(store: ObjectStore, tmp_path: Path) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.download("empty", tmp_path / "copy").read_bytes() == b""


def test_keys_allow_url_special_characters(store: ObjectStore) -> None:
    keys = sorted(["a b/ü#?%41+&=.bin", "a b/\u65e5\u672c", "a b/x%2Fy"])
    for key in keys:
        store.write(key, key.encode())
    assert [stored.key for stored in store.iter_objects("a b/")] == keys
    assert [store.read(key).decode() for key in keys] == keys
    assert delete_prefix(store, "a b/") == keys


def test_many_files_transfer_concurrently(store: ObjectStore, tmp_path: Path) -> None:
    sources = [tmp_path / f"{number}.bin" for number in range(20)]
    for source in sources:
        source.write_bytes(source.name.encode())

    def upload(source: Path) -> StoredObject:
        return store.upload(source, f"m/{source.name}", sha256=hashlib.sha256(source.read_bytes()).hexdigest())

    keys = [stored.key for stored in map_concurrently(upload, sources)]
    assert keys == [f"m/{source.name}" for source in sources]
    copies = map_concurrently(lambda key: store.download(key, tmp_path / "copies" / key), keys)
    assert [path.read_bytes() for path in copies] == [path.read_bytes() for path in sources]


def test_concurrent_transfers_raise_first_error(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    with pytest.raises(ChecksumMismatch):
        map_concurrently(
            lambda number: store.upload(tmp_path / "source", f"m/{number}", sha256="0" * 64 if number == 3 else None), range(10)
        )
    assert store.stat("m/3") is None
    store.write("a", b"")
    with pytest.raises(NoSuchObject):
        map_concurrently(lambda key: store.download(key, tmp_path / key), ["a", "missing"])


def test_no_transfer_starts_after_an_error() -> None:
    started: list[int] = []

    def fail(number: int) -> None:
        started.append(number)
        raise StoreUnavailable("no answer")

    with pytest.raises(StoreUnavailable):
        map_concurrently(fail, range(1000))
    assert len(started) <= MAX_CONCURRENT_TRANSFERS


def test_iteration_continues_across_pages(remote: ObjectStore) -> None:
    store = type(remote)(remote.url, page_size=3)  # pyright: ignore[reportCallIssue]
    keys = [f"f/{number:02}" for number in range(10)]
    for key in keys:
        store.write(key, b"")
    assert [stored.key for stored in store.iter_objects("f/")] == keys
    assert delete_prefix(store, "f/") == keys
    assert list(remote.iter_objects("")) == []
    close_store(store)


def test_more_than_thousand_objects_are_listed(new_store: StoreFactory) -> None:
    store = new_store("s3")
    location = BucketLocation.parse(store.url, "s3")
    for number in range(1001):  # directly into the server, which runs in this process
        s3_backends["123456789012"]["aws"].put_object(location.bucket, f"{location.folder}f/{number:04}", b"")
    assert len(list(store.iter_objects("f/"))) == 1001


def test_stores_in_one_bucket_are_isolated(remote: ObjectStore) -> None:
    left, right = (type(remote)(f"{remote.url}/{name}/") for name in ("left", "right"))  # pyright: ignore[reportCallIssue]
    assert left.url == f"{remote.url}/left"
    left.write("a", b"1")
    assert list(right.iter_objects("")) == []
    assert [stored.key for stored in left.iter_objects("")] == ["a"]
    assert [stored.key for stored in remote.iter_objects("left")] == ["left/a"]
    close_store(left)
    close_store(right)


@pytest.mark.parametrize(
    "url", ["gs://", "gs:///a", "gs://-b-", "gs://user@bucket", "s3://bucket?x=1", "s3://bucket/../other", "gs://bucket/a//b"]
)
def test_invalid_bucket_url_error_shows_example(url: str) -> None:
    with pytest.raises(StorageError, match="like"):
        open_store(url)


@pytest.mark.parametrize(("url", "canonical"), [("gs://bbb/", "gs://bbb"), ("gs://bbb/a/b/", "gs://bbb/a/b")])
def test_bucket_url_is_normalized(url: str, canonical: str) -> None:
    assert BucketLocation.parse(url, "gs").url == canonical


def test_opening_store_makes_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    assert isinstance(open_store("gs://bucket"), GcsStore)
    assert isinstance(open_store("s3://bucket"), S3Store)
