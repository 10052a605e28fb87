"""Records in Firestore: the store of the cloud. Any number of service processes may share it.

| collection | a document is | its fields |
|---|---|---|
| `jobs` | a job | `record` (JSON), `revision`, `writes`, what lists show and filter by |
| `jobs/{id}/events` | some events reported together, named by the cursor of the last | `events` (JSON), `attempt`, `expire_at` |
| `liveness` | a job's last sign of life | `heartbeat` (JSON), `last_cursor` |
| `datasets` | a dataset | `record` (JSON), `tenant_id`, `created_at` |
| `idempotency` | a caller's key, by its digest | `body_digest`, `job_id`, `created_at`, `expire_at` |

Four rules hold it together:

- **Every write is one commit that names what it was decided on** (`last_update_time`, or that there was nothing). Firestore's
  own transactions take locks and wait for each other; these never wait, one of them wins.
- **An answer that was lost is looked for.** The library may not repeat a commit by itself. Every step reads, decides and commits,
  and can be taken again: a job remembers the last writes by their ids, so that one which was carried out is known again.
- **Cursors are given out by the liveness document**, in the commit that makes the events visible. So they become visible in
  their order, and who reads behind a cursor misses nothing. It takes one write per report, which suits the one per second that
  Firestore sustains on a document. The events of one report share a document, and are paid for as one.
- **Each query is served by an index** of infra/firestore.indexes.json, or by merging some of them that differ in one equality
  only. Fields that no query asks for have none; fields that are absent cost none (`work_state`, `active_dataset_id`).
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The library's own annotations are partial; what comes out of documents is given its type where it is read.

import hashlib
import itertools
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias, TypeVar
from uuid import uuid4

import grpc
from google.api_core import exceptions as google
from google.api_core.retry import Retry
from google.auth.exceptions import DefaultCredentialsError
from google.cloud.firestore import (
    DELETE_FIELD,
    Client,
    CollectionReference,
    DocumentReference,
    DocumentSnapshot,
    FieldFilter,
    Query,
    WriteBatch,
)
from pydantic import TypeAdapter

from schema.dataset import Dataset
from schema.events import Event, EventBatch, ReportedEvent
from schema.job import Job, Status
from service.adapters.jobstores.cursors import decode_cursor, encode_cursor
from service.core.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    StaleRevision,
    TooLarge,
    TunesmithError,
    Unavailable,
)
from service.core.job_store_rules import IDEMPOTENCY_TTL, select_new_events
from service.core.ports import Heartbeat, IdempotencyKey, JobQuery, JobSummary, Page, StoredEvent
from storage.deadline import MIN_TIMEOUT_S, deadline, remaining_s

CALL_TIMEOUT_S = 10.0  # what a call may take when nobody who waits says less
RPC_TIMEOUT_S = 2.0  # what one answer may take: less than a caller's 5 s, so that a lost answer can still be looked for
MAX_RECONNECT_BACKOFF_MS = 2000  # gRPC's own 120 s would keep the service away for two minutes after the network is back
INITIAL_BACKOFF_S, MAX_BACKOFF_S = 0.02, 0.5

MAX_WRITE_IDS = 16  # far more than can happen to one job while somebody looks for a lost answer
EVENTS_TTL = timedelta(days=400)  # a year of curves, and a month to look back at it
MIN_HEARTBEAT_WRITE_INTERVAL = timedelta(seconds=5)  # a sign of life that tells nothing else; silence is judged by the minute

MAX_CHUNK_BYTES = 900_000  # events in one document, whose limit is 1 MiB
CHUNKS_PER_COMMIT = 4  # a commit's limit is 10 MiB, the emulator's 4
CHUNKS_PER_READ = 50
DELETES_PER_COMMIT = 400  # the limit has been 500

FILTERS = ("status", "project_id", "modality", "trainer_type")
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # as schema.base.Id; Firestore takes each of them as a document's name

NO_MESSAGE_LIMIT = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]  # as the library has it

Fields = dict[str, object]
Snapshot: TypeAlias = DocumentSnapshot[DocumentReference]
ReturnT = TypeVar("ReturnT")
Record = TypeVar("Record")


class SequencedEvent(ReportedEvent):
    """An event inside its document."""

    seq: int


EVENTS_ADAPTER: TypeAdapter[list[SequencedEvent]] = TypeAdapter(list[SequencedEvent])
HEARTBEAT_ADAPTER: TypeAdapter[Heartbeat] = TypeAdapter(Heartbeat)


class PreconditionFailed(Exception):
    """What the commit was decided on is not so any more; nothing was written."""


# A commit that met one of these was not carried out: somebody else was faster.
WRITE_CONFLICT_ERRORS = (google.AlreadyExists, google.FailedPrecondition, google.NotFound, google.Aborted)
# After these nobody knows whether a commit was carried out.
AMBIGUOUS_ERRORS = (google.ServerError, google.Cancelled, google.TooManyRequests)
# None would do for most calls, but a query's stream asks a policy that must be there.
NO_RETRIES = Retry(predicate=lambda _: False)


class FirestoreJobStore:
    """A Firestore database in native mode. Threads share one connection."""

    def __init__(self, *, project_id: str, database: str = "(default)") -> None:
        self._project_id = project_id
        self._database = database
        self._client = _connect(project_id, database)
        self._jobs = self._client.collection("jobs")
        self._heartbeats = self._client.collection("heartbeats")
        self._datasets = self._client.collection("datasets")
        self._idempotency_keys = self._client.collection("idempotency")

    # --- jobs --------------------------------------------------------------------------------------------------------

    def create_job(self, job: Job, idempotency: IdempotencyKey | None = None) -> Job:
        write = uuid4().hex
        place = _doc_ref(self._jobs, job.job_id)

        def step() -> Job:
            key = self._get(self._key_doc_ref(job, idempotency)) if idempotency else None
            if key and idempotency and (earlier := self._find_idempotent_job(key, job, idempotency)):
                return earlier
            stored = self._get(place, "writes")
            if stored.exists:
                if write in stored.get("writes"):
                    return job
                raise Conflict(f"{job.job_id} is there already")
            batch = self._client.batch()
            self._set_if_unchanged(batch, stored, build_job_fields(job, [write]))
            if key and idempotency:
                self._set_if_unchanged(batch, key, _key_fields(job, idempotency))
            self._commit(batch)
            return job

        return self._run_with_retry(step)

    def find_job(self, job_id: str) -> Job | None:
        return self._find(_doc_ref(self._jobs, job_id), Job.load)

    def replace_job(self, job: Job, events: Sequence[Event] = ()) -> Job:
        kept = job.model_copy(update={"revision": job.revision + 1})
        told = [SequencedEvent(seq=kept.revision, at=kept.updated_at, event=event) for event in events]
        write = uuid4().hex
        places = [_doc_ref(self._jobs, job.job_id), _doc_ref(self._heartbeats, job.job_id)]

        def step() -> Job:
            stored, *tails = self._get_all(places[: 2 if told else 1], "revision", "writes", "heartbeat", "last_cursor")
            if not stored.exists:
                raise NotFound(f"no job {job.job_id!r}")
            if write in stored.get("writes"):
                return kept
            if stored.get("revision") != job.revision:
                raise StaleRevision(f"{job.job_id} was changed by somebody else")
            batch = self._client.batch()
            self._set_if_unchanged(batch, stored, build_job_fields(kept, [*stored.get("writes"), write][-MAX_WRITE_IDS:]))
            for tail in tails:
                cursor = self._add_events(batch, places[0], 0, _last_cursor(tail), told, kept.updated_at)
                self._set_if_unchanged(batch, tail, {"heartbeat": _fields(tail).get("heartbeat"), "last_cursor": cursor})
            self._commit(batch)
            return kept

        return self._run_with_retry(step)

    def list_jobs(self, query: JobQuery) -> Page[JobSummary]:
        wanted = {name: str(value) for name in FILTERS if (value := getattr(query, name)) is not None}
        asked = self._jobs.select(["created_at", "summary"])
        for name, value in _filter_values(query.tenant_id, wanted).items() if wanted else [("tenant_id", query.tenant_id)]:
            asked = asked.where(filter=FieldFilter(f"list_filters.{name}", "==", value))
        return self._page(self._jobs, asked, query.limit, query.after, _load_summary)

    def list_queued_jobs(self, limit: int) -> list[Job]:
        return self._oldest("queued", limit)

    def list_active_jobs(self, limit: int) -> list[Job]:
        return self._oldest("active", limit)

    def list_jobs_using_dataset(self, dataset_id: str) -> list[str]:
        users = self._jobs.where(filter=FieldFilter("active_dataset_id", "==", dataset_id)).order_by("__name__").select([])
        return [found.id for found in self._query(users)]

    def delete_job(self, job_id: str) -> bool:
        """Forget the job, its events and its liveness, the record last: a deletion that was cut off goes on when repeated."""
        place = _doc_ref(self._jobs, job_id)
        with deadline(CALL_TIMEOUT_S):
            was_there = self._run_with_retry(lambda: self._get(place, "revision")).exists
            self._delete_events(place)
            self._delete([_doc_ref(self._heartbeats, job_id), place])
        return was_there

    # --- events ------------------------------------------------------------------------------------------------------

    def append_events(self, job_id: str, attempt: int, batch: EventBatch, now: datetime) -> int:
        place = _doc_ref(self._heartbeats, job_id)

        def step() -> tuple[int, bool]:
            tail = self._get(place)
            before = _load_heartbeat(tail)
            fresh, after = select_new_events(before, attempt, batch, now)
            if before and _is_redundant_heartbeat(before, after):
                return after.next_seq, False
            events = [SequencedEvent(seq=seq, at=reported.at, event=reported.event) for seq, reported in fresh]
            fitting = list(itertools.chain.from_iterable(itertools.islice(_split_into_chunks(events), CHUNKS_PER_COMMIT)))
            if len(fitting) < len(events):
                after = replace(after, next_seq=fitting[-1].seq + 1)
            writes = self._client.batch()
            cursor = self._add_events(writes, _doc_ref(self._jobs, job_id), attempt, _last_cursor(tail), fitting, now)
            self._set_if_unchanged(writes, tail, {"heartbeat": HEARTBEAT_ADAPTER.dump_json(after).decode(), "last_cursor": cursor})
            self._commit(writes)
            return after.next_seq, len(fitting) < len(events)

        with deadline(CALL_TIMEOUT_S):
            next_seq, more = self._run_with_retry(step)
            while more:
                next_seq, more = self._run_with_retry(step)
        return next_seq

    def list_events(self, job_id: str, after: int = 0, limit: int = 500) -> list[StoredEvent]:
        found: list[StoredEvent] = []
        with deadline(CALL_TIMEOUT_S):
            for pack in self._event_chunks(_doc_ref(self._jobs, job_id), _chunk_name(after), min(limit, CHUNKS_PER_READ)):
                found += [stored for stored in _load_chunk_events(pack) if stored.cursor > after]
                if len(found) >= limit:
                    break
        return found[:limit]

    def find_heartbeat(self, job_id: str) -> Heartbeat | None:
        return _load_heartbeat(self._run_with_retry(lambda: self._get(_doc_ref(self._heartbeats, job_id))))

    # --- datasets ----------------------------------------------------------------------------------------------------

    def create_dataset(self, dataset: Dataset) -> None:
        place = _doc_ref(self._datasets, dataset.processed_dataset_id)
        fields: Fields = {
            "record": dataset.model_dump_json(),
            "tenant_id": dataset.tenant_id,
            "created_at": _format_timestamp(dataset.created_at),
        }

        def step() -> None:
            stored = self._get(place)
            if stored.exists:
                if stored.to_dict() != fields:
                    raise Conflict(f"{dataset.processed_dataset_id} is there already")
                return
            batch = self._client.batch()
            self._set_if_unchanged(batch, stored, fields)
            self._commit(batch)

        self._run_with_retry(step)

    def find_dataset(self, dataset_id: str) -> Dataset | None:
        return self._find(_doc_ref(self._datasets, dataset_id), Dataset.load)

    def list_datasets(self, tenant_id: str, limit: int = 50, after: str | None = None) -> Page[Dataset]:
        asked = self._datasets.where(filter=FieldFilter("tenant_id", "==", tenant_id))
        return self._page(self._datasets, asked, limit, after, _load_dataset)

    def delete_dataset(self, dataset_id: str) -> bool:
        place = _doc_ref(self._datasets, dataset_id)
        with deadline(CALL_TIMEOUT_S):
            was_there = self._run_with_retry(lambda: self._get(place, "created_at")).exists
            self._delete([place])
        return was_there

    # --- the database ------------------------------------------------------------------------------------------------

    def ping(self) -> None:
        self._run_with_retry(lambda: self._get(self._jobs.document("ping"), "revision"))

    def close(self) -> None:
        self._client.close()

    def _run_with_retry(self, step: Callable[[], ReturnT]) -> ReturnT:
        """Take a step until it succeeds, is refused, or the caller's patience ends."""
        with deadline(CALL_TIMEOUT_S):
            for turn in itertools.count():
                try:
                    return step()
                except (PreconditionFailed, *AMBIGUOUS_ERRORS) as error:
                    pause_s = min(INITIAL_BACKOFF_S * 2**turn, MAX_BACKOFF_S) * random.uniform(0.5, 1)  # noqa: S311  # no secret
                    if remaining_s(CALL_TIMEOUT_S) - pause_s <= MIN_TIMEOUT_S:
                        raise self._translate_error(error) from error
                    time.sleep(pause_s)
                except google.GoogleAPICallError as error:
                    raise self._translate_error(error) from error
        raise AssertionError("a step ends, or is taken again")

    def _commit(self, batch: WriteBatch) -> None:
        """Carry out all the writes or none. Raises Overtaken, and NO_ANSWER, after which they may have been carried out."""
        try:
            batch.commit(retry=NO_RETRIES, timeout=remaining_s(RPC_TIMEOUT_S))
        except WRITE_CONFLICT_ERRORS as error:
            if _is_database_error(error):
                raise
            raise PreconditionFailed from error

    def _get(self, doc_ref: DocumentReference, *fields: str) -> Snapshot:
        return doc_ref.get(fields or None, retry=NO_RETRIES, timeout=remaining_s(RPC_TIMEOUT_S))

    def _get_all(self, doc_refs: Sequence[DocumentReference], *fields: str) -> list[Snapshot]:
        """The documents as they were at one moment, in the order of their places."""
        found = {
            one.id + one.reference.parent.id: one
            for one in self._client.get_all(list(doc_refs), fields, retry=NO_RETRIES, timeout=remaining_s(RPC_TIMEOUT_S))
        }
        return [found[place.id + place.parent.id] for place in doc_refs]

    def _query(self, query: Query) -> list[Snapshot]:
        return self._run_with_retry(lambda: list(query.get(retry=NO_RETRIES, timeout=remaining_s(RPC_TIMEOUT_S))))

    def _find(self, doc_ref: DocumentReference, load: Callable[[str], Record]) -> Record | None:
        found = self._run_with_retry(lambda: self._get(doc_ref, "record"))
        return load(found.get("record")) if found.exists else None

    def _page(
        self, rows: CollectionReference, query: Query, limit: int, after: str | None, read: Callable[[Snapshot], Record]
    ) -> Page[Record]:
        newest_first = _order_by_creation(query, Query.DESCENDING)
        if after:
            newest_first = newest_first.start_after(_cursor_position(after, rows))
        found = self._query(newest_first.limit(limit + 1))
        shown = found[:limit]
        next_cursor = encode_cursor(shown[-1].get("created_at"), shown[-1].id) if len(found) > limit else None
        return Page([read(one) for one in shown], next_cursor)

    def _oldest(self, work: str, limit: int) -> list[Job]:
        asked = self._jobs.where(filter=FieldFilter("work_state", "==", work)).select(["record"])
        return [Job.load(found.get("record")) for found in self._query(_order_by_creation(asked, Query.ASCENDING).limit(limit))]

    def _set_if_unchanged(self, batch: WriteBatch, stored: Snapshot, fields: Fields) -> None:
        """Write a document if it is still as it was read, or still not there. A field that is None is taken away."""
        if stored.exists:
            unchanged = self._client.write_option(last_update_time=stored.update_time)
            batch.update(stored.reference, {name: DELETE_FIELD if value is None else value for name, value in fields.items()}, unchanged)
        else:
            batch.create(stored.reference, _without_none(fields))

    def _delete(self, doc_refs: Iterable[DocumentReference]) -> None:
        batch = self._client.batch()
        for place in doc_refs:
            batch.delete(place)
        self._run_with_retry(lambda: self._commit(batch))

    # --- keys --------------------------------------------------------------------------------------------------------

    def _key_doc_ref(self, job: Job, idempotency: IdempotencyKey) -> DocumentReference:
        """A key may be any text; a document's name may not."""
        return self._idempotency_keys.document(hashlib.sha256(f"{job.tenant_id}/{idempotency.key}".encode()).hexdigest())

    def _find_idempotent_job(self, key: Snapshot, job: Job, idempotency: IdempotencyKey) -> Job | None:
        """The job made under the same key less than a day ago. Raises IdempotencyConflict.

        The age is looked at here, too: Firestore removes expired documents a day late.
        """
        if not key.exists or job.created_at - datetime.fromisoformat(key.get("created_at")) >= IDEMPOTENCY_TTL:
            return None
        if key.get("body_digest") != idempotency.body_digest:
            raise IdempotencyConflict(param="Idempotency-Key")
        stored = self._get(_doc_ref(self._jobs, key.get("job_id")), "record")
        return Job.load(stored.get("record")) if stored.exists else None

    # --- packs of events ---------------------------------------------------------------------------------------------

    def _add_events(
        self, batch: WriteBatch, job: DocumentReference, attempt: int, cursor: int, events: Sequence[SequencedEvent], now: datetime
    ) -> int:
        """Write the events behind a cursor; returns the cursor of the last."""
        for pack in _split_into_chunks(events):
            cursor += len(pack)
            fields = {"events": EVENTS_ADAPTER.dump_json(pack).decode(), "attempt": attempt, "expire_at": now + EVENTS_TTL}
            batch.set(job.collection("events").document(_chunk_name(cursor)), fields)
        return cursor

    def _event_chunks(self, job: DocumentReference, after: str, page_size: int) -> Iterator[Snapshot]:
        """Documents of events whose names come behind `after`."""
        events = job.collection("events")
        while True:
            behind = events.where(filter=FieldFilter("__name__", ">", events.document(after)))
            found = self._query(behind.order_by("__name__").limit(page_size))
            yield from found
            if len(found) < page_size:
                return
            after = found[-1].id

    def _delete_events(self, job: DocumentReference) -> None:
        events = job.collection("events")
        last = _chunk_name(0)
        while True:
            behind = events.where(filter=FieldFilter("__name__", ">", events.document(last)))  # what was deleted is not walked over again
            found = self._query(behind.order_by("__name__").select([]).limit(DELETES_PER_COMMIT))
            if not found:
                return
            self._delete(one.reference for one in found)
            last = found[-1].id

    # --- errors ------------------------------------------------------------------------------------------------------

    def _translate_error(self, error: Exception) -> TunesmithError:
        """What went wrong, and what an operator can do."""
        where = f"Firestore (project {self._project_id}, database {self._database})"
        match error:
            case PreconditionFailed():
                return Unavailable("the record is being changed by too many at once; try again")
            case google.Forbidden() if "SERVICE_DISABLED" in str(error) or "has not been used in project" in str(error):
                return Unavailable(
                    f"{where}: the API is not enabled", hint=f"gcloud services enable firestore.googleapis.com --project={self._project_id}"
                )
            case google.Forbidden() | google.Unauthorized():
                return Unavailable(
                    f"{where} refuses the service's account: it lacks the role roles/datastore.user", hint=self._grant_command()
                )
            case google.NotFound() if _is_database_error(error):
                return Unavailable(f"{where}: there is no such database", hint=self._create_database_command())
            case google.FailedPrecondition() if "index" in str(error):
                return Unavailable(
                    f"{where} lacks an index, or is still building it: {error.message}",
                    hint="infra/firestore.indexes.json names every index that is needed; `make deploy` creates them",
                )
            case google.FailedPrecondition() if _is_database_error(error):
                return Unavailable(
                    f"{where} is in Datastore mode; Tunesmith needs one in native mode", hint=self._create_database_command()
                )
            case google.InvalidArgument() if "longer than" in str(error) or "maximum allowed size" in str(error):
                return TooLarge(f"Firestore does not take a record of that size: {error.message}")
            case google.TooManyRequests():
                return Unavailable(f"{where}: a quota is used up: {error.message}", hint=self._quotas_url())
            case google.ClientError() if not isinstance(error, AMBIGUOUS_ERRORS):
                return Unavailable(f"{where} refuses what it was asked: {error}")
            case _:
                return Unavailable(f"{where} did not answer in time: {type(error).__name__}")

    def _grant_command(self) -> str:
        member = f"serviceAccount:tunesmith-api@{self._project_id}.iam.gserviceaccount.com"
        return f"gcloud projects add-iam-policy-binding {self._project_id} --member={member} --role=roles/datastore.user"

    def _create_database_command(self) -> str:
        which = f"--project={self._project_id} --database='{self._database}'"
        return f"gcloud firestore databases create {which} --type=firestore-native --location=REGION"

    def _quotas_url(self) -> str:
        return f"https://console.cloud.google.com/iam-admin/quotas?service=firestore.googleapis.com&project={self._project_id}"


def build_job_fields(job: Job, writes: list[str]) -> Fields:
    """A job's document. `writes` are the ids of what was last written to it, the newest last. A field that is None is left out."""
    config = job.training_config
    summary = {
        "job_name": job.job_name,
        "base_model_id": config.base_model_id,
        "status": str(job.status),
        "modality": config.modality,
        "trainer_type": config.trainer_type,
        "project_id": job.project_id,
    }
    return {
        "record": job.model_dump_json(),
        "revision": job.revision,
        "writes": writes,
        "created_at": _format_timestamp(job.created_at),
        "summary": summary,
        "list_filters": {"tenant_id": job.tenant_id} | _filter_values(job.tenant_id, summary),
        "work_state": "queued" if job.status is Status.QUEUED else "active" if job.status.is_active else None,
        "active_dataset_id": None if job.status.is_final else job.processed_dataset_id,
    }


class _Client(Client):
    """Google's client over a channel that is back a moment after the network is."""

    # The library offers no way to say how long gRPC may wait between attempts to connect.
    def _firestore_api_helper(self, transport: Any, client_class: Any, client_module: Any) -> Any:  # noqa: ANN401, ARG002  # the library's own
        if self._firestore_api_internal is None:
            options = [("grpc.keepalive_time_ms", 30_000), ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS), *NO_MESSAGE_LIMIT]
            if self._emulator_host is not None:
                channel = grpc.insecure_channel(self._emulator_host, options)
            else:
                channel = transport.create_channel(self._target, credentials=self._credentials, options=options)
            self._firestore_api_internal = client_class(transport=transport(host=self._target, channel=channel))
        return self._firestore_api_internal

    def open(self) -> None:
        """Make the channel, before there are threads that would each make one."""
        assert self._firestore_api

    def close(self) -> None:
        """Let go of the channel."""
        self._firestore_api.transport.close()


def _connect(project_id: str, database: str) -> _Client:
    try:
        client = _Client(project=project_id, database=database)
    except DefaultCredentialsError as error:
        raise Unavailable(
            "there are no Google credentials for Firestore here",
            hint="on Cloud Run the service account is found by itself; elsewhere: gcloud auth application-default login",
        ) from error
    client.open()
    return client


def _is_database_error(error: google.GoogleAPICallError) -> bool:
    """Whether something is wrong with the database as a whole, not with a document."""
    return "does not exist for project" in str(error) or "Datastore Mode" in str(error)


def _doc_ref(collection: CollectionReference, record_id: str) -> DocumentReference:
    """The document of a record. An id that no record can have leads to a document that is never there."""
    if SAFE_ID.fullmatch(record_id):
        return collection.document(record_id)
    return collection.document("-" + hashlib.sha256(record_id.encode(errors="replace")).hexdigest())


def _filter_values(tenant_id: str, values: Mapping[str, str | None]) -> dict[str, str]:
    """What a tenant's list is filtered by. The tenant is in each value, so that merged indexes hold nobody else's jobs."""
    return {name: f"{tenant_id}/{value}" for name in FILTERS if (value := values.get(name)) is not None}


def _key_fields(job: Job, idempotency: IdempotencyKey) -> Fields:
    return {
        "body_digest": idempotency.body_digest,
        "job_id": job.job_id,
        "created_at": _format_timestamp(job.created_at),
        "expire_at": job.created_at + IDEMPOTENCY_TTL,
    }


def _order_by_creation(query: Query, direction: str) -> Query:
    return query.order_by("created_at", direction=direction).order_by("__name__", direction=direction)


def _cursor_position(cursor: str, rows: CollectionReference) -> dict[str, object]:
    """The place of a cursor, as Firestore wants it. It came from outside: whatever cannot be a place is refused."""
    created_at, row_id = decode_cursor(cursor)
    if not (SAFE_ID.fullmatch(row_id) and created_at.isascii()):
        raise InvalidRequest("the cursor is not one that this API gave out", hint="start again without it", param="cursor")
    return {"created_at": created_at, "__name__": rows.document(row_id)}


def _load_summary(snapshot: Snapshot) -> JobSummary:
    shown: dict[str, Any] = snapshot.get("summary")
    return JobSummary(
        job_id=snapshot.id, created_at=datetime.fromisoformat(snapshot.get("created_at")), **shown | {"status": Status(shown["status"])}
    )


def _load_dataset(snapshot: Snapshot) -> Dataset:
    return Dataset.load(snapshot.get("record"))


def _load_heartbeat(snapshot: Snapshot) -> Heartbeat | None:
    text = _fields(snapshot).get("heartbeat")
    return HEARTBEAT_ADAPTER.validate_json(text) if text else None


def _last_cursor(snapshot: Snapshot) -> int:
    return _fields(snapshot).get("last_cursor", 0)


def _is_redundant_heartbeat(before: Heartbeat, after: Heartbeat) -> bool:
    """Whether a report of the same attempt says only that it still lives, and that was known: not worth a write."""
    return (
        replace(after, received_at=before.received_at) == before and after.received_at - before.received_at < MIN_HEARTBEAT_WRITE_INTERVAL
    )


def _split_into_chunks(events: Sequence[SequencedEvent]) -> Iterator[list[SequencedEvent]]:
    """The events in portions that fit into a document."""
    pack: list[SequencedEvent] = []
    size_bytes = 0
    for event in events:
        event_bytes = len(event.model_dump_json().encode()) + 1
        if pack and size_bytes + event_bytes > MAX_CHUNK_BYTES:
            yield pack
            pack, size_bytes = [], 0
        pack.append(event)
        size_bytes += event_bytes
    if pack:
        yield pack


def _chunk_name(cursor: int) -> str:
    """A name whose order as text is the order of cursors."""
    return f"{min(max(cursor, 0), 10**18):019d}"


def _load_chunk_events(chunk: Snapshot) -> list[StoredEvent]:
    events = EVENTS_ADAPTER.validate_json(chunk.get("events"))
    first = int(chunk.id) - len(events) + 1
    return [StoredEvent(cursor, chunk.get("attempt"), kept.seq, kept.at, kept.event) for cursor, kept in enumerate(events, start=first)]


def _fields(document: Snapshot) -> dict[str, Any]:
    return document.to_dict() or {}


def _without_none(fields: Fields) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _format_timestamp(moment: datetime) -> str:
    """A form whose order as text is its order in time."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
