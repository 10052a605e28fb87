"""The audit log: what callers changed or took, kept for a year and readable by admins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from service.core.access.ports import AccessStore, AuditQuery
from service.core.access.records import AuditEntry, Outcome
from service.core.ports import Page
from service.core.principals import Principal, Scope

RETENTION = timedelta(days=400)  # a year, and a month to look back at it
MAX_TEXT_CHARS = 300


@dataclass(frozen=True)
class Action:
    """What a request did."""

    name: str
    resource: str | None
    status: int  # of the response
    code: str | None
    address: str | None
    request_id: str | None


class AuditLog:
    """Writes and reads the entries."""

    def __init__(self, store: AccessStore, clock: Callable[[], datetime], random_suffix: Callable[[], str]) -> None:
        self._store = store
        self._clock = clock
        self._random_suffix = random_suffix

    def make_entry(self, principal: Principal, action: Action) -> AuditEntry:
        """The entry of an action that has just been carried out or refused."""
        now = self._clock()
        return AuditEntry(
            entry_id=f"{int(now.timestamp() * 1e6):016d}-{self._random_suffix()}",
            at=now,
            tenant_id=principal.tenant_id,
            subject=principal.subject[:MAX_TEXT_CHARS],
            action=action.name,
            resource=action.resource[:MAX_TEXT_CHARS] if action.resource else None,
            outcome=_outcome_of(action.status),
            status=action.status,
            code=action.code,
            address=action.address,
            request_id=action.request_id,
        )

    def append(self, entries: Sequence[AuditEntry]) -> None:
        """Add entries. Raises Unavailable."""
        self._store.append_audit_entries(entries)

    def list_entries(self, principal: Principal, query: AuditQuery) -> Page[AuditEntry]:
        """A page of the entries of the principal's tenant; for an operator, of every tenant if the query names none.

        Raises Forbidden, and InvalidRequest for a malformed cursor.
        """
        principal.require(Scope.ADMIN)
        if query.tenant_id != principal.tenant_id:
            principal.require(Scope.OPERATE)
        return self._store.list_audit_entries(query)

    def delete_old_entries(self, principal: Principal) -> int:
        """Delete the entries that are older than RETENTION; returns how many. Raises Forbidden, Unavailable."""
        principal.require(Scope.UPKEEP)
        return self._store.delete_old_audit_entries(self._clock() - RETENTION)


def _outcome_of(status: int) -> Outcome:
    return "ok" if status < 400 else "refused" if status < 500 else "failed"
