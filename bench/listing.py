"""B2: a page of 50 jobs among 10,000, 100,000 and 1,000,000, with and without filters, and the newest 50 runs at the peers.

Rows are copies of one record, written into each server's SQLite file while the server is stopped: a million requests over HTTP would
take most of an hour and give the same pages. All jobs are final, in a hundred projects. A million jobs need about 6 GB of the
temporary folder.
"""

import itertools
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bench.context import BenchmarkContext
from bench.figures import Measurement, at_least, at_most
from bench.http import LoadResult, Request, request_json, run_load
from bench.peers import PEERS, Peer, clone_runs, make_run_requests, peer_server
from bench.servers import Server, ServerUnavailable, run_service
from bench.stub_trainer import make_stub_trainer
from schema.job import Job, Status
from schema.placement import Placement
from schema.requests import TRAIN_REQUEST_EXAMPLE
from schema.training import SftConfig
from service.adapters.jobstores.cursors import encode_cursor
from service.adapters.jobstores.sqlite import SqliteJobStore
from service.core.job_lists import creator_term, pair_term, summarize_job

NAME = "listing"
SIZES = (10_000, 100_000, 1_000_000)
PEER_ROWS = 100_000
PAGE = 50
CLIENTS = 4
REQUESTS = 2000
PAGES = 200  # per filter, one client: the cost of one page, not the capacity of the machine
PAGES_TIMEOUT_S = 20.0
ROUNDS = 3
PEER_REQUESTS = 200
PEER_TIMEOUT_S = 20.0
START = datetime(2026, 1, 1, tzinfo=UTC)
RARE_PROJECT_ID = "project-with-one-job"  # the oldest job
PLACEMENT = Placement(launcher="local", profile="cpu", environment="llm")
JOB = Job(
    job_id="the-id",
    tenant_id="local",
    created_by="local",
    job_name="a job",
    processed_dataset_id="dataset_1",
    training_config=SftConfig.model_validate(TRAIN_REQUEST_EXAMPLE["training_config"]),
    placements=(PLACEMENT,),
    status=Status.COMPLETED,
    created_at=START,
    updated_at=START,
    status_changed_at=START,
)
SUMMARY = summarize_job(JOB).model_dump(mode="json", exclude_defaults=True)
# No job is active: the reconciler would work on it during the measurement.
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
    "two statuses": "&status=failed&status=cancelled",
    "search (all)": "&search=job",
    "a pair of one job": "&metadata=run=0",
    "created_by (all) and status": "&created_by=me&status=failed",
}
# These read an entry of every job, so that they grow with the number of jobs.
SCANS = {
    "search (none)": "&search=nothing",
    "the end of an id": "&search=%E2%80%A600000000",
    "counts": "&limit=1&counts=true",
    "counts of a project": "&limit=1&counts=true&project_id=project-7",
}
MIDDLE_PAGE = "a page from the middle"


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Measure the speed at 100,000 jobs, its growth with the number of jobs, and the peers."""
    loads: dict[int, LoadResult] = {}
    page_ms: dict[int, dict[str, float]] = {}
    for rows in SIZES:
        loads[rows], page_ms[rows] = await _measure_service(context, rows)
    small, large = page_ms[SIZES[0]], page_ms[SIZES[-1]]
    medium = loads[SIZES[1]]
    figures = [
        Measurement(NAME, f"GET /jobs among {SIZES[1]:,}, p99", medium.latency_ms(99), "ms", at_most(20), f"{CLIENTS} clients"),
        Measurement(NAME, f"GET /jobs among {SIZES[1]:,}", medium.requests_per_s, "/s", note=f"{CLIENTS} clients"),
        *(_growth_measurement(name, small[name], large[name]) for name in small if name not in SCANS),
        *(Measurement(NAME, f"GET /jobs among {SIZES[1]:,}: {name}", page_ms[SIZES[1]][name], "ms", at_most(200)) for name in SCANS),
    ]
    if not context.with_peers:
        return figures
    peers = [await _measure_peer(context, peer) for peer in PEERS]
    best = max((figure.value or 0.0 for figure in peers), default=0.0)
    ratio = medium.requests_per_s / best if best else None
    return [*figures, *peers, Measurement(NAME, "times the best peer", ratio, "×", at_least(10))]


def fill_database(database: Path, rows: int) -> None:
    """Create a database of the service with this many jobs."""
    SqliteJobStore(database).close()
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA synchronous = OFF")  # for this connection only
        with db:
            db.executemany("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _make_job_rows(rows))
            db.execute("INSERT INTO job_names SELECT tenant_id, created_at, job_id, job_name FROM jobs")
            terms = "SELECT tenant_id, ?, created_at, job_id FROM jobs"
            db.execute(f"INSERT INTO job_terms {terms}", (creator_term("local"),))
            db.execute(f"INSERT INTO job_terms {terms} ORDER BY created_at LIMIT 1", (pair_term("run", "0"),))
            db.create_function("summarize", -1, _summarize, deterministic=True)
            columns = "job_id, project_id, status, created_at"
            db.execute(f"INSERT INTO job_summaries SELECT job_id, summarize({columns}) FROM jobs")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _summarize(job_id: str, project_id: str, status: str, created_at: str) -> str:
    changes = {"job_id": job_id, "project_id": project_id, "status": status, "created_at": created_at}
    return json.dumps(SUMMARY | changes)


def _make_job_rows(rows: int) -> Iterator[tuple[object, ...]]:
    record = JOB.model_dump_json()
    config = JOB.training_config
    for number in range(rows):
        job_id = f"training_bench_gemma-3-270m_{number:012x}"
        status = STATUSES[number // 100 % len(STATUSES)]  # every project has every status
        created_at = (START + timedelta(seconds=number)).isoformat(timespec="microseconds")
        project_id = RARE_PROJECT_ID if number == 0 else f"project-{number % 100}"
        filter_columns = (config.base_model_id, status, config.modality, config.trainer_type)
        yield (
            job_id,
            "local",
            project_id,
            "a job",
            *filter_columns,
            "dataset_1",
            created_at,
            status.is_active,
            status.is_final,
            0,
            record.replace("the-id", job_id),
        )


async def _measure_service(context: BenchmarkContext, rows: int) -> tuple[LoadResult, dict[str, float]]:
    """The load result of unfiltered pages with several clients, and by filter the median time of a page in ms with one client."""
    home = context.folder / f"home-{rows}"
    fill_database(home / "tunesmith.db", rows)
    async with run_service(home, make_stub_trainer(context.folder / "trainer")) as server:
        await _load_pages(server, "", CLIENTS, PAGES)
        rounds = [await _load_pages(server, "", CLIENTS, REQUESTS) for _ in range(ROUNDS)]
        queries = {**FILTERS, **SCANS, MIDDLE_PAGE: await _middle_page_query(server, rows)}
        page_ms = {name: (await _load_pages(server, query, 1, PAGES)).latency_ms(50) for name, query in queries.items()}
    by_p99 = sorted(rounds, key=lambda load: load.latency_ms(99))
    (home / "tunesmith.db").unlink()
    return by_p99[ROUNDS // 2], page_ms


async def _load_pages(server: Server, query: str, clients: int, requests: int) -> LoadResult:
    load = await run_load(server.url, itertools.repeat(Request("GET", f"/jobs?limit={PAGE}{query}"), requests), clients, PAGES_TIMEOUT_S)
    if load.rejected:
        raise ServerUnavailable(f"GET /jobs{query} was rejected: {dict(load.rejected)}")
    return load


async def _middle_page_query(server: Server, rows: int) -> str:
    """The query of a page from the middle. A cursor is a position, not a count of rows: no earlier page has to be read first."""
    number = rows // 2
    created_at = (START + timedelta(seconds=number)).isoformat(timespec="microseconds")
    query = f"&cursor={encode_cursor(created_at, f'training_bench_gemma-3-270m_{number:012x}')}"
    page = await request_json(server.url, Request("GET", f"/jobs?limit={PAGE}{query}"))
    assert len(page["jobs"]) == PAGE
    return query


def _growth_measurement(name: str, small_ms: float, large_ms: float) -> Measurement:
    note = f"{small_ms:.2f} → {large_ms:.2f} ms"
    return Measurement(NAME, f"{SIZES[-1]:,} against {SIZES[0]:,}: {name}", large_ms / small_ms, "×", at_most(1.5), note)


async def _measure_peer(context: BenchmarkContext, peer: Peer) -> Measurement:
    """The newest 50 among as many rows as the service had; the better of one client and several."""
    name = f"{peer.name}, newest 50 among {PEER_ROWS:,}"
    home = context.folder / peer.name.replace(" ", "-")
    try:
        async with peer_server(peer, home) as server:
            await request_json(server.url, next(await make_run_requests(peer, server)))
        clone_runs(peer, home, PEER_ROWS)
        async with peer_server(peer, home) as server:
            page = await request_json(server.url, peer.page_request)
            rows = len(page.get("runs", []) if isinstance(page, dict) else page)
            if rows != PAGE:
                raise ServerUnavailable(f"its page of {PAGE} has {rows} of its {PEER_ROWS:,} runs, which cannot be compared")
            loads = [
                (clients, await run_load(server.url, itertools.repeat(peer.page_request, PEER_REQUESTS), clients, PEER_TIMEOUT_S))
                for clients in (1, CLIENTS)
            ]
    except (ServerUnavailable, ValueError, sqlite3.Error) as error:
        return Measurement(NAME, name, None, "/s", note=str(error))
    note = "; ".join(f"{clients} clients: {load.requests_per_s:.3g}/s, p99 {load.latency_ms(99):.0f} ms" for clients, load in loads)
    return Measurement(NAME, name, max(load.requests_per_s for _, load in loads), "/s", note=note)
