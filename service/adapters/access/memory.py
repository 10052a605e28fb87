"""API keys and the audit log in memory. For tests, and to read as the simplest implementation of the port."""

from collections.abc import Sequence
from datetime import datetime
from threading import RLock

from service.adapters.access import MAX_LISTED_KEYS
from service.adapters.jobstores.cursors import decode_cursor, encode_cursor
from service.adapters.jobstores.records import format_timestamp
from service.core.access.ports import AuditQuery
from service.core.access.records import ApiKey, AuditEntry
from service.core.errors import Conflict, NotFound
from service.core.ports import Page


class MemoryAccessStore:
    """One process's memory under one lock."""

    def __init__(self) -> None:
        self._keys: dict[str, ApiKey] = {}
        self._entries: list[AuditEntry] = []
        self._lock = RLock()

    def create_key(self, key: ApiKey) -> None:
        with self._lock:
            if key.key_id in self._keys or self.find_key_by_digest(key.digest):
                raise Conflict(f"{key.key_id} already exists")
            self._keys[key.key_id] = key

    def find_key_by_digest(self, digest: str) -> ApiKey | None:
        with self._lock:
            return next((key for key in self._keys.values() if key.digest == digest), None)

    def find_key(self, key_id: str) -> ApiKey | None:
        return self._keys.get(key_id)

    def list_keys(self, tenant_id: str | None) -> list[ApiKey]:
        with self._lock:
            keys = [key for key in self._keys.values() if tenant_id is None or key.tenant_id == tenant_id]
        return sorted(keys, key=lambda key: (key.created_at, key.key_id), reverse=True)[:MAX_LISTED_KEYS]

    def replace_key(self, key: ApiKey) -> None:
        with self._lock:
            if key.key_id not in self._keys:
                raise NotFound(f"no key {key.key_id!r}")
            self._keys[key.key_id] = key

    def append_audit_entries(self, entries: Sequence[AuditEntry]) -> None:
        with self._lock:
            self._entries.extend(entries)

    def list_audit_entries(self, query: AuditQuery) -> Page[AuditEntry]:
        position = decode_cursor(query.after) if query.after else None
        with self._lock:
            entries = sorted(self._entries, key=_position_of, reverse=True)
        found = [
            entry
            for entry in entries
            if query.tenant_id in (None, entry.tenant_id)
            and query.subject in (None, entry.subject)
            and query.action in (None, entry.action)
            and (position is None or _position_of(entry) < position)
        ]
        shown = found[: query.limit]
        return Page(shown, encode_cursor(*_position_of(shown[-1])) if len(found) > query.limit else None)

    def delete_old_audit_entries(self, before: datetime) -> int:
        with self._lock:
            kept = [entry for entry in self._entries if entry.at >= before]
            deleted = len(self._entries) - len(kept)
            self._entries = kept
        return deleted

    def ping(self) -> None:
        return None

    def close(self) -> None:
        return None


def _position_of(entry: AuditEntry) -> tuple[str, str]:
    return format_timestamp(entry.at), entry.entry_id
