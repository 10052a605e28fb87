"""The attempt's side of the protocol, for rows that act as an attempt. This is the only place of the suite that knows its messages."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import httpx2

from tests.attack.target import Caller, Json, Target
from tests.chaos.campaign import CampaignError
from tests.waiting import wait_until

START_WAIT_S = 20


@dataclass(frozen=True)
class AttemptClient:
    """One attempt of one job, by its token."""

    target: Target
    job_id: str
    number: int
    token: str
    claimant: str = "attack-1"

    def post(self, endpoint: str, body: Any, **options: Any) -> httpx2.Response:
        """Send one message."""
        path = f"/internal/jobs/{self.job_id}/attempts/{self.number}/{endpoint}"
        return Caller(self.target, self.token).request("POST", path, **({"json": body} if body is not None else {}), **options)

    def claim(self) -> httpx2.Response:
        """Claim the attempt."""
        return self.post("claim", {"claimant": self.claimant})

    def report(self, *events: Json, first_seq: int = 0, **fields: Any) -> httpx2.Response:
        """Send events."""
        rows = [{"at": now(), "event": event} for event in events]
        return self.post("events", {"first_seq": first_seq, "events": rows} | fields)

    def finish(self, outcome: str = "completed", **changes: Any) -> httpx2.Response:
        """Send the result."""
        return self.post("result", self.make_result(outcome) | changes)

    def make_result(self, outcome: str = "completed") -> Json:
        """The body of a result."""
        result = {"job_id": self.job_id, "attempt": self.number, "claimant": self.claimant, "outcome": outcome}
        return result | {"started_at": now(), "finished_at": now()}

    def with_token(self, token: str) -> "AttemptClient":
        """The same attempt with another token."""
        return replace(self, token=token)


def now() -> str:
    """The time, as messages have it."""
    return datetime.now(UTC).isoformat()


def wait_for_attempt(target: Target, job_id: str, number: int = 1) -> AttemptClient:
    """The attempt of a job, when the stub trainer has written its token. Raises TimeoutError."""
    path = target.home / "attempts" / f"{job_id}.{number}" / "token"
    wait_until(path.exists, START_WAIT_S, description=f"the attempt of {job_id}")
    return AttemptClient(target, job_id, number, path.read_text())


def start_attempt(target: Target, job_id: str, number: int = 1) -> AttemptClient:
    """The same, claimed and in training. Raises CampaignError."""
    attempt = wait_for_attempt(target, job_id, number)
    for response in (attempt.claim(), attempt.report({"type": "phase", "phase": "training"})):
        if response.status_code != 200:
            raise CampaignError(f"the attempt of {job_id} got {response.status_code}: {response.text[:300]}")
    return attempt


def end_process(target: Target, attempt: AttemptClient) -> None:
    """End the stub's process, which frees its slot once the launcher looks."""
    for process in target.attempts():
        if process.cmdline()[-1] == f"{attempt.job_id}.{attempt.number}":
            process.kill()
