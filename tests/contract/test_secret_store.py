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
from service.core.jobs import job_id_for
from service.core.ports import SecretStore
from storage.patience import patience
from tests.factories import a_config, a_request

CANARY = "hf_canary_value"
PROJECT = "p"
KINDS = ("local", "secret-manager")


def test_every_registered_store_is_under_contract() -> None:
    assert set(KINDS) == set(SECRET_STORES)


@pytest.fixture
def stand_in() -> Iterator[SecretManager]:
    with SecretManager() as stand_in:
        yield stand_in


@pytest.fixture
def cloud(stand_in: SecretManager) -> Iterator[SecretManagerStore]:
    store = SecretManagerStore(project_id=PROJECT, emulator_host=stand_in.host)
    yield store
    store.close()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SecretStore:
    return request.getfixturevalue("cloud") if request.param == "secret-manager" else LocalSecretStore(tmp_path / "secrets")


def test_secrets_come_back_as_they_were_put(store: SecretStore) -> None:
    store.put("job-1", {"hf_token": CANARY, "other": "ü\n"})
    assert store.read("job-1") == {"hf_token": CANARY, "other": "ü\n"}


def test_a_job_without_secrets_has_none(store: SecretStore) -> None:
    assert store.read("job-1") == {}


def test_putting_again_replaces(store: SecretStore) -> None:
    store.put("job-1", {"a": "1"})
    store.put("job-1", {"b": "2"})
    assert store.read("job-1") == {"b": "2"}


def test_of_two_who_put_at_once_one_is_read_whole(store: SecretStore) -> None:
    values = [{"a": str(n) * 1000} for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda value: _put(store, value), values))
    assert any(outcomes)
    assert store.read("job-1") in values


def _put(store: SecretStore, value: dict[str, str]) -> bool:
    try:
        store.put("job-1", value)
    except Unavailable:  # somebody else was faster; nothing is half written
        return False
    return True


def test_destroyed_secrets_are_gone(store: SecretStore) -> None:
    store.put("job-1", {"hf_token": CANARY})
    assert store.destroy("job-1")
    assert store.read("job-1") == {}
    assert not store.destroy("job-1")


def test_secrets_can_be_put_again_after_they_were_destroyed(store: SecretStore) -> None:
    store.put("job-1", {"a": "old"})
    store.destroy("job-1")
    store.put("job-1", {"a": "new"})
    assert store.read("job-1") == {"a": "new"}


def test_who_reads_while_secrets_are_destroyed_gets_them_whole_or_not_at_all(store: SecretStore) -> None:
    for _ in range(10):
        store.put("job-1", {"a": "1"})
        with ThreadPoolExecutor(2) as pool:
            reading, destroying = pool.submit(store.read, "job-1"), pool.submit(store.destroy, "job-1")
            assert reading.result() in ({"a": "1"}, {})
            assert destroying.result()


def test_secrets_of_no_name_are_none(store: SecretStore) -> None:
    store.put("job-1", {})
    assert store.read("job-1") == {}
    assert store.destroy("job-1")


def test_jobs_with_secrets_can_be_found(store: SecretStore) -> None:
    store.put("job-2", {"a": "1"})
    store.put("job-1", {"a": "1"})
    assert list(store.walk()) == ["job-1", "job-2"]


def test_large_secrets_fit(store: SecretStore) -> None:
    store.put("job-1", {"key": "k" * 60_000})
    assert store.read("job-1") == {"key": "k" * 60_000}


# --- on this machine -------------------------------------------------------------------------------------------------


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


# --- in Secret Manager -----------------------------------------------------------------------------------------------


def test_a_secret_ends_by_itself_should_nobody_destroy_it(cloud: SecretManagerStore, stand_in: SecretManager) -> None:
    cloud.put("job-1", {"a": "1"})
    (name,) = stand_in.secrets()
    assert name == f"projects/{PROJECT}/secrets/{PREFIX}job-1"
    assert stand_in.ttl_s(name) == 30 * 24 * 3600


def test_a_replaced_version_cannot_be_read_any_more(cloud: SecretManagerStore) -> None:
    for value in ("1", "2", "3"):
        cloud.put("job-1", {"a": value})
    assert [cloud._access("job-1", number) for number in (1, 2, 3, 4)] == [{}, {}, {"a": "3"}, None]


def test_a_version_that_was_disabled_is_not_read(cloud: SecretManagerStore, stand_in: SecretManager) -> None:
    cloud.put("job-1", {"a": "1"})
    stand_in.refuse_next("AccessSecretVersion", grpc.StatusCode.FAILED_PRECONDITION, "Secret Version is in DISABLED state.")
    assert cloud.read("job-1") == {}


def test_of_many_who_put_at_once_nobody_leaves_an_older_version_behind(cloud: SecretManagerStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: cloud.put("job-1", {"a": str(number)}), range(8)))
    found = [cloud._access("job-1", number) for number in range(1, 9)]
    assert found[:-1] == [{}] * 7
    assert found[-1] == cloud.read("job-1") != {}


def test_another_process_reads_what_was_just_put(cloud: SecretManagerStore, stand_in: SecretManager) -> None:
    another = SecretManagerStore(project_id=PROJECT, emulator_host=stand_in.host)
    for value in ("1", "2"):
        cloud.put("job-1", {"a": value})
        assert another.read("job-1") == {"a": value}
    another.close()


def test_a_payload_that_arrives_damaged_is_not_taken_for_secrets(cloud: SecretManagerStore, stand_in: SecretManager) -> None:
    cloud.put("job-1", {"a": CANARY})
    stand_in.damage_next_answer("AccessSecretVersion")
    with pytest.raises(Unavailable, match="job-1 arrived damaged") as refusal:
        cloud.read("job-1")
    assert CANARY not in str(refusal.value)
    assert cloud.read("job-1") == {"a": CANARY}


def test_a_secret_that_is_destroyed_while_it_is_written_is_told(cloud: SecretManagerStore, stand_in: SecretManager) -> None:
    stand_in.refuse_next("AddSecretVersion", grpc.StatusCode.NOT_FOUND, "Secret [s] not found.")
    with pytest.raises(Unavailable, match="does not find"):
        cloud.put("job-1", {"a": "1"})


def test_a_project_that_is_not_there_is_named(cloud: SecretManagerStore, stand_in: SecretManager) -> None:
    stand_in.refuse_next("ListSecrets", grpc.StatusCode.NOT_FOUND, "Project not found")
    with pytest.raises(Unavailable, match="no project p") as refusal:
        cloud.walk()
    assert refusal.value.hint == "gcloud projects describe p"


def test_other_peoples_secrets_are_not_walked_over(cloud: SecretManagerStore, stand_in: SecretManager) -> None:
    for number in range(250):  # three pages
        cloud._create(f"job-{number:03}")
    cloud._client.create_secret(parent=f"projects/{PROJECT}", secret_id="somebody-elses", secret=Secret(labels={"app": "other"}))
    assert list(cloud.walk()) == [f"job-{number:03}" for number in range(250)]


def test_secrets_that_are_too_large_are_refused_before_anything_is_kept(cloud: SecretManagerStore, stand_in: SecretManager) -> None:
    with pytest.raises(TooLarge, match="65536"):
        cloud.put("job-1", {"key": "k" * 70_000})
    assert stand_in.secrets() == []


def test_every_job_id_makes_a_valid_secret_id() -> None:
    longest = a_request(processed_dataset_id="d." * 60, training_config=a_config(base_model_id=f"a/{'b.' * 40}"))
    assert re.fullmatch(
        r"[A-Za-z0-9_-]{1,255}", PREFIX + job_id_for(longest.processed_dataset_id, longest.training_config.base_model_id, "0" * 12)
    )
    assert len(PREFIX + "x" * 128) <= 255  # an id is no longer anywhere
    with pytest.raises(ValidationError):
        TypeAdapter(Id).validate_python("x" * 129)


@pytest.mark.parametrize(
    ("code", "said", "message", "hint"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "Permission denied", "lacks its Secret Manager roles", "make deploy PROJECT_ID=p"),
        (
            grpc.StatusCode.PERMISSION_DENIED,
            "Secret Manager API has not been used in project p before",
            "not enabled",
            "gcloud services enable secretmanager.googleapis.com --project=p",
        ),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota exceeded", "quota", "https://console.cloud.google.com/iam-admin/quotas"),
        (grpc.StatusCode.INVALID_ARGUMENT, f"bad payload {CANARY}", "refuses", ""),
    ],
)
def test_a_refusal_says_what_mends_it_and_never_what_was_sent(
    cloud: SecretManagerStore,
    stand_in: SecretManager,
    caplog: pytest.LogCaptureFixture,
    code: grpc.StatusCode,
    said: str,
    message: str,
    hint: str,
) -> None:
    stand_in.refuse_next("AddSecretVersion", code, said)
    with caplog.at_level(logging.DEBUG), pytest.raises(Unavailable, match=message) as refusal:
        cloud.put("job-1", {"hf_token": CANARY})
    assert hint in refusal.value.hint
    assert CANARY not in f"{refusal.value.message} {refusal.value.hint} {caplog.text} {cloud!r}"


@pytest.mark.parametrize("method", ["CreateSecret", "AccessSecretVersion", "DestroySecretVersion", "DeleteSecret", "ListSecrets"])
@pytest.mark.parametrize("is_carried_out", [True, False])
def test_a_busy_server_is_asked_again(cloud: SecretManagerStore, stand_in: SecretManager, method: str, *, is_carried_out: bool) -> None:
    if is_carried_out:
        stand_in.lose_next_answer(method)
    else:
        stand_in.refuse_next(method, grpc.StatusCode.UNAVAILABLE)
    cloud.put("job-1", {"a": "1"})
    cloud.put("job-1", {"a": "2"})
    assert cloud.read("job-1") == {"a": "2"}
    assert list(cloud.walk()) == ["job-1"]
    cloud.destroy("job-1")
    assert stand_in.secrets() == []


def test_a_lost_answer_is_told_and_can_be_repeated(cloud: SecretManagerStore, stand_in: SecretManager) -> None:
    stand_in.lose_next_answer("AddSecretVersion")
    with pytest.raises(Unavailable):
        cloud.put("job-1", {"a": "1"})
    cloud.put("job-1", {"a": "2"})
    assert cloud.read("job-1") == {"a": "2"}
    assert cloud.destroy("job-1")
    assert stand_in.secrets() == []


def test_a_line_that_swallows_answers_is_waited_for_no_longer_than_the_caller_does(stand_in: SecretManager) -> None:
    with Proxy(*place_of(stand_in)) as line:
        store = SecretManagerStore(project_id=PROJECT, emulator_host=line.address)
        store.put("job-1", {"a": "1"})
        line.drop_answers()
        with patience(0.5), pytest.raises(Unavailable, match="did not answer in time"):
            store.put("job-2", {"a": "1"})
        assert [name.rpartition("/")[2] for name in stand_in.secrets()] == [f"{PREFIX}job-1", f"{PREFIX}job-2"]  # it was carried out
        line.restore()
        store.put("job-2", {"a": "2"})
        assert store.read("job-2") == {"a": "2"}
        store.close()


def test_the_last_try_ends_with_the_callers_patience(stand_in: SecretManager) -> None:
    with Proxy(*place_of(stand_in)) as line:
        store = SecretManagerStore(project_id=PROJECT, emulator_host=line.address)
        store.put("job-1", {"a": "1"})
        line.delay(0.1)
        stand_in.refuse_next("AccessSecretVersion", grpc.StatusCode.UNAVAILABLE)
        with patience(0.4), pytest.raises(Unavailable):  # for two tries, of 0.2 s and more each, this is not enough
            store.read("job-1")
        store.close()


def place_of(stand_in: SecretManager) -> tuple[str, int]:
    address, _, port = stand_in.host.rpartition(":")
    return address, int(port)
