"""A service for tests of the HTTP API, the requests they send and the errors they expect."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from jobs.ingest.pipeline import ingest
from schema.requests import TRAIN_REQUEST_EXAMPLE
from schema.spec import CLAIMANT_HEADER, claimant_id
from service.adapters.ingester import ProcessIngester
from service.adapters.launchers.local.launcher import LocalLauncher
from service.bootstrap import Services
from service.core import lifecycle
from service.main import create_app
from service.settings import Settings
from tests.factories import START, make_manifest, make_profile
from tests.local_token import local_headers

CLAIMANT = "c" * 64  # the secret of the process that claims the attempts of the tests
ROWS = "\n".join(
    json.dumps({"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]})
    for n in range(20)
)


@contextmanager
def run_test_service(home: Path, *, offline_attempts: bool = False, **changes: Any) -> Iterator[TestClient]:
    """A service with low limits, whose launcher starts no process. `changes` are settings.

    `offline_attempts`: attempts inherit HF_HUB_OFFLINE, so that a base must be stored or cached.
    """
    limits = {"max_upload_bytes": 100_000, "max_incoming_bytes": 200_000, "max_row_bytes": 10_000}
    settings = Settings(home=home, HF_HUB_OFFLINE=True, **limits | changes)  # type: ignore[call-arg]
    with pytest.MonkeyPatch.context() as patch:
        if not offline_attempts:
            patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr(LocalLauncher, "profiles", {"local": make_profile("local")})
        patch.setattr(LocalLauncher, "list_environments", lambda _: {"llm": make_manifest()})
        patch.setattr(LocalLauncher, "ping", lambda _: None)
        patch.setattr(LocalLauncher, "count_free_slots", lambda _, active_jobs: 0)  # jobs stay queued
        patch.setattr(LocalLauncher, "count_free_reserved_slots", lambda _, environment: 0)
        patch.setattr(LocalLauncher, "check", lambda *_: "running")  # the attempts of `start_attempt` have no process
        patch.setattr(ProcessIngester, "ingest", lambda _, task, **__: ingest(task))
        with TestClient(create_app(settings), raise_server_exceptions=False) as client:
            client.headers |= local_headers(home)
            yield client


def get_services(client: TestClient) -> Services:
    """The parts of the service behind a client."""
    return client.app.state.services  # type: ignore[attr-defined]


def upload(client: TestClient, content: str | bytes, **fields: str) -> Any:
    return client.post("/datasets", files={"file": ("rows.jsonl", content)}, data=fields)


def make_request_body(dataset_id: str, **changes: Any) -> dict[str, Any]:
    return {**TRAIN_REQUEST_EXAMPLE, "processed_dataset_id": dataset_id, **changes}


def make_request_body_with_config(dataset_id: str, group: str | None = None, **changes: Any) -> dict[str, Any]:
    """The documented example with changes in its training config, or in a group of it such as `hyperparameters`."""
    config: dict[str, Any] = json.loads(json.dumps(TRAIN_REQUEST_EXAMPLE["training_config"]))
    (config[group] if group else config).update(changes)
    return make_request_body(dataset_id, training_config=config)


def submit_job(client: TestClient, dataset_id: str) -> str:
    return client.post("/train", json=make_request_body(dataset_id)).json()["job_id"]


def start_attempt(client: TestClient, dataset_id: str, *, claimed: bool = True) -> str:
    """Submit a job and record its first attempt as launched and, unless told otherwise, claimed by `CLAIMANT`."""
    job_id = submit_job(client, dataset_id)
    store = get_services(client).store
    queued = store.find_job(job_id)
    assert queued is not None
    job = store.replace_job(lifecycle.begin_attempt(queued, queued.placements[0], START))
    job = store.replace_job(lifecycle.mark_launched(job, 1, "0@0", START))
    if claimed:
        store.replace_job(lifecycle.claim_attempt(job, 1, claimant_id(CLAIMANT), datetime.now(UTC)))
    return job_id


def attempt_headers(client: TestClient, job_id: str, attempt: int = 1) -> dict[str, str]:
    """What a process that claimed the attempt as `CLAIMANT` sends."""
    return {"Authorization": f"Bearer {get_services(client).tokens.sign_attempt_token(job_id, attempt)}", CLAIMANT_HEADER: CLAIMANT}


def launch_headers(client: TestClient, job_id: str, attempt: int = 1) -> dict[str, str]:
    """What an attempt sends that was just launched."""
    return {"Authorization": f"Bearer {get_services(client).tokens.sign_launch_token(job_id, attempt)}"}


def claim_attempt(client: TestClient, job_id: str, attempt: int = 1, claimant: str = CLAIMANT) -> Any:
    path = f"/internal/jobs/{job_id}/attempts/{attempt}/claim"
    return client.post(path, json={"claimant": claimant}, headers=launch_headers(client, job_id, attempt))


def make_result_body(job_id: str, outcome: str = "completed", **changes: Any) -> dict[str, Any]:
    body = {"job_id": job_id, "attempt": 1, "claimant": claimant_id(CLAIMANT), "outcome": outcome}
    return body | {"started_at": START.isoformat(), "finished_at": START.isoformat()} | changes


def get_error(response: Any, status: int) -> dict[str, Any]:
    """The error in a response, which must have this status and the one shape of errors."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"code", "message", "hint", "param", "errors"}
    assert "Traceback" not in response.text
    return error
