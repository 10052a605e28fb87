"""B4: time from `POST /train` to the first line of the attempt's output, and from a cancel to the end of its process.

It uses the real launcher and trainer, on a tiny Gemma with random weights, and cancels both attempts that have just started, whose
libraries are still loading, and attempts that are training.
"""

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from bench.context import MISSING_TRAINER_NOTE, REAL_TRAINER, BenchmarkContext
from bench.figures import Measurement, at_most, median
from bench.http import Request, request_json
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
        return [Measurement(NAME, "POST /train to first line", None, "s", at_most(0.3), MISSING_TRAINER_NOTE)]
    home = context.folder / "home"
    await asyncio.to_thread(install_tiny_base, home)
    async with run_service(home, {}) as server:
        dataset_id = await upload_dataset(server)
        await request_json(server.url, Request("GET", "/capabilities"))  # the service probes the trainer's environment once
        await _launch_and_cancel(server, dataset_id, in_training=False)  # fills the page cache
        early = [await _launch_and_cancel(server, dataset_id, in_training=False) for _ in range(LAUNCHES)]
        late = [await _launch_and_cancel(server, dataset_id, in_training=True) for _ in range(LAUNCHES_IN_TRAINING)]
    first_line_s = [start_s for start_s, _ in early]
    return [
        Measurement(
            NAME,
            "POST /train to first line, p50",
            median(first_line_s),
            "s",
            at_most(0.3),
            f"of {LAUNCHES}, slowest {max(first_line_s):.2f} s",
        ),
        _cancel_measurement("an attempt that has just started", [exit_s for _, exit_s in early]),
        _cancel_measurement("an attempt in training", [exit_s for _, exit_s in late]),
    ]


def _cancel_measurement(attempt: str, exit_s: list[float]) -> Measurement:
    note = f"of {len(exit_s)}, p50 {median(exit_s):.2f} s"
    return Measurement(NAME, f"from the cancel to the end of the process: {attempt}, slowest", max(exit_s), "s", at_most(2), note)


def install_tiny_base(home: Path) -> None:
    """Put the tiny Gemma into the object store of the service with this home."""
    folder = home / "objects/pretrained_weights/huggingface" / BASE
    folder.mkdir(parents=True)
    command = [REAL_TRAINER, "-m", "tests.tiny_gemma", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=SOURCE, env=make_environment(home, PYTHONPATH=str(SOURCE)))


async def _launch_and_cancel(server: Server, dataset_id: str, *, in_training: bool) -> tuple[float, float]:
    """Seconds from the request to the first line, and from the cancel to the end of the process."""
    config = {"base_model_id": BASE, "hyperparameters": {"max_steps": 1_000_000, "batch_size": 2, "logging_steps": 1}}
    submitted_at = time.perf_counter()
    answer = await request_json(server.url, Request("POST", "/train", {"processed_dataset_id": dataset_id, "training_config": config}))
    job_id = answer["job_id"]
    log = server.home / "attempts" / f"{job_id}.1.log"
    await _wait_until(lambda: log.exists() and b"\n" in log.read_bytes())
    first_line_s = time.perf_counter() - submitted_at
    process = _find_process(job_id)
    if in_training:
        await _wait_for_first_metrics(server, job_id)
    cancelled_at = time.perf_counter()
    await request_json(server.url, Request("POST", f"/jobs/{job_id}/cancel"))
    await _wait_until(lambda: not _is_alive(process))
    exit_s = time.perf_counter() - cancelled_at
    await _wait_until_cancelled(server, job_id)
    return first_line_s, exit_s


def _find_process(job_id: str) -> psutil.Process:
    return next(process for process in psutil.process_iter(["cmdline"]) if f"{job_id}.1" in (process.info["cmdline"] or []))


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def _wait_for_first_metrics(server: Server, job_id: str) -> None:
    async def has_metrics() -> bool:
        page = await request_json(server.url, Request("GET", f"/jobs/{job_id}/events?limit=1000"))
        return any(row["event"]["type"] == "metrics" for row in page["events"])

    await _wait_until_async(has_metrics, job_id)


async def _wait_until_cancelled(server: Server, job_id: str) -> None:
    """Raises ServerUnavailable if the process ended for another reason than the cancel."""

    async def is_cancelled() -> bool:
        status = (await request_json(server.url, Request("GET", f"/jobs/{job_id}")))["status"]
        if status in ("completed", "failed"):
            raise ServerUnavailable(f"{job_id} is {status}, not cancelled")
        return status == "cancelled"

    await _wait_until_async(is_cancelled, job_id)


async def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.perf_counter() + TIMEOUT_S
    while not condition():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"the condition was not met within {TIMEOUT_S:.0f} s")
        await asyncio.sleep(POLL_S)


async def _wait_until_async(condition: Callable[[], Awaitable[bool]], job_id: str) -> None:
    deadline = time.perf_counter() + TIMEOUT_S
    while not await condition():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{job_id}: the condition was not met within {TIMEOUT_S:.0f} s")
        await asyncio.sleep(0.1)
