"""The ports of access: identity tokens, and the store of API keys and the audit log, whose adapters share one contract suite."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from service.core.access.records import ApiKey, AuditEntry
from service.core.access.rules import Identity
from service.core.ports import Page


@dataclass(frozen=True)
class AuditQuery:
    """Which entries of the audit log, newest first. A filter that is None matches every entry."""

    tenant_id: str | None  # None: of every tenant
    limit: int = 100
    after: str | None = None  # a cursor from an earlier page
    subject: str | None = None
    action: str | None = None


class IdentityVerifier(Protocol):
    """Verifies identity tokens of the issuers that the deployment trusts."""

    def verify(self, token: str) -> Identity:
        """The identity that a token proves. May block. Raises Unauthorized, Unavailable."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class LocalCredential(Protocol):
    """Recognizes the account that runs the service."""

    def matches(self, text: str) -> bool:
        """Whether a caller's token is that of the home folder."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with the token, and does not reveal it."""
        ...


class AccessStore(Protocol):
    """Durable API keys and an append-only audit log. Raises Unavailable when the database does not answer.

    A key is durable when `create_key` or `replace_key` returns. An audit entry survives the end of the process; a power cut may take
    those of the last moments, so that writing them costs a request nearly nothing.
    """

    def create_key(self, key: ApiKey) -> None:
        """Store a new key. Raises Conflict for an id or digest that exists."""
        ...

    def find_key_by_digest(self, digest: str) -> ApiKey | None:
        """The key of a digest, revoked and expired ones included."""
        ...

    def find_key(self, key_id: str) -> ApiKey | None:
        """The key of that id, or None."""
        ...

    def list_keys(self, tenant_id: str | None) -> list[ApiKey]:
        """The keys of a tenant, or of every tenant, newest first; the newest thousand."""
        ...

    def replace_key(self, key: ApiKey) -> None:
        """Store a key over the one of the same id. Raises NotFound."""
        ...

    def append_audit_entries(self, entries: Sequence[AuditEntry]) -> None:
        """Add entries to the audit log. Nothing changes or removes one, except its age."""
        ...

    def list_audit_entries(self, query: AuditQuery) -> Page[AuditEntry]:
        """A page of entries, newest first. Raises InvalidRequest for a malformed cursor."""
        ...

    def delete_old_audit_entries(self, before: datetime) -> int:
        """Delete the entries that are older, which the deployment no longer has to keep; returns how many."""
        ...

    def ping(self) -> None:
        """Raise Unavailable unless a read would succeed now."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...
