"""An attempt without training that takes 50 ms: it claims, reports a phase and sends its result. Standard library only."""

import http.client
import json
import os
import time
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.chaos.attempt_log import append_entry

SERVICE_TIMEOUT_S = 60.0  # the campaign keeps killing the service
RETRY_INTERVAL_S = 0.1


def run_attempt(name: str) -> int:
    """Run the whole attempt; return its exit code."""
    append_entry(name, "started")
    claimant = f"light-{os.getpid()}"
    if _post_with_retry("claim", {"claimant": claimant}) != HTTPStatus.OK:
        return 0  # another process has the claim
    append_entry(name, "claimed")
    now = datetime.now(UTC).isoformat()
    _post_with_retry("events", {"first_seq": 0, "events": [{"at": now, "event": {"type": "phase", "phase": "training"}}]})
    result = {"job_id": os.environ["JOB_ID"], "attempt": int(os.environ["JOB_ATTEMPT"]), "claimant": claimant}
    result |= {"outcome": "completed", "started_at": now, "finished_at": now}
    _write_result(result)
    _post_with_retry("result", result)
    return 0


def _post_with_retry(endpoint: str, body: dict[str, Any]) -> int:
    """Send until the service answers; return the status."""
    until = time.monotonic() + SERVICE_TIMEOUT_S
    while True:
        status = _post(endpoint, body)
        if status is not None or time.monotonic() > until:
            return status or HTTPStatus.SERVICE_UNAVAILABLE
        time.sleep(RETRY_INTERVAL_S)


def _post(endpoint: str, body: dict[str, Any]) -> int | None:
    """Return the status, or None while the service is unavailable."""
    service_url = urlsplit(os.environ["SERVICE_URL"])
    connection = http.client.HTTPConnection(str(service_url.hostname), service_url.port, timeout=10)
    headers = {"Authorization": f"Bearer {os.environ['JOB_TOKEN']}", "Content-Type": "application/json"}
    path = f"/internal/jobs/{os.environ['JOB_ID']}/attempts/{os.environ['JOB_ATTEMPT']}/{endpoint}"
    try:
        connection.request("POST", path, json.dumps(body), headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return None if status >= HTTPStatus.INTERNAL_SERVER_ERROR else status


def _write_result(result: dict[str, Any]) -> None:
    """Write the result atomically into the folder of the object store."""
    path = Path(urlsplit(os.environ["JOB_SPEC_STORE_URL"]).path, "results", result["job_id"], f"{result['attempt']}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{os.getpid()}.part")
    temporary.write_text(json.dumps(result))
    temporary.rename(path)
