"""The attempt's side of the protocol, for rows that act as an attempt. This is the only place of the suite that knows its messages."""

import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import httpx2

from tests.attack.target import Caller, Json, Target
from tests.chaos.campaign import CampaignError
from tests.waiting import wait_until

START_WAIT_S = 20
LAUNCH_ENDPOINTS = ("claim", "token")  # with the token that the attempt was launched with


@dataclass(frozen=True)
class AttemptClient:
    """One attempt of one job: the token that it was launched with, the one that its claim returned, and the secret of its process."""

    target: Target
    job_id: str
    number: int
    launch_token: str
    token: str
    claimant: str = "the-secret-of-the-process"

    def post(self, endpoint: str, body: Any, *, token: str | None = None, **options: Any) -> httpx2.Response:
        """Send one message, by default with the token that it takes."""
        path = f"/internal/jobs/{self.job_id}/attempts/{self.number}/{endpoint}"
        right_token = self.launch_token if endpoint in LAUNCH_ENDPOINTS else self.token
        claimant = {"X-Claimant": self.claimant} if self.claimant else {}
        headers = claimant | dict(options.pop("headers", None) or {})
        caller = Caller(self.target, right_token if token is None else token)
        return caller.request("POST", path, headers=headers, **({"json": body} if body is not None else {}), **options)

    def claim(self) -> httpx2.Response:
        """Claim the attempt."""
        return self.post("claim", {"claimant": self.claimant})

    def report(self, *events: Json, first_seq: int = 0, **fields: Any) -> httpx2.Response:
        """Send events."""
        return self.post("events", make_batch(*events, first_seq=first_seq) | fields)

    def finish(self, outcome: str = "completed", **changes: Any) -> httpx2.Response:
        """Send the result."""
        return self.post("result", self.make_result(outcome) | changes)

    def make_result(self, outcome: str = "completed") -> Json:
        """The body of a result."""
        claimant = hashlib.sha256(self.claimant.encode()).hexdigest()
        result = {"job_id": self.job_id, "attempt": self.number, "claimant": claimant, "outcome": outcome}
        return result | {"started_at": now(), "finished_at": now()}


def make_batch(*events: Json, first_seq: int = 0) -> Json:
    """The body of a report."""
    return {"first_seq": first_seq, "events": [{"at": now(), "event": event} for event in events]}


def now() -> str:
    """The time, as messages have it."""
    return datetime.now(UTC).isoformat()


def wait_for_attempt(target: Target, job_id: str, number: int = 1) -> AttemptClient:
    """The attempt of a job, when the stub trainer has written its token. Raises TimeoutError."""
    path = target.home / "attempts" / f"{job_id}.{number}" / "token"
    wait_until(path.exists, START_WAIT_S, description=f"the attempt of {job_id}")
    token = path.read_text()
    return AttemptClient(target, job_id, number, token, token)


def start_attempt(target: Target, job_id: str, number: int = 1) -> AttemptClient:
    """The same, claimed and in training. Raises CampaignError."""
    launched = wait_for_attempt(target, job_id, number)
    claimed = _expect_success(launched.claim(), job_id)
    attempt = replace(launched, token=str(claimed.get("token", launched.token)))
    _expect_success(attempt.report({"type": "phase", "phase": "training"}), job_id)
    return attempt


def _expect_success(response: httpx2.Response, job_id: str) -> Json:
    if response.status_code != 200:
        raise CampaignError(f"the attempt of {job_id} got {response.status_code}: {response.text[:300]}")
    return response.json()


def end_process(target: Target, attempt: AttemptClient) -> None:
    """End the stub's process, which frees its slot once the launcher looks."""
    for process in target.attempts():
        if process.cmdline()[-1] == f"{attempt.job_id}.{attempt.number}":
            process.kill()
