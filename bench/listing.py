"""B2: a page of 50 jobs among 10,000, 100,000 and 1,000,000, plain and filtered, and the newest 50 runs at the peers.

Rows are copies of one record, written straight into each server's SQLite file while it is stopped: through the HTTP API a
million would take most of an hour, and the page cannot tell. All jobs are final; a hundred projects share them. A million
jobs take some 6 GB of the temporary folder for a while.
"""

import itertools
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bench.figures import Goal, Measurement, at_least, at_most
from bench.http import LoadResult, Request, request_json, run_load
from bench.peers import PEERS, Peer, clone_runs, make_run_requests, peer_server
from bench.scene import BenchmarkContext
from bench.servers import Server, ServerUnavailable, run_service
from bench.standin import make_stub_trainer
from schema.job import Job, Status
from schema.requests import TRAIN_REQUEST_EXAMPLE
from schema.training import SftConfig
from service.adapters.jobstores.cursors import encode_cursor
from service.adapters.jobstores.sqlite import SqliteJobStore

NAME = "listing"
SIZES = (10_000, 100_000, 1_000_000)
PEER_ROWS = 100_000
PAGE = 50
CLIENTS = 4
REQUESTS = 2000
PAGES = 200  # of each filter, one client: what one page costs, not what the machine can bear
PAGES_TIMEOUT_S = 20.0
ROUNDS = 3
PEER_REQUESTS = 200
PEER_TIMEOUT_S = 20.0
START = datetime(2026, 1, 1, tzinfo=UTC)
RARE_PROJECT_ID = "a-needle"  # a project of a single job, the oldest
# No job is queued or at work: the reconciler would look after it while we measure.
STATUSES = (Status.COMPLETED,) * 8 + (Status.FAILED, Status.CANCELLED)
FILTERS = {
    "no filter": "",
    "status=failed": "&status=failed",
    "status=queued (none)": "&status=queued",
    "project_id": "&project_id=project-7",
    "project_id of one job": f"&project_id={RARE_PROJECT_ID}",
    "project_id and status": "&project_id=project-7&status=failed",
    "project_id of one job and trainer_type": f"&project_id={RARE_PROJECT_ID}&trainer_type=sft",
    "status (none) and modality (all)": "&status=queued&modality=text",
    "modality (none) and trainer_type (all)": "&modality=vision&trainer_type=sft",
    "modality=text (all)": "&modality=text",
    "trainer_type=sft (all)": "&trainer_type=sft",
    "modality=vision (none)": "&modality=vision",
    "trainer_type=dpo (none)": "&trainer_type=dpo",
    "status and trainer_type (none)": "&status=completed&trainer_type=dpo",
}
MIDDLE_PAGE = "a page from the middle"


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Speed at 100,000, then how little the number of rows matters, then the peers."""
    busy: dict[int, LoadResult] = {}
    page_ms: dict[int, dict[str, float]] = {}
    for rows in SIZES:
        busy[rows], page_ms[rows] = await _measure_service(context, rows)
    small, large = page_ms[SIZES[0]], page_ms[SIZES[-1]]
    among = f"{SIZES[1]:,}"
    figures = [
        Measurement(NAME, f"GET /jobs among {among}, p99", busy[SIZES[1]].latency_ms(99), "ms", at_most(20), f"{CLIENTS} clients"),
        Measurement(NAME, f"GET /jobs among {among}", busy[SIZES[1]].requests_per_s, "/s", note=f"{CLIENTS} clients"),
        *(_growth_measurement(name, small[name], large[name]) for name in small),
    ]
    if not context.with_peers:
        return figures
    peers = [await _measure_peer(context, peer) for peer in PEERS]
    best = max((figure.value or 0.0 for figure in peers), default=0.0)
    ratio = busy[SIZES[1]].requests_per_s / best if best else None
    return [*figures, *peers, Measurement(NAME, "times the best peer", ratio, "×", at_least(10))]


def fill_database(database: Path, rows: int) -> None:
    """A database of the service with that many jobs."""
    SqliteJobStore(database).close()
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA synchronous = OFF")  # while it is filled
        with db:
            db.executemany("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _make_job_rows(rows))
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _make_job_rows(rows: int) -> Iterator[tuple[object, ...]]:
    job = Job(
        job_id="the-id",
        tenant_id="local",
        job_name="a job",
        processed_dataset_id="dataset_1",
        training_config=SftConfig.model_validate(TRAIN_REQUEST_EXAMPLE["training_config"]),
        status=Status.COMPLETED,
        created_at=START,
        updated_at=START,
        status_changed_at=START,
    )
    record = job.model_dump_json()
    config = job.training_config
    for number in range(rows):
        job_id = f"training_bench_gemma-3-270m_{number:012x}"
        status = STATUSES[number // 100 % len(STATUSES)]  # every project has every status
        created_at = (START + timedelta(seconds=number)).isoformat(timespec="microseconds")
        project_id = RARE_PROJECT_ID if number == 0 else f"project-{number % 100}"
        kinds = (config.base_model_id, status, config.modality, config.trainer_type)
        own = record.replace("the-id", job_id)
        yield (job_id, "local", project_id, "a job", *kinds, "dataset_1", created_at, status.is_active, status.is_final, 0, own)


async def _measure_service(context: BenchmarkContext, rows: int) -> tuple[LoadResult, dict[str, float]]:
    """The plain page from several clients, and the median milliseconds of a page by filter from one."""
    home = context.folder / f"home-{rows}"
    fill_database(home / "tunesmith.db", rows)
    async with run_service(home, make_stub_trainer(context.folder / "trainer")) as server:
        await _load_pages(server, "", CLIENTS, PAGES)
        rounds = [await _load_pages(server, "", CLIENTS, REQUESTS) for _ in range(ROUNDS)]
        queries = {**FILTERS, MIDDLE_PAGE: await _middle_page_query(server, rows)}
        page_ms = {name: (await _load_pages(server, query, 1, PAGES)).latency_ms(50) for name, query in queries.items()}
    by_p99 = sorted(rounds, key=lambda done: done.latency_ms(99))
    (home / "tunesmith.db").unlink()
    return by_p99[ROUNDS // 2], page_ms


async def _load_pages(server: Server, query: str, clients: int, requests: int) -> LoadResult:
    done = await run_load(server.url, itertools.repeat(Request("GET", f"/jobs?limit={PAGE}{query}"), requests), clients, PAGES_TIMEOUT_S)
    if done.rejected:
        raise ServerUnavailable(f"GET /jobs{query} was refused: {dict(done.rejected)}")
    return done


async def _middle_page_query(server: Server, rows: int) -> str:
    """A cursor is a place, not a number of rows: any page may be asked for without those before it."""
    number = rows // 2
    created_at = (START + timedelta(seconds=number)).isoformat(timespec="microseconds")
    query = f"&cursor={encode_cursor(created_at, f'training_bench_gemma-3-270m_{number:012x}')}"
    page = await request_json(server.url, Request("GET", f"/jobs?limit={PAGE}{query}"))
    assert len(page["jobs"]) == PAGE
    return query


def _growth_measurement(name: str, small_ms: float, large_ms: float) -> Measurement:
    goal: Goal = at_most(1.5)
    return Measurement(
        NAME, f"{SIZES[-1]:,} against {SIZES[0]:,}: {name}", large_ms / small_ms, "×", goal, f"{small_ms:.2f} → {large_ms:.2f} ms"
    )


async def _measure_peer(context: BenchmarkContext, peer: Peer) -> Measurement:
    """The newest 50 among as many rows as ours had; the better of one client and several."""
    what = f"{peer.name}, newest 50 among {PEER_ROWS:,}"
    home = context.folder / peer.name.replace(" ", "-")
    try:
        async with peer_server(peer, home) as server:
            await request_json(server.url, next(await make_run_requests(peer, server)))
        clone_runs(peer, home, PEER_ROWS)
        async with peer_server(peer, home) as server:
            found = await request_json(server.url, peer.page_request)
            rows = len(found.get("runs", []) if isinstance(found, dict) else found)
            if rows != PAGE:
                raise ServerUnavailable(f"it shows {rows} of its {PEER_ROWS:,} runs on a page of {PAGE}; that cannot be compared")
            requests = [(clients, itertools.repeat(peer.page_request, PEER_REQUESTS)) for clients in (1, CLIENTS)]
            loads = [(clients, await run_load(server.url, pages, clients, PEER_TIMEOUT_S)) for clients, pages in requests]
    except (ServerUnavailable, ValueError, sqlite3.Error) as error:
        return Measurement(NAME, what, None, "/s", note=str(error))
    words = [f"{clients} clients: {done.requests_per_s:.3g}/s, p99 {done.latency_ms(99):.0f} ms" for clients, done in loads]
    return Measurement(NAME, what, max(done.requests_per_s for _, done in loads), "/s", note="; ".join(words))
