"""What three quantizations of a tuned Gemma 3 270M take: converting, quantizing with an importance matrix, and hearing each file out."""

import asyncio
from datetime import datetime
from itertools import pairwise

from bench.figures import Measurement, at_most, median
from bench.real import REAL_BASE, get_events, install_real_base, submit_job, wait_for_status
from bench.scene import REAL_TRAINER, BenchmarkContext
from bench.servers import run_service

NAME = "quantizations"
ROUNDS = 3
QUANTIZATIONS = ["q8_0", "q6_k", "q4_k_m"]
TIMED_PHASES = ("converting", "verifying")  # quantizing is part of converting; merging is its own figure, in exports
HYPERPARAMETERS = {"max_steps": 8, "batch_size": 2, "max_seq_length": 128}


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Whole jobs, one after the other; their phases are timed by their own events."""
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, "three quantizations", None, "s", at_most(60), "there is no trainer's environment: make setup")]
    await asyncio.to_thread(install_real_base, context.folder)
    rounds: list[dict[str, float]] = []
    async with run_service(context.folder, REAL_TRAINER) as server:
        for _ in range(ROUNDS):
            export = {"include_gguf": True, "gguf_quantization": QUANTIZATIONS}
            job_id = await submit_job(server, {"base_model_id": REAL_BASE, "hyperparameters": HYPERPARAMETERS, "export_config": export})
            await wait_for_status(server, job_id, "completed")
            rounds.append(phase_durations_s(await get_events(server, job_id)))
    taken = [sum(phases[name] for name in TIMED_PHASES) for phases in rounds]
    parts = ", ".join(f"{name} {median([phases[name] for phases in rounds]):.1f} s" for name in ("merging", *TIMED_PHASES))
    note = f"{', '.join(QUANTIZATIONS)}; medians of {ROUNDS}: {parts}"
    return [Measurement(NAME, "convert, quantize and compare", median(taken), "s", at_most(60), note)]


def phase_durations_s(events: list[dict[str, object]]) -> dict[str, float]:
    """Seconds in each phase, from its event to the next one's."""
    begun = [(str(row["event"]["phase"]), datetime.fromisoformat(str(row["at"]))) for row in events if row["event"]["type"] == "phase"]  # type: ignore[index]
    taken: dict[str, float] = {}
    for (name, at), (_, until) in pairwise(begun):
        taken[name] = taken.get(name, 0.0) + (until - at).total_seconds()
    return taken
