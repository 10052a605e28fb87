"""Waiting for a store that is away, and not for ever."""

from collections import Counter
from pathlib import Path

import pytest

from jobs.errors import JobFailed
from jobs.patience import TRIES, download_all_patiently, download_patiently, patiently
from storage import ChecksumMismatch, NoSuchObject, ObjectExists, StorageError, StoreUnavailable
from storage.local import LocalStore

KEYS = ["base/config.json", "base/model.safetensors", "base/inner/vocab.txt"]


class Faulty(LocalStore):
    """A folder that fails to hand out a key as often as there are errors left for it."""

    def __init__(self, folder: Path, errors: dict[str, list[StorageError]]) -> None:
        super().__init__(folder.as_uri())
        self.errors = errors
        self.asked: Counter[str] = Counter()
        for key in KEYS:
            self.write(key, key.encode())

    def download(self, key: str, target: Path) -> Path:
        self.asked[key] += 1
        if self.errors.get(key):
            raise self.errors[key].pop()
        return super().download(key, target)


def never(_: float) -> None:
    """No time passes."""


def test_a_download_outlives_a_store_that_is_away_for_a_while(tmp_path: Path) -> None:
    naps: list[float] = []
    store = Faulty(tmp_path / "store", {KEYS[0]: [StoreUnavailable("away"), ChecksumMismatch("damaged"), StoreUnavailable("away")]})
    target = download_patiently(store, KEYS[0], tmp_path / "here.json", sleep=naps.append)
    assert target.read_text() == KEYS[0]
    assert naps == sorted(naps)
    assert len(naps) == 3


def test_a_file_that_arrived_is_not_fetched_again_for_the_sake_of_another(tmp_path: Path) -> None:
    store = Faulty(tmp_path / "store", {KEYS[1]: [StoreUnavailable("away")] * 2})
    found = download_all_patiently(store, KEYS, tmp_path / "here", below="base/", sleep=never)
    assert [path.relative_to(tmp_path / "here").as_posix() for path in found] == ["config.json", "model.safetensors", "inner/vocab.txt"]
    assert [path.read_text() for path in found] == KEYS
    assert store.asked == {KEYS[0]: 1, KEYS[1]: 3, KEYS[2]: 1}


def test_a_store_that_stays_away_is_named_in_the_failure(tmp_path: Path) -> None:
    store = Faulty(tmp_path / "store", {KEYS[0]: [StoreUnavailable("away")] * 100})
    with pytest.raises(JobFailed, match=f"{store.url}/{KEYS[0]} cannot be read: away") as caught:
        download_patiently(store, KEYS[0], tmp_path / "here.json", sleep=never)
    assert caught.value.failure.code == "internal"
    assert store.asked[KEYS[0]] == TRIES


@pytest.mark.parametrize("answer", [NoSuchObject("nothing there"), ObjectExists("taken")])
def test_an_answer_is_not_asked_for_twice(answer: StorageError) -> None:
    asked: list[int] = []

    def act() -> None:
        asked.append(1)
        raise answer

    with pytest.raises(type(answer)):
        patiently("it could not be done", act, sleep=never)
    assert len(asked) == 1
