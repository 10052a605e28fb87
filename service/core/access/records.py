"""What the access store keeps: API keys without their secret part, and entries of the audit log."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from schema.base import Id, Label
from schema.migrations import VersionedRecord

KeyScope = Literal["read", "submit", "admin"]
KeyScopes = Annotated[tuple[KeyScope, ...], Field(min_length=1, max_length=3)]

Outcome = Literal["ok", "refused", "failed"]  # below 400, 4xx, 5xx


class ApiKey(VersionedRecord):
    """An API key. The key itself is shown once and stored nowhere; its SHA-256 digest recognizes it."""

    key_id: Id
    tenant_id: Id
    name: Label
    scopes: KeyScopes
    digest: str  # SHA-256 of the whole key, in hex. 256 random bits need no salt and no slow hash.
    created_at: datetime
    created_by: str
    expires_at: datetime
    revoked_at: datetime | None = None

    def is_valid_at(self, now: datetime) -> bool:
        """Whether the key opens anything."""
        return self.revoked_at is None and now < self.expires_at


class AuditEntry(VersionedRecord):
    """One action of a caller that changes something or hands out a model: who, what, when, from where, and the outcome."""

    entry_id: Id  # sorts by time within a process
    at: datetime
    tenant_id: str
    subject: str
    action: str  # the operation id of the API: create_training_job
    resource: str | None = None  # the id that it is about
    outcome: Outcome
    status: int  # of the response
    code: str | None = None  # of the error
    address: str | None = None  # of the client
    request_id: str | None = None
