"""What every secret store promises."""

from collections.abc import Callable
from pathlib import Path

import pytest

from service.adapters.secrets import SECRET_STORES
from service.adapters.secrets.local import LocalSecretStore
from service.core.errors import Unavailable
from service.core.ports import SecretStore

BUILDERS: dict[str, Callable[[Path], SecretStore]] = {"local": lambda folder: LocalSecretStore(folder / "secrets")}
CANARY = "hf_canary_value"


def test_every_registered_store_is_under_contract() -> None:
    assert set(BUILDERS) == set(SECRET_STORES)


@pytest.fixture(params=sorted(SECRET_STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SecretStore:
    return BUILDERS[request.param](tmp_path)


def test_secrets_come_back_as_they_were_put(store: SecretStore) -> None:
    store.put("job-1", {"hf_token": CANARY, "other": "ü\n"})
    assert store.read("job-1") == {"hf_token": CANARY, "other": "ü\n"}


def test_a_job_without_secrets_has_none(store: SecretStore) -> None:
    assert store.read("job-1") == {}


def test_putting_again_replaces(store: SecretStore) -> None:
    store.put("job-1", {"a": "1"})
    store.put("job-1", {"b": "2"})
    assert store.read("job-1") == {"b": "2"}


def test_destroyed_secrets_are_gone(store: SecretStore) -> None:
    store.put("job-1", {"hf_token": CANARY})
    assert store.destroy("job-1")
    assert store.read("job-1") == {}
    assert not store.destroy("job-1")


def test_jobs_with_secrets_can_be_found(store: SecretStore) -> None:
    store.put("job-2", {"a": "1"})
    store.put("job-1", {"a": "1"})
    assert list(store.walk()) == ["job-1", "job-2"]


def test_local_secrets_are_encrypted_and_the_owners_alone(tmp_path: Path) -> None:
    LocalSecretStore(tmp_path / "s").put("job-1", {"hf_token": CANARY})
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    files = list((tmp_path / "s").iterdir())
    assert len(files) == 2
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o600
        assert CANARY.encode() not in file.read_bytes()


def test_local_secrets_survive_a_restart_but_not_another_key(tmp_path: Path) -> None:
    LocalSecretStore(tmp_path).put("job-1", {"hf_token": CANARY})
    assert LocalSecretStore(tmp_path).read("job-1") == {"hf_token": CANARY}
    (tmp_path / "key").unlink()
    with pytest.raises(Unavailable, match="job-1"):
        LocalSecretStore(tmp_path).read("job-1")
