"""Attempts simulated by the benchmark: the stub trainer occupies the slot, and the benchmark sends the reports."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bench.http import Request, request_json
from bench.servers import Server, ServerUnavailable, upload_dataset
from bench.submit import submit_many
from schema.spec import CLAIMANT_HEADER

LAUNCH_TIMEOUT_S = 60
CLAIMANT = "benchmark"


@dataclass(frozen=True)
class ClaimedAttempt:
    """The first attempt of a job: claimed, once it has the token of a claim."""

    job_id: str
    token: str

    def build_report(self, first_seq: int, steps: Sequence[int]) -> Request:
        """A batch with one metric point per step, as a trainer sends it."""
        now = datetime.now(UTC).isoformat()
        points = [{"at": now, "event": {"type": "metrics", "step": step, "values": _metric_values(step)}} for step in steps]
        return self.build_request("events", {"first_seq": first_seq, "events": points})

    def build_request(self, action: str, body: dict[str, Any]) -> Request:
        """A request that the attempt sends to the service, such as `events` or `result`."""
        return Request("POST", f"/internal/jobs/{self.job_id}/attempts/1/{action}", body, self._headers)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", CLAIMANT_HEADER: CLAIMANT}


async def claim_attempts(server: Server, jobs: int) -> list[ClaimedAttempt]:
    """Submit jobs, wait until all are launched, and claim them."""
    submitted = await submit_many(server, await upload_dataset(server), jobs, "held")
    if submitted.rejected:
        raise ServerUnavailable(f"the service rejected jobs: {dict(submitted.rejected)}")
    launched = [await _wait_for_launch(server, answer.json()["job_id"]) for answer in submitted.responses]
    attempts: list[ClaimedAttempt] = []
    for attempt in launched:
        claim = await request_json(server.url, attempt.build_request("claim", {"claimant": CLAIMANT}))
        attempts.append(attempt := ClaimedAttempt(attempt.job_id, claim["token"]))
        started = {"first_seq": 0, "events": [{"at": datetime.now(UTC).isoformat(), "event": {"type": "phase", "phase": "training"}}]}
        await request_json(server.url, attempt.build_request("events", started))
    return attempts


async def load_stored_steps(server: Server, job_id: str) -> list[tuple[int, int]]:
    """The event id and step of every metric point that the service stored for a job, in its order."""
    stored: list[tuple[int, int]] = []
    after = 0
    while True:
        page = await request_json(server.url, Request("GET", f"/jobs/{job_id}/events?limit=1000&after={after}"))
        stored += [(row["id"], row["event"]["step"]) for row in page["events"] if row["event"]["type"] == "metrics"]
        if not page["events"]:
            return stored
        after = page["next_after"]


async def _wait_for_launch(server: Server, job_id: str) -> ClaimedAttempt:
    token_file = server.home / "attempts" / f"{job_id}.1" / "token"
    deadline = time.monotonic() + LAUNCH_TIMEOUT_S
    while not token_file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job_id} was not launched within {LAUNCH_TIMEOUT_S} s")
        await asyncio.sleep(0.02)
    return ClaimedAttempt(job_id, token_file.read_text())


def _metric_values(step: int) -> dict[str, float]:
    return {"loss": 2.0 + 1 / (step + 1), "learning_rate": 2e-4, "grad_norm": 0.7, "tokens_per_second": 5120.0, "rss_bytes": 2.5e9}
