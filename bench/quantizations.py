"""What three quantizations of a tuned Gemma 3 270M take: converting, quantizing with an importance matrix, and hearing each file out."""

import asyncio
from datetime import datetime
from itertools import pairwise

from bench.figures import Figure, at_most, median
from bench.real import REAL_BASE, events_of, make_real_base, submit, until_status
from bench.scene import REAL_TRAINER, Scene
from bench.servers import service

NAME = "quantizations"
ROUNDS = 3
QUANTIZATIONS = ["q8_0", "q6_k", "q4_k_m"]
COUNTED = ("converting", "verifying")  # quantizing is part of converting; merging is its own figure, in exports
KNOBS = {"max_steps": 8, "batch_size": 2, "max_seq_length": 128}


async def measure(scene: Scene) -> list[Figure]:
    """Whole jobs, one after the other; their phases are timed by their own events."""
    if not REAL_TRAINER.exists():
        return [Figure(NAME, "three quantizations", None, "s", at_most(60), "there is no trainer's environment: make setup")]
    await asyncio.to_thread(make_real_base, scene.folder)
    rounds: list[dict[str, float]] = []
    async with service(scene.folder, REAL_TRAINER) as server:
        for _ in range(ROUNDS):
            export = {"include_gguf": True, "gguf_quantization": QUANTIZATIONS}
            job_id = await submit(server, {"base_model_id": REAL_BASE, "hyperparameters": KNOBS, "export_config": export})
            await until_status(server, job_id, "completed")
            rounds.append(phases_of(await events_of(server, job_id)))
    taken = [sum(phases[name] for name in COUNTED) for phases in rounds]
    parts = ", ".join(f"{name} {median([phases[name] for phases in rounds]):.1f} s" for name in ("merging", *COUNTED))
    note = f"{', '.join(QUANTIZATIONS)}; medians of {ROUNDS}: {parts}"
    return [Figure(NAME, "convert, quantize and compare", median(taken), "s", at_most(60), note)]


def phases_of(events: list[dict[str, object]]) -> dict[str, float]:
    """Seconds in each phase, from its event to the next one's."""
    begun = [(str(row["event"]["phase"]), datetime.fromisoformat(str(row["at"]))) for row in events if row["event"]["type"] == "phase"]  # type: ignore[index]
    taken: dict[str, float] = {}
    for (name, at), (_, until) in pairwise(begun):
        taken[name] = taken.get(name, 0.0) + (until - at).total_seconds()
    return taken
