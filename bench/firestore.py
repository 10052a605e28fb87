"""B8: the job store on Firestore's emulator: pages of 50 among 10,000 jobs, and 200 attempts that report concurrently.

The time is that of the store, of Google's client and of the emulator, which has no indexes and reads every job for each page.
Firestore itself reads a page from an index, over a network.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from google.cloud.firestore import Client

from bench.context import BenchmarkContext
from bench.figures import Measurement, at_most, exactly, percentile
from infra.loopback.firestore import run_firestore_emulator
from schema.events import EventBatch, MetricsLogged, ReportedEvent
from schema.job import Job, Status
from schema.placement import Placement
from schema.requests import TRAIN_REQUEST_EXAMPLE
from schema.training import SftConfig
from service.adapters.jobstores.cursors import encode_cursor
from service.adapters.jobstores.firestore.documents import build_job_fields
from service.adapters.jobstores.firestore.store import FirestoreJobStore
from service.core.errors import Unavailable
from service.core.job_lists import JobQuery
from storage.deadline import deadline

NAME = "firestore"
JOBS = 10_000
JOBS_PER_COMMIT = 400
PAGE = 50
PAGES = 100  # per filter
WRITERS = 200
BATCHES = 5  # per writer
EVENTS = 20  # per batch
CALLER_TIMEOUT_S = 4.5  # as in the API
MAX_TRIES = 10  # an attempt's reporter retries for hours
START = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = SftConfig.model_validate(TRAIN_REQUEST_EXAMPLE["training_config"])
PLACEMENT = Placement(launcher="local", profile="cpu", environment="llm")
STATUSES = (Status.COMPLETED,) * 8 + (Status.FAILED, Status.CANCELLED)
FILTERS = {
    "no filter": JobQuery("local"),
    "status": JobQuery("local", statuses=(Status.FAILED,)),
    "project_id": JobQuery("local", project_id="project-7"),
    "project_id and status": JobQuery("local", project_id="project-7", statuses=(Status.FAILED,)),
    "every filter": JobQuery("local", statuses=(Status.COMPLETED,), project_id="project-7", modality="text", trainer_type="sft"),
    "status (none)": JobQuery("local", statuses=(Status.QUEUED,)),
    "a page from the middle": JobQuery("local", after=encode_cursor((START + timedelta(seconds=JOBS // 2)).isoformat(), "x")),
}


async def measure(_: BenchmarkContext) -> list[Measurement]:
    """Measure pages before reports: the emulator also scans events, which would slow the pages."""
    with run_firestore_emulator() as host:
        os.environ["FIRESTORE_EMULATOR_HOST"] = host  # read by Google's client
        try:
            return await asyncio.to_thread(_measure)
        finally:
            del os.environ["FIRESTORE_EMULATOR_HOST"]


def _measure() -> list[Measurement]:
    store = FirestoreJobStore(project_id="bench")
    try:
        return [*_measure_pages(store), *_measure_reports(store)]
    finally:
        store.close()


def _measure_pages(store: FirestoreJobStore) -> Iterator[Measurement]:
    _insert_jobs(Client(project="bench"))
    for _ in range(PAGES):  # warm up the emulator's Java
        store.list_jobs(JobQuery("local"))
    for name, query in FILTERS.items():
        times_ms = [_time_page_ms(store, query) for _ in range(PAGES)]
        note = f"p50 {percentile(times_ms, 50):.1f} ms"
        yield Measurement(NAME, f"a page of {PAGE} among {JOBS:,}, p95: {name}", percentile(times_ms, 95), "ms", at_most(100), note)


def _insert_jobs(client: Client) -> None:
    """Write the documents that the store would write for these jobs, but many in one commit."""
    for first in range(0, JOBS, JOBS_PER_COMMIT):
        batch = client.batch()
        for number in range(first, min(first + JOBS_PER_COMMIT, JOBS)):
            job = _make_job(number)
            fields = {name: value for name, value in build_job_fields(job, []).items() if value is not None}
            batch.set(client.collection("jobs").document(job.job_id), fields)
        batch.commit()


def _make_job(number: int) -> Job:
    created_at = START + timedelta(seconds=number)
    return Job(
        job_id=f"training_bench_gemma-3-270m_{number:012x}",
        tenant_id="local",
        project_id=f"project-{number % 100}",
        job_name="a job",
        processed_dataset_id="dataset_1",
        training_config=CONFIG,
        placements=(PLACEMENT,),
        status=STATUSES[number // 100 % len(STATUSES)],  # every project has every status
        created_at=created_at,
        updated_at=created_at,
        status_changed_at=created_at,
    )


def _time_page_ms(store: FirestoreJobStore, query: JobQuery) -> float:
    started_at = time.perf_counter()
    store.list_jobs(query)
    return (time.perf_counter() - started_at) * 1000


def _measure_reports(store: FirestoreJobStore) -> list[Measurement]:
    started_at = time.perf_counter()
    with ThreadPoolExecutor(WRITERS) as pool:
        reports = [report for writer in pool.map(lambda number: _append_batches(store, number), range(WRITERS)) for report in writer]
    elapsed_s = time.perf_counter() - started_at
    expected = Counter({(number, seq): 1 for number in range(WRITERS) for seq in range(BATCHES * EVENTS)})
    stored = Counter((number, row.seq) for number in range(WRITERS) for row in store.list_events(f"job-{number}"))
    load = f"{WRITERS} concurrent writers, {BATCHES} batches of {EVENTS} events each"
    retries = sum(report.retries for report in reports)
    latencies_ms = [report.elapsed_ms for report in reports]
    return [
        Measurement(NAME, f"{load}: events lost", (expected - stored).total(), "events", exactly(0), f"{expected.total():,} were sent"),
        Measurement(NAME, f"{load}: events duplicated", (stored - expected).total(), "events", exactly(0)),
        Measurement(NAME, f"{load}: a batch, p95", percentile(latencies_ms, 95), "ms", note=f"{retries} retries"),
        Measurement(NAME, f"{load}: total rate", expected.total() / elapsed_s, "events/s"),
    ]


@dataclass(frozen=True)
class _AppendResult:
    """The outcome of one stored batch."""

    elapsed_ms: float
    retries: int


def _append_batches(store: FirestoreJobStore, number: int) -> list[_AppendResult]:
    return [_append_with_retry(store, f"job-{number}", batch * EVENTS) for batch in range(BATCHES)]


def _append_with_retry(store: FirestoreJobStore, job_id: str, first_seq: int) -> _AppendResult:
    now = datetime.now(UTC)
    events = [ReportedEvent(at=now, event=MetricsLogged(step=first_seq + n, values={"loss": 1.0})) for n in range(EVENTS)]
    started_at = time.perf_counter()
    for retries in range(MAX_TRIES):
        with suppress(Unavailable), deadline(CALLER_TIMEOUT_S):
            store.append_events(job_id, 1, EventBatch(first_seq=first_seq, events=events), now)
            return _AppendResult((time.perf_counter() - started_at) * 1000, retries)
    raise RuntimeError(f"{job_id} could not store a batch in {MAX_TRIES} tries")
