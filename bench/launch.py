"""B4: from `POST /train` to the first line of the attempt's output, and from cancel to the end of its process.

The real launcher and the real trainer, on a tiny Gemma with random weights. It cancels attempts that have just started,
whose libraries are still loading, and attempts that are training.
"""

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from bench.figures import Measurement, at_most, median, percentile
from bench.http import Request, request_json
from bench.scene import REAL_TRAINER, BenchmarkContext
from bench.servers import SOURCE, Server, ServerUnavailable, make_environment, run_service, upload_dataset

NAME = "launch"
BASE = "tests/tiny-gemma"
LAUNCHES = 20
LAUNCHES_IN_TRAINING = 5
POLL_S = 0.002
TIMEOUT_S = 120.0


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """How soon attempts start, and how soon they end after a cancel."""
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, "POST /train to first line", None, "s", at_most(0.3), "there is no trainer's environment: make setup")]
    home = context.folder / "home"
    await asyncio.to_thread(install_tiny_base, home)
    async with run_service(home, REAL_TRAINER) as server:
        dataset_id = await upload_dataset(server)
        await request_json(server.url, Request("GET", "/capabilities"))  # asked once per service: what the trainer's environment can do
        await _launch_and_cancel(server, dataset_id, in_training=False)  # files in the page cache, as on any day but the first
        early = [await _launch_and_cancel(server, dataset_id, in_training=False) for _ in range(LAUNCHES)]
        late = [await _launch_and_cancel(server, dataset_id, in_training=True) for _ in range(LAUNCHES_IN_TRAINING)]
    begun_s = [begin_s for begin_s, _ in early]
    return [
        Measurement(
            NAME, "POST /train to first line, p50", median(begun_s), "s", at_most(0.3), f"of {LAUNCHES}, slowest {max(begun_s):.2f} s"
        ),
        _cancel_measurement("an attempt that has just begun", [gone_s for _, gone_s in early]),
        _cancel_measurement("an attempt in training", [gone_s for _, gone_s in late]),
    ]


def _cancel_measurement(what: str, gone_s: list[float]) -> Measurement:
    return Measurement(
        NAME,
        f"cancel to no process: {what}, slowest",
        max(gone_s),
        "s",
        at_most(2),
        f"of {len(gone_s)}, p50 {percentile(gone_s, 50):.2f} s",
    )


def install_tiny_base(home: Path) -> None:
    """Put the tiny Gemma where the jobs of a service in that home find it."""
    folder = home / "objects/pretrained_weights/huggingface" / BASE
    folder.mkdir(parents=True)
    command = [REAL_TRAINER, "-m", "tests.tiny_gemma", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=SOURCE, env=make_environment(home, PYTHONPATH=str(SOURCE)))


async def _launch_and_cancel(server: Server, dataset_id: str, *, in_training: bool) -> tuple[float, float]:
    """Seconds to the first line, and from the cancel until the process is gone."""
    config = {"base_model_id": BASE, "hyperparameters": {"max_steps": 1_000_000, "batch_size": 2, "logging_steps": 1}}
    began = time.perf_counter()
    answer = await request_json(server.url, Request("POST", "/train", {"processed_dataset_id": dataset_id, "training_config": config}))
    job_id = answer["job_id"]
    log = server.home / "attempts" / f"{job_id}.1.log"
    await _wait_until(lambda: log.exists() and b"\n" in log.read_bytes())
    begun_s = time.perf_counter() - began
    attempt = _find_process(job_id)
    if in_training:
        await _wait_for_first_metrics(server, job_id)
    began = time.perf_counter()
    await request_json(server.url, Request("POST", f"/jobs/{job_id}/cancel"))
    await _wait_until(lambda: not _is_alive(attempt))
    gone_s = time.perf_counter() - began
    await _wait_until_cancelled(server, job_id)
    return begun_s, gone_s


def _find_process(job_id: str) -> psutil.Process:
    return next(process for process in psutil.process_iter(["cmdline"]) if f"{job_id}.1" in (process.info["cmdline"] or []))


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def _wait_for_first_metrics(server: Server, job_id: str) -> None:
    """Until the first metric point has come."""

    async def has_metrics() -> bool:
        page = await request_json(server.url, Request("GET", f"/jobs/{job_id}/events?limit=1000"))
        return any(row["event"]["type"] == "metrics" for row in page["events"])

    await _wait_until_async(has_metrics, job_id)


async def _wait_until_cancelled(server: Server, job_id: str) -> None:
    """Until the job is final. A process that is gone for another reason than the cancel is no measurement."""

    async def is_cancelled() -> bool:
        status = (await request_json(server.url, Request("GET", f"/jobs/{job_id}")))["status"]
        if status in ("completed", "failed"):
            raise ServerUnavailable(f"{job_id} should have been cancelled, and is {status}")
        return status == "cancelled"

    await _wait_until_async(is_cancelled, job_id)


async def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.perf_counter() + TIMEOUT_S
    while not condition():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"it did not happen within {TIMEOUT_S:.0f} s")
        await asyncio.sleep(POLL_S)


async def _wait_until_async(condition: Callable[[], Awaitable[bool]], job_id: str) -> None:
    deadline = time.perf_counter() + TIMEOUT_S
    while not await condition():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{job_id} did not get there within {TIMEOUT_S:.0f} s")
        await asyncio.sleep(0.1)
