"""Records in Firestore: the job store of a deployment on Google Cloud. Any number of service processes may share it.

| collection | one document is | its fields |
|---|---|---|
| `jobs` | a job | `record` (JSON), `revision`, `writes`, and the fields that lists show and filter by |
| `jobs/{id}/events` | a chunk of events reported together, named by the cursor of the last | `events` (JSON), `attempt`, `expire_at` |
| `heartbeats` | the job's last heartbeat | `heartbeat` (JSON), `last_cursor` |
| `datasets` | a dataset | `record` (JSON), `tenant_id`, `created_at` |
| `usage` | what an attempt, job or dataset adds to its tenant's usage | `scope` (tenant and period), `gpu_seconds`, `usd`, `stored_bytes` |
| `idempotency` | an idempotency key, named by its digest | `body_digest`, `job_id`, `created_at`, `expire_at` |

Four rules:

- **Every write is one commit with preconditions**: each document must be as it was read (`last_update_time`) or still absent.
  Firestore's own transactions take locks and wait for each other; these commits never wait, and one of them wins.
- **Every step can be repeated.** The library may not repeat a commit by itself, because its answer may have been lost. A step reads,
  decides and commits; a job's document keeps the ids of the last writes, so a repeated step recognizes a write that was carried out.
- **The heartbeat document assigns cursors**, in the commit that makes the events visible. Events become visible in cursor order, so a
  reader behind a cursor misses none. This costs one write per report; Firestore sustains about one per second on a document. All
  events of a report share a document and are billed as one.
- **Each query is served by an index** of infra/firestore.indexes.json, or by merging indexes that differ in one equality only. Fields
  that no query uses have no index; absent fields (`work_lists`, `active_dataset_id`, `active_mixed_dataset_ids`) cost none.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The library's own annotations are partial; what comes out of documents gets its type where it is read.

import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from uuid import uuid4

from google.cloud.firestore import DocumentReference, FieldFilter

from schema.dataset import Dataset
from schema.events import Event, EventBatch
from schema.job import Job, Status
from service.adapters.jobstores.firestore import job_lists, queries
from service.adapters.jobstores.firestore.database import CALL_TIMEOUT_S, Database, Fields, Snapshot
from service.adapters.jobstores.firestore.documents import (
    build_dataset_fields,
    build_heartbeat_fields,
    build_idempotency_fields,
    build_job_fields,
    doc_ref_by_id,
    fields_of,
    idempotency_key_id,
    last_cursor_of,
    load_entry,
    load_heartbeat,
)
from service.adapters.jobstores.firestore.events import (
    CHUNKS_PER_COMMIT,
    SequencedEvent,
    add_events,
    delete_events,
    fetch_events,
    split_into_chunks,
)
from service.adapters.jobstores.firestore.usage import count_jobs, sum_usage, usage_ref, write_usage
from service.adapters.jobstores.records import Record, RecordReader, load_record
from service.core.errors import Conflict, IdempotencyConflict, NotFound, StaleRevision
from service.core.event_store import Heartbeat, StoredEvent
from service.core.job_lists import JobEntry, JobQuery, ListedJob
from service.core.job_store_rules import IDEMPOTENCY_TTL, select_new_events
from service.core.ports import IdempotencyKey, Page
from service.core.stored_json import make_storable
from service.core.usage import STORED, JobState, Usage, dataset_bytes_key, dataset_entry, iter_job_entries, job_bytes_key
from storage.deadline import deadline

MAX_UNLISTED_JOBS = 1000  # more than a deployment before 0.2 can have had open
MAX_WRITE_IDS = 16  # far more than one job can collect while a writer looks for a lost answer
MIN_HEARTBEAT_WRITE_INTERVAL = timedelta(seconds=5)  # for a heartbeat without news; silence is judged by the minute


class FirestoreJobStore:
    """A Firestore database in native mode. Threads share one connection."""

    def __init__(self, *, project_id: str, database: str = "(default)") -> None:
        self._database = Database(project_id, database)
        client = self._database.client
        self._jobs = client.collection("jobs")
        self._heartbeats = client.collection("heartbeats")
        self._datasets = client.collection("datasets")
        self._idempotency_keys = client.collection("idempotency")
        self._usage = client.collection("usage")
        self._reader = RecordReader()
        self._lists_are_complete = False

    # --- jobs --------------------------------------------------------------------------------------------------------

    def create_job(self, job: Job, idempotency: IdempotencyKey | None = None) -> Job:
        write_id = uuid4().hex
        fields = build_job_fields(job, [write_id])
        job_ref = doc_ref_by_id(self._jobs, job.job_id)
        key_ref = self._idempotency_keys.document(idempotency_key_id(job.tenant_id, idempotency.key)) if idempotency else None

        def step() -> Job:
            key = self._database.get(key_ref) if key_ref else None
            if key and idempotency and (earlier := self._find_idempotent_job(key, job, idempotency)):
                return earlier
            stored = self._database.get(job_ref, "writes")
            if stored.exists:
                if write_id in stored.get("writes"):
                    return job
                raise Conflict(f"{job.job_id} already exists")
            batch = self._database.client.batch()
            self._database.set_if_unchanged(batch, stored, fields)
            if key and idempotency:
                self._database.set_if_unchanged(batch, key, build_idempotency_fields(job, idempotency))
            self._database.commit(batch)
            return job

        return self._database.run_with_retry(step)

    def find_job(self, job_id: str) -> Job | None:
        return self._find(doc_ref_by_id(self._jobs, job_id), Job)

    def find_job_entry(self, job_id: str) -> JobEntry | None:
        fields = ("created_at", "summary", "list_filters")
        stored = self._database.run_with_retry(lambda: self._database.get(doc_ref_by_id(self._jobs, job_id), *fields))
        return load_entry(stored) if stored.exists else None

    def replace_job(self, job: Job, events: Sequence[Event] = ()) -> Job:
        updated = job.model_copy(update={"revision": job.revision + 1})
        sequenced = [SequencedEvent(seq=updated.revision, at=updated.updated_at, event=make_storable(event)[0]) for event in events]
        write_id = uuid4().hex
        job_ref, heartbeat_ref = doc_ref_by_id(self._jobs, job.job_id), doc_ref_by_id(self._heartbeats, job.job_id)
        doc_refs = [job_ref, heartbeat_ref] if sequenced else [job_ref]

        def step() -> Job:
            stored, *heartbeats = self._database.get_all(doc_refs, "revision", "writes", "heartbeat", "last_cursor")
            if not stored.exists:
                raise NotFound(f"no job {job.job_id!r}")
            if write_id in stored.get("writes"):
                return updated
            if stored.get("revision") != job.revision:
                raise StaleRevision(f"{job.job_id} was changed by another writer")
            batch = self._database.client.batch()
            write_ids = [*stored.get("writes"), write_id][-MAX_WRITE_IDS:]
            self._database.set_if_unchanged(batch, stored, build_job_fields(updated, write_ids))
            write_usage(batch, self._usage, iter_job_entries(updated))
            for heartbeat in heartbeats:
                cursor = add_events(batch, job_ref, 0, last_cursor_of(heartbeat), sequenced, updated.updated_at)
                fields: Fields = {"heartbeat": fields_of(heartbeat).get("heartbeat"), "last_cursor": cursor}
                self._database.set_if_unchanged(batch, heartbeat, fields)
            self._database.commit(batch)
            return updated

        return self._database.run_with_retry(step)

    def list_jobs(self, query: JobQuery) -> Page[ListedJob]:
        return job_lists.list_jobs(self._database, self._jobs, self._heartbeats, query, self._reader)

    def count_jobs_by_status(self, query: JobQuery) -> dict[Status, int] | None:
        return job_lists.count_jobs_by_status(self._database, self._jobs, query, self._reader)

    def list_queued_jobs(self, launcher: str | None, limit: int) -> list[Job]:
        self._list_jobs_of_earlier_version()
        return queries.list_oldest_jobs(self._database, self._jobs, "queued", launcher, limit, self._reader)

    def list_active_jobs(self, launcher: str | None, limit: int) -> list[Job]:
        self._list_jobs_of_earlier_version()
        return queries.list_oldest_jobs(self._database, self._jobs, "active", launcher, limit, self._reader)

    def _list_jobs_of_earlier_version(self) -> None:
        """Put the open jobs of a version before 0.2 into the lists of work, once for each process.

        Their documents have a field `work_state` instead. This and its index can go when no deployment has such jobs any more.
        """
        if self._lists_are_complete:
            return
        for job_id in queries.list_unlisted_jobs(self._database, self._jobs, MAX_UNLISTED_JOBS):
            self._database.run_with_retry(partial(self._write_again, doc_ref_by_id(self._jobs, job_id)))
        self._lists_are_complete = True

    def _write_again(self, job_ref: DocumentReference) -> None:
        """Write a job's document as it is, with today's fields."""
        stored = self._database.get(job_ref)
        for job in self._reader.load_readable(Job, [(stored.id, stored.get("record"))] if stored.exists else []):
            batch = self._database.client.batch()
            self._database.set_if_unchanged(batch, stored, build_job_fields(job, stored.get("writes")))
            self._database.commit(batch)

    def list_jobs_using_dataset(self, dataset_id: str) -> list[str]:
        filters = FieldFilter("active_dataset_id", "==", dataset_id), FieldFilter("active_mixed_dataset_ids", "array_contains", dataset_id)
        queries = [self._jobs.where(filter=each).order_by("__name__").select([]) for each in filters]
        return sorted(snapshot.id for query in queries for snapshot in self._database.query(query))

    def delete_job(self, job_id: str) -> bool:
        """Delete the job's events, its heartbeat and its record, the record last: an interrupted deletion goes on when repeated."""
        job_ref = doc_ref_by_id(self._jobs, job_id)
        with deadline(CALL_TIMEOUT_S):
            existed = self._database.run_with_retry(lambda: self._database.get(job_ref, "revision")).exists
            delete_events(self._database, job_ref)
            stored_bytes_ref = usage_ref(self._usage, STORED, job_bytes_key(job_ref.id))
            self._database.delete([doc_ref_by_id(self._heartbeats, job_id), stored_bytes_ref, job_ref])
        return existed

    # --- events ------------------------------------------------------------------------------------------------------

    def append_events(self, job_id: str, attempt: int, batch: EventBatch, now: datetime) -> int:
        job_ref, heartbeat_ref = doc_ref_by_id(self._jobs, job_id), doc_ref_by_id(self._heartbeats, job_id)

        def step() -> tuple[int, bool]:
            """Store what fits into one commit: the next seq, and whether events are left over."""
            stored = self._database.get(heartbeat_ref)
            before = load_heartbeat(stored)
            new_events, after = select_new_events(before, attempt, batch, now)
            if before and _is_redundant(before, after):
                return after.next_seq, False
            sequenced = [SequencedEvent(seq=new.seq, at=new.at, event=new.event) for new in new_events]
            chunks = itertools.islice(split_into_chunks(sequenced), CHUNKS_PER_COMMIT)
            fitting = list(itertools.chain.from_iterable(chunks))
            if len(fitting) < len(sequenced):
                first_part = batch.model_copy(update={"events": batch.events[: fitting[-1].seq + 1 - batch.first_seq]})
                _, after = select_new_events(before, attempt, first_part, now)
            writes = self._database.client.batch()
            cursor = add_events(writes, job_ref, attempt, last_cursor_of(stored), fitting, now)
            self._database.set_if_unchanged(writes, stored, build_heartbeat_fields(after, cursor))
            self._database.commit(writes)
            return after.next_seq, len(fitting) < len(sequenced)

        with deadline(CALL_TIMEOUT_S):
            next_seq, more = self._database.run_with_retry(step)
            while more:
                next_seq, more = self._database.run_with_retry(step)
        return next_seq

    def list_events(self, job_id: str, after: int = 0, limit: int = 500, max_bytes: int | None = None) -> list[StoredEvent]:
        with deadline(CALL_TIMEOUT_S):
            return fetch_events(self._database, doc_ref_by_id(self._jobs, job_id), after, limit, max_bytes, self._reader.report)

    def find_last_cursor(self, job_id: str) -> int:
        doc_ref = doc_ref_by_id(self._heartbeats, job_id)
        return last_cursor_of(self._database.run_with_retry(lambda: self._database.get(doc_ref, "last_cursor")))

    def find_heartbeat(self, job_id: str) -> Heartbeat | None:
        return load_heartbeat(self._database.run_with_retry(lambda: self._database.get(doc_ref_by_id(self._heartbeats, job_id))))

    # --- datasets ----------------------------------------------------------------------------------------------------

    def create_dataset(self, dataset: Dataset) -> None:
        doc_ref, fields = doc_ref_by_id(self._datasets, dataset.processed_dataset_id), build_dataset_fields(dataset)

        def step() -> None:
            stored = self._database.get(doc_ref)
            if stored.exists:
                if stored.to_dict() != fields:
                    raise Conflict(f"{dataset.processed_dataset_id} already exists")
                return
            batch = self._database.client.batch()
            self._database.set_if_unchanged(batch, stored, fields)
            write_usage(batch, self._usage, [dataset_entry(dataset)])
            self._database.commit(batch)

        self._database.run_with_retry(step)

    def replace_dataset(self, dataset: Dataset) -> None:
        doc_ref, fields = doc_ref_by_id(self._datasets, dataset.processed_dataset_id), build_dataset_fields(dataset)

        def step() -> None:
            stored = self._database.get(doc_ref)
            if not stored.exists or stored.get("tenant_id") != dataset.tenant_id:
                raise NotFound(f"no dataset {dataset.processed_dataset_id!r}")
            batch = self._database.client.batch()
            self._database.set_if_unchanged(batch, stored, fields)
            write_usage(batch, self._usage, [dataset_entry(dataset)])
            self._database.commit(batch)

        self._database.run_with_retry(step)

    def find_dataset(self, dataset_id: str) -> Dataset | None:
        return self._find(doc_ref_by_id(self._datasets, dataset_id), Dataset)

    def find_dataset_tenant(self, dataset_id: str) -> str | None:
        doc_ref = doc_ref_by_id(self._datasets, dataset_id)
        return fields_of(self._database.run_with_retry(lambda: self._database.get(doc_ref, "tenant_id"))).get("tenant_id")

    def list_datasets(self, tenant_id: str, limit: int = 50, after: str | None = None) -> Page[Dataset]:
        selected = self._datasets.where(filter=FieldFilter("tenant_id", "==", tenant_id))

        def load(shown: Sequence[Snapshot]) -> list[Dataset]:
            return self._reader.load_readable(Dataset, ((snapshot.id, snapshot.get("record")) for snapshot in shown))

        return queries.fetch_page(self._database, self._datasets, selected, limit, after, load)

    def delete_dataset(self, dataset_id: str) -> bool:
        doc_ref = doc_ref_by_id(self._datasets, dataset_id)
        with deadline(CALL_TIMEOUT_S):
            existed = self._database.run_with_retry(lambda: self._database.get(doc_ref, "created_at")).exists
            self._database.delete([doc_ref, usage_ref(self._usage, STORED, dataset_bytes_key(doc_ref.id))])
        return existed

    # --- usage -------------------------------------------------------------------------------------------------------

    def count_jobs(self, tenant_id: str, state: JobState) -> int:
        return count_jobs(self._database, self._jobs, tenant_id, state)

    def sum_usage(self, tenant_id: str, period: str) -> Usage:
        return sum_usage(self._database, self._usage, tenant_id, period)

    def find_job_by_key(self, tenant_id: str, idempotency_key: str, body_digest: str) -> Job | None:
        key_ref = self._idempotency_keys.document(idempotency_key_id(tenant_id, idempotency_key))
        key = self._database.run_with_retry(lambda: self._database.get(key_ref))
        return self.find_job(key.get("job_id")) if key.exists and key.get("body_digest") == body_digest else None

    # --- the database ------------------------------------------------------------------------------------------------

    def ping(self) -> None:
        self._database.run_with_retry(lambda: self._database.get(self._jobs.document("ping"), "revision"))

    def close(self) -> None:
        self._database.close()

    def _find(self, doc_ref: DocumentReference, model: type[Record]) -> Record | None:
        snapshot = self._database.run_with_retry(lambda: self._database.get(doc_ref, "record"))
        return load_record(model, snapshot.get("record")) if snapshot.exists else None

    def _find_idempotent_job(self, key: Snapshot, job: Job, idempotency: IdempotencyKey) -> Job | None:
        """The job created under the same key less than a day ago. Raises IdempotencyConflict.

        Checks the age itself: Firestore deletes expired documents up to a day late.
        """
        if not key.exists or job.created_at - datetime.fromisoformat(key.get("created_at")) >= IDEMPOTENCY_TTL:
            return None
        if key.get("body_digest") != idempotency.body_digest:
            raise IdempotencyConflict(param="Idempotency-Key")
        stored = self._database.get(doc_ref_by_id(self._jobs, key.get("job_id")), "record")
        return load_record(Job, stored.get("record")) if stored.exists else None


def _is_redundant(before: Heartbeat, after: Heartbeat) -> bool:
    """Whether a heartbeat brings no news and follows another so soon that it is not worth a write."""
    same = replace(after, received_at=before.received_at) == before
    return same and after.received_at - before.received_at < MIN_HEARTBEAT_WRITE_INTERVAL
