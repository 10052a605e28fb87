"""Cost of checkpoints and interruptions: how long saving blocks training, how soon a pause takes effect, how soon a resumed attempt
takes its next step, and what time slices add.

The first three use the real Gemma 3 270M and default checkpointing; the slices use the tiny one, because their cost is process startup.
"""

import asyncio
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from bench.context import MISSING_TRAINER_NOTE, REAL_TRAINER, BenchmarkContext
from bench.figures import Measurement, at_most
from bench.gemma_270m import REAL_BASE, TIMEOUT_S, Json, get_events, get_job, install_real_base, submit_job, wait_for_status
from bench.http import Request, request_json
from bench.launch import BASE, install_tiny_base
from bench.servers import Server, run_service

NAME = "interruptions"
REAL_EPOCHS = 12  # over the small dataset: as many steps as a short real training
PAUSE_AT_STEP = 20
SLICE_S = 40
SLICED_STEPS = 1500


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Measure a real training that is paused once, and a tiny one in one time slice and in several."""
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, "saving", None, "%", at_most(5), MISSING_TRAINER_NOTE)]
    return [*await _measure_pause(context.folder / "real"), *await _measure_time_slices(context.folder / "tiny")]


async def _measure_pause(home: Path) -> list[Measurement]:
    await asyncio.to_thread(install_real_base, home)
    async with run_service(home, {}) as server:
        hyperparameters = {
            "epochs": REAL_EPOCHS,
            "batch_size": 2,
            "gradient_accumulation_steps": 4,
            "logging_steps": 1,
            "max_seq_length": 128,
        }
        job_id = await submit_job(server, {"base_model_id": REAL_BASE, "hyperparameters": hyperparameters})
        await _wait_until_step(server, job_id, PAUSE_AT_STEP)
        requested_at = time.perf_counter()
        await request_json(server.url, Request("POST", f"/jobs/{job_id}/pause"))
        paused = await wait_for_status(server, job_id, "paused")
        pause_s = time.perf_counter() - requested_at
        await request_json(server.url, Request("POST", f"/jobs/{job_id}/resume"))
        job = await wait_for_status(server, job_id, "completed")
        events = await get_events(server, job_id)
    saves = [row["event"] for row in events if row["event"]["type"] == "checkpoint_saved"]
    fresh_s, resumed_s = (_launch_to_first_step_s(job, events, number) for number in (1, 2))
    step_s = _median_step_s(events)
    blocked_s, training_s = sum(save["save_s"] for save in saves), step_s * job["progress"]["step"]
    note = f"{len(saves)} checkpoints of {saves[0]['size_bytes'] / 1e6:.0f} MB, longest {max(save['save_s'] for save in saves):.2f} s"
    pause_note = f"a step takes {step_s:.2f} s; the save {saves[0]['save_s']:.2f} s, its upload {saves[0]['upload_s']:.2f} s"
    resume_note = (
        f"from launch to step {paused['checkpoint_saved']['step'] + 1}: {resumed_s:.1f} s; of a fresh attempt to step 1: {fresh_s:.1f} s"
    )
    return [
        Measurement(NAME, "saving, share of the training time", 100 * blocked_s / training_s, "%", at_most(5), note),
        Measurement(NAME, "from the pause request to paused", pause_s, "s", None, pause_note),
        Measurement(
            NAME, "first step of a resumed attempt, later than that of a fresh one", resumed_s - fresh_s, "s", at_most(5), resume_note
        ),
    ]


async def _measure_time_slices(home: Path) -> list[Measurement]:
    await asyncio.to_thread(install_tiny_base, home)
    config = {"base_model_id": BASE, "hyperparameters": {"max_steps": SLICED_STEPS, "logging_steps": 100}}
    runs: list[tuple[float, int]] = []
    for limits in ({}, {"TUNESMITH_LOCAL_TIME_LIMIT_S": str(SLICE_S)}):
        async with run_service(home, {}, settings=limits) as server:
            started_at = time.perf_counter()
            job = await wait_for_status(server, await submit_job(server, config), "completed")
            runs.append((time.perf_counter() - started_at, len(job["attempts"])))
    (whole_s, _), (sliced_s, slices) = runs
    added_s = (sliced_s - whole_s) / max(slices - 1, 1)
    note = f"{sliced_s:.1f} s in {slices} slices of {SLICE_S} s, {whole_s:.1f} s in one; {100 * added_s / 3600:.2f} % of a slice of an hour"
    return [Measurement(NAME, "an additional time slice", added_s, "s", None, note)]


async def _wait_until_step(server: Server, job_id: str, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while ((await get_job(server, job_id))["progress"] or {"step": 0})["step"] < step:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the job did not reach step {step}")
        await asyncio.sleep(0.1)


def _launch_to_first_step_s(job: Json, events: list[Json], attempt: int) -> float:
    """From the launch of an attempt to the metrics of its first step."""
    launched_at = datetime.fromisoformat(job["attempts"][attempt - 1]["created_at"])
    first_step_at = next(row["at"] for row in events if row["attempt"] == attempt and row["event"]["type"] == "metrics")
    return (datetime.fromisoformat(first_step_at) - launched_at).total_seconds()


def _median_step_s(events: list[Json]) -> float:
    """The median time of a step, from the metric points of consecutive steps."""
    points = [
        (row["attempt"], row["event"]["step"], datetime.fromisoformat(row["at"])) for row in events if row["event"]["type"] == "metrics"
    ]
    times = sorted((b[2] - a[2]).total_seconds() for a, b in pairwise(points) if a[0] == b[0] and b[1] == a[1] + 1)
    return times[len(times) // 2]
