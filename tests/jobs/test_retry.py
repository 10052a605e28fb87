"""Store operations are retried while the store is unavailable, a limited number of times."""

from collections import Counter
from pathlib import Path

import pytest

from jobs.runtime.errors import JobFailed
from jobs.runtime.retry import TRIES, download_all_with_retry, download_with_retry, retry_store
from storage import ChecksumMismatch, NoSuchObject, ObjectExists, StorageError, StoreUnavailable
from storage.file import LocalStore

KEYS = ["base/config.json", "base/model.safetensors", "base/inner/vocab.txt"]


class FaultyStore(LocalStore):
    """A folder store whose downloads of a key raise the given errors first."""

    def __init__(self, folder: Path, errors: dict[str, list[StorageError]]) -> None:
        super().__init__(folder.as_uri())
        self.errors = errors
        self.downloads: Counter[str] = Counter()
        for key in KEYS:
            self.write(key, key.encode())

    def download(self, key: str, target: Path) -> Path:
        self.downloads[key] += 1
        if self.errors.get(key):
            raise self.errors[key].pop()
        return super().download(key, target)


def skip_sleep(_: float) -> None:
    """Do not sleep."""


def test_download_retries_temporary_outage(tmp_path: Path) -> None:
    sleeps_s: list[float] = []
    store = FaultyStore(tmp_path / "store", {KEYS[0]: [StoreUnavailable("away"), ChecksumMismatch("damaged"), StoreUnavailable("away")]})
    target = download_with_retry(store, KEYS[0], tmp_path / "config.json", sleep=sleeps_s.append)
    assert target.read_text() == KEYS[0]
    assert sleeps_s == sorted(sleeps_s)
    assert len(sleeps_s) == 3


def test_downloaded_file_is_not_fetched_again(tmp_path: Path) -> None:
    store = FaultyStore(tmp_path / "store", {KEYS[1]: [StoreUnavailable("away")] * 2})
    paths = download_all_with_retry(store, KEYS, tmp_path / "target", prefix="base/", sleep=skip_sleep)
    assert [path.relative_to(tmp_path / "target").as_posix() for path in paths] == ["config.json", "model.safetensors", "inner/vocab.txt"]
    assert [path.read_text() for path in paths] == KEYS
    assert store.downloads == {KEYS[0]: 1, KEYS[1]: 3, KEYS[2]: 1}


def test_permanent_outage_fails_with_store_url(tmp_path: Path) -> None:
    store = FaultyStore(tmp_path / "store", {KEYS[0]: [StoreUnavailable("away")] * 100})
    with pytest.raises(JobFailed, match=f"{store.url}/{KEYS[0]} cannot be read: away") as caught:
        download_with_retry(store, KEYS[0], tmp_path / "config.json", sleep=skip_sleep)
    assert caught.value.failure.code == "internal"
    assert store.downloads[KEYS[0]] == TRIES


@pytest.mark.parametrize("error", [NoSuchObject("nothing there"), ObjectExists("taken")])
def test_definitive_error_is_not_retried(error: StorageError) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        retry_store("it could not be done", fail, sleep=skip_sleep)
    assert len(calls) == 1
