"""The Firestore store beyond the contract: lost responses, concurrent commits, indexes, limits and errors."""

import itertools
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.api_core import exceptions as google
from google.cloud.firestore import DELETE_FIELD
from google.cloud.firestore_v1.types import StructuredQuery

from schema.dataset import DatasetShare
from schema.events import EventBatch, MetricsLogged, ReportedEvent, StatusChanged, WarningRaised
from schema.job import Job, Status
from service.adapters.access.firestore import FirestoreAccessStore
from service.adapters.jobstores.cursors import encode_cursor
from service.adapters.jobstores.firestore import job_lists
from service.adapters.jobstores.firestore.documents import FILTERS
from service.adapters.jobstores.firestore.events import EVENTS_TTL
from service.adapters.jobstores.firestore.store import FirestoreJobStore
from service.core.access.audit import RETENTION
from service.core.access.ports import AuditQuery
from service.core.errors import Conflict, IdempotencyConflict, InvalidRequest, StaleRevision, Unavailable
from service.core.job_lists import JobQuery
from service.core.job_store_rules import IDEMPOTENCY_TTL
from service.core.ports import IdempotencyKey
from storage.deadline import deadline
from tests.contract.test_access_store import make_entry, make_key
from tests.factories import START, make_attempt, make_dataset, make_job

INDEXES = json.loads((Path(__file__).parents[2] / "infra/firestore.indexes.json").read_text())
STATUS_EVENT = StatusChanged(status=Status.PREPARING, attempt=1)

Rpc = Callable[..., Any]


@pytest.fixture
def store(firestore_project: str) -> Iterator[FirestoreJobStore]:
    store = FirestoreJobStore(project_id=firestore_project)
    yield store
    store.close()


class RpcInterceptor:
    """Replaces one RPC of Google's client, records its requests and injects faults."""

    def __init__(self, store: FirestoreJobStore | FirestoreAccessStore, rpc: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._api = store._database.client._firestore_api  # pyright: ignore[reportPrivateUsage]  # below the client's own logic
        self._send: Rpc = getattr(self._api, rpc)
        self.requests: list[Any] = []
        self._faults: list[Callable[[Callable[[], Any]], Any]] = []
        monkeypatch.setattr(self._api, rpc, self._intercept)

    def set_faults(self, *faults: Callable[[Callable[[], Any]], Any]) -> None:
        """The faults of the next requests, one each."""
        self._faults = list(faults)

    def _intercept(self, *args: Any, **kwargs: Any) -> Any:
        self.requests.append(kwargs["request"])
        send = lambda: self._send(*args, **kwargs)  # noqa: E731
        return self._faults.pop(0)(send) if self._faults else send()


@pytest.fixture
def commits(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch) -> RpcInterceptor:
    return RpcInterceptor(store, "commit", monkeypatch)


def lose_response(send: Callable[[], Any]) -> None:
    """Firestore carries out the request, and its response is lost."""
    send()
    raise google.ServiceUnavailable("Socket closed")


def lose_request(send: Callable[[], Any]) -> None:
    """The request never reaches Firestore."""
    raise google.DeadlineExceeded("Deadline Exceeded")


def fail_with(error: google.GoogleAPICallError) -> Callable[[Callable[[], Any]], None]:
    def refuse(_: Callable[[], Any]) -> None:
        raise error

    return refuse


def make_batch(first_seq: int, count: int, message: str = "x") -> EventBatch:
    events = [ReportedEvent(at=START, event=WarningRaised(code="c", message=message)) for _ in range(count)]
    return EventBatch(first_seq=first_seq, events=events)


# --- lost responses --------------------------------------------------------------------------------------------------

parametrize_loss = pytest.mark.parametrize("loss", [lose_response, lose_request])


@parametrize_loss
@pytest.mark.parametrize("key", [None, IdempotencyKey("k", "digest")], ids=["no key", "key"])
def test_job_is_created_once_after_lost_rpc(
    store: FirestoreJobStore, commits: RpcInterceptor, loss: Callable[..., None], key: IdempotencyKey | None
) -> None:
    commits.set_faults(loss)
    assert store.create_job(make_job(), key) == make_job()
    assert [row.job_id for row in store.list_jobs(JobQuery("local")).rows] == ["job-1"]


@parametrize_loss
def test_update_and_event_are_stored_once_after_lost_rpc(
    store: FirestoreJobStore, commits: RpcInterceptor, loss: Callable[..., None]
) -> None:
    job = store.create_job(make_job())
    commits.set_faults(loss, loss)
    updated = store.replace_job(job, [STATUS_EVENT])
    assert updated.revision == 1
    assert store.find_job("job-1") == updated
    assert [stored.event for stored in store.list_events("job-1")] == [STATUS_EVENT]


def test_update_with_lost_response_is_recognized_after_later_updates(store: FirestoreJobStore, commits: RpcInterceptor) -> None:
    job = store.create_job(make_job())

    def lose_response_after_other_updates(send: Callable[[], Any]) -> None:
        send()
        for _ in range(3):
            store.replace_job(store.find_job("job-1") or job)
        raise google.ServiceUnavailable("Socket closed")

    commits.set_faults(lose_response_after_other_updates)
    assert store.replace_job(job).revision == 1
    assert (store.find_job("job-1") or job).revision == 4


def test_lost_update_after_concurrent_update_is_stale(store: FirestoreJobStore, commits: RpcInterceptor) -> None:
    job = store.create_job(make_job())

    def lose_request_after_other_update(_: Callable[[], Any]) -> None:
        store.replace_job(job.model_copy(update={"job_name": "another"}))
        raise google.ServiceUnavailable("Socket closed")

    commits.set_faults(lose_request_after_other_update)
    with pytest.raises(StaleRevision):
        store.replace_job(job, [STATUS_EVENT])
    assert store.list_events("job-1") == []


def test_late_duplicate_request_changes_nothing(store: FirestoreJobStore, commits: RpcInterceptor) -> None:
    job = store.create_job(make_job())
    delayed: list[Callable[[], Any]] = []

    def delay_request(send: Callable[[], Any]) -> None:
        delayed.append(send)
        raise google.DeadlineExceeded("Deadline Exceeded")

    commits.set_faults(delay_request)
    store.replace_job(job, [STATUS_EVENT])
    commits.set_faults(delay_request)
    store.append_events("job-1", 1, make_batch(0, 2), START)
    for send in delayed:
        with pytest.raises(google.FailedPrecondition):
            send()
    assert [(stored.attempt, stored.seq) for stored in store.list_events("job-1")] == [(0, 1), (1, 0), (1, 1)]


@parametrize_loss
def test_batch_is_stored_once_after_lost_rpc(store: FirestoreJobStore, commits: RpcInterceptor, loss: Callable[..., None]) -> None:
    commits.set_faults(loss, loss)
    assert store.append_events("job-1", 1, make_batch(0, 3), START) == 3
    assert [stored.seq for stored in store.list_events("job-1")] == [0, 1, 2]


@parametrize_loss
def test_dataset_create_and_delete_survive_lost_rpc(store: FirestoreJobStore, commits: RpcInterceptor, loss: Callable[..., None]) -> None:
    commits.set_faults(loss)
    store.create_dataset(make_dataset())
    commits.set_faults(loss)
    assert store.delete_dataset("dataset_1")
    assert store.find_dataset("dataset_1") is None


@parametrize_loss
def test_read_is_retried(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch, loss: Callable[..., None]) -> None:
    store.create_job(make_job())
    for rpc, read in (("batch_get_documents", lambda: store.find_job("job-1")), ("run_query", lambda: store.list_queued_jobs(None, 1)[0])):
        RpcInterceptor(store, rpc, monkeypatch).set_faults(loss, loss)
        assert read() == make_job()


def test_interrupted_query_stream_is_retried(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        store.create_job(make_job(f"job-{n}"))

    def break_stream(send: Callable[[], Any]) -> Iterator[Any]:
        yield next(iter(send()))
        raise google.ServiceUnavailable("Socket closed")

    RpcInterceptor(store, "run_query", monkeypatch).set_faults(break_stream)
    assert [job.job_id for job in store.list_queued_jobs(None, 10)] == ["job-0", "job-1", "job-2"]


@pytest.mark.parametrize("contended", [google.Aborted("Transaction lock timeout."), google.FailedPrecondition("stored version")])
def test_contended_update_is_retried(store: FirestoreJobStore, commits: RpcInterceptor, contended: google.GoogleAPICallError) -> None:
    job = store.create_job(make_job())
    commits.set_faults(fail_with(contended))
    assert store.replace_job(job).revision == 1


# --- races -----------------------------------------------------------------------------------------------------------


def test_concurrent_idempotency_key_returns_other_job(store: FirestoreJobStore, commits: RpcInterceptor) -> None:
    def after_another(send: Callable[[], Any]) -> Any:
        store.create_job(make_job("job-2"), IdempotencyKey("k", "digest"))
        return send()

    commits.set_faults(after_another)
    assert store.create_job(make_job("job-1"), IdempotencyKey("k", "digest")).job_id == "job-2"
    assert store.find_job("job-1") is None


def test_concurrent_idempotency_key_with_other_body_conflicts(store: FirestoreJobStore, commits: RpcInterceptor) -> None:
    def after_another(send: Callable[[], Any]) -> Any:
        store.create_job(make_job("job-2"), IdempotencyKey("k", "another"))
        return send()

    commits.set_faults(after_another)
    with pytest.raises(IdempotencyConflict):
        store.create_job(make_job("job-1"), IdempotencyKey("k", "digest"))
    assert store.find_job("job-1") is None


def test_conflicting_job_does_not_reserve_key(store: FirestoreJobStore) -> None:
    store.create_job(make_job("job-1"))
    with pytest.raises(Conflict):
        store.create_job(make_job("job-1"), IdempotencyKey("k", "digest"))
    assert store.create_job(make_job("job-2"), IdempotencyKey("k", "another")).job_id == "job-2"


def test_concurrent_update_and_batch_are_both_stored(store: FirestoreJobStore, commits: RpcInterceptor) -> None:
    job = store.create_job(make_job())

    def after_a_report(send: Callable[[], Any]) -> Any:
        store.append_events("job-1", 1, make_batch(0, 2), START)
        return send()

    commits.set_faults(after_a_report)
    assert store.replace_job(job, [STATUS_EVENT]).revision == 1
    assert [(stored.attempt, stored.seq) for stored in store.list_events("job-1")] == [(1, 0), (1, 1), (0, 1)]
    heartbeat = store.find_heartbeat("job-1")
    assert heartbeat is not None
    assert heartbeat.next_seq == 2


# --- number and size of writes ---------------------------------------------------------------------------------------


def test_batch_is_one_commit_of_two_documents(store: FirestoreJobStore, commits: RpcInterceptor) -> None:
    store.append_events("job-1", 1, make_batch(0, 100), START)
    assert [len(request["writes"]) for request in commits.requests] == [2]


def test_heartbeat_soon_after_another_is_not_written(store: FirestoreJobStore, commits: RpcInterceptor) -> None:
    store.append_events("job-1", 1, make_batch(0, 2), START)
    assert store.append_events("job-1", 1, make_batch(2, 0), START + timedelta(seconds=4.9)) == 2
    assert len(commits.requests) == 1
    assert store.append_events("job-1", 1, make_batch(2, 0), START + timedelta(seconds=5)) == 2
    assert len(commits.requests) == 2


def test_phase_change_is_written_immediately(store: FirestoreJobStore) -> None:
    store.append_events("job-1", 1, make_batch(0, 2), START)
    store.append_events("job-1", 1, EventBatch(first_seq=2, phase="merging"), START)
    heartbeat = store.find_heartbeat("job-1")
    assert heartbeat is not None
    assert heartbeat.phase == "merging"


def test_oversized_batch_is_split_into_commits(store: FirestoreJobStore, commits: RpcInterceptor) -> None:
    commits.set_faults(lambda send: send(), lose_response)
    assert store.append_events("job-1", 1, make_batch(0, 20, "ж" * 200_000), START) == 20
    assert [stored.seq for stored in store.list_events("job-1")] == list(range(20))


def test_interrupted_deletion_resumes_on_retry(store: FirestoreJobStore, commits: RpcInterceptor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.adapters.jobstores.firestore.events.DELETES_PER_COMMIT", 3)
    store.create_job(make_job())
    for seq in range(8):
        store.append_events("job-1", 1, make_batch(seq, 1), START)
    commits.set_faults(lambda send: send(), fail_with(google.PermissionDenied("gone for a moment")))
    with pytest.raises(Unavailable):
        store.delete_job("job-1")
    assert store.find_job("job-1") is not None
    assert len(store.list_events("job-1")) == 5
    assert store.delete_job("job-1")
    assert store.list_events("job-1") == []
    assert store.find_job("job-1") is None


# --- error messages --------------------------------------------------------------------------------------------------


NO_INDEX = google.FailedPrecondition("The query requires an index. You can create it here: …")
NO_DATABASE = google.NotFound("The database (default) does not exist for project p Please visit …")
OTHER_MODE = google.FailedPrecondition("The Cloud Firestore API is not available for Firestore in Datastore Mode database p.")
NO_ROLE = google.PermissionDenied("Missing or insufficient permissions.")
NO_API = google.PermissionDenied("Cloud Firestore API has not been used in project p")


@pytest.mark.parametrize(
    ("rpc", "error", "message", "hint"),
    [
        *(
            (rpc, error, message, hint)
            for rpc in ("run_query", "batch_get_documents", "commit")
            for error, message, hint in (
                (NO_ROLE, "roles/datastore.user", "gcloud projects add-iam-policy-binding"),
                (NO_API, "not enabled", "gcloud services enable firestore"),
                (NO_DATABASE, "no such database", "gcloud firestore databases create"),
                (OTHER_MODE, "native mode", "--type=firestore-native"),
                (google.InvalidArgument("what?"), "refused the request", ""),
            )
        ),
        ("run_query", NO_INDEX, "lacks an index", "firestore.indexes.json"),
    ],
)
def test_firestore_error_names_operator_fix(
    store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch, rpc: str, error: google.GoogleAPICallError, message: str, hint: str
) -> None:
    calls = {
        "run_query": lambda: store.list_queued_jobs(None, 1),
        "batch_get_documents": store.ping,
        "commit": lambda: store.create_dataset(make_dataset()),
    }
    RpcInterceptor(store, rpc, monkeypatch).set_faults(fail_with(error))
    with pytest.raises(Unavailable, match=message) as excinfo:
        calls[rpc]()
    assert hint in excinfo.value.hint


@pytest.mark.parametrize("error", [google.ServiceUnavailable("x"), google.ResourceExhausted("Quota exceeded"), google.Aborted("x")])
def test_persistent_error_is_unavailable_within_deadline(
    store: FirestoreJobStore, commits: RpcInterceptor, error: google.GoogleAPICallError
) -> None:
    commits.set_faults(*[fail_with(error)] * 1000)
    with deadline(0.2), pytest.raises(Unavailable):
        store.create_job(make_job())


@pytest.mark.parametrize("is_listening", [True, False], ids=["silent", "closed"])
def test_unresponsive_firestore_is_unavailable_within_deadline(monkeypatch: pytest.MonkeyPatch, is_listening: bool) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        if not is_listening:
            silent.close()
        store = FirestoreJobStore(project_id="p")
        with deadline(0.3), pytest.raises(Unavailable, match=r"Firestore .* did not answer in time"):
            store.ping()
        store.close()


@pytest.mark.parametrize("position", [("2026-01-01", "a/b"), ("2026-01-01", ""), ("\ud800", "x"), ("2026-01-01", "__x__")])
def test_malformed_cursor_is_rejected(store: FirestoreJobStore, position: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        store.list_jobs(JobQuery("local", after=encode_cursor(*position)))


# --- indexes: the emulator needs none, so only these tests find a missing one ----------------------------------------


def iter_filtered_queries() -> Iterator[JobQuery]:
    """Every combination of the filters that Firestore matches, without and with a term."""
    values: dict[str, Any] = {
        "statuses": (Status.FAILED,),
        "project_id": "p",
        "modality": "text",
        "trainer_type": "sft",
        "created_by": "local",
        "metadata": (("team", "search"),),
    }
    assert len(values) == len(FILTERS) + 1
    for count in range(len(values) + 1):
        for names in itertools.combinations(values, count):
            yield JobQuery("local", **{name: values[name] for name in names})


def list_with_every_filter(store: FirestoreJobStore) -> None:
    """List jobs with every combination of filters, of the first page and of a later one."""
    later = {"after": encode_cursor("2026-01-01", "x"), "created_from": START, "created_before": START + timedelta(days=1)}
    several = (Status.FAILED, Status.QUEUED)
    for query in iter_filtered_queries():
        store.list_jobs(query)
        store.list_jobs(replace(query, **later))
        store.list_jobs(replace(query, statuses=several if query.statuses else (), search="a job-1"))


def call_every_method(store: FirestoreJobStore) -> None:
    """Call every method, except for lists of jobs."""
    shares = tuple(DatasetShare(processed_dataset_id=dataset_id, weight=1.0) for dataset_id in ("dataset_1", "dataset_2"))
    job = make_job(project_id="p", datasets=shares)
    store.create_job(job, IdempotencyKey("k", "digest"))
    store.replace_job(job, [STATUS_EVENT])
    store.append_events("job-1", 1, make_batch(0, 1), START)
    store.create_dataset(make_dataset())
    cursor = encode_cursor("2026-01-01", "x")
    for after in (None, cursor):
        store.list_datasets("local", after=after)
    store.list_queued_jobs(None, 1)
    store.list_active_jobs(None, 1)
    store.list_jobs_using_dataset("dataset_1")
    store.list_events("job-1")
    store.find_heartbeat("job-1")
    store.ping()


class RecordedQuery:
    """A query as sent: its collection, equality fields, range fields and order."""

    def __init__(self, query: StructuredQuery, *, is_counted: bool = False) -> None:
        assert len(query.from_) == 1
        assert not query.from_[0].all_descendants
        assert is_counted or query.limit or query.order_by[0].field.field_path == "__name__"
        self.collection = query.from_[0].collection_id
        filters = list(query.where.composite_filter.filters) or [query.where]
        field_filters = [part.field_filter for part in filters if part.field_filter.field.field_path]
        conditions = [(field_filter.field.field_path, field_filter.op.name) for field_filter in field_filters]
        self.array_fields = {path for path, op in conditions if op.startswith("ARRAY_CONTAINS")}
        self.equality_fields = {path for path, op in conditions if op in ("EQUAL", "IN")} | self.array_fields
        self.range_fields = {path for path, _ in conditions} - self.equality_fields
        self.order_by = [(order.field.field_path, order.direction.name) for order in query.order_by]

    def __repr__(self) -> str:
        return f"{self.collection}: {sorted(self.equality_fields)} {sorted(self.range_fields)} by {self.order_by}"

    @property
    def indexed_order(self) -> list[tuple[str, str]]:
        """The order without the document's name: every index ends with the name, in the direction of the field before."""
        if self.order_by[-1][0] != "__name__":
            return self.order_by
        assert len(self.order_by) == 1 or self.order_by[-1][1] == self.order_by[-2][1]
        return self.order_by[:-1]

    def find_indexes(self) -> list[dict[str, Any]] | None:
        """The indexes in the file that serve the query; empty when it needs none, None when one is missing.

        Firestore's rule: a composite index serves its equalities and then its order; several are merged when each has one of the
        equalities and all have the same order.
        """
        if self.range_fields - {"__name__", self.order_by[0][0]}:
            return None
        if not self.indexed_order:
            indexed = [has_single_field_index(self.collection, path, is_array=path in self.array_fields) for path in self.equality_fields]
            return [] if all(indexed) and len(indexed) < 2 else None
        needed = [[(path, "CONTAINS" if path in self.array_fields else "ASCENDING"), *self.indexed_order] for path in self.equality_fields]
        indexes = [index for index in INDEXES["indexes"] if index["collectionGroup"] == self.collection and index_keys(index) in needed]
        return indexes if len(indexes) == len(needed) else None


def index_keys(index: dict[str, Any]) -> list[tuple[str, str]]:
    assert index["queryScope"] == "COLLECTION"
    return [(field["fieldPath"], field.get("order") or field["arrayConfig"]) for field in index["fields"]]


def has_single_field_index(collection: str, path: str, *, is_array: bool = False) -> bool:
    """Whether the field has a single-field index: it has one unless the file excludes it or the map that contains it."""
    overrides = {(override["collectionGroup"], override["fieldPath"]): override["indexes"] for override in INDEXES["fieldOverrides"]}
    indexes = overrides.get((collection, path), overrides.get((collection, path.partition(".")[0])))
    kind = {"arrayConfig": "CONTAINS"} if is_array else {"order": "ASCENDING"}
    return indexes is None or kind | {"queryScope": "COLLECTION"} in indexes


def test_queries_and_indexes_match(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    interceptor = RpcInterceptor(store, "run_query", monkeypatch)
    call_every_method(store)
    list_with_every_filter(store)
    store.delete_job("job-1")
    queries = [RecordedQuery(request["structured_query"]) for request in interceptor.requests]
    assert len({frozenset(query.equality_fields) for query in queries if query.collection == "jobs"}) == 2 ** (len(FILTERS) + 1) + 4
    used: list[dict[str, Any]] = []
    for query in queries:
        indexes = query.find_indexes()
        assert indexes is not None, f"no index for {query}"
        used += indexes
    others = ("usage", "api_keys", "audit")  # the two tests below
    assert [index for index in INDEXES["indexes"] if index not in used and index["collectionGroup"] not in others] == []


def test_queries_of_keys_and_audit_entries_match_indexes(firestore_project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FirestoreAccessStore(project_id=firestore_project)
    interceptor = RpcInterceptor(store, "run_query", monkeypatch)
    store.list_keys("local")
    for tenant_id, subject, action in itertools.product((None, "local"), (None, "s"), (None, "a")):
        store.list_audit_entries(AuditQuery(tenant_id, subject=subject, action=action))
    store.close()
    found = [RecordedQuery(request["structured_query"]).find_indexes() for request in interceptor.requests]
    assert None not in found
    used = [index for indexes in found for index in indexes or ()]
    assert [index for index in INDEXES["indexes"] if index["collectionGroup"] in ("api_keys", "audit") and index not in used] == []


def test_sums_and_counts_match_indexes(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum is served by an index of the filter and the field, a count by that of the query that it counts."""
    interceptor = RpcInterceptor(store, "run_aggregation_query", monkeypatch)
    store.count_jobs("local", "queued")
    store.count_jobs("local", "active")
    store.sum_usage("local", "2026-01")
    needed: list[list[tuple[str, str]]] = []
    for request in interceptor.requests:
        aggregation = request["structured_aggregation_query"]
        query, [wanted] = aggregation.structured_query, aggregation.aggregations
        order = [(each.field.field_path, each.direction.name) for each in query.order_by]
        summed = [(wanted.sum.field.field_path, "ASCENDING")] if wanted.sum.field.field_path else []
        needed.append([(query.where.field_filter.field.field_path, "ASCENDING"), *order, *summed])
    listed = [index_keys(index) for index in INDEXES["indexes"]]
    assert [keys for keys in needed if keys not in listed] == []
    assert [keys for keys in listed if keys[0][0] == "scope" and keys not in needed] == []
    assert len(needed) == 5


def test_counts_by_status_match_indexes(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Firestore counts what it can select itself: one count for each status."""
    counts = RpcInterceptor(store, "run_aggregation_query", monkeypatch)
    reads = RpcInterceptor(store, "run_query", monkeypatch)
    store.count_jobs_by_status(JobQuery("local"))
    store.count_jobs_by_status(JobQuery("local", project_id="p", created_by="s", metadata=(("team", "search"),), created_from=START))
    counted = [request["structured_aggregation_query"].structured_query for request in counts.requests]
    assert len(counted) == 2 * len(Status)
    assert all(RecordedQuery(query, is_counted=True).find_indexes() for query in counted)
    assert reads.requests == []


def test_page_reads_heartbeats_once_and_none_of_jobs_without_attempts(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(4):
        attempts = (make_attempt(),) if n < 2 else ()
        store.create_job(make_job(f"job-{n}", attempts=attempts, created_at=START + timedelta(seconds=n)))
        store.append_events(f"job-{n}", 1, make_batch(0, 1), START)
    reads = RpcInterceptor(store, "batch_get_documents", monkeypatch)
    rows = store.list_jobs(JobQuery("local")).rows
    assert [row.heartbeat is not None for row in rows] == [False, False, True, True]
    assert [len(request["documents"]) for request in reads.requests] == [2]
    reads.requests.clear()
    store.list_jobs(JobQuery("local", created_from=START + timedelta(seconds=2)))
    assert reads.requests == []


def test_search_reads_a_bounded_number_of_documents_and_its_cursor_goes_on(
    store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_lists, "MAX_SCANNED", 4)
    monkeypatch.setattr(job_lists, "SCANNED_PER_READ", 2)
    for n in range(11):
        name = "red-apple" if n == 0 else "red pear"  # the oldest
        store.create_job(make_job(f"job-{n:02}", job_name=name, created_at=START + timedelta(seconds=n)))
    reads = RpcInterceptor(store, "run_query", monkeypatch)
    pages: list[list[str]] = []
    cursor = None
    while cursor or not pages:
        page = store.list_jobs(JobQuery("local", limit=1, search="-", after=cursor))  # punctuation is in no term
        pages.append([row.job_id for row in page.rows])
        cursor = page.next_cursor
    assert pages == [[], [], ["job-00"]]
    assert sum(request["structured_query"].limit for request in reads.requests) <= 3 * (4 + 2)


def test_search_finds_beginnings_of_words(store: FirestoreJobStore) -> None:
    store.create_job(make_job(job_name="Red apples of Bordeaux-in-an-unusually-long-name"))

    def is_found(search: str) -> bool:
        return bool(store.list_jobs(JobQuery("local", search=search)).rows)

    assert all(is_found(search) for search in ("r", "APP", "red apples", "d apple", "unusually-long-name", "bordeaux-in", "unusually"))
    assert not any(is_found(search) for search in ("pples", "ordeaux", "red pears"))


def test_count_of_a_search_reads_a_bounded_number_of_documents(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_lists, "MAX_COUNTED", 2)
    for n in range(3):
        store.create_job(make_job(f"job-{n}", job_name="pear" if n else "apple"))
    assert store.count_jobs_by_status(JobQuery("local", search="pear")) == {Status.QUEUED: 2}
    store.create_job(make_job("job-4", job_name="pear"))
    assert store.count_jobs_by_status(JobQuery("local", search="pear")) is None
    assert store.count_jobs_by_status(JobQuery("local")) is not None


def test_job_of_an_earlier_version_is_listed(store: FirestoreJobStore) -> None:
    """Its summary is a map of fewer fields, and it has no search terms."""
    store.create_job(make_job(project_id="p", created_by="someone"))
    document = store._database.client.document("jobs/job-1")  # pyright: ignore[reportPrivateUsage]
    summary = {
        "job_name": "a job",
        "base_model_id": "google/gemma-3-270m",
        "status": "queued",
        "modality": "text",
        "trainer_type": "sft",
        "project_id": "p",
        "cost": '{"gpu_seconds":3.0}',
    }
    document.update({"summary": summary, "search_terms": DELETE_FIELD, "list_filters.created_by": DELETE_FIELD})
    [row] = store.list_jobs(JobQuery("local", project_id="p")).rows
    assert (row.summary.job_name, row.summary.created_by, row.summary.cost.gpu_seconds) == ("a job", None, 3.0)
    assert store.list_jobs(JobQuery("local", created_by="someone")).rows == []
    store.replace_job(make_job(project_id="p", created_by="someone"))
    assert [row.job_id for row in store.list_jobs(JobQuery("local", created_by="someone", search="a job")).rows] == ["job-1"]


def test_query_without_index_is_detected() -> None:
    query = StructuredQuery(
        {
            "from_": [{"collection_id": "jobs"}],
            "where": {"field_filter": {"field": {"field_path": "list_filters.status"}, "op": "EQUAL", "value": {"string_value": "x"}}},
            "order_by": [{"field": {"field_path": "created_at"}, "direction": "ASCENDING"}],
            "limit": 1,
        }
    )
    assert RecordedQuery(query).find_indexes() is None


FIELDS_OF_EARLIER_VERSIONS = {("jobs", "work_state")}


@pytest.mark.parametrize(
    ("state", "job"), [("queued", make_job()), ("active", make_job(status=Status.TRAINING, attempts=(make_attempt(),)))]
)
def test_open_job_of_an_earlier_version_is_found_after_an_upgrade(firestore_project: str, state: str, job: Job) -> None:
    """Its document has `work_state`, a text, and is in no list of work."""
    before = FirestoreJobStore(project_id=firestore_project)
    before.create_job(job)
    document = before._database.client.document(f"jobs/{job.job_id}")  # pyright: ignore[reportPrivateUsage]
    document.update({"work_state": state, "work_lists": DELETE_FIELD})
    store = FirestoreJobStore(project_id=firestore_project)
    listed = store.list_queued_jobs("fake", 10) if state == "queued" else store.list_active_jobs("fake", 10)
    assert listed == [job]
    assert "work_state" not in document.get().to_dict()
    before.close()
    store.close()


def fill_access_store(project: str) -> None:
    """Store a key and an entry of the audit log."""
    access_store = FirestoreAccessStore(project_id=project)
    access_store.create_key(make_key())
    access_store.append_audit_entries([make_entry(0)])
    access_store.close()


def test_every_field_has_index_override(store: FirestoreJobStore, firestore_project: str) -> None:
    call_every_method(store)
    fill_access_store(firestore_project)
    overrides = {(override["collectionGroup"], override["fieldPath"]) for override in INDEXES["fieldOverrides"]}
    client = store._database.client  # pyright: ignore[reportPrivateUsage]
    stored = {
        (document.reference.parent.id, name)
        for collection in [*client.collections(), client.collection("jobs/job-1/events")]
        for document in collection.stream()
        for name in document.to_dict()
    }
    assert stored | FIELDS_OF_EARLIER_VERSIONS == overrides


def test_expiring_documents_have_ttl_timestamp(store: FirestoreJobStore, firestore_project: str) -> None:
    call_every_method(store)
    fill_access_store(firestore_project)
    client = store._database.client  # pyright: ignore[reportPrivateUsage]
    ttls = {"events": EVENTS_TTL, "idempotency": IDEMPOTENCY_TTL, "audit": RETENTION}
    expiring = {override["collectionGroup"] for override in INDEXES["fieldOverrides"] if override.get("ttl")}
    assert expiring == set(ttls)
    for collection, ttl in ttls.items():
        for document in client.collection_group(collection).stream():
            expire_at = document.get("expire_at")
            assert isinstance(expire_at, datetime)
            assert expire_at == START + ttl


def test_null_metric_values_are_stored(store: FirestoreJobStore) -> None:
    metrics = MetricsLogged(step=1, values={"loss": None, "learning_rate": 1e-5})
    store.append_events("job-1", 1, EventBatch(first_seq=0, events=[ReportedEvent(at=START, event=metrics)]), START)
    assert store.list_events("job-1")[0].event == metrics
