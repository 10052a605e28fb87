"""B14: what a user waits for besides the training: from `POST /train` to the first step, and from the last step to `completed`.

It trains the real Gemma 3 270M for a few steps on a small dataset with held-out rows, with one q8_0 file. The first step counts when the
service shows it as done.
"""

import asyncio
import os
import time
from datetime import datetime

from bench.context import MISSING_TRAINER_NOTE, REAL_TRAINER, BenchmarkContext
from bench.figures import Measurement, at_most
from bench.gemma_270m import REAL_BASE, TIMEOUT_S, Json, get_events, get_job, install_real_base, submit_job, wait_for_status
from bench.http import Request, request_json
from bench.servers import Server, run_service

NAME = "waiting"
STEPS = 5
POLL_S = 0.1
CONFIG: Json = {
    "base_model_id": REAL_BASE,
    "hyperparameters": {"max_steps": STEPS, "batch_size": 4, "max_seq_length": 160, "logging_steps": 1},
    "export_config": {"format": "adapter", "include_gguf": True, "gguf_quantization": ["q8_0"]},
}


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Both waiting times of one job, with the load of the machine before it."""
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, "POST /train to first step", None, "s", at_most(15), MISSING_TRAINER_NOTE)]
    home = context.folder / "home"
    await asyncio.to_thread(install_real_base, home)
    threads = str(os.cpu_count() or 1)
    async with run_service(home, {"OMP_NUM_THREADS": threads}) as server:
        await request_json(server.url, Request("GET", "/capabilities"))  # the service probes the trainer's environment once
        load = os.getloadavg()[0]
        submitted_at = time.time()
        job_id = await submit_job(server, CONFIG)
        await _wait_for_first_step(server, job_id)
        first_step_s = time.time() - submitted_at
        await wait_for_status(server, job_id, "completed")
        events = await get_events(server, job_id)
    last_step_at = max(_seconds(row) for row in events if row["event"]["type"] == "metrics")
    completed_at = max(_seconds(row) for row in events)
    note = f"load {load:.1f} before it, {threads} cores"
    return [
        Measurement(NAME, "POST /train to first step", first_step_s, "s", at_most(15), note),
        Measurement(NAME, "last step to completed, one q8_0", completed_at - last_step_at, "s", at_most(50), note),
    ]


async def _wait_for_first_step(server: Server, job_id: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not (job := await get_job(server, job_id))["progress"]:
        if job["status"] == "failed" or time.monotonic() > deadline:
            raise RuntimeError(f"the job is {job['status']} before its first step: {job['failure']}")
        await asyncio.sleep(POLL_S)


def _seconds(row: Json) -> float:
    return datetime.fromisoformat(row["at"].replace("Z", "+00:00")).timestamp()
