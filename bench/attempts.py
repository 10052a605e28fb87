"""Attempts that the benchmark speaks for: the stand-in holds the slot, and the reports come from here."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bench.http import Request, ask
from bench.servers import Server, upload
from bench.submit import submit_many

LAUNCH_MOST_S = 60


@dataclass(frozen=True)
class HeldAttempt:
    """The first attempt of a job, claimed."""

    job_id: str
    token: str

    def report(self, first_seq: int, steps: Sequence[int]) -> Request:
        """A batch of one metric point a step, as a trainer sends them."""
        now = datetime.now(UTC).isoformat()
        points = [{"at": now, "event": {"type": "metrics", "step": step, "values": _values(step)}} for step in steps]
        return self.post("events", {"first_seq": first_seq, "events": points})

    def post(self, verb: str, body: dict[str, Any]) -> Request:
        """Something that an attempt says."""
        return Request("POST", f"/internal/jobs/{self.job_id}/attempts/1/{verb}", body, {"Authorization": f"Bearer {self.token}"})


async def hold_attempts(server: Server, jobs: int) -> list[HeldAttempt]:
    """Submit jobs, wait until all are launched, and claim them."""
    submitted = await submit_many(server, await upload(server), jobs, "held")
    held = [await _held(server, answer.json()["job_id"]) for answer in submitted.answers]
    for attempt in held:
        await ask(server.url, attempt.post("claim", {"claimant": "bench"}))
        begun = {"first_seq": 0, "events": [{"at": datetime.now(UTC).isoformat(), "event": {"type": "phase", "phase": "training"}}]}
        await ask(server.url, attempt.post("events", begun))
    return held


async def stored_steps(server: Server, job_id: str) -> list[tuple[int, int]]:
    """The id and the step of every metric point that the service has of a job, in its order."""
    found: list[tuple[int, int]] = []
    after = 0
    while True:
        page = await ask(server.url, Request("GET", f"/jobs/{job_id}/events?limit=1000&after={after}"))
        found += [(row["id"], row["event"]["step"]) for row in page["events"] if row["event"]["type"] == "metrics"]
        if not page["events"]:
            return found
        after = page["next_after"]


async def _held(server: Server, job_id: str) -> HeldAttempt:
    token = server.home / "attempts" / f"{job_id}.1" / "token"
    deadline = time.monotonic() + LAUNCH_MOST_S
    while not token.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job_id} was not launched within {LAUNCH_MOST_S} s")
        await asyncio.sleep(0.02)
    return HeldAttempt(job_id, token.read_text())


def _values(step: int) -> dict[str, float]:
    return {"loss": 2.0 + 1 / (step + 1), "learning_rate": 2e-4, "grad_norm": 0.7, "tokens_per_second": 5120.0, "rss_bytes": 2.5e9}
