"""API keys: who may make them, what they open, and when they stop."""

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from service.adapters.access.memory import MemoryAccessStore
from service.core.access.keys import CACHE_TTL, KEY_PREFIX, Keys, NewKey, make_key
from service.core.access.records import KeyScope
from service.core.errors import Forbidden, NotFound
from service.core.principals import LOCAL_PRINCIPAL, Principal, Role, Scope, role_principal
from tests.factories import START

ADMIN = role_principal("a", "ada", Role.ADMIN)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> MemoryAccessStore:
    return MemoryAccessStore()


@pytest.fixture
def keys(store: MemoryAccessStore, clock: Clock) -> Keys:
    return Keys(store, clock)


def request_key(*scopes: KeyScope, tenant_id: str | None = None, days: int = 90) -> NewKey:
    return NewKey("ci", scopes or ("submit",), timedelta(days=days), tenant_id)


def test_key_has_256_random_bits_and_a_prefix() -> None:
    made = {make_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith(KEY_PREFIX) and len(key) == len(KEY_PREFIX) + 43 for key in made)


def test_key_is_recognized_and_not_stored(keys: Keys, store: MemoryAccessStore) -> None:
    key, secret = keys.create(ADMIN, request_key())
    principal = keys.recognize(secret)
    assert principal == role_principal("a", f"key:{key.key_id}", Role.SUBMIT)
    assert secret not in key.model_dump_json()
    assert secret.removeprefix(KEY_PREFIX) not in str(store.list_keys(None))


@pytest.mark.parametrize(
    ("scopes", "may", "may_not"),
    [
        (("read",), {Scope.JOBS_READ, Scope.DATASETS_READ}, {Scope.JOBS_WRITE, Scope.ADMIN, Scope.UPKEEP}),
        (("submit",), {Scope.JOBS_READ, Scope.JOBS_WRITE, Scope.DATASETS_WRITE}, {Scope.ADMIN, Scope.OPERATE, Scope.ATTEMPT}),
        (("admin",), {Scope.JOBS_WRITE, Scope.ADMIN}, {Scope.OPERATE, Scope.UPKEEP, Scope.ATTEMPT}),
        (("read", "admin"), {Scope.ADMIN}, {Scope.OPERATE}),
    ],
)
def test_scopes_of_a_key(keys: Keys, scopes: tuple[KeyScope, ...], may: set[Scope], may_not: set[Scope]) -> None:
    principal = keys.recognize(keys.create(ADMIN, request_key(*scopes))[1])
    assert principal is not None
    assert may <= principal.scopes
    assert not may_not & principal.scopes


@pytest.mark.parametrize("change", [lambda text: text[:-1], lambda text: text + "a", str.upper, lambda _: "tsk_" + "a" * 10_000])
def test_other_text_is_not_a_key(keys: Keys, change: Callable[[str], str]) -> None:
    _, secret = keys.create(ADMIN, request_key())
    assert keys.recognize(change(secret)) is None


def test_key_expires_also_while_it_is_remembered(keys: Keys, clock: Clock) -> None:
    _, secret = keys.create(ADMIN, request_key(days=1))
    clock.now = START + timedelta(days=1) - timedelta(seconds=1)
    assert keys.recognize(secret) is not None
    clock.now = START + timedelta(days=1)
    assert keys.recognize(secret) is None


def test_revoked_key_is_refused_at_once_here_and_soon_elsewhere(keys: Keys, store: MemoryAccessStore, clock: Clock) -> None:
    elsewhere = Keys(store, clock)
    key, secret = keys.create(ADMIN, request_key())
    assert keys.recognize(secret)
    assert elsewhere.recognize(secret)
    assert keys.revoke(ADMIN, key.key_id).revoked_at == START
    assert keys.revoke(ADMIN, key.key_id).revoked_at == START
    assert keys.recognize(secret) is None
    clock.now = START + CACHE_TTL
    assert elsewhere.recognize(secret) is None


def test_unknown_keys_do_not_fill_the_memory(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.core.access.keys.MAX_CACHED_KEYS", 10)
    for number in range(100):
        assert keys.recognize(f"tsk_{number}") is None
    assert sum(keys.is_remembered(f"tsk_{number}") for number in range(100)) <= 10


@pytest.mark.parametrize("role", [Role.READ, Role.SUBMIT, Role.SCHEDULER])
def test_only_admins_manage_keys(keys: Keys, role: Role) -> None:
    principal = role_principal("a", "bob", role)
    key, _ = keys.create(ADMIN, request_key())
    for call in (
        lambda: keys.create(principal, request_key()),
        lambda: keys.list_keys(principal),
        lambda: keys.revoke(principal, key.key_id),
    ):
        with pytest.raises(Forbidden):
            call()


def test_admin_stays_within_the_tenant(keys: Keys) -> None:
    other = role_principal("b", "bob", Role.ADMIN)
    key, _ = keys.create(other, request_key())
    assert keys.list_keys(ADMIN) == []
    with pytest.raises(NotFound):
        keys.revoke(ADMIN, key.key_id)
    with pytest.raises(Forbidden, match="own tenant"):
        keys.create(ADMIN, request_key(tenant_id="b"))
    with pytest.raises(Forbidden):
        keys.list_keys(ADMIN, all_tenants=True)
    assert keys.list_keys(other) == [key]


@pytest.mark.parametrize("principal", [LOCAL_PRINCIPAL])
def test_operator_manages_keys_of_every_tenant(keys: Keys, principal: Principal) -> None:
    key, secret = keys.create(principal, request_key("admin", tenant_id="b"))
    recognized = keys.recognize(secret)
    assert recognized is not None
    assert recognized.tenant_id == "b"
    assert keys.list_keys(principal) == []
    assert keys.list_keys(principal, all_tenants=True) == [key]
    assert keys.revoke(principal, key.key_id).revoked_at is not None
