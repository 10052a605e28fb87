"""B3: time from process start to the first 200 of /health; memory when idle and after 2,000 submissions."""

import asyncio

from bench.context import REAL_TRAINER, BenchmarkContext
from bench.figures import Measurement, at_most, median
from bench.peers import PEERS, Peer, peer_server
from bench.servers import ServerUnavailable, run_service, upload_dataset
from bench.stub_trainer import make_stub_trainer
from bench.submit import REQUESTS, submit_many

NAME = "footprint"
STARTS = 7
SETTLE_S = 5.0  # for background work after a server is ready


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Measure the service, then its peers in their second start, after they have created their tables."""
    ready_s = median([await _measure_start(context) for _ in range(STARTS)])
    idle_mb, loaded_mb = await _measure_memory(context)
    figures = [
        Measurement(NAME, "ready", ready_s, "s", at_most(1.5), f"median of {STARTS} starts"),
        Measurement(NAME, "memory, idle", idle_mb, "MB", at_most(120)),
        Measurement(NAME, f"memory after {REQUESTS:,} submissions", loaded_mb, "MB", at_most(120)),
    ]
    if context.with_peers:
        for peer in PEERS:
            figures += await _measure_peer(context, peer)
    return figures


async def _measure_start(context: BenchmarkContext) -> float:
    """Seconds until the service is ready, with the real trainer's environment if installed: the service probes it at startup."""
    trainer = REAL_TRAINER if REAL_TRAINER.exists() else make_stub_trainer(context.folder / "trainer")
    async with run_service(context.folder / "start", trainer) as server:
        return server.ready_s


async def _measure_memory(context: BenchmarkContext) -> tuple[float, float]:
    async with run_service(context.folder / "memory", make_stub_trainer(context.folder / "trainer")) as server:
        await asyncio.sleep(SETTLE_S)
        idle_mb = server.rss_mb()
        await submit_many(server, await upload_dataset(server), REQUESTS, "memory")
        return idle_mb, server.rss_mb()


async def _measure_peer(context: BenchmarkContext, peer: Peer) -> list[Measurement]:
    home = context.folder / peer.name.replace(" ", "-")
    try:
        async with peer_server(peer, home):
            pass
        async with peer_server(peer, home) as server:
            await asyncio.sleep(SETTLE_S)
            memory = Measurement(NAME, f"{peer.name}, memory, idle", server.rss_mb(), "MB", note=f"{len(server.processes())} processes")
            return [Measurement(NAME, f"{peer.name}, ready", server.ready_s, "s"), memory]
    except ServerUnavailable as error:
        return [Measurement(NAME, f"{peer.name}, ready", None, "s", note=str(error))]
