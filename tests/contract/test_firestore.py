"""What only Firestore can surprise with: lost answers, races between commits, missing indexes, limits, and errors in its own words."""

import itertools
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.api_core import exceptions as google
from google.cloud.firestore_v1.types import StructuredQuery

from schema.events import EventBatch, Metrics, ReportedEvent, StatusChanged, Warned
from schema.job import Status
from service.adapters.jobstores.cursors import encode_cursor
from service.adapters.jobstores.firestore import EVENTS_LIFE, FILTERS, FirestoreJobStore
from service.core.errors import Conflict, IdempotencyConflict, InvalidRequest, StaleRevision, TooLarge, Unavailable
from service.core.jobstore import IDEMPOTENCY_LIFE
from service.core.ports import IdempotencyKey, JobQuery
from storage.patience import patience
from tests.factories import START, a_dataset, a_job

INDEXES = json.loads((Path(__file__).parents[2] / "infra/firestore.indexes.json").read_text())
TOLD = StatusChanged(status=Status.PREPARING, attempt=1)

Rpc = Callable[..., Any]


@pytest.fixture
def store(firestore_project: str) -> Iterator[FirestoreJobStore]:
    store = FirestoreJobStore(project_id=firestore_project)
    yield store
    store.close()


class Wire:
    """Stands where Google's client sends its requests, and lets some of them go wrong."""

    def __init__(self, store: FirestoreJobStore, rpc: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._api = store._client._firestore_api  # pyright: ignore[reportPrivateUsage]  # the last place before the network
        self._send: Rpc = getattr(self._api, rpc)
        self.requests: list[Any] = []
        self._troubles: list[Callable[[Callable[[], Any]], Any]] = []
        monkeypatch.setattr(self._api, rpc, self._pass_on)

    def troubles(self, *troubles: Callable[[Callable[[], Any]], Any]) -> None:
        """What befalls the next requests, one each."""
        self._troubles = list(troubles)

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        self.requests.append(kwargs["request"])
        send = lambda: self._send(*args, **kwargs)  # noqa: E731
        return self._troubles.pop(0)(send) if self._troubles else send()


@pytest.fixture
def commits(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(store, "commit", monkeypatch)


def answer_lost(send: Callable[[], Any]) -> None:
    """The request arrives and is carried out; nobody hears of it."""
    send()
    raise google.ServiceUnavailable("Socket closed")


def request_lost(send: Callable[[], Any]) -> None:
    """The request never arrives."""
    raise google.DeadlineExceeded("Deadline Exceeded")


def refused_with(error: google.GoogleAPICallError) -> Callable[[Callable[[], Any]], None]:
    def refuse(_: Callable[[], Any]) -> None:
        raise error

    return refuse


def a_batch(first_seq: int, count: int, message: str = "x") -> EventBatch:
    events = [ReportedEvent(at=START, event=Warned(code="c", message=message)) for _ in range(count)]
    return EventBatch(first_seq=first_seq, events=events)


# --- lost answers ----------------------------------------------------------------------------------------------------

LOSSES = pytest.mark.parametrize("loss", [answer_lost, request_lost])


@LOSSES
@pytest.mark.parametrize("key", [None, IdempotencyKey("k", "digest")], ids=["no key", "key"])
def test_a_job_is_made_once_whatever_is_lost(
    store: FirestoreJobStore, commits: Wire, loss: Callable[..., None], key: IdempotencyKey | None
) -> None:
    commits.troubles(loss)
    assert store.create_job(a_job(), key) == a_job()
    assert [row.job_id for row in store.page_jobs(JobQuery("local")).rows] == ["job-1"]


@LOSSES
def test_a_change_is_made_and_told_once_whatever_is_lost(store: FirestoreJobStore, commits: Wire, loss: Callable[..., None]) -> None:
    job = store.create_job(a_job())
    commits.troubles(loss, loss)
    kept = store.replace_job(job, [TOLD])
    assert kept.revision == 1
    assert store.find_job("job-1") == kept
    assert [stored.event for stored in store.page_events("job-1")] == [TOLD]


def test_a_change_whose_answer_was_lost_is_known_although_others_went_on(store: FirestoreJobStore, commits: Wire) -> None:
    job = store.create_job(a_job())

    def answer_lost_and_others_go_on(send: Callable[[], Any]) -> None:
        send()
        for _ in range(3):
            store.replace_job(store.find_job("job-1") or job)
        raise google.ServiceUnavailable("Socket closed")

    commits.troubles(answer_lost_and_others_go_on)
    assert store.replace_job(job).revision == 1
    assert (store.find_job("job-1") or job).revision == 4


def test_a_change_that_was_lost_while_another_was_made_is_stale(store: FirestoreJobStore, commits: Wire) -> None:
    job = store.create_job(a_job())

    def lost_and_another_is_made(_: Callable[[], Any]) -> None:
        store.replace_job(job.model_copy(update={"job_name": "another"}))
        raise google.ServiceUnavailable("Socket closed")

    commits.troubles(lost_and_another_is_made)
    with pytest.raises(StaleRevision):
        store.replace_job(job, [TOLD])
    assert store.page_events("job-1") == []


def test_a_request_that_arrives_after_its_repetition_changes_nothing(store: FirestoreJobStore, commits: Wire) -> None:
    job = store.create_job(a_job())
    late: list[Callable[[], Any]] = []

    def held_up(send: Callable[[], Any]) -> None:
        late.append(send)
        raise google.DeadlineExceeded("Deadline Exceeded")

    commits.troubles(held_up)
    store.replace_job(job, [TOLD])
    commits.troubles(held_up)
    store.append_events("job-1", 1, a_batch(0, 2), START)
    for send in late:
        with pytest.raises(google.FailedPrecondition):
            send()
    assert [(stored.attempt, stored.seq) for stored in store.page_events("job-1")] == [(0, 1), (1, 0), (1, 1)]


@LOSSES
def test_a_report_is_kept_once_whatever_is_lost(store: FirestoreJobStore, commits: Wire, loss: Callable[..., None]) -> None:
    commits.troubles(loss, loss)
    assert store.append_events("job-1", 1, a_batch(0, 3), START) == 3
    assert [stored.seq for stored in store.page_events("job-1")] == [0, 1, 2]


@LOSSES
def test_a_dataset_is_kept_and_deleted_whatever_is_lost(store: FirestoreJobStore, commits: Wire, loss: Callable[..., None]) -> None:
    commits.troubles(loss)
    store.create_dataset(a_dataset())
    commits.troubles(loss)
    assert store.delete_dataset("dataset_1")
    assert store.find_dataset("dataset_1") is None


@LOSSES
def test_a_read_is_repeated(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch, loss: Callable[..., None]) -> None:
    store.create_job(a_job())
    for rpc, read in (("batch_get_documents", lambda: store.find_job("job-1")), ("run_query", lambda: store.queued_jobs(1)[0])):
        Wire(store, rpc, monkeypatch).troubles(loss, loss)
        assert read() == a_job()


def test_a_stream_that_breaks_off_in_its_middle_is_read_again(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        store.create_job(a_job(f"job-{n}"))

    def broken_off(send: Callable[[], Any]) -> Iterator[Any]:
        yield next(iter(send()))
        raise google.ServiceUnavailable("Socket closed")

    Wire(store, "run_query", monkeypatch).troubles(broken_off)
    assert [job.job_id for job in store.queued_jobs(10)] == ["job-0", "job-1", "job-2"]


@pytest.mark.parametrize("contended", [google.Aborted("Transaction lock timeout."), google.FailedPrecondition("stored version")])
def test_a_change_that_lost_a_race_but_is_not_stale_is_made(
    store: FirestoreJobStore, commits: Wire, contended: google.GoogleAPICallError
) -> None:
    job = store.create_job(a_job())
    commits.troubles(refused_with(contended))
    assert store.replace_job(job).revision == 1


# --- races -----------------------------------------------------------------------------------------------------------


def test_a_key_that_is_taken_while_a_job_is_made_leads_to_the_other_job(store: FirestoreJobStore, commits: Wire) -> None:
    def after_another(send: Callable[[], Any]) -> Any:
        store.create_job(a_job("job-2"), IdempotencyKey("k", "digest"))
        return send()

    commits.troubles(after_another)
    assert store.create_job(a_job("job-1"), IdempotencyKey("k", "digest")).job_id == "job-2"
    assert store.find_job("job-1") is None


def test_a_key_that_is_taken_for_another_body_meanwhile_is_refused(store: FirestoreJobStore, commits: Wire) -> None:
    def after_another(send: Callable[[], Any]) -> Any:
        store.create_job(a_job("job-2"), IdempotencyKey("k", "another"))
        return send()

    commits.troubles(after_another)
    with pytest.raises(IdempotencyConflict):
        store.create_job(a_job("job-1"), IdempotencyKey("k", "digest"))
    assert store.find_job("job-1") is None


def test_a_job_that_conflicts_leaves_its_key_free(store: FirestoreJobStore) -> None:
    store.create_job(a_job("job-1"))
    with pytest.raises(Conflict):
        store.create_job(a_job("job-1"), IdempotencyKey("k", "digest"))
    assert store.create_job(a_job("job-2"), IdempotencyKey("k", "another")).job_id == "job-2"


def test_a_change_and_a_report_that_meet_are_both_kept(store: FirestoreJobStore, commits: Wire) -> None:
    job = store.create_job(a_job())

    def after_a_report(send: Callable[[], Any]) -> Any:
        store.append_events("job-1", 1, a_batch(0, 2), START)
        return send()

    commits.troubles(after_a_report)
    assert store.replace_job(job, [TOLD]).revision == 1
    assert [(stored.attempt, stored.seq) for stored in store.page_events("job-1")] == [(1, 0), (1, 1), (0, 1)]
    alive = store.liveness("job-1")
    assert alive is not None
    assert alive.next_seq == 2


# --- few writes, and none too large ----------------------------------------------------------------------------------


def test_a_report_is_one_commit_of_two_documents(store: FirestoreJobStore, commits: Wire) -> None:
    store.append_events("job-1", 1, a_batch(0, 100), START)
    assert [len(request["writes"]) for request in commits.requests] == [2]


def test_a_sign_of_life_right_after_another_is_not_written(store: FirestoreJobStore, commits: Wire) -> None:
    store.append_events("job-1", 1, a_batch(0, 2), START)
    assert store.append_events("job-1", 1, a_batch(2, 0), START + timedelta(seconds=4.9)) == 2
    assert len(commits.requests) == 1
    assert store.append_events("job-1", 1, a_batch(2, 0), START + timedelta(seconds=5)) == 2
    assert len(commits.requests) == 2


def test_a_phase_is_written_at_once(store: FirestoreJobStore) -> None:
    store.append_events("job-1", 1, a_batch(0, 2), START)
    store.append_events("job-1", 1, EventBatch(first_seq=2, phase="merging"), START)
    alive = store.liveness("job-1")
    assert alive is not None
    assert alive.phase == "merging"


def test_a_report_larger_than_a_commit_may_be_is_kept_in_several(store: FirestoreJobStore, commits: Wire) -> None:
    commits.troubles(lambda send: send(), answer_lost)
    assert store.append_events("job-1", 1, a_batch(0, 20, "ж" * 200_000), START) == 20
    assert [stored.seq for stored in store.page_events("job-1")] == list(range(20))


def test_what_is_larger_than_a_document_may_be_is_refused_in_words(store: FirestoreJobStore) -> None:
    with pytest.raises(TooLarge, match="size"):
        store.append_events("job-1", 1, a_batch(0, 1, "x" * 1_100_000), START)


def test_a_deletion_that_was_cut_off_goes_on_when_repeated(
    store: FirestoreJobStore, commits: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.adapters.jobstores.firestore.DELETES_PER_COMMIT", 3)
    store.create_job(a_job())
    for seq in range(8):
        store.append_events("job-1", 1, a_batch(seq, 1), START)
    commits.troubles(lambda send: send(), refused_with(google.PermissionDenied("gone for a moment")))
    with pytest.raises(Unavailable):
        store.delete_job("job-1")
    assert store.find_job("job-1") is not None
    assert len(store.page_events("job-1")) == 5
    assert store.delete_job("job-1")
    assert store.page_events("job-1") == []
    assert store.find_job("job-1") is None


# --- errors in words -------------------------------------------------------------------------------------------------


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
                (google.InvalidArgument("what?"), "refuses what it was asked", ""),
            )
        ),
        ("run_query", NO_INDEX, "lacks an index", "firestore.indexes.json"),
    ],
)
def test_a_refusal_says_what_an_operator_can_do(
    store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch, rpc: str, error: google.GoogleAPICallError, message: str, hint: str
) -> None:
    calls = {
        "run_query": lambda: store.queued_jobs(1),
        "batch_get_documents": store.ping,
        "commit": lambda: store.create_dataset(a_dataset()),
    }
    Wire(store, rpc, monkeypatch).troubles(refused_with(error))
    with pytest.raises(Unavailable, match=message) as refused:
        calls[rpc]()
    assert hint in refused.value.hint


@pytest.mark.parametrize("error", [google.ServiceUnavailable("x"), google.ResourceExhausted("Quota exceeded"), google.Aborted("x")])
def test_trouble_that_lasts_is_unavailable_before_the_caller_gives_up(
    store: FirestoreJobStore, commits: Wire, error: google.GoogleAPICallError
) -> None:
    commits.troubles(*[refused_with(error)] * 1000)
    with patience(0.2), pytest.raises(Unavailable):
        store.create_job(a_job())


@pytest.mark.parametrize("listens", [True, False], ids=["silent", "closed"])
def test_a_firestore_that_does_not_answer_is_unavailable_in_time(monkeypatch: pytest.MonkeyPatch, listens: bool) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        if not listens:
            silent.close()
        store = FirestoreJobStore(project_id="p")
        with patience(0.3), pytest.raises(Unavailable, match=r"Firestore .* did not answer in time"):
            store.ping()
        store.close()


@pytest.mark.parametrize("place", [("2026-01-01", "a/b"), ("2026-01-01", ""), ("\ud800", "x"), ("2026-01-01", "__x__")])
def test_a_cursor_that_is_no_place_is_refused(store: FirestoreJobStore, place: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        store.page_jobs(JobQuery("local", after=encode_cursor(*place)))


# --- indexes: the emulator needs none, so that what is missing shows only here ----------------------------------------


def every_call(store: FirestoreJobStore) -> None:
    """Every method, with every combination of filters."""
    store.create_job(a_job(project_id="p"), IdempotencyKey("k", "digest"))
    store.replace_job(a_job(project_id="p"), [TOLD])
    store.append_events("job-1", 1, a_batch(0, 1), START)
    store.create_dataset(a_dataset())
    cursor = encode_cursor("2026-01-01", "x")
    values = {"status": Status.FAILED, "project_id": "p", "modality": "text", "trainer_type": "sft"}
    for count in range(len(FILTERS) + 1):
        for names in itertools.combinations(FILTERS, count):
            for after in (None, cursor):
                store.page_jobs(JobQuery("local", after=after, **{name: values[name] for name in names}))
    for after in (None, cursor):
        store.page_datasets("local", after=after)
    store.queued_jobs(1)
    store.active_jobs(1)
    store.uses_of_dataset("dataset_1")
    store.page_events("job-1")
    store.liveness("job-1")
    store.ping()


class Question:
    """A query as it went over the wire: a collection, what must be equal, and the order."""

    def __init__(self, query: StructuredQuery) -> None:
        assert len(query.from_) == 1
        assert not query.from_[0].all_descendants
        assert query.limit or query.order_by[0].field.field_path == "__name__"
        self.collection = query.from_[0].collection_id
        filters = list(query.where.composite_filter.filters) or [query.where]
        asked = [(one.field_filter.field.field_path, one.field_filter.op.name) for one in filters if one.field_filter.field.field_path]
        self.equal = {path for path, op in asked if op == "EQUAL"}
        self.ranges = {path for path, op in asked if op != "EQUAL"}
        self.order = [(order.field.field_path, order.direction.name) for order in query.order_by]

    def __repr__(self) -> str:
        return f"{self.collection}: {sorted(self.equal)} {sorted(self.ranges)} by {self.order}"

    @property
    def indexed_order(self) -> list[tuple[str, str]]:
        """The order without the document's name, which ends every index in the direction of the field before it."""
        if self.order[-1][0] != "__name__":
            return self.order
        assert len(self.order) == 1 or self.order[-1][1] == self.order[-2][1]
        return self.order[:-1]

    def indexes(self) -> list[dict[str, Any]] | None:
        """Those of the file that serve it; empty when none of its own is needed, None when there is none.

        Firestore's rule: a composite index serves its equalities and then its order; several are merged when each has one of the
        equalities and all have the same order.
        """
        if self.ranges - {"__name__"}:
            return None
        if not self.indexed_order:
            return [] if all(is_indexed_alone(self.collection, path) for path in self.equal) and len(self.equal) < 2 else None
        wanted = [[(path, "ASCENDING"), *self.indexed_order] for path in self.equal]
        found = [index for index in INDEXES["indexes"] if index["collectionGroup"] == self.collection and keys_of(index) in wanted]
        return found if len(found) == len(wanted) and not self.ranges else None


def keys_of(index: dict[str, Any]) -> list[tuple[str, str]]:
    assert index["queryScope"] == "COLLECTION"
    return [(field["fieldPath"], field["order"]) for field in index["fields"]]


def is_indexed_alone(collection: str, path: str) -> bool:
    """Whether the field has an index of its own: each has, unless the file says otherwise, also for the map that it is in."""
    stated = {(one["collectionGroup"], one["fieldPath"]): one["indexes"] for one in INDEXES["fieldOverrides"]}
    own = stated.get((collection, path), stated.get((collection, path.partition(".")[0])))
    return own is None or {"order": "ASCENDING", "queryScope": "COLLECTION"} in own


def test_every_query_has_its_index_and_every_index_its_query(store: FirestoreJobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(store, "run_query", monkeypatch)
    every_call(store)
    store.delete_job("job-1")
    questions = [Question(request["structured_query"]) for request in wire.requests]
    assert len({frozenset(question.equal) for question in questions if question.collection == "jobs"}) == 2 ** len(FILTERS) + 2
    used: list[dict[str, Any]] = []
    for question in questions:
        indexes = question.indexes()
        assert indexes is not None, f"no index for {question}"
        used += indexes
    assert [index for index in INDEXES["indexes"] if index not in used] == []


def test_a_query_without_its_index_is_found() -> None:
    query = StructuredQuery(
        {
            "from_": [{"collection_id": "jobs"}],
            "where": {"field_filter": {"field": {"field_path": "listed.status"}, "op": "EQUAL", "value": {"string_value": "x"}}},
            "order_by": [{"field": {"field_path": "created_at"}, "direction": "ASCENDING"}],
            "limit": 1,
        }
    )
    assert Question(query).indexes() is None


def test_of_every_field_it_is_said_whether_it_is_indexed(store: FirestoreJobStore) -> None:
    every_call(store)
    stated = {(one["collectionGroup"], one["fieldPath"]) for one in INDEXES["fieldOverrides"]}
    client = store._client  # pyright: ignore[reportPrivateUsage]
    kept = {
        (document.reference.parent.id, name)
        for collection in [*client.collections(), client.collection("jobs/job-1/events")]
        for document in collection.stream()
        for name in document.to_dict()
    }
    assert kept == stated


def test_what_expires_has_a_moment_that_firestore_understands(store: FirestoreJobStore) -> None:
    every_call(store)
    client = store._client  # pyright: ignore[reportPrivateUsage]
    lives = {"events": EVENTS_LIFE, "idempotency": IDEMPOTENCY_LIFE}
    expiring = {one["collectionGroup"] for one in INDEXES["fieldOverrides"] if one.get("ttl")}
    assert expiring == set(lives)
    for collection, life in lives.items():
        for document in client.collection_group(collection).stream():
            expire_at = document.get("expire_at")
            assert isinstance(expire_at, datetime)
            assert expire_at == START + life


def test_numbers_that_are_none_are_kept(store: FirestoreJobStore) -> None:
    point = Metrics(step=1, values={"loss": None, "learning_rate": 1e-5})
    store.append_events("job-1", 1, EventBatch(first_seq=0, events=[ReportedEvent(at=START, event=point)]), START)
    assert store.page_events("job-1")[0].event == point
