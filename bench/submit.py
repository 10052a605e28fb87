"""B1: durable `POST /train`, and the same, one run created, at the peers.

16 clients send 2,000 requests, each under an Idempotency-Key of its own. What was answered is counted in the listing
afterwards, and some requests are sent again and must give the same job. Peers are measured at one client and at 16,
and the better rate counts, of the requests that they did.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from bench.figures import Measurement, at_least, at_most, exactly, median
from bench.http import LoadResult, Request, request_json, run_load
from bench.peers import PEERS, Peer, make_run_requests, peer_server
from bench.scene import BenchmarkContext
from bench.servers import Server, ServerUnavailable, run_service, upload_dataset
from bench.standin import make_stub_trainer
from schema.requests import TRAIN_REQUEST_EXAMPLE

NAME = "submit"
CLIENTS = 16
REQUESTS = 2000
WARM_UP = 100
ROUNDS = 3
REPEATED_REQUESTS = 100
PEER_REQUESTS = 400
PEER_TIMEOUT_S = 30.0


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Ours, then each peer, then ours beside the best of them."""
    rounds = [await _run_round(context, number) for number in range(ROUNDS)]
    rate = median([submitted.requests_per_s for submitted, *_ in rounds])
    p99_ms = median([submitted.latency_ms(99) for submitted, *_ in rounds])
    refused = sum(submitted.rejected.total() for submitted, *_ in rounds)
    figures = [
        Measurement(NAME, f"POST /train, {CLIENTS} clients", rate, "/s", at_least(400), f"median of {ROUNDS} × {REQUESTS:,}"),
        Measurement(NAME, "p99", p99_ms, "ms", at_most(150)),
        Measurement(NAME, "refused", refused, "", exactly(0)),
        Measurement(NAME, "answered but not kept", sum(lost for _, lost, _ in rounds), "", exactly(0)),
        Measurement(NAME, "repeated key, another job", sum(doubled for *_, doubled in rounds), "", exactly(0)),
    ]
    if not context.with_peers:
        return figures
    peers = [await _measure_peer(context, peer) for peer in PEERS]
    best = max((figure.value or 0.0 for figure in peers), default=0.0)
    return [*figures, *peers, Measurement(NAME, "times the best peer", rate / best if best else None, "×", at_least(4))]


def generate_train_requests(dataset_id: str, key: str) -> Iterator[Request]:
    """As many as one likes, each another job."""
    body: dict[str, Any] = copy.deepcopy(TRAIN_REQUEST_EXAMPLE) | {"processed_dataset_id": dataset_id, "hf_token": None}
    for number in itertools.count():
        yield Request("POST", "/train", body | {"job_name": f"job {number}"}, {"Idempotency-Key": f"{key}-{number}"})


async def submit_many(server: Server, dataset_id: str, requests: int, key: str) -> LoadResult:
    """Jobs that wait in the queue; the stand-in holds the only slot."""
    return await run_load(server.url, itertools.islice(generate_train_requests(dataset_id, key), requests), CLIENTS)


async def _run_round(context: BenchmarkContext, number: int) -> tuple[LoadResult, int, int]:
    """A new service: what was submitted, how many of it are not there afterwards, and how many repeats were other jobs."""
    trainer = make_stub_trainer(context.folder / "trainer")
    async with run_service(context.folder / f"home-{number}", trainer) as server:
        dataset_id = await upload_dataset(server)
        await submit_many(server, dataset_id, WARM_UP, "warm-up")
        submitted = await submit_many(server, dataset_id, REQUESTS, "first")
        told = {answer.json()["job_id"] for answer in submitted.responses}
        repeats = await submit_many(server, dataset_id, REPEATED_REQUESTS, "first")
        doubled = {answer.json()["job_id"] for answer in repeats.responses} - told
        return submitted, len(told - await _list_job_ids(server)), len(doubled)


async def _list_job_ids(server: Server) -> set[str]:
    found: set[str] = set()
    path = "/jobs?limit=200"
    cursor = ""
    while cursor is not None:
        page = await request_json(server.url, Request("GET", f"{path}&cursor={cursor}" if cursor else path))
        found |= {row["job_id"] for row in page["jobs"]}
        cursor = page["next_cursor"]
    return found


async def _measure_peer(context: BenchmarkContext, peer: Peer) -> Measurement:
    what = f"{peer.name}, one run created"
    try:
        async with peer_server(peer, context.folder / peer.name.replace(" ", "-")) as server:
            runs = await make_run_requests(peer, server)
            loads = [
                (clients, await run_load(server.url, itertools.islice(runs, PEER_REQUESTS), clients, PEER_TIMEOUT_S))
                for clients in (1, CLIENTS)
            ]
    except (ServerUnavailable, ValueError) as error:
        return Measurement(NAME, what, None, "/s", note=str(error))
    best = max(done.requests_per_s for _, done in loads)
    return Measurement(NAME, what, best, "/s", note="; ".join(_describe_load(clients, done) for clients, done in loads))


def _describe_load(clients: int, done: LoadResult) -> str:
    refused = f", {done.rejected.total()} refused" if done.rejected else ""
    return f"{clients} clients: {done.requests_per_s:.3g}/s, p99 {done.latency_ms(99):.0f} ms{refused}"
