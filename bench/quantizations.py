"""Time of three quantizations of a tuned Gemma 3 270M: convert, quantize with an importance matrix, and verify each file."""

import asyncio
from datetime import datetime
from itertools import pairwise

from bench.context import MISSING_TRAINER_NOTE, REAL_TRAINER, BenchmarkContext
from bench.figures import Measurement, at_most, median
from bench.gemma_270m import REAL_BASE, Json, get_events, install_real_base, submit_job, wait_for_status
from bench.servers import run_service

NAME = "quantizations"
ROUNDS = 3
QUANTIZATIONS = ["q8_0", "q6_k", "q4_k_m"]
TIMED_PHASES = ("converting", "verifying")  # quantizing is part of converting; bench/exports.py measures merging
HYPERPARAMETERS = {"max_steps": 8, "batch_size": 2, "max_seq_length": 128}


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Run whole jobs one after another; their events give the time of each phase."""
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, "three quantizations", None, "s", at_most(60), MISSING_TRAINER_NOTE)]
    await asyncio.to_thread(install_real_base, context.folder)
    rounds: list[dict[str, float]] = []
    async with run_service(context.folder, REAL_TRAINER) as server:
        for _ in range(ROUNDS):
            export = {"include_gguf": True, "gguf_quantization": QUANTIZATIONS}
            job_id = await submit_job(server, {"base_model_id": REAL_BASE, "hyperparameters": HYPERPARAMETERS, "export_config": export})
            await wait_for_status(server, job_id, "completed")
            rounds.append(phase_durations_s(await get_events(server, job_id)))
    totals_s = [sum(phases[name] for name in TIMED_PHASES) for phases in rounds]
    parts = ", ".join(f"{name} {median([phases[name] for phases in rounds]):.1f} s" for name in ("merging", *TIMED_PHASES))
    note = f"{', '.join(QUANTIZATIONS)}; medians of {ROUNDS}: {parts}"
    return [Measurement(NAME, "convert, quantize and compare", median(totals_s), "s", at_most(60), note)]


def phase_durations_s(events: list[Json]) -> dict[str, float]:
    """Seconds in each phase, from its event to the next one's."""
    phases = [(row["event"]["phase"], datetime.fromisoformat(row["at"])) for row in events if row["event"]["type"] == "phase"]
    durations_s: dict[str, float] = {}
    for (name, started_at), (_, ended_at) in pairwise(phases):
        durations_s[name] = durations_s.get(name, 0.0) + (ended_at - started_at).total_seconds()
    return durations_s
