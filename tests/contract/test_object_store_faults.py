"""What the stores in buckets make of servers that fail: nothing partial is seen, what passes is got over, what does not is told."""

import base64
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import pytest

from infra.loopback import cloud_storage, s3
from infra.loopback.http_faults import Fault, HttpFaults, Wrong, http_faults
from storage import ChecksumMismatch, NoSuchObject, ObjectExists, ObjectStore, StoreUnavailable, delete_below, open_store, upload_many
from storage.gcs import GcsStore
from storage.patience import patience
from storage.s3 import _stall_s  # pyright: ignore[reportPrivateUsage]
from tests.contract.object_fixtures import close, on_cloud_storage, on_s3

SMALL = b"0123456789" * 10
LARGE = bytes(range(256)) * 36_000  # 9.2 MB: more than goes to Cloud Storage in one request
TWO_PARTS = bytes(range(256)) * 70_000  # 17.9 MB
PASSING: list[Wrong] = ["refuse", "reset", "cut request", "lose answer", "cut answer"]
BUCKET = "a-bucket"
RESUMABLE = "upload_id="  # the requests that bring the bytes of a large upload


@pytest.fixture(scope="module")
def gs_front() -> Iterator[HttpFaults]:
    with http_faults() as front, cloud_storage.cloud_storage(address=front.url, buckets=[BUCKET]) as url:
        front.target = url
        yield front


@pytest.fixture(scope="module")
def s3_front(s3_url: str) -> Iterator[HttpFaults]:
    with http_faults(s3_url) as front:
        s3.make_bucket(s3_url, BUCKET)
        yield front


@pytest.fixture(params=["gs", "s3"])
def front(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HttpFaults:
    """What stands before the store's server, and does as told."""
    front: HttpFaults = request.getfixturevalue(f"{request.param}_front")
    {"gs": on_cloud_storage, "s3": on_s3}[request.param](monkeypatch, front.url)
    front.plan()
    return front


@pytest.fixture
def store(request: pytest.FixtureRequest, front: HttpFaults) -> Iterator[ObjectStore]:
    """An empty folder of the bucket."""
    scheme = request.node.callspec.params["front"]
    store = open_store(f"{scheme}://{BUCKET}/{uuid.uuid4().hex}")
    yield store
    front.plan()
    close(store)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(LARGE)
    return path


def part_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


# --- what passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", PASSING)
def test_a_write_gets_over_what_passes(front: HttpFaults, store: ObjectStore, wrong: Wrong) -> None:
    front.plan(Fault(wrong, method="POST"), Fault(wrong, method="PUT"))
    written = store.write("a", SMALL)
    assert store.read("a") == SMALL
    assert store.stat("a") == written


@pytest.mark.parametrize("wrong", [*PASSING, "damage answer"])
def test_a_read_gets_over_what_passes(front: HttpFaults, store: ObjectStore, wrong: Wrong) -> None:
    store.write("a", SMALL)
    front.plan(Fault(wrong, method="GET"))
    assert store.read("a") == SMALL


@pytest.mark.parametrize("wrong", ["reset", "lose answer", "cut answer", "damage answer"])
def test_a_download_gets_over_what_passes(front: HttpFaults, store: ObjectStore, tmp_path: Path, wrong: Wrong) -> None:
    (tmp_path / "source").write_bytes(LARGE)
    store.upload(tmp_path / "source", "a")
    # For Cloud Storage, the first two GETs ask what there is and for the first range.
    front.plan(Fault(wrong, method="GET", after=2))
    assert store.download("a", tmp_path / "copy").read_bytes() == LARGE
    assert part_files(tmp_path) == []


@pytest.mark.parametrize("wrong", ["refuse", "cut request", "lose answer"])
def test_an_upload_gets_over_what_passes(front: HttpFaults, store: ObjectStore, large: Path, wrong: Wrong) -> None:
    front.plan(Fault(wrong, method="PUT"))
    stored = store.upload(large, "a", sha256=hashlib.sha256(LARGE).hexdigest())
    assert store.stat("a") == stored
    assert store.download("a", large.with_name("copy")).read_bytes() == LARGE


def test_a_session_that_ends_with_a_lost_answer_is_an_upload_that_arrived(
    gs_front: HttpFaults, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cloud_storage(monkeypatch, gs_front.url)
    store = GcsStore(f"gs://{BUCKET}/lost")
    gs_front.plan(Fault("lose answer", path=RESUMABLE))
    assert store.upload(large, "a") == store.stat("a")
    assert len([passed for passed in gs_front.passed if "uploadType=resumable" in passed.path and passed.method == "POST"]) == 1
    store.close()


def test_a_busy_store_is_asked_again(front: HttpFaults, store: ObjectStore) -> None:
    front.plan(Fault("refuse", status=429, times=2))
    store.write("a", SMALL)
    assert len(front.passed) == 3


def test_a_deletion_gets_over_what_passes(front: HttpFaults, store: ObjectStore) -> None:
    for key in ("f/1", "f/2", "f/3"):
        store.write(key, b"")
    front.plan(Fault("reset", method="DELETE"), Fault("refuse", method="DELETE"), Fault("refuse", method="GET"))
    assert delete_below(store, "f/") == ["f/1", "f/2", "f/3"]
    assert list(store.walk("")) == []


# --- who was first ----------------------------------------------------------------------------------------------------


def test_a_writer_whose_answer_was_lost_was_still_the_first(front: HttpFaults, store: ObjectStore) -> None:
    front.plan(Fault("lose answer", method="POST"), Fault("lose answer", method="PUT"))
    written = store.write("a", SMALL, if_absent=True)
    assert store.stat("a") == written
    with pytest.raises(ObjectExists):
        store.write("a", SMALL, if_absent=True)


def test_a_writer_who_was_refused_once_and_then_late_is_told(front: HttpFaults, store: ObjectStore) -> None:
    store.write("a", SMALL)
    front.plan(Fault("refuse"))
    with pytest.raises(ObjectExists):
        store.write("a", SMALL, if_absent=True)  # the same bytes, and yet another's


# --- what is damaged --------------------------------------------------------------------------------------------------


def test_a_download_that_stays_damaged_leaves_no_file(front: HttpFaults, store: ObjectStore, tmp_path: Path) -> None:
    store.write("a", SMALL)
    content = "alt=media" if isinstance(store, GcsStore) else ""  # Google's GET tells what is known of an object, too
    front.plan(Fault("damage answer", method="GET", path=content, times=9))
    (tmp_path / "copy").write_bytes(b"what was there before")
    with pytest.raises(ChecksumMismatch, match="damaged"):
        store.download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"what was there before"
    assert part_files(tmp_path) == []


def test_a_stream_that_is_damaged_does_not_end_as_if_it_were_whole(front: HttpFaults, store: ObjectStore, large: Path) -> None:
    store.upload(large, "a")
    with store.open_read("a") as stream:
        stream.read(10)
        front.plan(Fault("damage answer", method="GET"))
        with pytest.raises(ChecksumMismatch):
            stream.read()


def test_an_upload_that_stays_damaged_does_not_stay(gs_front: HttpFaults, monkeypatch: pytest.MonkeyPatch, large: Path) -> None:
    """Google refuses it before anybody sees it. The stand-in does not look, so that the second line of defence is seen at work."""
    on_cloud_storage(monkeypatch, gs_front.url)
    store = GcsStore(f"gs://{BUCKET}/damaged")
    gs_front.plan(Fault("damage request", path="uploadType", times=9))
    with pytest.raises(ChecksumMismatch, match="damaged"):
        store.write("a", SMALL)
    gs_front.plan(Fault("damage request", path=RESUMABLE, times=9))
    with pytest.raises(ChecksumMismatch, match="damaged"):
        store.upload(large, "b")
    assert list(store.walk("")) == []
    store.close()


def test_s3_refuses_what_arrives_damaged_and_gets_it_again(s3_front: HttpFaults, monkeypatch: pytest.MonkeyPatch) -> None:
    on_s3(monkeypatch, s3_front.url)
    store = open_store(f"s3://{BUCKET}/refused")
    refusal = Fault("refuse", method="PUT", status=400, body="<Error><Code>XAmzContentSHA256Mismatch</Code></Error>")
    s3_front.plan(refusal)
    store.write("a", SMALL)
    s3_front.plan(refusal, refusal)
    with pytest.raises(ChecksumMismatch, match="damaged"):
        store.write("b", SMALL)
    assert [stored.key for stored in store.walk("")] == ["a"]
    close(store)


def test_google_is_told_the_sum_beforehand(gs_front: HttpFaults, monkeypatch: pytest.MonkeyPatch, large: Path) -> None:
    on_cloud_storage(monkeypatch, gs_front.url)
    store = GcsStore(f"gs://{BUCKET}/sums")
    for content, upload in ((SMALL, lambda: store.write("a", SMALL)), (LARGE, lambda: store.upload(large, "b"))):
        gs_front.plan()
        upload()
        declared = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
        assert f'"crc32c": "{declared}"'.encode() in gs_front.passed[0].body
    store.close()


def test_s3_is_told_the_sum_of_every_body(s3_front: HttpFaults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the signature, as every server of the kind understands it, and not in a trailer, which many do not."""
    on_s3(monkeypatch, s3_front.url)
    store = open_store(f"s3://{BUCKET}/sums")
    (tmp_path / "source").write_bytes(TWO_PARTS)
    s3_front.plan()
    store.upload(tmp_path / "source", "a")
    bodies = [passed for passed in s3_front.passed if passed.method == "PUT"]
    assert b"".join(passed.body for passed in bodies) == TWO_PARTS
    for passed in bodies:
        assert passed.headers["X-Amz-Content-SHA256"] == hashlib.sha256(passed.body).hexdigest()
        assert "aws-chunked" not in passed.headers.get("Content-Encoding", "")
    close(store)


# --- what does not pass -----------------------------------------------------------------------------------------------

USES: dict[str, Callable[[ObjectStore, Path], object]] = {
    "write": lambda store, path: store.write("new", SMALL),
    "read": lambda store, path: store.read("a"),
    "open_read": lambda store, path: store.open_read("a"),
    "upload": lambda store, path: store.upload(path, "new"),
    "download": lambda store, path: store.download("a", path.with_name("copy")),
    "stat": lambda store, path: store.stat("a"),
    "walk": lambda store, path: list(store.walk("")),
    "delete": lambda store, path: store.delete("a"),
}


@pytest.mark.parametrize("use", USES)
def test_a_store_that_stays_away_is_told_in_time(front: HttpFaults, store: ObjectStore, large: Path, use: str) -> None:
    store.write("a", SMALL)
    front.plan(Fault("refuse", times=1000))
    began = time.monotonic()
    with patience(0.1), pytest.raises(StoreUnavailable, match=f"://{BUCKET}"):
        USES[use](store, large)
    assert time.monotonic() - began < 2
    front.plan()
    assert [stored.key for stored in store.walk("")] == ["a"]
    assert sorted(path.name for path in large.parent.iterdir()) == ["large"]


def test_a_store_that_hangs_is_not_waited_for(front: HttpFaults, store: ObjectStore) -> None:
    store.write("a", SMALL)
    front.plan(Fault("hang", times=1000))
    began = time.monotonic()
    with patience(0.2), pytest.raises(StoreUnavailable):
        store.read("a")
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("left_s", [120, 55, 4.5, 2, 1, 0.5])
def test_a_try_at_s3_ends_before_the_patience_does(left_s: float) -> None:
    assert 1.5 * _stall_s(left_s) <= left_s


def test_nobody_at_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cloud_storage(monkeypatch, "http://127.0.0.1:1")
    on_s3(monkeypatch, "http://127.0.0.1:1")
    for url in ("gs://bucket", "s3://bucket"):
        store = open_store(url)
        with patience(0.2), pytest.raises(StoreUnavailable, match=url):
            store.read("a")
        close(store)


@pytest.mark.parametrize("use", USES)
def test_a_missing_bucket_is_not_a_missing_object(front: HttpFaults, store: ObjectStore, large: Path, use: str) -> None:
    elsewhere = open_store(store.url.replace(BUCKET, "no-such-bucket"))
    with pytest.raises(StoreUnavailable, match="bucket no-such-bucket does not exist; make it: "):
        USES[use](elsewhere, large)
    close(elsewhere)
    assert store.stat("missing") is None
    with pytest.raises(NoSuchObject):
        store.read("missing")


@pytest.mark.parametrize("use", USES)
def test_a_refusal_names_the_role_and_the_command(gs_front: HttpFaults, monkeypatch: pytest.MonkeyPatch, large: Path, use: str) -> None:
    on_cloud_storage(monkeypatch, gs_front.url)
    who = "tunesmith-job@p.iam.gserviceaccount.com"
    message = f"{who} does not have storage.objects.get access to the Google Cloud Storage object."
    gs_front.plan(Fault("refuse", status=403, times=9, body=json.dumps({"error": {"code": 403, "message": message}})))
    store = GcsStore(f"gs://{BUCKET}")
    with pytest.raises(StoreUnavailable) as caught:
        USES[use](store, large)
    command = f"gcloud storage buckets add-iam-policy-binding gs://{BUCKET} --member=serviceAccount:{who} --role=roles/storage.objectUser"
    assert command in str(caught.value)
    assert len(gs_front.passed) == 1
    store.close()
    gs_front.plan()


def test_a_refusal_of_s3_says_what_the_credentials_need(s3_front: HttpFaults, monkeypatch: pytest.MonkeyPatch) -> None:
    on_s3(monkeypatch, s3_front.url)
    s3_front.plan(Fault("refuse", status=403, body="<Error><Code>AccessDenied</Code><Message>no</Message></Error>"))
    store = open_store(f"s3://{BUCKET}")
    with pytest.raises(StoreUnavailable, match="s3:ListBucket"):
        store.read("a")
    close(store)


def test_parts_of_an_upload_that_failed_are_removed(s3_front: HttpFaults, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_s3(monkeypatch, s3_front.url)
    store = open_store(f"s3://{BUCKET}/aborted")
    (tmp_path / "source").write_bytes(TWO_PARTS)
    s3_front.plan(Fault("refuse", method="PUT", path="partNumber=2", status=400, body="<Error><Code>EntityTooSmall</Code></Error>"))
    with pytest.raises(StoreUnavailable, match="EntityTooSmall"):
        store.upload(tmp_path / "source", "a")
    assert [passed.method for passed in s3_front.passed] == ["POST", "PUT", "PUT", "DELETE"]
    assert list(store.walk("")) == []
    close(store)


def test_one_file_of_many_that_fails_is_told(front: HttpFaults, store: ObjectStore, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}" for number in range(5)]
    for file in files:
        file.write_bytes(SMALL)
    front.plan(Fault("refuse", times=1000, after=2))
    with patience(0.1), pytest.raises(StoreUnavailable):
        upload_many(store, [(file, f"m/{file.name}", None) for file in files])
