"""B7: what the service adds to the training time. The same spec is trained through the service and directly, in pairs.

It uses the tiny Gemma, whose steps are short: every step reports its progress and every tenth its metrics, many times as often as
with a real model, so the result is an upper bound.
"""

import asyncio
import json
import subprocess
import time

from bench.context import MISSING_TRAINER_NOTE, REAL_TRAINER, BenchmarkContext
from bench.figures import Measurement, at_most, median
from bench.http import Request, request_json
from bench.launch import BASE, install_tiny_base
from bench.servers import SOURCE, Server, make_environment, run_service, upload_dataset

NAME = "overhead"
PAIRS = 3
STEPS = 500
TIMEOUT_S = 300.0


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """How much longer training takes through the service."""
    name = "training time added by the service, median of the pairs"
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, name, None, "%", at_most(2), MISSING_TRAINER_NOTE)]
    home = context.folder / "home"
    await asyncio.to_thread(install_tiny_base, home)
    async with run_service(home, {}) as server:
        dataset_id = await upload_dataset(server)
        pairs = [await _measure_pair(server, dataset_id, context, number) for number in range(PAIRS)]
    added = [100 * (served / direct - 1) for served, direct in pairs]
    note = "; ".join(f"{served:.1f} s and {direct:.1f} s" for served, direct in pairs)
    return [Measurement(NAME, name, median(added), "%", at_most(2), note)]


async def _measure_pair(server: Server, dataset_id: str, context: BenchmarkContext, number: int) -> tuple[float, float]:
    """Training time in seconds: through the service, and without it."""
    config = {"base_model_id": BASE, "hyperparameters": {"max_steps": STEPS, "save_strategy": "no"}}
    answer = await request_json(server.url, Request("POST", "/train", {"processed_dataset_id": dataset_id, "training_config": config}))
    job_id = answer["job_id"]
    deadline = time.monotonic() + TIMEOUT_S
    while (job := await request_json(server.url, Request("GET", f"/jobs/{job_id}")))["status"] != "completed":
        if job["status"] == "failed" or time.monotonic() > deadline:
            raise RuntimeError(f"the job did not complete: {job['failure']}")
        await asyncio.sleep(0.5)
    served = json.loads((server.home / f"objects/results/{job_id}/1.json").read_text())["train_runtime_s"]
    direct = await asyncio.to_thread(_direct_train_runtime_s, server, job_id, context, number)
    return served, direct


def _direct_train_runtime_s(server: Server, job_id: str, context: BenchmarkContext, number: int) -> float:
    spec = server.home / f"objects/configs/{job_id}.json"
    command = [REAL_TRAINER, "-m", "bench.direct_training", spec, context.folder / f"direct-{number}"]
    variables = make_environment(server.home, PYTHONPATH=str(SOURCE), TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(command, cwd=SOURCE, env=variables, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])
