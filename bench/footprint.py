"""B3: from the start of the process to the first 200 on /health, and memory, idle and after 2,000 submissions."""

import asyncio

from bench.figures import Figure, at_most, median
from bench.peers import PEERS, Peer, peer_server
from bench.scene import REAL_TRAINER, Scene
from bench.servers import ServerDown, service, upload
from bench.standin import stand_in_trainer
from bench.submit import REQUESTS, submit_many

NAME = "footprint"
STARTS = 7
SETTLE_S = 5.0  # what a server still does by itself after it is ready


async def measure(scene: Scene) -> list[Figure]:
    """Ours; then the peers, in their second start, when their tables are there."""
    ready_s = median([await _start(scene) for _ in range(STARTS)])
    idle_mb, after_mb = await _memory(scene)
    figures = [
        Figure(NAME, "ready", ready_s, "s", at_most(1.5), f"median of {STARTS} starts"),
        Figure(NAME, "memory, idle", idle_mb, "MB", at_most(120)),
        Figure(NAME, f"memory after {REQUESTS:,} submissions", after_mb, "MB", at_most(120)),
    ]
    if scene.with_peers:
        for peer in PEERS:
            figures += await _measure_peer(scene, peer)
    return figures


async def _start(scene: Scene) -> float:
    """With the real trainer's environment where there is one: the service asks it what it can do while it starts."""
    trainer = REAL_TRAINER if REAL_TRAINER.exists() else stand_in_trainer(scene.folder / "trainer")
    async with service(scene.folder / "start", trainer) as server:
        return server.ready_s


async def _memory(scene: Scene) -> tuple[float, float]:
    async with service(scene.folder / "memory", stand_in_trainer(scene.folder / "trainer")) as server:
        await asyncio.sleep(SETTLE_S)
        idle_mb = server.rss_mb()
        await submit_many(server, await upload(server), REQUESTS, "memory")
        return idle_mb, server.rss_mb()


async def _measure_peer(scene: Scene, peer: Peer) -> list[Figure]:
    home = scene.folder / peer.name.replace(" ", "-")
    try:
        async with peer_server(peer, home):
            pass
        async with peer_server(peer, home) as server:
            await asyncio.sleep(SETTLE_S)
            memory = Figure(NAME, f"{peer.name}, memory, idle", server.rss_mb(), "MB", note=f"{len(server.processes())} processes")
            return [Figure(NAME, f"{peer.name}, ready", server.ready_s, "s"), memory]
    except ServerDown as error:
        return [Figure(NAME, f"{peer.name}, ready", None, "s", note=str(error))]
