"""Jobs on the real Gemma 3 270M, for benchmarks that run their own service."""

import asyncio
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.context import REAL_TRAINER
from bench.http import Request, request_json
from bench.servers import SOURCE, Server, make_environment, upload_dataset

REAL_BASE = "google/gemma-3-270m"
TIMEOUT_S = 900.0

Json = dict[str, Any]  # Any: JSON


def install_real_base(home: Path) -> None:
    """Put the real base into the object store of the service with this home, from the user's cache."""
    command = [REAL_TRAINER, "infra/gemma_270m.py", "--store", (home / "objects").as_uri()]
    user_folders = {name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME") if name in os.environ}
    variables = make_environment(home, PYTHONPATH=str(SOURCE)) | user_folders
    subprocess.run(command, check=True, capture_output=True, cwd=SOURCE, env=variables)


async def submit_job(server: Server, config: Json) -> str:
    """Submit a job with this training config on a small dataset; returns its id."""
    dataset_id = await upload_dataset(server)
    answer = await request_json(server.url, Request("POST", "/train", {"processed_dataset_id": dataset_id, "training_config": config}))
    return answer["job_id"]


async def wait_for_status(server: Server, job_id: str, status: str) -> Json:
    """The job, once it has this status. Raises RuntimeError if the job fails or after TIMEOUT_S."""
    deadline = time.monotonic() + TIMEOUT_S
    while (job := await get_job(server, job_id))["status"] != status:
        if job["status"] == "failed" or time.monotonic() > deadline:
            raise RuntimeError(f"the job is {job['status']}, not {status}: {job['failure']}")
        await asyncio.sleep(0.1)
    return job


async def get_job(server: Server, job_id: str) -> Json:
    """The job as it is now."""
    return await request_json(server.url, Request("GET", f"/jobs/{job_id}"))


async def get_events(server: Server, job_id: str) -> list[Json]:
    """All events of the job so far."""
    events: list[Json] = []
    after = 0
    while True:
        page = await request_json(server.url, Request("GET", f"/jobs/{job_id}/events?limit=1000&after={after}"))
        if not page["events"]:
            return events
        events += page["events"]
        after = events[-1]["id"]
