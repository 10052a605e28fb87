"""What every secret store promises."""

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.cloud.secretmanager_v1 import Secret
from pydantic import TypeAdapter, ValidationError

from infra.loopback.proxy import Proxy
from infra.loopback.secret_manager import SecretManager
from schema.base import Id
from service.adapters.secrets import SECRET_STORES
from service.adapters.secrets.local import LocalSecretStore
from service.adapters.secrets.secret_manager import PREFIX, SecretManagerStore
from service.core.errors import TooLarge, Unavailable
from service.core.jobs.submit import make_job_id
from service.core.ports import SecretStore
from storage.deadline import deadline
from tests.factories import make_config, make_train_request

CANARY = "hf_canary_value"
PROJECT = "p"
KINDS = ("local", "secret-manager")


def test_every_registered_store_is_covered() -> None:
    assert set(KINDS) == set(SECRET_STORES)


@pytest.fixture
def emulator() -> Iterator[SecretManager]:
    with SecretManager() as emulator:
        yield emulator


@pytest.fixture
def cloud(emulator: SecretManager) -> Iterator[SecretManagerStore]:
    store = SecretManagerStore(project_id=PROJECT, emulator_host=emulator.host)
    yield store
    store.close()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SecretStore:
    return request.getfixturevalue("cloud") if request.param == "secret-manager" else LocalSecretStore(tmp_path / "secrets")


def test_secrets_round_trip(store: SecretStore) -> None:
    store.put("job-1", {"hf_token": CANARY, "other": "ü\n"})
    assert store.read("job-1") == {"hf_token": CANARY, "other": "ü\n"}


def test_a_job_without_secrets_has_none(store: SecretStore) -> None:
    assert store.read("job-1") == {}


def test_put_replaces_secrets(store: SecretStore) -> None:
    store.put("job-1", {"a": "1"})
    store.put("job-1", {"b": "2"})
    assert store.read("job-1") == {"b": "2"}


def test_concurrent_puts_are_never_mixed(store: SecretStore) -> None:
    values = [{"a": str(n) * 1000} for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda value: _put(store, value), values))
    assert any(outcomes)
    assert store.read("job-1") in values


def _put(store: SecretStore, value: dict[str, str]) -> bool:
    try:
        store.put("job-1", value)
    except Unavailable:  # another writer was first; nothing is partly written
        return False
    return True


def test_destroyed_secrets_are_not_readable(store: SecretStore) -> None:
    store.put("job-1", {"hf_token": CANARY})
    assert store.destroy("job-1")
    assert store.read("job-1") == {}
    assert not store.destroy("job-1")


def test_secrets_can_be_put_again_after_they_were_destroyed(store: SecretStore) -> None:
    store.put("job-1", {"a": "old"})
    store.destroy("job-1")
    store.put("job-1", {"a": "new"})
    assert store.read("job-1") == {"a": "new"}


def test_read_during_destroy_is_all_or_nothing(store: SecretStore) -> None:
    for _ in range(10):
        store.put("job-1", {"a": "1"})
        with ThreadPoolExecutor(2) as pool:
            reading, destroying = pool.submit(store.read, "job-1"), pool.submit(store.destroy, "job-1")
            assert reading.result() in ({"a": "1"}, {})
            assert destroying.result()


def test_empty_secrets_are_none(store: SecretStore) -> None:
    store.put("job-1", {})
    assert store.read("job-1") == {}
    assert store.destroy("job-1")


def test_jobs_with_secrets_are_listed(store: SecretStore) -> None:
    store.put("job-2", {"a": "1"})
    store.put("job-1", {"a": "1"})
    assert list(store.iter_job_ids()) == ["job-1", "job-2"]


def test_large_secrets_fit(store: SecretStore) -> None:
    store.put("job-1", {"key": "k" * 60_000})
    assert store.read("job-1") == {"key": "k" * 60_000}


# --- local -----------------------------------------------------------------------------------------------------------


def test_local_secrets_are_encrypted_and_private(tmp_path: Path) -> None:
    LocalSecretStore(tmp_path / "s").put("job-1", {"hf_token": CANARY})
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    files = list((tmp_path / "s").iterdir())
    assert len(files) == 2
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o600
        assert CANARY.encode() not in file.read_bytes()


def test_local_secrets_need_the_same_key_after_restart(tmp_path: Path) -> None:
    LocalSecretStore(tmp_path).put("job-1", {"hf_token": CANARY})
    assert LocalSecretStore(tmp_path).read("job-1") == {"hf_token": CANARY}
    (tmp_path / "key").unlink()
    with pytest.raises(Unavailable, match="job-1"):
        LocalSecretStore(tmp_path).read("job-1")


# --- Secret Manager --------------------------------------------------------------------------------------------------


def test_secret_has_ttl(cloud: SecretManagerStore, emulator: SecretManager) -> None:
    cloud.put("job-1", {"a": "1"})
    (name,) = emulator.secret_names()
    assert name == f"projects/{PROJECT}/secrets/{PREFIX}job-1"
    assert emulator.ttl_s(name) == 30 * 24 * 3600


def test_replaced_version_is_destroyed(cloud: SecretManagerStore) -> None:
    for value in ("1", "2", "3"):
        cloud.put("job-1", {"a": value})
    assert [cloud._access_version("job-1", number) for number in (1, 2, 3, 4)] == [{}, {}, {"a": "3"}, None]


def test_disabled_version_is_not_read(cloud: SecretManagerStore, emulator: SecretManager) -> None:
    cloud.put("job-1", {"a": "1"})
    emulator.fail_next("AccessSecretVersion", grpc.StatusCode.FAILED_PRECONDITION, "Secret Version is in DISABLED state.")
    assert cloud.read("job-1") == {}


def test_concurrent_puts_leave_one_version(cloud: SecretManagerStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: cloud.put("job-1", {"a": str(number)}), range(8)))
    versions = [cloud._access_version("job-1", number) for number in range(1, 9)]
    assert versions[:-1] == [{}] * 7
    assert versions[-1] == cloud.read("job-1") != {}


def test_second_client_reads_latest_secret(cloud: SecretManagerStore, emulator: SecretManager) -> None:
    another = SecretManagerStore(project_id=PROJECT, emulator_host=emulator.host)
    for value in ("1", "2"):
        cloud.put("job-1", {"a": value})
        assert another.read("job-1") == {"a": value}
    another.close()


def test_corrupt_payload_is_rejected(cloud: SecretManagerStore, emulator: SecretManager) -> None:
    cloud.put("job-1", {"a": CANARY})
    emulator.corrupt_next_response("AccessSecretVersion")
    with pytest.raises(Unavailable, match="job-1 arrived damaged") as excinfo:
        cloud.read("job-1")
    assert CANARY not in str(excinfo.value)
    assert cloud.read("job-1") == {"a": CANARY}


def test_secret_destroyed_during_write_raises(cloud: SecretManagerStore, emulator: SecretManager) -> None:
    emulator.fail_next("AddSecretVersion", grpc.StatusCode.NOT_FOUND, "Secret [s] not found.")
    with pytest.raises(Unavailable, match="does not find"):
        cloud.put("job-1", {"a": "1"})


def test_missing_project_is_named(cloud: SecretManagerStore, emulator: SecretManager) -> None:
    emulator.fail_next("ListSecrets", grpc.StatusCode.NOT_FOUND, "Project not found")
    with pytest.raises(Unavailable, match="no project p") as excinfo:
        cloud.iter_job_ids()
    assert excinfo.value.hint == "gcloud projects describe p"


def test_foreign_secrets_are_not_listed(cloud: SecretManagerStore, emulator: SecretManager) -> None:
    for number in range(250):  # three pages
        cloud._create_secret(f"job-{number:03}")
    cloud._client.create_secret(parent=f"projects/{PROJECT}", secret_id="somebody-elses", secret=Secret(labels={"app": "other"}))
    assert list(cloud.iter_job_ids()) == [f"job-{number:03}" for number in range(250)]


def test_oversized_secrets_are_rejected_before_writing(cloud: SecretManagerStore, emulator: SecretManager) -> None:
    with pytest.raises(TooLarge, match="65536"):
        cloud.put("job-1", {"key": "k" * 70_000})
    assert emulator.secret_names() == []


def test_job_ids_map_to_valid_secret_ids() -> None:
    longest = make_train_request(processed_dataset_id="d." * 60, training_config=make_config(base_model_id=f"a/{'b.' * 40}"))
    assert re.fullmatch(
        r"[A-Za-z0-9_-]{1,255}", PREFIX + make_job_id(longest.processed_dataset_id, longest.training_config.base_model_id, "0" * 12)
    )
    assert len(PREFIX + "x" * 128) <= 255  # the longest id that is valid
    with pytest.raises(ValidationError):
        TypeAdapter(Id).validate_python("x" * 129)


@pytest.mark.parametrize(
    ("code", "google_message", "message", "hint"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "Permission denied", "lacks its Secret Manager roles", "make deploy PROJECT_ID=p"),
        (
            grpc.StatusCode.PERMISSION_DENIED,
            "Secret Manager API has not been used in project p before",
            "not enabled",
            "gcloud services enable secretmanager.googleapis.com --project=p",
        ),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota exceeded", "quota", "https://console.cloud.google.com/iam-admin/quotas"),
        (grpc.StatusCode.INVALID_ARGUMENT, f"bad payload {CANARY}", "refused", ""),
    ],
)
def test_secret_manager_error_names_fix_and_hides_secret(
    cloud: SecretManagerStore,
    emulator: SecretManager,
    caplog: pytest.LogCaptureFixture,
    code: grpc.StatusCode,
    google_message: str,
    message: str,
    hint: str,
) -> None:
    emulator.fail_next("AddSecretVersion", code, google_message)
    with caplog.at_level(logging.DEBUG), pytest.raises(Unavailable, match=message) as excinfo:
        cloud.put("job-1", {"hf_token": CANARY})
    assert hint in excinfo.value.hint
    assert CANARY not in f"{excinfo.value.message} {excinfo.value.hint} {caplog.text} {cloud!r}"


@pytest.mark.parametrize("method", ["CreateSecret", "AccessSecretVersion", "DestroySecretVersion", "DeleteSecret", "ListSecrets"])
@pytest.mark.parametrize("is_carried_out", [True, False])
def test_busy_secret_manager_is_retried(cloud: SecretManagerStore, emulator: SecretManager, method: str, *, is_carried_out: bool) -> None:
    if is_carried_out:
        emulator.drop_next_response(method)
    else:
        emulator.fail_next(method, grpc.StatusCode.UNAVAILABLE)
    cloud.put("job-1", {"a": "1"})
    cloud.put("job-1", {"a": "2"})
    assert cloud.read("job-1") == {"a": "2"}
    assert list(cloud.iter_job_ids()) == ["job-1"]
    cloud.destroy("job-1")
    assert emulator.secret_names() == []


def test_lost_response_raises_and_retry_succeeds(cloud: SecretManagerStore, emulator: SecretManager) -> None:
    emulator.drop_next_response("AddSecretVersion")
    with pytest.raises(Unavailable):
        cloud.put("job-1", {"a": "1"})
    cloud.put("job-1", {"a": "2"})
    assert cloud.read("job-1") == {"a": "2"}
    assert cloud.destroy("job-1")
    assert emulator.secret_names() == []


def test_dropped_responses_respect_caller_deadline(emulator: SecretManager) -> None:
    with Proxy(*split_host(emulator)) as proxy:
        store = SecretManagerStore(project_id=PROJECT, emulator_host=proxy.address)
        store.put("job-1", {"a": "1"})
        proxy.drop_responses()
        with deadline(0.5), pytest.raises(Unavailable, match="did not answer in time"):
            store.put("job-2", {"a": "1"})
        assert [name.rpartition("/")[2] for name in emulator.secret_names()] == [f"{PREFIX}job-1", f"{PREFIX}job-2"]  # it was executed
        proxy.restore()
        store.put("job-2", {"a": "2"})
        assert store.read("job-2") == {"a": "2"}
        store.close()


def test_last_retry_ends_at_caller_deadline(emulator: SecretManager) -> None:
    with Proxy(*split_host(emulator)) as proxy:
        store = SecretManagerStore(project_id=PROJECT, emulator_host=proxy.address)
        store.put("job-1", {"a": "1"})
        proxy.delay(0.1)
        emulator.fail_next("AccessSecretVersion", grpc.StatusCode.UNAVAILABLE)
        with deadline(0.4), pytest.raises(Unavailable):  # not enough for two tries of at least 0.2 s each
            store.read("job-1")
        store.close()


def split_host(emulator: SecretManager) -> tuple[str, int]:
    address, _, port = emulator.host.rpartition(":")
    return address, int(port)
