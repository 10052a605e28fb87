"""B8: the job store on Firestore's emulator: pages of 50 among 10,000 jobs, and 200 attempts that report at once.

What is measured is our own work, Google's client and the emulator, which has no indexes: it walks over every job for each page.
Firestore itself reads a page along an index, over a network.
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

from bench.figures import Figure, at_most, exactly, percentile
from bench.scene import Scene
from infra.loopback.firestore import firestore_emulator
from schema.events import EventBatch, Metrics, ReportedEvent
from schema.job import Job, Status
from schema.requests import SEED_EXAMPLE
from schema.training import SftConfig
from service.adapters.jobstores.cursors import encode_cursor
from service.adapters.jobstores.firestore import FirestoreJobStore, fields_of_job
from service.core.errors import Unavailable
from service.core.ports import JobQuery
from storage.patience import patience

NAME = "firestore"
JOBS = 10_000
JOBS_PER_COMMIT = 400
PAGE = 50
PAGES = 100  # of each filter
WRITERS = 200
BATCHES = 5  # of each writer
EVENTS = 20  # of each batch
CALLER_WAITS_S = 4.5  # as in the API
TRIES = 10  # an attempt's reporter goes on for hours
START = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = SftConfig.model_validate(SEED_EXAMPLE["training_config"])
STATUSES = (Status.COMPLETED,) * 8 + (Status.FAILED, Status.CANCELLED)
FILTERS = {
    "no filter": JobQuery("local"),
    "status": JobQuery("local", status=Status.FAILED),
    "project_id": JobQuery("local", project_id="project-7"),
    "project_id and status": JobQuery("local", project_id="project-7", status=Status.FAILED),
    "every filter": JobQuery("local", status=Status.COMPLETED, project_id="project-7", modality="text", trainer_type="sft"),
    "status (none)": JobQuery("local", status=Status.QUEUED),
    "a page from the middle": JobQuery("local", after=encode_cursor((START + timedelta(seconds=JOBS // 2)).isoformat(), "x")),
}


async def measure(_: Scene) -> list[Figure]:
    """Pages first, for the emulator walks over events, too."""
    with firestore_emulator() as host:
        os.environ["FIRESTORE_EMULATOR_HOST"] = host  # read by Google's client
        try:
            return await asyncio.to_thread(_measure)
        finally:
            del os.environ["FIRESTORE_EMULATOR_HOST"]


def _measure() -> list[Figure]:
    store = FirestoreJobStore(project_id="bench")
    try:
        return [*_pages(store), *_reports(store)]
    finally:
        store.close()


def _pages(store: FirestoreJobStore) -> Iterator[Figure]:
    _fill(Client(project="bench"))
    for _ in range(PAGES):  # the emulator's Java warms up
        store.page_jobs(JobQuery("local"))
    for name, query in FILTERS.items():
        took_ms = [_page_ms(store, query) for _ in range(PAGES)]
        note = f"p50 {percentile(took_ms, 50):.1f} ms"
        yield Figure(NAME, f"a page of {PAGE} among {JOBS:,}, p95: {name}", percentile(took_ms, 95), "ms", at_most(100), note)


def _fill(client: Client) -> None:
    """As many jobs as the store would have written, many in one commit."""
    for first in range(0, JOBS, JOBS_PER_COMMIT):
        batch = client.batch()
        for number in range(first, min(first + JOBS_PER_COMMIT, JOBS)):
            job = _job(number)
            fields = {name: value for name, value in fields_of_job(job, []).items() if value is not None}
            batch.set(client.collection("jobs").document(job.job_id), fields)
        batch.commit()


def _job(number: int) -> Job:
    created_at = START + timedelta(seconds=number)
    return Job(
        job_id=f"training_bench_gemma-3-270m_{number:012x}",
        tenant_id="local",
        project_id=f"project-{number % 100}",
        job_name="a job",
        processed_dataset_id="dataset_1",
        training_config=CONFIG,
        status=STATUSES[number // 100 % len(STATUSES)],  # every project has every status
        created_at=created_at,
        updated_at=created_at,
        status_changed_at=created_at,
    )


def _page_ms(store: FirestoreJobStore, query: JobQuery) -> float:
    began = time.perf_counter()
    store.page_jobs(query)
    return (time.perf_counter() - began) * 1000


def _reports(store: FirestoreJobStore) -> list[Figure]:
    began = time.perf_counter()
    with ThreadPoolExecutor(WRITERS) as pool:
        reports = [report for writer in pool.map(lambda number: _report(store, number), range(WRITERS)) for report in writer]
    took_s = time.perf_counter() - began
    expected = Counter({(number, seq): 1 for number in range(WRITERS) for seq in range(BATCHES * EVENTS)})
    kept = Counter((number, stored.seq) for number in range(WRITERS) for stored in store.page_events(f"job-{number}"))
    what = f"{WRITERS} writers at once, {BATCHES} batches of {EVENTS} events each"
    again = sum(report.refused for report in reports)
    waits_ms = [report.took_ms for report in reports]
    return [
        Figure(NAME, f"{what}: events lost", (expected - kept).total(), "events", exactly(0), f"{expected.total():,} were sent"),
        Figure(NAME, f"{what}: events doubled", (kept - expected).total(), "events", exactly(0)),
        Figure(NAME, f"{what}: a batch, p95", percentile(waits_ms, 95), "ms", note=f"{again} were told to try again"),
        Figure(NAME, f"{what}: together", expected.total() / took_s, "events/s"),
    ]


@dataclass(frozen=True)
class _Report:
    """One batch that was kept in the end."""

    took_ms: float
    refused: int


def _report(store: FirestoreJobStore, number: int) -> list[_Report]:
    return [_keep(store, f"job-{number}", batch * EVENTS) for batch in range(BATCHES)]


def _keep(store: FirestoreJobStore, job_id: str, first_seq: int) -> _Report:
    now = datetime.now(UTC)
    events = [ReportedEvent(at=now, event=Metrics(step=first_seq + n, values={"loss": 1.0})) for n in range(EVENTS)]
    began = time.perf_counter()
    for refused in range(TRIES):
        with suppress(Unavailable), patience(CALLER_WAITS_S):
            store.append_events(job_id, 1, EventBatch(first_seq=first_seq, events=events), now)
            return _Report((time.perf_counter() - began) * 1000, refused)
    raise RuntimeError(f"{job_id} could not report in {TRIES} tries")
