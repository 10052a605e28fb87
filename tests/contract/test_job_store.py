"""What every job store promises."""

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from schema.dataset import Dataset, DatasetShare
from schema.events import (
    Event,
    EventBatch,
    MetricsLogged,
    PhaseChanged,
    ReportedEvent,
    SamplesGenerated,
    StatusChanged,
    WarningRaised,
)
from schema.ingestion import IngestLimits, IngestOptions
from schema.job import EvalMetrics, Job, Progress, Sample, Status
from schema.placement import Placement
from schema.training import IngestConfig
from schema.training.llm_graders import JsonSchemaGrader
from service.adapters.jobstores import JOB_STORES
from service.adapters.jobstores.cursors import encode_cursor
from service.adapters.jobstores.firestore.store import FirestoreJobStore
from service.adapters.jobstores.memory import MemoryJobStore
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.adapters.jobstores.sqlite_lists import select_page
from service.bootstrap import load_adapter
from service.core import job_store_rules
from service.core.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    RecordTooNew,
    StaleRevision,
    TooLarge,
    Unavailable,
    UnreadableRecord,
)
from service.core.event_store import StoredEvent
from service.core.job_lists import JobQuery, ListedJob, summarize_job
from service.core.ports import IdempotencyKey, JobStore
from service.core.stored_json import MAX_EVENT_BYTES, MAX_RECORD_BYTES, MAX_SAMPLES_EVENT_BYTES
from service.core.usage import STORED
from tests.contract.sqlite_versions import downgrade
from tests.factories import START, make_attempt, make_dataset, make_grpo_config, make_job

BUILDERS: dict[str, Callable[[type, pytest.FixtureRequest], JobStore]] = {
    "firestore": lambda store, request: store(project_id=request.getfixturevalue("firestore_project")),
    "memory": lambda store, _: store(),
    "sqlite": lambda store, request: store(request.getfixturevalue("tmp_path") / "jobs.db"),
}


def test_every_registered_store_is_covered() -> None:
    assert set(BUILDERS) == set(JOB_STORES)


@pytest.fixture(params=sorted(JOB_STORES))
def store(request: pytest.FixtureRequest) -> Iterator[JobStore]:
    store = BUILDERS[request.param](load_adapter(JOB_STORES, "job store", request.param), request)
    yield store
    store.close()


def make_batch(first_seq: int, count: int, **changes: object) -> EventBatch:
    events = [ReportedEvent(at=START, event=MetricsLogged(step=first_seq + n, values={"loss": 1.0})) for n in range(count)]
    return EventBatch(first_seq=first_seq, events=events).model_copy(update=changes)


def test_job_round_trips(store: JobStore) -> None:
    job = make_job(job_name="naïve – 模型", project_id="p")
    assert store.create_job(job) == job
    assert store.find_job(job.job_id) == job


def test_unknown_job_is_none(store: JobStore) -> None:
    assert store.find_job("nobody") is None


@pytest.mark.parametrize("job_id", ["", ".", "..", "a/b", "__jobs__", "x" * 2000, "naïve"])
def test_invalid_job_id_is_not_found(store: JobStore, job_id: str) -> None:
    assert store.find_job(job_id) is None
    assert store.list_events(job_id) == []
    assert not store.delete_job(job_id)


def test_duplicate_job_id_conflicts(store: JobStore) -> None:
    store.create_job(make_job())
    with pytest.raises(Conflict):
        store.create_job(make_job(job_name="another"))


def test_update_increments_revision(store: JobStore) -> None:
    job = store.create_job(make_job())
    changed = store.replace_job(job.model_copy(update={"job_name": "new"}))
    assert changed.revision == job.revision + 1
    assert store.find_job(job.job_id) == changed


def test_second_writer_gets_stale_revision(store: JobStore) -> None:
    job = store.create_job(make_job())
    store.replace_job(job.model_copy(update={"job_name": "first"}))
    with pytest.raises(StaleRevision):
        store.replace_job(job.model_copy(update={"job_name": "second"}))
    stored_job = store.find_job(job.job_id)
    assert stored_job is not None
    assert stored_job.job_name == "first"


def test_one_of_many_concurrent_writers_wins(store: JobStore) -> None:
    job = store.create_job(make_job())

    def write(n: int) -> bool:
        try:
            store.replace_job(job.model_copy(update={"job_name": f"writer {n}"}))
        except StaleRevision:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(write, range(32))) == 1


def test_stale_update_stores_no_event(store: JobStore) -> None:
    job = store.create_job(make_job())
    store.replace_job(job, [StatusChanged(status=Status.PREPARING, attempt=1)])
    with pytest.raises(StaleRevision):
        store.replace_job(job, [StatusChanged(status=Status.CANCELLED, attempt=1)])
    assert len(store.list_events(job.job_id)) == 1


def test_updating_missing_job_is_not_found(store: JobStore) -> None:
    with pytest.raises(NotFound):
        store.replace_job(make_job())


def test_same_idempotency_key_returns_same_job(store: JobStore) -> None:
    key = IdempotencyKey("k", "digest")
    first = store.create_job(make_job("job-1"), key)
    assert store.create_job(make_job("job-2"), key) == first
    assert store.find_job("job-2") is None


def test_concurrent_requests_with_same_key_create_one_job(store: JobStore) -> None:
    with ThreadPoolExecutor(16) as pool:
        job_ids = pool.map(lambda n: store.create_job(make_job(f"job-{n}"), IdempotencyKey("k", "digest")).job_id, range(50))
    assert len(set(job_ids)) == 1


def test_same_key_with_other_body_conflicts(store: JobStore) -> None:
    store.create_job(make_job("job-1"), IdempotencyKey("k", "digest"))
    with pytest.raises(IdempotencyConflict):
        store.create_job(make_job("job-2"), IdempotencyKey("k", "another"))


def test_idempotency_key_expires_after_a_day(store: JobStore) -> None:
    store.create_job(make_job("job-1"), IdempotencyKey("k", "digest"))
    tomorrow = START + timedelta(hours=25)
    assert store.create_job(make_job("job-2", created_at=tomorrow), IdempotencyKey("k", "another")).job_id == "job-2"


def test_idempotency_key_is_scoped_to_tenant(store: JobStore) -> None:
    store.create_job(make_job("job-1"), IdempotencyKey("k", "digest"))
    assert store.create_job(make_job("job-2", tenant_id="other"), IdempotencyKey("k", "another")).job_id == "job-2"


def test_pages_list_every_job_once_newest_first(store: JobStore) -> None:
    for n in range(7):  # two jobs per second: the id orders them
        store.create_job(make_job(f"job-{n}", created_at=START + timedelta(seconds=n // 2)))
    seen: list[str] = []
    cursor = None
    while True:
        page = store.list_jobs(JobQuery("local", limit=3, after=cursor))
        seen += [row.job_id for row in page.rows]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == [f"job-{n}" for n in reversed(range(7))]


def test_new_job_does_not_shift_pages(store: JobStore) -> None:
    for n in range(4):
        store.create_job(make_job(f"job-{n}", created_at=START + timedelta(seconds=n)))
    first = store.list_jobs(JobQuery("local", limit=2))
    store.create_job(make_job("job-9", created_at=START + timedelta(seconds=9)))
    second = store.list_jobs(JobQuery("local", limit=2, after=first.next_cursor))
    assert [row.job_id for row in second.rows] == ["job-1", "job-0"]


@pytest.mark.parametrize(
    ("filters", "job_ids"),
    [
        ({"statuses": (Status.FAILED,)}, ["job-2"]),
        ({"project_id": "p"}, ["job-1"]),
        ({"modality": "vision"}, []),
        ({"trainer_type": "sft"}, ["job-2", "job-1", "job-0"]),
        ({"statuses": (Status.QUEUED,), "project_id": "p"}, ["job-1"]),
    ],
)
def test_filters_select_matching_jobs(store: JobStore, filters: dict[str, str], job_ids: list[str]) -> None:
    store.create_job(make_job("job-0"))
    store.create_job(make_job("job-1", project_id="p", created_at=START + timedelta(seconds=1)))
    store.create_job(make_job("job-2", status=Status.FAILED, created_at=START + timedelta(seconds=2)))
    store.create_job(make_job("job-3", tenant_id="other", project_id="p", status=Status.FAILED))
    assert [row.job_id for row in store.list_jobs(JobQuery("local", **filters)).rows] == job_ids


def list_all_ids(store: JobStore, **filters: Any) -> list[str]:
    """The ids of all pages, the newest job first."""
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = store.list_jobs(JobQuery("local", limit=2, after=cursor or None, **filters))
        found += [row.job_id for row in page.rows]
        cursor = page.next_cursor
    return found


def create_varied_jobs(store: JobStore) -> None:
    """Eight jobs of one tenant, a second apart, and one of another tenant that has everything that they have."""
    statuses = (Status.QUEUED, Status.FAILED, Status.COMPLETED, Status.TRAINING)
    for n in range(8):
        job = make_job(
            f"training_dataset_gemma-3-270m_00000000{n}d21" if n < 2 else f"job-{n}",
            job_name=("Support bot", "Änderungs-Bot v2", "100% of it_all", "a job")[n % 4],
            status=statuses[n % 4],
            project_id="p" if n < 4 else None,
            created_by="ann" if n % 2 else "ben",
            metadata={"team": "search" if n < 6 else "ads", "run": str(n)},
            created_at=START + timedelta(seconds=n),
        )
        store.create_job(job)
    everything: dict[str, Any] = {"project_id": "p", "created_by": "ann", "metadata": {"team": "search", "run": "1"}}
    store.create_job(make_job("foreign-1d21", tenant_id="other", job_name="Support bot v2", status=Status.FAILED, **everything))


ID_0, ID_1 = "training_dataset_gemma-3-270m_000000000d21", "training_dataset_gemma-3-270m_000000001d21"
TWO_SECONDS, SIX_SECONDS = START + timedelta(seconds=2), START + timedelta(seconds=6)
LIST_FILTERS: list[tuple[dict[str, Any], list[str]]] = [
    ({"statuses": (Status.FAILED, Status.QUEUED)}, ["job-5", "job-4", ID_1, ID_0]),
    ({"statuses": (Status.FAILED, Status.QUEUED, Status.PAUSED), "project_id": "p"}, [ID_1, ID_0]),
    ({"statuses": (Status.FAILED, Status.QUEUED), "created_by": "ben"}, ["job-4", ID_0]),
    ({"statuses": (Status.PAUSED,)}, []),
    ({"statuses": tuple(Status), "metadata": (("team", "ads"),)}, ["job-7", "job-6"]),
    ({"search": "support"}, ["job-4", ID_0]),
    ({"search": "BOT"}, ["job-5", "job-4", ID_1, ID_0]),
    ({"search": "bot", "statuses": (Status.FAILED,)}, ["job-5", ID_1]),
    ({"search": "bot", "modality": "text", "trainer_type": "sft"}, ["job-5", "job-4", ID_1, ID_0]),
    ({"search": "änderungs-bot V2"}, ["job-5", ID_1]),
    ({"search": "A\u0308nderungs"}, ["job-5", ID_1]),  # the same letter in two characters
    ({"search": "100%"}, ["job-6", "job-2"]),
    ({"search": "t_a"}, ["job-6", "job-2"]),
    ({"search": "_"}, ["job-6", "job-2"]),
    ({"search": "%"}, ["job-6", "job-2"]),
    ({"search": "nothing"}, []),
    ({"search": "0d21"}, [ID_0]),
    ({"search": "…1d21"}, [ID_1]),
    ({"search": "...1D21"}, [ID_1]),
    ({"search": ID_0}, [ID_0]),
    ({"search": "270m_000000001d21"}, [ID_1]),
    ({"search": "d21"}, []),  # too short for the end of an id, and in no name
    ({"search": "…bot"}, []),  # with an ellipsis it is the end of an id only
    ({"search": "foreign"}, []),
    ({"metadata": (("team", "search"),)}, ["job-5", "job-4", "job-3", "job-2", ID_1, ID_0]),
    ({"metadata": (("team", "search"), ("run", "4"))}, ["job-4"]),
    ({"metadata": (("team", "search"), ("team", "ads"))}, []),
    ({"metadata": (("team", "sear"),)}, []),
    ({"metadata": (("team", "search"),), "search": "support", "created_by": "ben"}, ["job-4", ID_0]),
    ({"created_by": "ann"}, ["job-7", "job-5", "job-3", ID_1]),
    ({"created_by": "ann", "project_id": "p"}, ["job-3", ID_1]),
    ({"created_by": "ann", "search": "bot"}, ["job-5", ID_1]),
    ({"created_by": "nobody"}, []),
    ({"created_from": TWO_SECONDS, "created_before": SIX_SECONDS}, ["job-5", "job-4", "job-3", "job-2"]),
    ({"created_from": TWO_SECONDS, "created_before": SIX_SECONDS, "search": "bot"}, ["job-5", "job-4"]),
    ({"created_from": TWO_SECONDS, "metadata": (("team", "ads"),)}, ["job-7", "job-6"]),
    ({"created_from": SIX_SECONDS, "statuses": (Status.QUEUED, Status.TRAINING, Status.COMPLETED)}, ["job-7", "job-6"]),
    ({"created_from": SIX_SECONDS, "created_before": TWO_SECONDS}, []),
]


def test_jobs_are_found_by_every_filter(store: JobStore) -> None:
    create_varied_jobs(store)
    found = [list_all_ids(store, **filters) for filters, _ in LIST_FILTERS]
    assert found == [expected for _, expected in LIST_FILTERS]


def test_counts_by_status_follow_the_other_filters(store: JobStore) -> None:
    create_varied_jobs(store)
    for filters, _ in LIST_FILTERS[::3]:
        counts = store.count_jobs_by_status(JobQuery("local", limit=1, after="ignored", **filters))
        listed = store.list_jobs(JobQuery("local", **filters | {"statuses": ()}))
        assert counts is not None
        assert {status: count for status, count in counts.items() if count} == Counter(row.summary.status for row in listed.rows), filters


def test_found_job_follows_its_record(store: JobStore) -> None:
    job = store.create_job(make_job(job_name="before", metadata={"a": "b"}, created_by="ann"))
    store.replace_job(job.model_copy(update={"job_name": "after", "metadata": {"a": "c"}, "status": Status.FAILED}))
    assert list_all_ids(store, search="before") == list_all_ids(store, metadata=(("a", "b"),)) == []
    assert list_all_ids(store, search="after", metadata=(("a", "c"),), created_by="ann", statuses=(Status.FAILED,)) == ["job-1"]
    store.delete_job("job-1")
    assert list_all_ids(store, search="after") == list_all_ids(store, metadata=(("a", "c"),)) == list_all_ids(store, created_by="ann") == []
    assert store.count_jobs_by_status(JobQuery("local", search="after")) == {}
    store.create_job(make_job())  # nothing is left of it that would be in the way
    assert list_all_ids(store, search="a job") == ["job-1"]


def test_part_within_a_word_is_found(tmp_path: Path) -> None:
    """Except on Firestore, whose indexes hold beginnings of words."""
    for store in (SqliteJobStore(tmp_path / "jobs.db"), MemoryJobStore()):
        store.create_job(make_job(job_name="Bordeaux"))
        assert list_all_ids(store, search="ordea") == ["job-1"]
        store.close()


@pytest.mark.parametrize("value", ["", "=", "a=b", "x" * 512, "模" * 512, "…"])
def test_any_value_of_metadata_is_found(store: JobStore, value: str) -> None:
    store.create_job(make_job(metadata={"key": value}))
    store.create_job(make_job("job-2", metadata={"key": value + "x" if len(value) < 512 else value[:-1] + "y"}))
    assert list_all_ids(store, metadata=(("key", value),)) == ["job-1"]


def test_list_shows_what_the_record_and_the_heartbeat_say(store: JobStore) -> None:
    later = START + timedelta(seconds=9)
    job = store.create_job(make_job(metadata={"a": "b"}, created_by="ann", placements=place("a", "b")))
    [row] = store.list_jobs(JobQuery("local")).rows
    assert row == ListedJob(summarize_job(job), None)
    shown = row.summary
    assert (shown.launcher, shown.hardware, shown.method, shown.processed_dataset_id) == ("a", "p", "LoRA", "dataset_1")
    assert (shown.metadata, shown.created_by, shown.started_at, shown.eval_loss) == ({"a": "b"}, "ann", None, None)
    running = {"status": Status.TRAINING, "attempts": (make_attempt(placement=place("b")[0]),), "started_at": START}
    job = store.replace_job(job.model_copy(update=running))
    progress = Progress(step=3, total_steps=10, epoch=0.3, total_epochs=1, loss=1.5, remaining_s=20.0)
    store.append_events("job-1", 1, make_batch(0, 1, phase="training", progress=progress), later)
    [row] = store.list_jobs(JobQuery("local")).rows
    assert row.heartbeat is not None
    assert (row.heartbeat.phase, row.heartbeat.progress, row.heartbeat.received_at) == ("training", progress, later)
    assert (row.summary.launcher, row.summary.started_at) == ("b", START)
    attempts = (*job.attempts, make_attempt(2))
    metrics = EvalMetrics(eval_loss=0.5)
    changes = {"attempts": attempts, "metrics": metrics, "base_metrics": EvalMetrics(eval_loss=2.0), "finished_at": later}
    store.replace_job(job.model_copy(update=changes))
    [row] = store.list_jobs(JobQuery("local")).rows
    assert row.heartbeat is None  # the newest attempt has sent none
    assert (row.summary.eval_loss, row.summary.base_eval_loss, row.summary.finished_at) == (0.5, 2.0, later)


def test_jobs_of_a_sqlite_file_of_version_4_are_found_after_an_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    store = SqliteJobStore(path)
    for n in range(3):
        store.create_job(make_job(f"job-{n}", job_name=f"Name {n}", metadata={"n": str(n)}, created_at=START + timedelta(seconds=n)))
    replace_stored_text(store, "jobs", "job-1", "{")
    store.close()
    downgrade(path, 4)
    store = SqliteJobStore(path)
    assert list_all_ids(store, search="NAME") == ["job-2", "job-1", "job-0"]
    assert list_all_ids(store, metadata=(("n", "2"),)) == ["job-2"]
    assert list_all_ids(store, metadata=(("n", "1"),)) == []  # its record cannot be read
    shown = [(row.summary.job_name, row.summary.processed_dataset_id) for row in store.list_jobs(JobQuery("local")).rows]
    assert shown == [("Name 2", "dataset_1"), ("Name 1", "dataset_1"), ("Name 0", "dataset_1")]
    assert store.delete_job("job-1")
    assert list_all_ids(store, search="name 1") == []
    store.close()


def test_job_with_a_damaged_summary_is_listed_by_its_columns(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path / "jobs.db")
    store.create_job(make_job(project_id="p"))
    with store._database.transaction() as db:  # pyright: ignore[reportPrivateUsage]
        db.execute("UPDATE job_summaries SET summary = '{'")
    [row] = store.list_jobs(JobQuery("local")).rows
    assert (row.job_id, row.summary.project_id, row.summary.status) == ("job-1", "p", Status.QUEUED)
    entry = store.find_job_entry("job-1")
    assert entry is not None
    assert (entry.tenant_id, entry.summary.created_at) == ("local", START)
    store.close()


@pytest.mark.parametrize("cursor", ["x", "WzEsMl0", "W10", "é", "bnVsbA", "e30"])
def test_invalid_cursor_is_rejected(store: JobStore, cursor: str) -> None:
    with pytest.raises(InvalidRequest):
        store.list_jobs(JobQuery("local", after=cursor))


def test_queued_and_active_jobs_are_found_oldest_first(store: JobStore) -> None:
    for n, status in enumerate([*Status, Status.QUEUED, Status.TRAINING]):
        store.create_job(make_job(f"job-{n}-{status}", status=status, created_at=START - timedelta(seconds=n)))
    assert [job.job_id for job in store.list_queued_jobs(None, 10)] == ["job-9-queued", "job-0-queued"]
    assert [job.job_id for job in store.list_queued_jobs(None, 1)] == ["job-9-queued"]
    active = [job.status for job in store.list_active_jobs(None, 10)]
    assert active == [Status.TRAINING, Status.CANCELLING, Status.PAUSING, Status.TRAINING, Status.PREPARING]


def place(*launchers: str) -> tuple[Placement, ...]:
    return tuple(Placement(launcher=launcher, profile="p", environment="llm") for launcher in launchers)


def list_ids(jobs: list[Job]) -> list[str]:
    return [job.job_id for job in jobs]


def test_work_of_a_launcher_follows_the_job(store: JobStore) -> None:
    job = store.create_job(make_job("both", placements=place("a", "b")))
    store.create_job(make_job("only-b", placements=place("b", "b"), created_at=START + timedelta(seconds=1)))
    assert list_ids(store.list_queued_jobs("a", 10)) == ["both"]
    assert list_ids(store.list_queued_jobs("b", 10)) == ["both", "only-b"]
    assert list_ids(store.list_queued_jobs("b", 1)) == ["both"]
    attempt = make_attempt(placement=place("b")[0])
    job = store.replace_job(job.model_copy(update={"status": Status.TRAINING, "attempts": (attempt,)}))
    assert (list_ids(store.list_active_jobs("a", 10)), list_ids(store.list_active_jobs("b", 10))) == ([], ["both"])
    assert (list_ids(store.list_queued_jobs("a", 10)), list_ids(store.list_queued_jobs("b", 10))) == ([], ["only-b"])
    job = store.replace_job(job.model_copy(update={"status": Status.QUEUED}))
    assert (list_ids(store.list_queued_jobs("a", 10)), store.list_active_jobs("b", 10)) == (["both"], [])
    store.replace_job(job.model_copy(update={"status": Status.CANCELLED}))
    store.delete_job("only-b")
    assert all(store.list_queued_jobs(name, 10) + store.list_active_jobs(name, 10) == [] for name in ("a", "b", None))


def test_long_queue_of_one_launcher_hides_no_job_of_another(store: JobStore) -> None:
    for number in range(300):
        store.create_job(make_job(f"a-{number}", placements=place("a"), created_at=START + timedelta(seconds=number)))
    store.create_job(make_job("b", placements=place("b"), created_at=START + timedelta(days=1)))
    assert list_ids(store.list_queued_jobs("b", 1)) == ["b"]
    assert list_ids(store.list_queued_jobs("a", 2)) == ["a-0", "a-1"]
    assert len(store.list_queued_jobs(None, 1000)) == 301


def test_open_jobs_of_an_earlier_sqlite_file_are_found_after_an_upgrade(tmp_path: Path) -> None:
    """Its tables have version 2: there is no table of launchers, and its records have version 1."""
    path = tmp_path / "jobs.db"
    store = SqliteJobStore(path)
    placement = Placement(launcher="cloud-run", profile="l4", environment="llm")
    job = store.create_job(make_job(placements=(placement,)))
    first = json.loads(job.model_dump_json(exclude={"schema_version", "placements"})) | {"hardware": "l4", "schema_version": 1}
    attempt = {"number": 1, "launcher": "cloud-run", "created_at": START.isoformat(), "launch_started_at": None, "handle": "h"}
    active = first | {"job_id": "job-2", "status": "training", "attempts": [attempt]}
    store.create_job(make_job("job-2", status=Status.TRAINING))
    store.create_job(make_job("job-3", status=Status.COMPLETED))
    with store._database.transaction() as db:  # pyright: ignore[reportPrivateUsage]
        for record in (first, active):
            db.execute("UPDATE jobs SET record = ? WHERE job_id = ?", (json.dumps(record), record["job_id"]))
    store.close()
    downgrade(path, 2)
    store = SqliteJobStore(path)
    assert list_ids(store.list_queued_jobs("cloud-run", 10)) == ["job-1"]
    [found] = store.list_active_jobs("cloud-run", 10)
    assert (found.job_id, found.attempts[0].placement, found.attempts[0].launch_started_at) == ("job-2", placement, START)
    store.close()


def test_final_job_is_neither_queued_nor_active(store: JobStore) -> None:
    job = store.create_job(make_job())
    store.replace_job(job.model_copy(update={"status": Status.CANCELLED}))
    assert store.list_queued_jobs(None, 10) + store.list_active_jobs(None, 10) == []


def test_retried_job_is_queued_then_active(store: JobStore) -> None:
    job = store.create_job(make_job(status=Status.FAILED))
    job = store.replace_job(job.model_copy(update={"status": Status.QUEUED}))
    assert [job.job_id for job in store.list_queued_jobs(None, 10)] == ["job-1"]
    assert store.list_jobs_using_dataset("dataset_1") == ["job-1"]
    store.replace_job(job.model_copy(update={"status": Status.TRAINING}))
    assert [job.job_id for job in store.list_active_jobs(None, 10)] == ["job-1"]
    assert store.list_queued_jobs(None, 10) == []


def test_dataset_uses_are_non_final_jobs(store: JobStore) -> None:
    for status in Status:
        store.create_job(make_job(f"job-{status}", status=status))
    users = set(store.list_jobs_using_dataset("dataset_1"))
    assert users == {f"job-{status}" for status in Status if not status.is_final}
    assert store.list_jobs_using_dataset("dataset_2") == []


def test_job_uses_every_dataset_that_it_mixes(store: JobStore) -> None:
    shares = tuple(DatasetShare(processed_dataset_id=dataset_id, weight=1.0) for dataset_id in ("dataset_1", "dataset_2", "dataset_3"))
    mixed = store.create_job(make_job("job-b", datasets=shares))
    store.create_job(make_job("job-a", processed_dataset_id="dataset_2"))
    assert store.list_jobs_using_dataset("dataset_1") == ["job-b"]
    assert store.list_jobs_using_dataset("dataset_2") == ["job-a", "job-b"]
    assert store.list_jobs_using_dataset("dataset_3") == ["job-b"]
    store.replace_job(mixed.model_copy(update={"status": Status.CANCELLED}))
    assert store.list_jobs_using_dataset("dataset_2") == ["job-a"]
    store.delete_job("job-b")
    assert store.list_jobs_using_dataset("dataset_3") == []


def test_events_are_ordered_after_cursor(store: JobStore) -> None:
    store.create_job(make_job())
    assert store.append_events("job-1", 1, make_batch(0, 3), START) == 3
    assert store.append_events("job-1", 1, make_batch(3, 2), START) == 5
    events = store.list_events("job-1")
    assert [stored.seq for stored in events] == [0, 1, 2, 3, 4]
    assert [stored.seq for stored in store.list_events("job-1", after=events[1].cursor, limit=2)] == [2, 3]


def test_repeated_batch_is_stored_once(store: JobStore) -> None:
    store.create_job(make_job())
    store.append_events("job-1", 1, make_batch(0, 3), START)
    assert store.append_events("job-1", 1, make_batch(1, 3), START) == 4
    assert [stored.seq for stored in store.list_events("job-1")] == [0, 1, 2, 3]


def test_concurrent_batches_are_stored_exactly_once(store: JobStore) -> None:
    for n in range(8):
        store.create_job(make_job(f"job-{n}"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: [store.append_events(f"job-{n}", 1, make_batch(first, 5), START) for first in range(0, 50, 5)], range(8)))
    for n in range(8):
        assert [stored.seq for stored in store.list_events(f"job-{n}")] == list(range(50))


def test_concurrent_duplicate_batch_is_stored_once(store: JobStore) -> None:
    store.create_job(make_job())
    with ThreadPoolExecutor(8) as pool:
        next_seqs = list(pool.map(lambda _: store.append_events("job-1", 1, make_batch(0, 5), START), range(16)))
    assert next_seqs == [5] * 16
    assert [stored.seq for stored in store.list_events("job-1")] == list(range(5))


def test_cursor_reader_misses_no_concurrent_events(store: JobStore) -> None:
    store.create_job(make_job())
    seen: list[StoredEvent] = []

    def read_next_page() -> None:
        seen.extend(store.list_events("job-1", after=seen[-1].cursor if seen else 0, limit=7))

    def report() -> None:
        for first in range(0, 40, 2):
            store.append_events("job-1", 1, make_batch(first, 2), START + timedelta(minutes=first))

    def change() -> None:
        for _ in range(20):
            store.replace_job(store.find_job("job-1") or make_job(), [StatusChanged(status=Status.TRAINING, attempt=1)])

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(report), pool.submit(change)]
        while not all(writer.done() for writer in writers):
            read_next_page()
        for writer in writers:
            writer.result()
    while len(seen) < 60:
        before = len(seen)
        read_next_page()
        assert len(seen) > before
    assert seen == store.list_events("job-1")
    assert [stored.seq for stored in seen if stored.attempt == 1] == list(range(40))
    assert [stored.cursor for stored in seen] == sorted({stored.cursor for stored in seen})


def test_next_attempt_starts_at_sequence_zero(store: JobStore) -> None:
    store.create_job(make_job())
    store.append_events("job-1", 1, make_batch(0, 3), START)
    assert store.append_events("job-1", 2, make_batch(0, 1), START) == 1
    assert [(stored.attempt, stored.seq) for stored in store.list_events("job-1")] == [(1, 0), (1, 1), (1, 2), (2, 0)]


def test_batch_from_older_attempt_is_ignored(store: JobStore) -> None:
    store.create_job(make_job())
    store.append_events("job-1", 2, make_batch(0, 1), START)
    store.append_events("job-1", 1, make_batch(0, 5), START + timedelta(seconds=9))
    heartbeat = store.find_heartbeat("job-1")
    assert heartbeat is not None
    assert (heartbeat.attempt, heartbeat.received_at) == (2, START)
    assert len(store.list_events("job-1")) == 1


def test_empty_batch_is_a_heartbeat(store: JobStore) -> None:
    store.create_job(make_job())
    assert store.find_heartbeat("job-1") is None
    progress = Progress(step=3, total_steps=10, epoch=0.3, total_epochs=1)
    store.append_events("job-1", 1, make_batch(0, 0, phase="training", progress=progress), START)
    later = START + timedelta(seconds=5)
    store.append_events("job-1", 1, make_batch(0, 0), later)
    heartbeat = store.find_heartbeat("job-1")
    assert heartbeat is not None
    assert (heartbeat.received_at, heartbeat.phase, heartbeat.progress) == (later, "training", progress)


def test_events_round_trip(store: JobStore) -> None:
    store.create_job(make_job())
    metrics = MetricsLogged(step=0, values={"loss": None}, notes={"loss": "not a number"})
    events = [ReportedEvent(at=START, event=PhaseChanged(phase="tokenizing")), ReportedEvent(at=START, event=metrics)]
    store.append_events("job-1", 1, EventBatch(first_seq=0, events=events), START)
    assert [stored.event for stored in store.list_events("job-1")] == [PhaseChanged(phase="tokenizing"), metrics]


def test_thousand_event_batch_keeps_order(store: JobStore) -> None:
    store.create_job(make_job())
    assert store.append_events("job-1", 1, make_batch(0, 1000), START) == 1000
    assert [stored.seq for stored in store.list_events("job-1", limit=2000)] == list(range(1000))
    assert store.list_events("job-1", after=2**63 - 1) == []


def test_deleting_job_removes_everything(store: JobStore) -> None:
    store.create_job(make_job())
    store.append_events("job-1", 1, make_batch(0, 3), START)
    assert store.delete_job("job-1")
    assert store.find_job("job-1") is None
    assert store.list_events("job-1") == []
    assert store.find_heartbeat("job-1") is None
    assert not store.delete_job("job-1")


def test_replaced_dataset_is_read_listed_and_counted_as_it_is_now(store: JobStore) -> None:
    before = make_dataset(status="processing", splits={}, rows_uploaded=0)
    store.create_dataset(before)
    store.create_dataset(make_dataset("dataset_2", created_at=START + timedelta(seconds=1)))
    ready = make_dataset(name="other name")
    for _ in range(2):  # an answer may be lost
        store.replace_dataset(ready)
    assert store.find_dataset("dataset_1") == ready
    assert [row.processed_dataset_id for row in store.list_datasets("local").rows] == ["dataset_2", "dataset_1"]
    assert store.sum_usage("local", STORED).stored_bytes == 400
    assert store.delete_dataset("dataset_1")
    assert store.sum_usage("local", STORED).stored_bytes == 200


def test_only_a_dataset_of_the_same_tenant_is_replaced(store: JobStore) -> None:
    with pytest.raises(NotFound):
        store.replace_dataset(make_dataset())
    assert store.find_dataset("dataset_1") is None
    store.create_dataset(make_dataset(tenant_id="other"))
    with pytest.raises(NotFound):
        store.replace_dataset(make_dataset())
    assert store.find_dataset("dataset_1") == make_dataset(tenant_id="other")
    assert store.list_datasets("local").rows == []


def test_job_of_an_ingestion_round_trips_and_uses_its_dataset(store: JobStore) -> None:
    config = IngestConfig(source="gs://bucket/rows.csv", options=IngestOptions.model_validate({}), limits=IngestLimits())
    job = make_job(training_config=config, job_name="dataset rows")
    assert store.create_job(job) == job
    assert store.find_job(job.job_id) == job
    [row] = store.list_jobs(JobQuery("local", trainer_type="ingest")).rows
    assert (row.summary.trainer_type, row.summary.base_model_id, row.summary.job_name) == ("ingest", "", "dataset rows")
    assert store.list_jobs_using_dataset("dataset_1") == [job.job_id]


def test_dataset_create_page_and_delete(store: JobStore) -> None:
    for n in range(3):
        store.create_dataset(make_dataset(f"dataset_{n}", created_at=START + timedelta(seconds=n)))
    store.create_dataset(make_dataset("dataset_x", tenant_id="other"))
    first = store.list_datasets("local", limit=2)
    second = store.list_datasets("local", limit=2, after=first.next_cursor)
    assert [row.processed_dataset_id for row in first.rows + second.rows] == ["dataset_2", "dataset_1", "dataset_0"]
    assert second.next_cursor is None
    assert store.find_dataset("dataset_1") == make_dataset("dataset_1", created_at=START + timedelta(seconds=1))
    assert store.delete_dataset("dataset_1")
    assert store.find_dataset("dataset_1") is None
    assert not store.delete_dataset("dataset_1")


# --- records of other versions ---------------------------------------------------------------------------------------


def replace_stored_text(store: JobStore, table: str, record_id: str, text: str) -> None:
    """Overwrite a record's JSON behind the store's back, as another version of the service would have written it."""
    match store:
        case FirestoreJobStore():
            client = store._database.client  # pyright: ignore[reportPrivateUsage]
            client.collection(table).document(record_id).update({"record": text})
        case MemoryJobStore():
            records = store._jobs if table == "jobs" else store._datasets  # pyright: ignore[reportPrivateUsage]
            records[record_id] = text
        case SqliteJobStore():
            id_column = "job_id" if table == "jobs" else "dataset_id"
            with store._database.transaction() as db:  # pyright: ignore[reportPrivateUsage]
                db.execute(f"UPDATE {table} SET record = ? WHERE {id_column} = ?", (text, record_id))
        case _:
            raise AssertionError(f"unknown store {store}")


def rename_field(old: str, new: str) -> Callable[[dict[str, object]], dict[str, object]]:
    """A toy migration."""
    return lambda document: {new if name == old else name: value for name, value in document.items()}


def test_old_job_is_migrated_when_read(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "migrations", {0: rename_field("title", "job_name"), 1: lambda document: document})
    job = store.create_job(make_job(job_name="a name"))
    old = rename_field("job_name", "title")(json.loads(job.model_dump_json())) | {"schema_version": 0}
    replace_stored_text(store, "jobs", job.job_id, json.dumps(old))
    assert store.find_job(job.job_id) == job
    assert store.list_queued_jobs(None, 10) == [job]
    renamed = store.replace_job(job.model_copy(update={"job_name": "another"}))  # writes the current form
    monkeypatch.undo()
    assert store.find_job(job.job_id) == renamed


def test_old_dataset_is_migrated_when_read(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "migrations", {0: rename_field("title", "name")})
    dataset = make_dataset()
    store.create_dataset(dataset)
    old = rename_field("name", "title")(json.loads(dataset.model_dump_json())) | {"schema_version": 0}
    replace_stored_text(store, "datasets", dataset.processed_dataset_id, json.dumps(old))
    assert store.find_dataset(dataset.processed_dataset_id) == dataset
    assert store.list_datasets(dataset.tenant_id).rows == [dataset]


def test_record_without_version_is_read(store: JobStore) -> None:
    placement = Placement(launcher="cloud-run", profile="l4", environment="llm")
    job = store.create_job(make_job(placements=(placement,)))
    first = json.loads(job.model_dump_json(exclude={"schema_version", "placements"})) | {"hardware": "l4"}
    replace_stored_text(store, "jobs", job.job_id, json.dumps(first))
    assert store.find_job(job.job_id) == job


def test_record_of_newer_version_is_refused_and_kept(store: JobStore) -> None:
    job, other = store.create_job(make_job()), store.create_job(make_job("job-2"))
    newer = json.dumps(json.loads(job.model_dump_json()) | {"schema_version": 3})
    replace_stored_text(store, "jobs", job.job_id, newer)
    with pytest.raises(RecordTooNew, match="a newer version of Tunesmith wrote this Job record") as excinfo:
        store.find_job(job.job_id)
    assert "deploy" in excinfo.value.hint
    assert store.list_queued_jobs(None, 10) == [other]  # other jobs still run
    replace_stored_text(store, "jobs", job.job_id, job.model_dump_json())
    assert store.find_job(job.job_id) == job


# --- records that cannot be read -------------------------------------------------------------------------------------

DAMAGED_TEXTS = {
    "not JSON": "{",
    "other fields": '{"schema_version":2,"job_id":"job-1"}',
    "nested": '{"schema_version":2,"job_name":' + "[" * 500 + "]" * 500 + "}",
    "an unknown version": '{"schema_version":-5}',
    "migration fails": '{"schema_version":1,"attempts":[1]}',
}


@pytest.mark.parametrize("text", DAMAGED_TEXTS.values(), ids=DAMAGED_TEXTS)
def test_damaged_job_is_listed_skipped_by_work_lists_and_deletable(store: JobStore, text: str) -> None:
    store.create_job(make_job(project_id="p"))
    other = store.create_job(make_job("job-2", created_at=START + timedelta(seconds=1)))
    replace_stored_text(store, "jobs", "job-1", text)
    with pytest.raises(UnreadableRecord) as excinfo:
        store.find_job("job-1")
    assert "DELETE" in excinfo.value.hint
    assert [row.job_id for row in store.list_jobs(JobQuery("local")).rows] == ["job-2", "job-1"]
    for launcher in (None, "fake"):
        assert store.list_queued_jobs(launcher, 1) == [other]  # the limit counts readable jobs
    entry = store.find_job_entry("job-1")
    assert entry is not None
    assert (entry.tenant_id, entry.summary.project_id, entry.summary.status) == ("local", "p", Status.QUEUED)
    assert store.delete_job("job-1")
    assert store.find_job_entry("job-1") is None


def test_many_damaged_jobs_at_the_head_of_a_list_hide_none_behind_them(store: JobStore) -> None:
    for n in range(7):
        store.create_job(make_job(f"job-{n}", created_at=START + timedelta(seconds=n), status=Status.PREPARING, attempts=(make_attempt(),)))
        if n not in (4, 6):
            replace_stored_text(store, "jobs", f"job-{n}", "{}")
    for launcher in (None, "fake"):
        assert [job.job_id for job in store.list_active_jobs(launcher, 2)] == ["job-4", "job-6"]
        assert [job.job_id for job in store.list_active_jobs(launcher, 1)] == ["job-4"]


def test_damaged_dataset_is_skipped_and_deletable(store: JobStore) -> None:
    for n in range(3):
        store.create_dataset(make_dataset(f"dataset_{n}", created_at=START + timedelta(seconds=n)))
    replace_stored_text(store, "datasets", "dataset_1", "{}")
    with pytest.raises(UnreadableRecord):
        store.find_dataset("dataset_1")
    assert [row.processed_dataset_id for row in store.list_datasets("local").rows] == ["dataset_2", "dataset_0"]
    first = store.list_datasets("local", limit=2)
    assert first.next_cursor is not None
    assert [row.processed_dataset_id for row in store.list_datasets("local", after=first.next_cursor).rows] == ["dataset_0"]
    assert store.find_dataset_tenant("dataset_1") == "local"
    assert store.delete_dataset("dataset_1")
    assert store.find_dataset_tenant("dataset_1") is None


@pytest.mark.parametrize(
    "value",
    [10**400, "\ud800", 2**63],
    ids=["long integer", "half a surrogate pair", "65 bits"],
)
def test_job_that_could_not_be_read_back_is_not_stored(store: JobStore, value: Any) -> None:
    """`model_construct` stands for a defect elsewhere: validation would have refused these values."""
    grader = JsonSchemaGrader.model_construct(type="json_schema", name="shape", weight=1.0, json_schema={"const": value})
    config = make_grpo_config().model_copy(update={"reward_config": [grader]})
    job = make_job(training_config=config)
    with pytest.raises(InvalidRequest):
        store.create_job(job)
    assert store.find_job(job.job_id) is None
    stored = store.create_job(make_job())
    with pytest.raises(InvalidRequest):
        store.replace_job(stored.model_copy(update={"training_config": config}))
    assert store.find_job(job.job_id) == stored


def test_deeply_nested_job_is_not_stored(store: JobStore) -> None:
    nested: Any = 1
    for _ in range(230):
        nested = {"a": nested}
    grader = JsonSchemaGrader.model_construct(type="json_schema", name="shape", weight=1.0, json_schema=nested)
    with pytest.raises(InvalidRequest, match="recursion limit"):
        store.create_job(make_job(training_config=make_grpo_config().model_copy(update={"reward_config": [grader]})))
    assert store.find_job("job-1") is None


def test_job_larger_than_the_limit_is_not_stored(store: JobStore) -> None:
    with pytest.raises(TooLarge):
        store.create_job(make_job(wandb_url="x" * MAX_RECORD_BYTES))


def store_damaged_event(store: JobStore, job_id: str, text: str) -> None:
    """Replace the JSON of a job's first event behind the store's back."""
    match store:
        case FirestoreJobStore():
            chunks = store._jobs.document(job_id).collection("events")  # pyright: ignore[reportPrivateUsage]
            (first, *_) = chunks.order_by("__name__").get()
            first.reference.update({"events": f'[{{"at":"{START.isoformat()}","seq":0,"event":{text}}}]'})
        case MemoryJobStore():
            rows = store._events[job_id]  # pyright: ignore[reportPrivateUsage]
            rows[0] = replace(rows[0], text=text)
        case SqliteJobStore():
            with store._database.transaction() as db:  # pyright: ignore[reportPrivateUsage]
                db.execute("UPDATE events SET event = ? WHERE cursor = (SELECT MIN(cursor) FROM events)", (text,))
        case _:
            raise AssertionError(f"unknown store {store}")


@pytest.mark.parametrize(
    "text",
    [
        '{"type":"metrics","step":0,"values":{"loss":NaN}}',
        '{"type":"metrics","step":99999999999999999999,"values":{}}',
        '{"type":"new"}',
        "[]",
    ],
)
def test_event_that_cannot_be_read_is_skipped(store: JobStore, text: str) -> None:
    store.create_job(make_job())
    store.append_events("job-1", 1, make_batch(0, 1), START)
    store.append_events("job-1", 1, make_batch(1, 2), START)
    store_damaged_event(store, "job-1", text)
    assert [stored.seq for stored in store.list_events("job-1")] == [1, 2]
    assert [stored.seq for stored in store.list_events("job-1", limit=1)] == [1]


# --- limits of events ------------------------------------------------------------------------------------------------


def make_event_batch(*events: Event, first_seq: int = 0) -> EventBatch:
    return EventBatch(first_seq=first_seq, events=[ReportedEvent(at=START, event=event) for event in events])


def test_event_that_is_too_long_is_replaced_by_a_warning(store: JobStore) -> None:
    store.create_job(make_job())
    too_long = make_event_batch(
        WarningRaised(code="x", message="y" * MAX_EVENT_BYTES),
        SamplesGenerated(when="after", step=1, samples=(Sample(prompt="p", text="é" * (MAX_SAMPLES_EVENT_BYTES // 2)),)),
        SamplesGenerated(when="after", step=1, samples=(Sample(prompt="p", text="t" * (MAX_SAMPLES_EVENT_BYTES - 1000)),)),
    )
    assert store.append_events("job-1", 1, too_long, START) == 3
    first, second, third = (stored.event for stored in store.list_events("job-1"))
    assert [event.code for event in (first, second) if isinstance(event, WarningRaised)] == ["event_too_large"] * 2
    assert third == too_long.events[2].event


def test_page_of_events_ends_at_a_number_of_bytes(store: JobStore) -> None:
    store.create_job(make_job())
    for n in range(6):
        store.append_events("job-1", 1, make_event_batch(WarningRaised(code="x", message="y" * 10_000), first_seq=n), START)
    seqs: list[int] = []
    cursor, pages = 0, 0
    while page := store.list_events("job-1", cursor, max_bytes=25_000):
        seqs += [stored.seq for stored in page]
        cursor, pages = page[-1].cursor, pages + 1
    assert (seqs, pages) == (list(range(6)), 2)
    assert len(store.list_events("job-1", max_bytes=1)) == 1


def test_last_cursor_is_that_of_the_newest_event(store: JobStore) -> None:
    job = store.create_job(make_job())
    assert store.find_last_cursor("job-1") == 0
    store.append_events("job-1", 1, make_batch(0, 3), START)
    assert store.find_last_cursor("job-1") == store.list_events("job-1")[-1].cursor
    store.replace_job(job, [StatusChanged(status=Status.FAILED, attempt=1)])
    assert store.find_last_cursor("job-1") == store.list_events("job-1")[-1].cursor
    assert store.find_last_cursor("job-2") == 0


def test_events_beyond_the_limit_of_a_job_are_dropped_with_one_warning(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store_rules, "MAX_JOB_EVENTS", 4)
    job = store.create_job(make_job())
    for attempt in (1, 2):  # the limit is that of the job, not of an attempt
        for first_seq in (0, 3):
            assert store.append_events("job-1", attempt, make_batch(first_seq, 3), START) == first_seq + 3
    assert [(stored.attempt, stored.event.type) for stored in store.list_events("job-1")] == [(1, "metrics")] * 4 + [(1, "warning")]
    store.append_events("job-1", 2, make_event_batch(PhaseChanged(phase="training"), first_seq=6), START)
    store.replace_job(job, [StatusChanged(status=Status.FAILED, attempt=1)])
    assert [stored.event.type for stored in store.list_events("job-1")][-1] == "status"
    heartbeat = store.find_heartbeat("job-1")
    assert heartbeat is not None
    assert heartbeat.dropped_events == 9  # the warning took the place of one


def test_events_beyond_the_bytes_of_a_job_are_dropped(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store_rules, "MAX_JOB_EVENT_BYTES", 10_000)
    store.create_job(make_job())
    for n in range(5):
        store.append_events("job-1", 1, make_event_batch(WarningRaised(code="x", message="y" * 3000), first_seq=n), START)
    phase = make_event_batch(PhaseChanged(phase="exporting"), first_seq=5)
    store.append_events("job-1", 1, phase, START)
    codes = [stored.event.code if isinstance(stored.event, WarningRaised) else stored.event.type for stored in store.list_events("job-1")]
    assert codes == ["x", "x", "x", "too_many_events", "phase"]
    store.delete_job("job-1")
    assert store.find_heartbeat("job-1") is None


def test_ping_succeeds(store: JobStore) -> None:
    store.ping()


def test_database_of_other_version_is_rejected(tmp_path: Path) -> None:
    SqliteJobStore(tmp_path / "jobs.db").close()
    with sqlite3.connect(tmp_path / "jobs.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(Unavailable, match="another version"):
        SqliteJobStore(tmp_path / "jobs.db")


def test_locked_database_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.adapters.jobstores.sqlite_database.BUSY_TIMEOUT_S", 0.05)
    store = SqliteJobStore(tmp_path / "jobs.db")
    other = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable):
        store.create_job(make_job())
    assert store.find_job("job-1") is None  # reads do not wait for the lock
    other.execute("ROLLBACK")
    store.create_job(make_job())  # it recovers
    other.close()
    store.close()


def test_committed_job_survives_without_close(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path / "jobs.db")
    store.create_job(make_job())
    another = SqliteJobStore(tmp_path / "jobs.db")  # as after a kill: the first store was not closed
    assert another.find_job("job-1") == make_job()
    with sqlite3.connect(tmp_path / "jobs.db") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()
    another.close()
    store.close()


QUERIES = [
    JobQuery("local"),
    JobQuery("local", statuses=(Status.FAILED,)),
    JobQuery("local", statuses=(Status.FAILED, Status.QUEUED, Status.PAUSED)),
    JobQuery("local", project_id="p"),
    JobQuery("local", project_id="p", statuses=(Status.FAILED,)),
    JobQuery("local", project_id="p", statuses=(Status.FAILED, Status.QUEUED)),
    JobQuery("local", modality="vision"),
    JobQuery("local", trainer_type="dpo"),
    JobQuery("local", trainer_type="dpo", statuses=(Status.FAILED,)),
    JobQuery("local", modality="text", statuses=(Status.FAILED,)),
    JobQuery("local", project_id="p", trainer_type="sft"),
    JobQuery("local", project_id="p", search="name", created_by="ann"),
    JobQuery("local", modality="text", search="name"),
    JobQuery("local", after=encode_cursor("2026-01-01", "x")),
    JobQuery("local", created_from=START, created_before=START + timedelta(days=1)),
]
QUERIES_BY_TERM = [
    JobQuery("local", search="name"),
    JobQuery("local", search="name", after=encode_cursor("2026-01-01", "x")),
    JobQuery("local", created_by="ann"),
    JobQuery("local", created_by="ann", search="name"),
    JobQuery("local", metadata=(("a", "b"), ("c", "d")), created_by="ann", statuses=(Status.FAILED, Status.QUEUED), project_id="p"),
]


def name_filters(query: JobQuery) -> str:
    """The filters of a query, as a test's name."""
    return " ".join(f"{name}={value}" for name, value in asdict(query).items() if value and name not in ("tenant_id", "limit"))


@pytest.mark.parametrize("query", QUERIES_BY_TERM, ids=name_filters)
def test_jobs_are_read_by_term_or_name_in_order(tmp_path: Path, query: JobQuery) -> None:
    store = SqliteJobStore(tmp_path / "jobs.db")
    statement = select_page(query)
    plan = [row[3] for row in store._database.read(f"EXPLAIN QUERY PLAN {statement.sql}", *statement.values)]  # pyright: ignore[reportPrivateUsage]
    found = next(step for step in plan if " found " in step)
    assert found.startswith("SEARCH found USING PRIMARY KEY (tenant_id=?")
    assert "(term=?" in found or ("term=?" in found) == (query.search is None or query.created_by is not None)
    assert ("created_at" in found) == (query.after is not None)
    assert [step for step in plan if "TEMP B-TREE" in step or (step.startswith("SCAN") and step != "SCAN page")] == []
    store.close()


@pytest.mark.parametrize(
    "query",
    QUERIES,
    ids=name_filters,
)
def test_list_queries_use_an_index(tmp_path: Path, query: JobQuery, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteJobStore(tmp_path / "jobs.db")
    queries: list[tuple[str, tuple[object, ...]]] = []
    read = store._database.iter_rows  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(store._database, "iter_rows", lambda sql, *values: queries.append((sql, values)) or read(sql, *values))
    store.list_jobs(query)
    store.list_queued_jobs(None, 5)
    store.list_active_jobs(None, 5)
    store.list_jobs_using_dataset("d")
    for sql, values in queries:
        plan = " ".join(row[3] for row in read(f"EXPLAIN QUERY PLAN {sql}", *values))
        assert "USING" in plan
        assert "INDEX jobs_" in plan or "mixed USING PRIMARY KEY" in plan
        assert "TEMP B-TREE" not in plan
    store.close()


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (JobQuery("local", project_id="p", trainer_type="sft", modality="text"), "jobs_by_project "),
        (JobQuery("local", statuses=(Status.QUEUED,), modality="text"), "jobs_by_status "),
        (JobQuery("local", trainer_type="dpo", statuses=(Status.FAILED,), modality="text"), "jobs_by_trainer_and_status "),
    ],
    ids=["project", "status", "trainer and status"],
)
def test_most_selective_filter_chooses_index(tmp_path: Path, query: JobQuery, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteJobStore(tmp_path / "jobs.db")
    read = store._database.read  # pyright: ignore[reportPrivateUsage]
    plans: list[str] = []

    def explained(sql: str, *values: object) -> list[tuple[object, ...]]:
        plans.append(" ".join(row[3] for row in read(f"EXPLAIN QUERY PLAN {sql}", *values)))
        return read(sql, *values)

    monkeypatch.setattr(store._database, "read", explained)
    store.list_jobs(query)
    assert index in plans[0]
    store.close()
