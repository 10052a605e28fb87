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

from bench.figures import Figure, Goal, at_least, at_most
from bench.http import Load, Request, ask, load
from bench.peers import PEERS, Peer, clone_runs, peer_server, run_requests
from bench.scene import Scene
from bench.servers import Server, ServerDown, service
from bench.standin import stand_in_trainer
from schema.job import Job, Status
from schema.requests import SEED_EXAMPLE
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
PAGES_MOST_S = 20.0
ROUNDS = 3
PEER_REQUESTS = 200
PEER_MOST_S = 20.0
START = datetime(2026, 1, 1, tzinfo=UTC)
NEEDLE = "a-needle"  # a project of a single job, the oldest
# No job is queued or at work: the reconciler would look after it while we measure.
STATUSES = (Status.COMPLETED,) * 8 + (Status.FAILED, Status.CANCELLED)
FILTERS = {
    "no filter": "",
    "status=failed": "&status=failed",
    "status=queued (none)": "&status=queued",
    "project_id": "&project_id=project-7",
    "project_id of one job": f"&project_id={NEEDLE}",
    "project_id and status": "&project_id=project-7&status=failed",
    "project_id of one job and trainer_type": f"&project_id={NEEDLE}&trainer_type=sft",
    "status (none) and modality (all)": "&status=queued&modality=text",
    "modality (none) and trainer_type (all)": "&modality=vision&trainer_type=sft",
    "modality=text (all)": "&modality=text",
    "trainer_type=sft (all)": "&trainer_type=sft",
    "modality=vision (none)": "&modality=vision",
    "trainer_type=dpo (none)": "&trainer_type=dpo",
    "status and trainer_type (none)": "&status=completed&trainer_type=dpo",
}
MIDDLE = "a page from the middle"


async def measure(scene: Scene) -> list[Figure]:
    """Speed at 100,000, then how little the number of rows matters, then the peers."""
    busy: dict[int, Load] = {}
    page_ms: dict[int, dict[str, float]] = {}
    for rows in SIZES:
        busy[rows], page_ms[rows] = await _measure_ours(scene, rows)
    small, large = page_ms[SIZES[0]], page_ms[SIZES[-1]]
    among = f"{SIZES[1]:,}"
    figures = [
        Figure(NAME, f"GET /jobs among {among}, p99", busy[SIZES[1]].milliseconds(99), "ms", at_most(20), f"{CLIENTS} clients"),
        Figure(NAME, f"GET /jobs among {among}", busy[SIZES[1]].per_second, "/s", note=f"{CLIENTS} clients"),
        *(_growth(name, small[name], large[name]) for name in small),
    ]
    if not scene.with_peers:
        return figures
    peers = [await _measure_peer(scene, peer) for peer in PEERS]
    best = max((figure.value or 0.0 for figure in peers), default=0.0)
    ratio = busy[SIZES[1]].per_second / best if best else None
    return [*figures, *peers, Figure(NAME, "times the best peer", ratio, "×", at_least(10))]


def fill(database: Path, rows: int) -> None:
    """A database of the service with that many jobs."""
    SqliteJobStore(database).close()
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA synchronous = OFF")  # while it is filled
        with db:
            db.executemany("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _rows(rows))
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _rows(rows: int) -> Iterator[tuple[object, ...]]:
    job = Job(
        job_id="the-id",
        tenant_id="local",
        job_name="a job",
        processed_dataset_id="dataset_1",
        training_config=SftConfig.model_validate(SEED_EXAMPLE["training_config"]),
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
        project_id = NEEDLE if number == 0 else f"project-{number % 100}"
        kinds = (config.base_model_id, status, config.modality, config.trainer_type)
        own = record.replace("the-id", job_id)
        yield (job_id, "local", project_id, "a job", *kinds, "dataset_1", created_at, status.is_active, status.is_final, 0, own)


async def _measure_ours(scene: Scene, rows: int) -> tuple[Load, dict[str, float]]:
    """The plain page from several clients, and the median milliseconds of a page by filter from one."""
    home = scene.folder / f"home-{rows}"
    fill(home / "tunesmith.db", rows)
    async with service(home, stand_in_trainer(scene.folder / "trainer")) as server:
        await _pages(server, "", CLIENTS, PAGES)
        rounds = [await _pages(server, "", CLIENTS, REQUESTS) for _ in range(ROUNDS)]
        queries = {**FILTERS, MIDDLE: await _to_the_middle(server, rows)}
        page_ms = {name: (await _pages(server, query, 1, PAGES)).milliseconds(50) for name, query in queries.items()}
    by_p99 = sorted(rounds, key=lambda done: done.milliseconds(99))
    (home / "tunesmith.db").unlink()
    return by_p99[ROUNDS // 2], page_ms


async def _pages(server: Server, query: str, clients: int, requests: int) -> Load:
    done = await load(server.url, itertools.repeat(Request("GET", f"/jobs?limit={PAGE}{query}"), requests), clients, PAGES_MOST_S)
    if done.refused:
        raise ServerDown(f"GET /jobs{query} was refused: {dict(done.refused)}")
    return done


async def _to_the_middle(server: Server, rows: int) -> str:
    """A cursor is a place, not a number of rows: any page may be asked for without those before it."""
    number = rows // 2
    created_at = (START + timedelta(seconds=number)).isoformat(timespec="microseconds")
    query = f"&cursor={encode_cursor(created_at, f'training_bench_gemma-3-270m_{number:012x}')}"
    page = await ask(server.url, Request("GET", f"/jobs?limit={PAGE}{query}"))
    assert len(page["jobs"]) == PAGE
    return query


def _growth(name: str, small_ms: float, large_ms: float) -> Figure:
    goal: Goal = at_most(1.5)
    return Figure(
        NAME, f"{SIZES[-1]:,} against {SIZES[0]:,}: {name}", large_ms / small_ms, "×", goal, f"{small_ms:.2f} → {large_ms:.2f} ms"
    )


async def _measure_peer(scene: Scene, peer: Peer) -> Figure:
    """The newest 50 among as many rows as ours had; the better of one client and several."""
    what = f"{peer.name}, newest 50 among {PEER_ROWS:,}"
    home = scene.folder / peer.name.replace(" ", "-")
    try:
        async with peer_server(peer, home) as server:
            await ask(server.url, next(await run_requests(peer, server)))
        clone_runs(peer, home, PEER_ROWS)
        async with peer_server(peer, home) as server:
            found = await ask(server.url, peer.page)
            rows = len(found.get("runs", []) if isinstance(found, dict) else found)
            if rows != PAGE:
                raise ServerDown(f"it shows {rows} of its {PEER_ROWS:,} runs on a page of {PAGE}; that cannot be compared")
            requests = [(clients, itertools.repeat(peer.page, PEER_REQUESTS)) for clients in (1, CLIENTS)]
            loads = [(clients, await load(server.url, pages, clients, PEER_MOST_S)) for clients, pages in requests]
    except (ServerDown, ValueError, sqlite3.Error) as error:
        return Figure(NAME, what, None, "/s", note=str(error))
    words = [f"{clients} clients: {done.per_second:.3g}/s, p99 {done.milliseconds(99):.0f} ms" for clients, done in loads]
    return Figure(NAME, what, max(done.per_second for _, done in loads), "/s", note="; ".join(words))
