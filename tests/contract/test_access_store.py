"""What every access store promises: API keys, and an audit log that only grows."""

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from service.adapters.access import ACCESS_STORES
from service.adapters.jobstores import JOB_STORES
from service.bootstrap import load_adapter
from service.core.access.ports import AccessStore, AuditQuery
from service.core.access.records import ApiKey, AuditEntry
from service.core.errors import Conflict, InvalidRequest, NotFound
from tests.factories import START

BUILDERS: dict[str, Callable[[type, pytest.FixtureRequest], AccessStore]] = {
    "firestore": lambda store, request: store(project_id=request.getfixturevalue("firestore_project")),
    "memory": lambda store, _: store(),
    "sqlite": lambda store, request: store(request.getfixturevalue("tmp_path") / "access.db"),
}


def test_every_job_store_has_an_access_store_that_is_covered() -> None:
    assert set(BUILDERS) == set(ACCESS_STORES) == set(JOB_STORES)


@pytest.fixture(params=sorted(ACCESS_STORES))
def store(request: pytest.FixtureRequest) -> Iterator[AccessStore]:
    store = BUILDERS[request.param](load_adapter(ACCESS_STORES, "access store", request.param), request)
    yield store
    store.close()


def make_key(number: int = 0, **changes: object) -> ApiKey:
    key = ApiKey(
        key_id=f"key_{number}",
        tenant_id="a",
        name=f"Schlüssel {number}",
        scopes=("read",),
        digest=f"{number:064x}",
        created_at=START + timedelta(seconds=number),
        created_by="local",
        expires_at=START + timedelta(days=90),
    )
    return key.model_copy(update=changes)


def make_entry(number: int, **changes: object) -> AuditEntry:
    entry = AuditEntry(
        entry_id=f"{number:06d}-x",
        at=START + timedelta(seconds=number),
        tenant_id="a",
        subject="key:key_0",
        action="create_training_job",
        resource=f"job_{number}",
        outcome="ok",
        status=201,
        address="127.0.0.1",
        request_id="r",
    )
    return entry.model_copy(update=changes)


def test_key_is_found_by_id_and_by_digest(store: AccessStore) -> None:
    key = make_key()
    store.create_key(key)
    assert store.find_key("key_0") == store.find_key_by_digest(key.digest) == key
    assert store.find_key("key_1") is None
    assert store.find_key_by_digest("f" * 64) is None


def test_id_and_digest_are_unique(store: AccessStore) -> None:
    store.create_key(make_key())
    with pytest.raises(Conflict):
        store.create_key(make_key(name="other"))
    with pytest.raises(Conflict):
        store.create_key(make_key(1, digest=make_key().digest))
    assert [key.name for key in store.list_keys("a")] == ["Schlüssel 0"]


def test_keys_are_listed_by_tenant_newest_first(store: AccessStore) -> None:
    for number, tenant in enumerate(["a", "b", "a"]):
        store.create_key(make_key(number, tenant_id=tenant))
    assert [key.key_id for key in store.list_keys("a")] == ["key_2", "key_0"]
    assert [key.key_id for key in store.list_keys(None)] == ["key_2", "key_1", "key_0"]
    assert store.list_keys("c") == []


def test_key_is_replaced(store: AccessStore) -> None:
    store.create_key(make_key())
    store.replace_key(make_key(revoked_at=START))
    assert store.find_key("key_0") == make_key(revoked_at=START)
    with pytest.raises(NotFound):
        store.replace_key(make_key(1))


def test_audit_log_is_read_newest_first_in_pages(store: AccessStore) -> None:
    store.append_audit_entries([make_entry(number) for number in range(3)])
    store.append_audit_entries([make_entry(3), make_entry(4)])
    first = store.list_audit_entries(AuditQuery("a", limit=2))
    second = store.list_audit_entries(AuditQuery("a", limit=2, after=first.next_cursor))
    third = store.list_audit_entries(AuditQuery("a", limit=2, after=second.next_cursor))
    assert [entry.resource for page in (first, second, third) for entry in page.rows] == ["job_4", "job_3", "job_2", "job_1", "job_0"]
    assert third.next_cursor is None
    assert first.rows[0] == make_entry(4)


def test_audit_log_is_filtered(store: AccessStore) -> None:
    store.append_audit_entries(
        [make_entry(0), make_entry(1, tenant_id="b"), make_entry(2, subject="ada@example.com"), make_entry(3, action="delete_job")]
    )

    def list_numbers(tenant_id: str | None, **filters: str) -> list[int]:
        query = AuditQuery(tenant_id, subject=filters.get("subject"), action=filters.get("action"))
        return [int((entry.resource or "").removeprefix("job_")) for entry in store.list_audit_entries(query).rows]

    assert list_numbers(None) == [3, 2, 1, 0]
    assert list_numbers("a") == [3, 2, 0]
    assert list_numbers("a", subject="ada@example.com") == [2]
    assert list_numbers("a", action="delete_job") == [3]
    assert list_numbers("b", subject="key:key_0", action="create_training_job") == [1]


def test_foreign_cursor_is_refused(store: AccessStore) -> None:
    with pytest.raises(InvalidRequest):
        store.list_audit_entries(AuditQuery("a", after="no cursor"))


def test_old_audit_entries_are_deleted(store: AccessStore) -> None:
    store.append_audit_entries([make_entry(number) for number in range(4)])
    assert store.delete_old_audit_entries(START + timedelta(seconds=2)) == 2
    assert [entry.resource for entry in store.list_audit_entries(AuditQuery(None)).rows] == ["job_3", "job_2"]


def test_store_answers(store: AccessStore) -> None:
    store.ping()
