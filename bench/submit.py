"""B1: durable `POST /train`, and the same, one run created, at the peers.

16 clients send 2,000 requests, each under an Idempotency-Key of its own. What was answered is counted in the listing
afterwards, and some requests are sent again and must give the same job. Peers are measured at one client and at 16,
and the better rate counts, of the requests that they did.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from bench.figures import Figure, at_least, at_most, exactly, median
from bench.http import Load, Request, ask, load
from bench.peers import PEERS, Peer, peer_server, run_requests
from bench.scene import Scene
from bench.servers import Server, ServerDown, service, upload
from bench.standin import stand_in_trainer
from schema.requests import SEED_EXAMPLE

NAME = "submit"
CLIENTS = 16
REQUESTS = 2000
WARM_UP = 100
ROUNDS = 3
REPEATED = 100
PEER_REQUESTS = 400
PEER_MOST_S = 30.0


async def measure(scene: Scene) -> list[Figure]:
    """Ours, then each peer, then ours beside the best of them."""
    rounds = [await _round(scene, number) for number in range(ROUNDS)]
    rate = median([submitted.per_second for submitted, *_ in rounds])
    p99_ms = median([submitted.milliseconds(99) for submitted, *_ in rounds])
    refused = sum(submitted.refused.total() for submitted, *_ in rounds)
    figures = [
        Figure(NAME, f"POST /train, {CLIENTS} clients", rate, "/s", at_least(400), f"median of {ROUNDS} × {REQUESTS:,}"),
        Figure(NAME, "p99", p99_ms, "ms", at_most(150)),
        Figure(NAME, "refused", refused, "", exactly(0)),
        Figure(NAME, "answered but not kept", sum(lost for _, lost, _ in rounds), "", exactly(0)),
        Figure(NAME, "repeated key, another job", sum(doubled for *_, doubled in rounds), "", exactly(0)),
    ]
    if not scene.with_peers:
        return figures
    peers = [await _measure_peer(scene, peer) for peer in PEERS]
    best = max((figure.value or 0.0 for figure in peers), default=0.0)
    return [*figures, *peers, Figure(NAME, "times the best peer", rate / best if best else None, "×", at_least(4))]


def train_requests(dataset_id: str, key: str) -> Iterator[Request]:
    """As many as one likes, each another job."""
    body: dict[str, Any] = copy.deepcopy(SEED_EXAMPLE) | {"processed_dataset_id": dataset_id, "hf_token": None}
    for number in itertools.count():
        yield Request("POST", "/train", body | {"job_name": f"job {number}"}, {"Idempotency-Key": f"{key}-{number}"})


async def submit_many(server: Server, dataset_id: str, requests: int, key: str) -> Load:
    """Jobs that wait in the queue; the stand-in holds the only slot."""
    return await load(server.url, itertools.islice(train_requests(dataset_id, key), requests), CLIENTS)


async def _round(scene: Scene, number: int) -> tuple[Load, int, int]:
    """A new service: what was submitted, how many of it are not there afterwards, and how many repeats were other jobs."""
    trainer = stand_in_trainer(scene.folder / "trainer")
    async with service(scene.folder / f"home-{number}", trainer) as server:
        dataset_id = await upload(server)
        await submit_many(server, dataset_id, WARM_UP, "warm-up")
        submitted = await submit_many(server, dataset_id, REQUESTS, "first")
        told = {answer.json()["job_id"] for answer in submitted.answers}
        repeats = await submit_many(server, dataset_id, REPEATED, "first")
        doubled = {answer.json()["job_id"] for answer in repeats.answers} - told
        return submitted, len(told - await _listed(server)), len(doubled)


async def _listed(server: Server) -> set[str]:
    found: set[str] = set()
    path = "/jobs?limit=200"
    cursor = ""
    while cursor is not None:
        page = await ask(server.url, Request("GET", f"{path}&cursor={cursor}" if cursor else path))
        found |= {row["job_id"] for row in page["jobs"]}
        cursor = page["next_cursor"]
    return found


async def _measure_peer(scene: Scene, peer: Peer) -> Figure:
    what = f"{peer.name}, one run created"
    try:
        async with peer_server(peer, scene.folder / peer.name.replace(" ", "-")) as server:
            runs = await run_requests(peer, server)
            loads = [
                (clients, await load(server.url, itertools.islice(runs, PEER_REQUESTS), clients, PEER_MOST_S)) for clients in (1, CLIENTS)
            ]
    except (ServerDown, ValueError) as error:
        return Figure(NAME, what, None, "/s", note=str(error))
    best = max(done.per_second for _, done in loads)
    return Figure(NAME, what, best, "/s", note="; ".join(_in_words(clients, done) for clients, done in loads))


def _in_words(clients: int, done: Load) -> str:
    refused = f", {done.refused.total()} refused" if done.refused else ""
    return f"{clients} clients: {done.per_second:.3g}/s, p99 {done.milliseconds(99):.0f} ms{refused}"
