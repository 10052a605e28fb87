"""B1: durable `POST /train`, compared with creating one run at each peer.

16 clients send 2,000 requests, each with its own Idempotency-Key. Afterwards every acknowledged job must be in the list, and some
requests are repeated and must return the same job. Peers are measured with one client and with 16; the better rate of successful
requests counts.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from bench.context import BenchmarkContext
from bench.figures import Measurement, at_least, at_most, exactly, median
from bench.http import LoadResult, Request, request_json, run_load
from bench.peers import PEERS, Peer, make_run_requests, peer_server
from bench.servers import Server, ServerUnavailable, run_service, upload_dataset
from bench.stub_trainer import make_stub_trainer
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
    """Measure the service, then each peer, and compare the service with the best peer."""
    rounds = [await _run_round(context, number) for number in range(ROUNDS)]
    rate = median([submitted.requests_per_s for submitted, *_ in rounds])
    p99_ms = median([submitted.latency_ms(99) for submitted, *_ in rounds])
    rejected = sum(submitted.rejected.total() for submitted, *_ in rounds)
    figures = [
        Measurement(NAME, f"POST /train, {CLIENTS} clients", rate, "/s", at_least(400), f"median of {ROUNDS} × {REQUESTS:,}"),
        Measurement(NAME, "p99", p99_ms, "ms", at_most(150)),
        Measurement(NAME, "rejected", rejected, "", exactly(0)),
        Measurement(NAME, "acknowledged but lost", sum(lost for _, lost, _ in rounds), "", exactly(0)),
        Measurement(NAME, "repeated key, another job", sum(duplicates for *_, duplicates in rounds), "", exactly(0)),
    ]
    if not context.with_peers:
        return figures
    peers = [await _measure_peer(context, peer) for peer in PEERS]
    best = max((figure.value or 0.0 for figure in peers), default=0.0)
    return [*figures, *peers, Measurement(NAME, "times the best peer", rate / best if best else None, "×", at_least(4))]


def generate_train_requests(dataset_id: str, key: str) -> Iterator[Request]:
    """Endless requests, each for a new job."""
    body: dict[str, Any] = copy.deepcopy(TRAIN_REQUEST_EXAMPLE) | {"processed_dataset_id": dataset_id, "hf_token": None}
    for number in itertools.count():
        yield Request("POST", "/train", body | {"job_name": f"job {number}"}, {"Idempotency-Key": f"{key}-{number}"})


async def submit_many(server: Server, dataset_id: str, requests: int, key: str) -> LoadResult:
    """Submit jobs that stay in the queue, because the stub trainer occupies the only slot."""
    return await run_load(server.url, itertools.islice(generate_train_requests(dataset_id, key), requests), CLIENTS)


async def _run_round(context: BenchmarkContext, number: int) -> tuple[LoadResult, int, int]:
    """On a new service: the load result, the number of lost jobs, and the number of repeats that created another job."""
    trainer = make_stub_trainer(context.folder / "trainer")
    async with run_service(context.folder / f"home-{number}", trainer) as server:
        dataset_id = await upload_dataset(server)
        await submit_many(server, dataset_id, WARM_UP, "warm-up")
        submitted = await submit_many(server, dataset_id, REQUESTS, "first")
        job_ids = {answer.json()["job_id"] for answer in submitted.responses}
        repeats = await submit_many(server, dataset_id, REPEATED_REQUESTS, "first")
        duplicates = {answer.json()["job_id"] for answer in repeats.responses} - job_ids
        return submitted, len(job_ids - await _list_job_ids(server)), len(duplicates)


async def _list_job_ids(server: Server) -> set[str]:
    job_ids: set[str] = set()
    path = "/jobs?limit=200"
    cursor = ""
    while cursor is not None:
        page = await request_json(server.url, Request("GET", f"{path}&cursor={cursor}" if cursor else path))
        job_ids |= {row["job_id"] for row in page["jobs"]}
        cursor = page["next_cursor"]
    return job_ids


async def _measure_peer(context: BenchmarkContext, peer: Peer) -> Measurement:
    name = f"{peer.name}, one run created"
    try:
        async with peer_server(peer, context.folder / peer.name.replace(" ", "-")) as server:
            runs = await make_run_requests(peer, server)
            loads = [
                (clients, await run_load(server.url, itertools.islice(runs, PEER_REQUESTS), clients, PEER_TIMEOUT_S))
                for clients in (1, CLIENTS)
            ]
    except (ServerUnavailable, ValueError) as error:
        return Measurement(NAME, name, None, "/s", note=str(error))
    best = max(load.requests_per_s for _, load in loads)
    return Measurement(NAME, name, best, "/s", note="; ".join(_describe_load(clients, load) for clients, load in loads))


def _describe_load(clients: int, load: LoadResult) -> str:
    rejected = f", {load.rejected.total()} rejected" if load.rejected else ""
    return f"{clients} clients: {load.requests_per_s:.3g}/s, p99 {load.latency_ms(99):.0f} ms{rejected}"
