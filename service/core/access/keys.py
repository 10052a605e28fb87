"""API keys: create, list, revoke, and recognize one."""

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from service.core.access.ports import AccessStore
from service.core.access.records import ApiKey, KeyScope
from service.core.errors import Forbidden, NotFound, Unauthorized
from service.core.principals import Principal, Role, Scope, role_principal

KEY_PREFIX = "tsk_"
KEY_SUBJECT_PREFIX = "key:"  # of the subject of a principal that an API key gives
KEY_BYTES = 32
MAX_KEY_CHARS = 64  # longer text is no key, and is not hashed
CACHE_TTL = timedelta(seconds=10)  # how long another process may accept a revoked key
MAX_CACHED_KEYS = 10_000


@dataclass(frozen=True)
class NewKey:
    """What a caller asks for. Without a tenant, the key is for the caller's own."""

    name: str
    scopes: tuple[KeyScope, ...]
    expires_in: timedelta
    tenant_id: str | None = None


class Keys:
    """The API keys of the deployment. A key that was recognized is remembered for some seconds."""

    def __init__(self, store: AccessStore, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._clock = clock
        self._recognized: dict[str, tuple[datetime, ApiKey | None]] = {}

    def create(self, principal: Principal, request: NewKey) -> tuple[ApiKey, str]:
        """Create a key; returns its record and the key itself, which is never shown again. Raises Forbidden."""
        principal.require(Scope.ADMIN)
        tenant_id = request.tenant_id or principal.tenant_id
        if tenant_id != principal.tenant_id and Scope.OPERATE not in principal.scopes:
            raise Forbidden(f"{principal.subject} may create keys of its own tenant only", hint="leave tenant_id out", param="tenant_id")
        secret, now = make_key(), self._clock()
        key = ApiKey(
            key_id=f"key_{secrets.token_hex(6)}",
            tenant_id=tenant_id,
            name=request.name,
            scopes=tuple(dict.fromkeys(request.scopes)),
            digest=compute_key_digest(secret),
            created_at=now,
            created_by=principal.subject,
            expires_at=now + request.expires_in,
        )
        self._store.create_key(key)
        return key, secret

    def list_keys(self, principal: Principal, *, all_tenants: bool = False) -> list[ApiKey]:
        """The keys of the principal's tenant, or of every tenant for an operator. Raises Forbidden."""
        principal.require(Scope.ADMIN)
        if all_tenants:
            principal.require(Scope.OPERATE)
        return self._store.list_keys(None if all_tenants else principal.tenant_id)

    def revoke(self, principal: Principal, key_id: str) -> ApiKey:
        """Make a key useless. Can be repeated. Raises NotFound, also for a key of another tenant; Forbidden."""
        principal.require(Scope.ADMIN)
        key = self._store.find_key(key_id)
        if key is None or not (key.tenant_id == principal.tenant_id or Scope.OPERATE in principal.scopes):
            raise NotFound(f"no key {key_id!r}", hint="GET /keys lists them", param="key_id")
        if key.revoked_at is None:
            key = key.model_copy(update={"revoked_at": self._clock()})
            self._store.replace_key(key)
        self._recognized.pop(key.digest, None)
        return key

    def is_remembered(self, secret: str) -> bool:
        """Whether `recognize` would answer without asking the store."""
        known = self._recognized.get(compute_key_digest(secret))
        return known is not None and timedelta(0) <= self._clock() - known[0] < CACHE_TTL

    def recognize(self, secret: str) -> Principal | None:
        """The principal of a key; None for text that is not a key, and for a revoked or expired one. Raises Unavailable."""
        if len(secret) > MAX_KEY_CHARS:
            return None
        digest, now = compute_key_digest(secret), self._clock()
        known = self._recognized.get(digest)
        if known is None or not timedelta(0) <= now - known[0] < CACHE_TTL:
            known = (now, self._store.find_key_by_digest(digest))
            if len(self._recognized) >= MAX_CACHED_KEYS:  # random keys of an attacker must not fill the memory
                self._recognized.clear()
            self._recognized[digest] = known
        key = known[1]
        return _principal_of(key) if key and key.is_valid_at(now) else None

    def get_principal(self, subject: str) -> Principal:
        """The principal of that subject, while its key is valid. Raises Unauthorized, Unavailable."""
        key = self._store.find_key(subject.removeprefix(KEY_SUBJECT_PREFIX))
        if key is None or not key.is_valid_at(self._clock()):
            raise Unauthorized("the API key of this session is expired or revoked")
        return _principal_of(key)


def _principal_of(key: ApiKey) -> Principal:
    return role_principal(key.tenant_id, f"{KEY_SUBJECT_PREFIX}{key.key_id}", *(Role(scope) for scope in key.scopes))


def make_key() -> str:
    """A new key: 256 random bits, with a prefix that scanners of leaked secrets can search for."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def compute_key_digest(secret: str) -> str:
    """The digest under which a key is stored."""
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
