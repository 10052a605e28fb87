"""B17: how long `POST /train?dry_run=true` takes for a known dataset, whose tokens were counted or not, beside `POST /train`.

One client asks one after the other. The base is the tiny Gemma in the model store, so that the Hub is not asked.
"""

import asyncio

from bench.context import MISSING_TRAINER_NOTE, REAL_TRAINER, BenchmarkContext
from bench.figures import Measurement, at_most
from bench.http import Request, request_json, run_load
from bench.launch import BASE, install_tiny_base
from bench.servers import run_service, upload_dataset
from bench.stub_trainer import make_stub_trainer

NAME = "dry_run"
REQUESTS = 100
GOAL_MS = 300
AUTO = {"batch_size": "auto", "gradient_accumulation_steps": "auto", "max_seq_length": "auto"}


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """The latency of a plain dry run, and of one that chooses everything, at the 95th percentile."""
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, "dry run", None, "ms", at_most(GOAL_MS), MISSING_TRAINER_NOTE)]
    home = context.folder / "home"
    await asyncio.to_thread(install_tiny_base, home)
    figures: list[Measurement] = []
    async with run_service(home, make_stub_trainer(context.folder / "trainer")) as server:
        dataset_id = await upload_dataset(server)
        for name, hyperparameters, hardware in (("everything given", {}, None), ("everything chosen", AUTO, "auto")):
            config = {"base_model_id": BASE, "hyperparameters": hyperparameters}
            body = {"processed_dataset_id": dataset_id, "training_config": config, "hardware": hardware}
            request = Request("POST", "/train?dry_run=true", body)
            await request_json(server.url, request)  # the base is read once
            load = await run_load(server.url, iter([request] * REQUESTS), 1)
            note = f"p50 {load.latency_ms(50):.0f} ms of {REQUESTS}"
            figures.append(Measurement(NAME, f"dry run, {name}, p95", load.latency_ms(95), "ms", at_most(GOAL_MS), note))
    return figures
