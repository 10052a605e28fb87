"""Object servers on loopback, started once per session, and the environment in which the real clients find them."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.loopback import cloud_storage, s3
from storage import ObjectStore
from storage.registry import open_store

StoreFactory = Callable[[str], ObjectStore]


@pytest.fixture(scope="session")
def cloud_storage_url() -> Iterator[str]:
    with cloud_storage.run_cloud_storage() as url:
        yield url


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    with s3.run_s3() as url:
        yield url


def use_cloud_storage(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """New clients of Cloud Storage connect to the server at `url`."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)


def use_s3(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """New clients of S3 connect to the server at `url`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    monkeypatch.setenv("AWS_REGION", "auto")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")


@pytest.fixture
def new_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreFactory]:
    """Creates an empty store of a scheme. Starts only the servers that a test uses."""
    opened: list[ObjectStore] = []

    def new(scheme: str) -> ObjectStore:
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        match scheme:
            case "file":
                url = (tmp_path / "objects with space").as_uri()
            case "gs":
                server_url = request.getfixturevalue("cloud_storage_url")
                cloud_storage.create_bucket(server_url, bucket)
                use_cloud_storage(monkeypatch, server_url)
                url = f"gs://{bucket}"
            case "s3":
                server_url = request.getfixturevalue("s3_url")
                s3.create_bucket(server_url, bucket)
                use_s3(monkeypatch, server_url)
                url = f"s3://{bucket}/some/folder"
            case _:
                raise AssertionError(f"no server for {scheme}")
        opened.append(open_store(url))
        return opened[-1]

    yield new
    for store in opened:
        close_store(store)


def close_store(store: ObjectStore) -> None:
    """Close a store; a test fails if it leaves connections open."""
    from storage.gs import GcsStore
    from storage.s3 import S3Store

    if isinstance(store, GcsStore | S3Store):
        store.close()
