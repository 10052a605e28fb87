"""An attempt without training that takes 50 ms: it claims, reports a phase and sends its result. Standard library only."""

import hashlib
import http.client
import json
import os
import secrets
import time
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.chaos.attempt_log import append_entry

CLAIMANT_HEADER = "X-Claimant"

SERVICE_TIMEOUT_S = 60.0  # the campaign keeps killing the service
RETRY_INTERVAL_S = 0.1


def run_attempt(name: str) -> int:
    """Run the whole attempt; return its exit code."""
    append_entry(name, "started")
    claimant = secrets.token_hex(32)
    headers = {"Authorization": f"Bearer {os.environ['JOB_TOKEN']}"}
    status, answer = _post_with_retry("claim", {"claimant": claimant}, headers)
    if status != HTTPStatus.OK:
        return 0  # another process has the claim
    headers = {"Authorization": f"Bearer {json.loads(answer)['token']}", CLAIMANT_HEADER: claimant}
    append_entry(name, "claimed")
    now = datetime.now(UTC).isoformat()
    _post_with_retry("events", {"first_seq": 0, "events": [{"at": now, "event": {"type": "phase", "phase": "training"}}]}, headers)
    result = {"job_id": os.environ["JOB_ID"], "attempt": int(os.environ["JOB_ATTEMPT"])}
    result["claimant"] = hashlib.sha256(claimant.encode()).hexdigest()
    result |= {"outcome": "completed", "started_at": now, "finished_at": now}
    _write_result(result)
    _post_with_retry("result", result, headers)
    return 0


def _post_with_retry(endpoint: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, bytes]:
    """Send until the service answers; return the status and the answer."""
    until = time.monotonic() + SERVICE_TIMEOUT_S
    while True:
        answer = _post(endpoint, body, headers)
        if answer is not None or time.monotonic() > until:
            return answer or (HTTPStatus.SERVICE_UNAVAILABLE, b"")
        time.sleep(RETRY_INTERVAL_S)


def _post(endpoint: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, bytes] | None:
    """Return the status and the answer, or None while the service is unavailable."""
    service_url = urlsplit(os.environ["SERVICE_URL"])
    connection = http.client.HTTPConnection(str(service_url.hostname), service_url.port, timeout=10)
    path = f"/internal/jobs/{os.environ['JOB_ID']}/attempts/{os.environ['JOB_ATTEMPT']}/{endpoint}"
    try:
        connection.request("POST", path, json.dumps(body), headers | {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, answer = response.status, response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return None if status >= HTTPStatus.INTERNAL_SERVER_ERROR else (status, answer)


def _write_result(result: dict[str, Any]) -> None:
    """Write the result atomically into the folder of the object store."""
    path = Path(urlsplit(os.environ["JOB_SPEC_STORE_URL"]).path, "results", result["job_id"], f"{result['attempt']}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{os.getpid()}.part")
    temporary.write_text(json.dumps(result))
    temporary.rename(path)
