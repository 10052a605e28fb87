"""B7: what orchestration adds to a training: the same spec through the service and by hand, one after the other, in pairs.

The tiny Gemma, because its steps are short: every step reports its progress, every tenth its metrics, many times as often as
those of a real model, so the figure is an upper bound.
"""

import asyncio
import json
import subprocess
import time

from bench.figures import Measurement, at_most, median
from bench.http import Request, request_json
from bench.launch import BASE, install_tiny_base
from bench.scene import REAL_TRAINER, BenchmarkContext
from bench.servers import SOURCE, Server, make_environment, run_service, upload_dataset

NAME = "overhead"
PAIRS = 3
STEPS = 500
TIMEOUT_S = 300.0


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """How much longer the training takes under the service."""
    name = "longer than by hand, median of the pairs"
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, name, None, "%", at_most(2), "there is no trainer's environment: make setup")]
    home = context.folder / "home"
    await asyncio.to_thread(install_tiny_base, home)
    async with run_service(home, REAL_TRAINER) as server:
        dataset_id = await upload_dataset(server)
        pairs = [await _measure_pair(server, dataset_id, context, number) for number in range(PAIRS)]
    added = [100 * (served / by_hand - 1) for served, by_hand in pairs]
    note = "; ".join(f"{served:.1f} s and {by_hand:.1f} s" for served, by_hand in pairs)
    return [Measurement(NAME, name, median(added), "%", at_most(2), note)]


async def _measure_pair(server: Server, dataset_id: str, context: BenchmarkContext, number: int) -> tuple[float, float]:
    """Seconds of training: through the service, and by hand."""
    config = {"base_model_id": BASE, "hyperparameters": {"max_steps": STEPS, "save_strategy": "no"}}
    answer = await request_json(server.url, Request("POST", "/train", {"processed_dataset_id": dataset_id, "training_config": config}))
    job_id = answer["job_id"]
    deadline = time.monotonic() + TIMEOUT_S
    while (job := await request_json(server.url, Request("GET", f"/jobs/{job_id}")))["status"] != "completed":
        if job["status"] == "failed" or time.monotonic() > deadline:
            raise RuntimeError(f"the job did not complete: {job['failure']}")
        await asyncio.sleep(0.5)
    result = await asyncio.to_thread(_service_train_runtime_s, server, job_id)
    by_hand = await asyncio.to_thread(_direct_train_runtime_s, server, job_id, context, number)
    return result, by_hand


def _service_train_runtime_s(server: Server, job_id: str) -> float:
    return json.loads((server.home / f"objects/results/{job_id}/1.json").read_text())["train_runtime_s"]


def _direct_train_runtime_s(server: Server, job_id: str, context: BenchmarkContext, number: int) -> float:
    command = [REAL_TRAINER, "-m", "bench.by_hand", server.home / f"objects/configs/{job_id}.json", context.folder / f"by-hand-{number}"]
    variables = make_environment(server.home, PYTHONPATH=str(SOURCE), TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(command, cwd=SOURCE, env=variables, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])
