"""API keys and the audit log in Firestore.

| collection | one document is | its fields |
|---|---|---|
| `api_keys` | a key, named by its id | `record` (JSON), `digest`, `tenant_id`, `created_at` |
| `audit` | an entry of the audit log, named by its id | `record` (JSON), `tenant_id`, `subject`, `action`, `created_at`, `expire_at` |

Firestore deletes entries some time after `expire_at`.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Sequence
from datetime import datetime
from functools import partial

from google.cloud.firestore import FieldFilter, Query

from service.adapters.access import MAX_LISTED_KEYS
from service.adapters.jobstores.firestore.database import Database, Fields, Snapshot
from service.adapters.jobstores.firestore.documents import doc_ref_by_id
from service.adapters.jobstores.firestore.queries import fetch_page
from service.adapters.jobstores.records import Record, RecordReader, format_timestamp, load_record
from service.core.access.audit import RETENTION
from service.core.access.ports import AuditQuery
from service.core.access.records import ApiKey, AuditEntry
from service.core.errors import Conflict, NotFound
from service.core.ports import Page

DELETES_PER_COMMIT = 400


class FirestoreAccessStore:
    """A Firestore database in native mode, the same as the job store's."""

    def __init__(self, *, project_id: str, database: str = "(default)") -> None:
        self._database = Database(project_id, database)
        self._keys = self._database.client.collection("api_keys")
        self._entries = self._database.client.collection("audit")
        self._reader = RecordReader()

    def create_key(self, key: ApiKey) -> None:
        ref = doc_ref_by_id(self._keys, key.key_id)

        def step() -> None:
            stored = self._database.get(ref, "record")
            if stored.exists:
                if stored.get("record") == key.model_dump_json():
                    return  # an earlier try of this call, whose answer was lost
                raise Conflict(f"{key.key_id} already exists")
            if self.find_key_by_digest(key.digest) is not None:
                raise Conflict(f"{key.key_id} has the digest of another key")
            batch = self._database.client.batch()
            self._database.set_if_unchanged(batch, stored, _key_fields(key))
            self._database.commit(batch)

        self._database.run_with_retry(step)

    def find_key_by_digest(self, digest: str) -> ApiKey | None:
        found = self._database.query(self._keys.where(filter=FieldFilter("digest", "==", digest)).select(["record"]).limit(1))
        return load_record(ApiKey, found[0].get("record")) if found else None

    def find_key(self, key_id: str) -> ApiKey | None:
        ref = doc_ref_by_id(self._keys, key_id)
        stored = self._database.run_with_retry(lambda: self._database.get(ref, "record"))
        return load_record(ApiKey, stored.get("record")) if stored.exists else None

    def list_keys(self, tenant_id: str | None) -> list[ApiKey]:
        query = self._keys.select(["record"])
        if tenant_id is not None:
            query = query.where(filter=FieldFilter("tenant_id", "==", tenant_id))
        found = self._database.query(query.order_by("created_at", direction=Query.DESCENDING).limit(MAX_LISTED_KEYS))
        return self._load_readable(ApiKey, found)

    def replace_key(self, key: ApiKey) -> None:
        ref = doc_ref_by_id(self._keys, key.key_id)

        def step() -> None:
            stored = self._database.get(ref, "record")
            if not stored.exists:
                raise NotFound(f"no key {key.key_id!r}")
            batch = self._database.client.batch()
            self._database.set_if_unchanged(batch, stored, _key_fields(key))
            self._database.commit(batch)

        self._database.run_with_retry(step)

    def append_audit_entries(self, entries: Sequence[AuditEntry]) -> None:
        batch = self._database.client.batch()
        for entry in entries:  # `set`, not `create`: a repeated commit whose answer was lost writes the same documents
            batch.set(doc_ref_by_id(self._entries, entry.entry_id), _entry_fields(entry))
        self._database.run_with_retry(lambda: self._database.commit(batch))

    def list_audit_entries(self, query: AuditQuery) -> Page[AuditEntry]:
        selected = self._entries.select(["record", "created_at"])
        for name in ("tenant_id", "subject", "action"):
            if (value := getattr(query, name)) is not None:
                selected = selected.where(filter=FieldFilter(name, "==", value))
        load = partial(self._load_readable, AuditEntry)
        return fetch_page(self._database, self._entries, selected, query.limit, query.after, load)

    def delete_old_audit_entries(self, before: datetime) -> int:
        old = self._entries.where(filter=FieldFilter("created_at", "<", format_timestamp(before)))
        found = self._database.query(old.select([]).limit(DELETES_PER_COMMIT))
        self._database.delete(snapshot.reference for snapshot in found)
        return len(found)

    def ping(self) -> None:
        self._database.query(self._keys.select([]).limit(1))

    def close(self) -> None:
        self._database.close()

    def _load_readable(self, model: type[Record], snapshots: Sequence[Snapshot]) -> list[Record]:
        return self._reader.load_readable(model, ((snapshot.id, snapshot.get("record")) for snapshot in snapshots))


def _key_fields(key: ApiKey) -> Fields:
    return {
        "record": key.model_dump_json(),
        "digest": key.digest,
        "tenant_id": key.tenant_id,
        "created_at": format_timestamp(key.created_at),
    }


def _entry_fields(entry: AuditEntry) -> Fields:
    return {
        "record": entry.model_dump_json(),
        "tenant_id": entry.tenant_id,
        "subject": entry.subject,
        "action": entry.action,
        "created_at": format_timestamp(entry.at),
        "expire_at": entry.at + RETENTION,
    }
