"""Bucket stores and failing servers: nothing partial becomes visible, transient faults are retried, permanent ones are reported."""

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
from infra.loopback.http_faults import Fault, FaultKind, HttpFaultProxy, run_http_fault_proxy
from storage import ChecksumMismatch, NoSuchObject, ObjectExists, ObjectStore, StoreUnavailable, delete_prefix, map_concurrently
from storage.deadline import deadline
from storage.gs import GcsStore
from storage.registry import open_store
from storage.s3 import _choose_read_timeout_s  # pyright: ignore[reportPrivateUsage]
from tests.contract.object_fixtures import close_store, use_cloud_storage, use_s3

SMALL = b"0123456789" * 10
LARGE = bytes(range(256)) * 36_000  # 9.2 MB: more than goes to Cloud Storage in one request
TWO_PARTS = bytes(range(256)) * 70_000  # 17.9 MB
TRANSIENT_FAULTS: list[FaultKind] = ["reject", "reset", "truncate request", "drop response", "truncate response"]
BUCKET = "a-bucket"
RESUMABLE_UPLOAD_QUERY = "upload_id="  # in the requests that send the bytes of a large upload


@pytest.fixture(scope="module")
def gs_fault_proxy() -> Iterator[HttpFaultProxy]:
    with run_http_fault_proxy() as proxy, cloud_storage.run_cloud_storage(public_url=proxy.url, buckets=[BUCKET]) as url:
        proxy.target = url
        yield proxy


@pytest.fixture(scope="module")
def s3_fault_proxy(s3_url: str) -> Iterator[HttpFaultProxy]:
    with run_http_fault_proxy(s3_url) as proxy:
        s3.create_bucket(s3_url, BUCKET)
        yield proxy


@pytest.fixture(params=["gs", "s3"])
def fault_proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HttpFaultProxy:
    """The proxy in front of the store's server."""
    proxy: HttpFaultProxy = request.getfixturevalue(f"{request.param}_fault_proxy")
    {"gs": use_cloud_storage, "s3": use_s3}[request.param](monkeypatch, proxy.url)
    proxy.set_faults()
    return proxy


@pytest.fixture
def store(request: pytest.FixtureRequest, fault_proxy: HttpFaultProxy) -> Iterator[ObjectStore]:
    """An empty folder of the bucket."""
    scheme = request.node.callspec.params["fault_proxy"]
    store = open_store(f"{scheme}://{BUCKET}/{uuid.uuid4().hex}")
    yield store
    fault_proxy.set_faults()
    close_store(store)


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(LARGE)
    return path


def find_part_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


# --- transient faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRANSIENT_FAULTS)
def test_write_survives_transient_fault(fault_proxy: HttpFaultProxy, store: ObjectStore, kind: FaultKind) -> None:
    fault_proxy.set_faults(Fault(kind, method="POST"), Fault(kind, method="PUT"))
    written = store.write("a", SMALL)
    assert store.read("a") == SMALL
    assert store.stat("a") == written


@pytest.mark.parametrize("kind", [*TRANSIENT_FAULTS, "corrupt response"])
def test_read_survives_transient_fault(fault_proxy: HttpFaultProxy, store: ObjectStore, kind: FaultKind) -> None:
    store.write("a", SMALL)
    fault_proxy.set_faults(Fault(kind, method="GET"))
    assert store.read("a") == SMALL


@pytest.mark.parametrize("kind", ["reset", "drop response", "truncate response", "corrupt response"])
def test_download_survives_transient_fault(fault_proxy: HttpFaultProxy, store: ObjectStore, tmp_path: Path, kind: FaultKind) -> None:
    (tmp_path / "source").write_bytes(LARGE)
    store.upload(tmp_path / "source", "a")
    # For Cloud Storage, the first two GETs read the metadata and the first range.
    fault_proxy.set_faults(Fault(kind, method="GET", skip_first=2))
    assert store.download("a", tmp_path / "copy").read_bytes() == LARGE
    assert find_part_files(tmp_path) == []


@pytest.mark.parametrize("kind", ["reject", "truncate request", "drop response"])
def test_upload_survives_transient_fault(fault_proxy: HttpFaultProxy, store: ObjectStore, large_file: Path, kind: FaultKind) -> None:
    fault_proxy.set_faults(Fault(kind, method="PUT"))
    stored = store.upload(large_file, "a", sha256=hashlib.sha256(LARGE).hexdigest())
    assert store.stat("a") == stored
    assert store.download("a", large_file.with_name("copy")).read_bytes() == LARGE


def test_upload_session_with_lost_final_response_succeeds(
    gs_fault_proxy: HttpFaultProxy, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cloud_storage(monkeypatch, gs_fault_proxy.url)
    store = GcsStore(f"gs://{BUCKET}/lost")
    gs_fault_proxy.set_faults(Fault("drop response", path=RESUMABLE_UPLOAD_QUERY))
    assert store.upload(large_file, "a") == store.stat("a")
    assert (
        len([recorded for recorded in gs_fault_proxy.requests if "uploadType=resumable" in recorded.path and recorded.method == "POST"])
        == 1
    )
    store.close()


def test_busy_store_is_retried(fault_proxy: HttpFaultProxy, store: ObjectStore) -> None:
    fault_proxy.set_faults(Fault("reject", status=429, times=2))
    store.write("a", SMALL)
    assert len(fault_proxy.requests) == 3


def test_deletion_survives_transient_fault(fault_proxy: HttpFaultProxy, store: ObjectStore) -> None:
    for key in ("f/1", "f/2", "f/3"):
        store.write(key, b"")
    fault_proxy.set_faults(Fault("reset", method="DELETE"), Fault("reject", method="DELETE"), Fault("reject", method="GET"))
    assert delete_prefix(store, "f/") == ["f/1", "f/2", "f/3"]
    assert list(store.iter_objects("")) == []


# --- concurrent writers ----------------------------------------------------------------------------------------------


def test_if_absent_write_with_lost_response_succeeds(fault_proxy: HttpFaultProxy, store: ObjectStore) -> None:
    fault_proxy.set_faults(Fault("drop response", method="POST"), Fault("drop response", method="PUT"))
    written = store.write("a", SMALL, if_absent=True)
    assert store.stat("a") == written
    with pytest.raises(ObjectExists):
        store.write("a", SMALL, if_absent=True)


def test_retried_if_absent_write_reports_existing_object(fault_proxy: HttpFaultProxy, store: ObjectStore) -> None:
    store.write("a", SMALL)
    fault_proxy.set_faults(Fault("reject"))
    with pytest.raises(ObjectExists):
        store.write("a", SMALL, if_absent=True)  # the same bytes, but another write


# --- damaged bytes ---------------------------------------------------------------------------------------------------


def test_corrupt_download_keeps_existing_file(fault_proxy: HttpFaultProxy, store: ObjectStore, tmp_path: Path) -> None:
    store.write("a", SMALL)
    content = "alt=media" if isinstance(store, GcsStore) else ""  # Cloud Storage also uses GET for metadata
    fault_proxy.set_faults(Fault("corrupt response", method="GET", path=content, times=9))
    (tmp_path / "copy").write_bytes(b"existing content")
    with pytest.raises(ChecksumMismatch, match="damaged"):
        store.download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"existing content"
    assert find_part_files(tmp_path) == []


def test_corrupt_stream_raises_checksum_mismatch(fault_proxy: HttpFaultProxy, store: ObjectStore, large_file: Path) -> None:
    store.upload(large_file, "a")
    with store.open_read("a") as stream:
        stream.read(10)
        fault_proxy.set_faults(Fault("corrupt response", method="GET"))
        with pytest.raises(ChecksumMismatch):
            stream.read()


def test_corrupt_upload_is_removed(gs_fault_proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch, large_file: Path) -> None:
    """Google rejects it before it becomes visible. The emulator does not, which tests the client's own check."""
    use_cloud_storage(monkeypatch, gs_fault_proxy.url)
    store = GcsStore(f"gs://{BUCKET}/damaged")
    gs_fault_proxy.set_faults(Fault("corrupt request", path="uploadType", times=9))
    with pytest.raises(ChecksumMismatch, match="damaged"):
        store.write("a", SMALL)
    gs_fault_proxy.set_faults(Fault("corrupt request", path=RESUMABLE_UPLOAD_QUERY, times=9))
    with pytest.raises(ChecksumMismatch, match="damaged"):
        store.upload(large_file, "b")
    assert list(store.iter_objects("")) == []
    store.close()


def test_s3_checksum_rejection_is_retried_once(s3_fault_proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    use_s3(monkeypatch, s3_fault_proxy.url)
    store = open_store(f"s3://{BUCKET}/refused")
    refusal = Fault("reject", method="PUT", status=400, body="<Error><Code>XAmzContentSHA256Mismatch</Code></Error>")
    s3_fault_proxy.set_faults(refusal)
    store.write("a", SMALL)
    s3_fault_proxy.set_faults(refusal, refusal)
    with pytest.raises(ChecksumMismatch, match="damaged"):
        store.write("b", SMALL)
    assert [stored.key for stored in store.iter_objects("")] == ["a"]
    close_store(store)


def test_gcs_upload_declares_checksum(gs_fault_proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch, large_file: Path) -> None:
    use_cloud_storage(monkeypatch, gs_fault_proxy.url)
    store = GcsStore(f"gs://{BUCKET}/sums")
    for content, upload in ((SMALL, lambda: store.write("a", SMALL)), (LARGE, lambda: store.upload(large_file, "b"))):
        gs_fault_proxy.set_faults()
        upload()
        declared = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
        assert f'"crc32c": "{declared}"'.encode() in gs_fault_proxy.requests[0].body
    store.close()


def test_s3_requests_declare_body_checksum(s3_fault_proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the signature, which every S3 server understands, and not in a trailer, which many do not."""
    use_s3(monkeypatch, s3_fault_proxy.url)
    store = open_store(f"s3://{BUCKET}/sums")
    (tmp_path / "source").write_bytes(TWO_PARTS)
    s3_fault_proxy.set_faults()
    store.upload(tmp_path / "source", "a")
    bodies = [recorded for recorded in s3_fault_proxy.requests if recorded.method == "PUT"]
    assert b"".join(recorded.body for recorded in bodies) == TWO_PARTS
    for recorded in bodies:
        assert recorded.headers["X-Amz-Content-SHA256"] == hashlib.sha256(recorded.body).hexdigest()
        assert "aws-chunked" not in recorded.headers.get("Content-Encoding", "")
    close_store(store)


# --- permanent faults ------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[ObjectStore, Path], object]] = {
    "write": lambda store, path: store.write("new", SMALL),
    "read": lambda store, path: store.read("a"),
    "open_read": lambda store, path: store.open_read("a"),
    "upload": lambda store, path: store.upload(path, "new"),
    "download": lambda store, path: store.download("a", path.with_name("copy")),
    "stat": lambda store, path: store.stat("a"),
    "walk": lambda store, path: list(store.iter_objects("")),
    "delete": lambda store, path: store.delete("a"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unavailable_store_fails_within_deadline(fault_proxy: HttpFaultProxy, store: ObjectStore, large_file: Path, operation: str) -> None:
    store.write("a", SMALL)
    fault_proxy.set_faults(Fault("reject", times=1000))
    started_at_s = time.monotonic()
    with deadline(0.1), pytest.raises(StoreUnavailable, match=f"://{BUCKET}"):
        OPERATIONS[operation](store, large_file)
    assert time.monotonic() - started_at_s < 2
    fault_proxy.set_faults()
    assert [stored.key for stored in store.iter_objects("")] == ["a"]
    assert sorted(path.name for path in large_file.parent.iterdir()) == ["large"]


def test_hanging_store_fails_within_deadline(fault_proxy: HttpFaultProxy, store: ObjectStore) -> None:
    store.write("a", SMALL)
    fault_proxy.set_faults(Fault("hang", times=1000))
    started_at_s = time.monotonic()
    with deadline(0.2), pytest.raises(StoreUnavailable):
        store.read("a")
    assert time.monotonic() - started_at_s < 1.5


@pytest.mark.parametrize("remaining_s", [120, 55, 4.5, 2, 1, 0.5])
def test_s3_read_timeout_fits_within_deadline(remaining_s: float) -> None:
    assert 1.5 * _choose_read_timeout_s(remaining_s) <= remaining_s


def test_refused_connection_is_store_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cloud_storage(monkeypatch, "http://127.0.0.1:1")
    use_s3(monkeypatch, "http://127.0.0.1:1")
    for url in ("gs://bucket", "s3://bucket"):
        store = open_store(url)
        with deadline(0.2), pytest.raises(StoreUnavailable, match=url):
            store.read("a")
        close_store(store)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_missing_bucket_is_not_a_missing_object(
    fault_proxy: HttpFaultProxy, store: ObjectStore, large_file: Path, operation: str
) -> None:
    elsewhere = open_store(store.url.replace(BUCKET, "no-such-bucket"))
    with pytest.raises(StoreUnavailable, match="bucket no-such-bucket does not exist; create it: "):
        OPERATIONS[operation](elsewhere, large_file)
    close_store(elsewhere)
    assert store.stat("missing") is None
    with pytest.raises(NoSuchObject):
        store.read("missing")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gcs_permission_error_names_role_and_command(
    gs_fault_proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch, large_file: Path, operation: str
) -> None:
    use_cloud_storage(monkeypatch, gs_fault_proxy.url)
    account = "tunesmith-job@p.iam.gserviceaccount.com"
    message = f"{account} does not have storage.objects.get access to the Google Cloud Storage object."
    gs_fault_proxy.set_faults(Fault("reject", status=403, times=9, body=json.dumps({"error": {"code": 403, "message": message}})))
    store = GcsStore(f"gs://{BUCKET}")
    with pytest.raises(StoreUnavailable) as excinfo:
        OPERATIONS[operation](store, large_file)
    command = (
        f"gcloud storage buckets add-iam-policy-binding gs://{BUCKET} --member=serviceAccount:{account} --role=roles/storage.objectUser"
    )
    assert command in str(excinfo.value)
    assert len(gs_fault_proxy.requests) == 1
    store.close()
    gs_fault_proxy.set_faults()


def test_s3_permission_error_names_required_action(s3_fault_proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    use_s3(monkeypatch, s3_fault_proxy.url)
    s3_fault_proxy.set_faults(Fault("reject", status=403, body="<Error><Code>AccessDenied</Code><Message>no</Message></Error>"))
    store = open_store(f"s3://{BUCKET}")
    with pytest.raises(StoreUnavailable, match="s3:ListBucket"):
        store.read("a")
    close_store(store)


def test_failed_multipart_upload_is_aborted(s3_fault_proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_s3(monkeypatch, s3_fault_proxy.url)
    store = open_store(f"s3://{BUCKET}/aborted")
    (tmp_path / "source").write_bytes(TWO_PARTS)
    s3_fault_proxy.set_faults(
        Fault("reject", method="PUT", path="partNumber=2", status=400, body="<Error><Code>EntityTooSmall</Code></Error>")
    )
    with pytest.raises(StoreUnavailable, match="EntityTooSmall"):
        store.upload(tmp_path / "source", "a")
    assert [recorded.method for recorded in s3_fault_proxy.requests] == ["POST", "PUT", "PUT", "DELETE"]
    assert list(store.iter_objects("")) == []
    close_store(store)


def test_concurrent_uploads_raise_when_one_fails(fault_proxy: HttpFaultProxy, store: ObjectStore, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}" for number in range(5)]
    for file in files:
        file.write_bytes(SMALL)
    fault_proxy.set_faults(Fault("reject", times=1000, skip_first=2))
    with deadline(0.1), pytest.raises(StoreUnavailable):
        map_concurrently(lambda file: store.upload(file, f"m/{file.name}"), files)
