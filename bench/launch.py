"""B4: from `POST /train` to the first line of the attempt's output, and from cancel to the end of its process.

The real launcher and the real trainer, on a tiny Gemma with random weights. Cancelled are attempts that have just begun,
whose libraries are still being loaded, and attempts in the middle of their training.
"""

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from bench.figures import Figure, at_most, median, percentile
from bench.http import Request, ask
from bench.scene import REAL_TRAINER, Scene
from bench.servers import SOURCE, Server, ServerDown, environment, service, upload

NAME = "launch"
BASE = "tests/tiny-gemma"
LAUNCHES = 20
IN_TRAINING = 5
POLL_S = 0.002
WITHIN_S = 120.0


async def measure(scene: Scene) -> list[Figure]:
    """How soon attempts begin, and how soon they end when told to."""
    if not REAL_TRAINER.exists():
        return [Figure(NAME, "POST /train to first line", None, "s", at_most(0.3), "there is no trainer's environment: make setup")]
    home = scene.folder / "home"
    await asyncio.to_thread(make_base, home)
    async with service(home, REAL_TRAINER) as server:
        dataset_id = await upload(server)
        await ask(server.url, Request("GET", "/capabilities"))  # asked once per service: what the trainer's environment can do
        await _launch_and_cancel(server, dataset_id, in_training=False)  # files in the page cache, as on any day but the first
        early = [await _launch_and_cancel(server, dataset_id, in_training=False) for _ in range(LAUNCHES)]
        late = [await _launch_and_cancel(server, dataset_id, in_training=True) for _ in range(IN_TRAINING)]
    begun_s = [begin_s for begin_s, _ in early]
    return [
        Figure(NAME, "POST /train to first line, p50", median(begun_s), "s", at_most(0.3), f"of {LAUNCHES}, slowest {max(begun_s):.2f} s"),
        _cancelled("an attempt that has just begun", [gone_s for _, gone_s in early]),
        _cancelled("an attempt in training", [gone_s for _, gone_s in late]),
    ]


def _cancelled(what: str, gone_s: list[float]) -> Figure:
    return Figure(
        NAME,
        f"cancel to no process: {what}, slowest",
        max(gone_s),
        "s",
        at_most(2),
        f"of {len(gone_s)}, p50 {percentile(gone_s, 50):.2f} s",
    )


def make_base(home: Path) -> None:
    """Put the tiny Gemma where the jobs of a service in that home find it."""
    folder = home / "objects/pretrained_weights/huggingface" / BASE
    folder.mkdir(parents=True)
    command = [REAL_TRAINER, "-m", "tests.tiny_gemma", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=SOURCE, env=environment(home, PYTHONPATH=str(SOURCE)))


async def _launch_and_cancel(server: Server, dataset_id: str, *, in_training: bool) -> tuple[float, float]:
    """Seconds to the first line, and from the cancel until the process is gone."""
    config = {"base_model_id": BASE, "hyperparameters": {"max_steps": 1_000_000, "batch_size": 2, "logging_steps": 1}}
    began = time.perf_counter()
    answer = await ask(server.url, Request("POST", "/train", {"processed_dataset_id": dataset_id, "training_config": config}))
    job_id = answer["job_id"]
    log = server.home / "attempts" / f"{job_id}.1.log"
    await _until(lambda: log.exists() and b"\n" in log.read_bytes())
    begun_s = time.perf_counter() - began
    attempt = _process_of(job_id)
    if in_training:
        await _until_trained(server, job_id)
    began = time.perf_counter()
    await ask(server.url, Request("POST", f"/jobs/{job_id}/cancel"))
    await _until(lambda: not _alive(attempt))
    gone_s = time.perf_counter() - began
    await _until_cancelled(server, job_id)
    return begun_s, gone_s


def _process_of(job_id: str) -> psutil.Process:
    return next(process for process in psutil.process_iter(["cmdline"]) if f"{job_id}.1" in (process.info["cmdline"] or []))


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def _until_trained(server: Server, job_id: str) -> None:
    """Until the first metric point has come."""

    async def reported() -> bool:
        page = await ask(server.url, Request("GET", f"/jobs/{job_id}/events?limit=1000"))
        return any(row["event"]["type"] == "metrics" for row in page["events"])

    await _until_answer(reported, job_id)


async def _until_cancelled(server: Server, job_id: str) -> None:
    """Until the job is final. A process that is gone for another reason than the cancel is no measurement."""

    async def final() -> bool:
        status = (await ask(server.url, Request("GET", f"/jobs/{job_id}")))["status"]
        if status in ("completed", "failed"):
            raise ServerDown(f"{job_id} should have been cancelled, and is {status}")
        return status == "cancelled"

    await _until_answer(final, job_id)


async def _until(true: Callable[[], bool]) -> None:
    deadline = time.perf_counter() + WITHIN_S
    while not true():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"it did not happen within {WITHIN_S:.0f} s")
        await asyncio.sleep(POLL_S)


async def _until_answer(true: Callable[[], Awaitable[bool]], job_id: str) -> None:
    deadline = time.perf_counter() + WITHIN_S
    while not await true():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{job_id} did not get there within {WITHIN_S:.0f} s")
        await asyncio.sleep(0.1)
