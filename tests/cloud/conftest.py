"""The service on emulators of Google Cloud, each behind a proxy that can cut, hang and reset connections and drop responses."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient

from infra.loopback.cloud_run.server import CloudRun
from infra.loopback.cloud_storage import run_cloud_storage
from infra.loopback.firestore import run_firestore_emulator
from infra.loopback.proxy import Proxy
from infra.loopback.secret_manager import SecretManager
from schema.capabilities import MANIFEST_FILE
from schema.requests import TRAIN_REQUEST_EXAMPLE
from service.main import create_app
from service.settings import Settings
from tests.factories import make_dataset, make_manifest
from tests.fakes import FakeClock
from tests.local_token import local_headers
from tests.waiting import wait_until

REGION, PROFILE = "loopback", "cpu"
BUCKETS = ("configs", "datasets", "models")
MAX_RESPONSE_S = 5.0
ATTEMPT_SCRIPT = "import time; time.sleep(60)"  # occupies compute and reports nothing
Json = dict[str, Any]


@dataclass
class CloudDeployment:
    """A deployment, and the proxies between its parts."""

    client: TestClient
    clock: FakeClock
    project: str
    firestore_proxy: Proxy
    storage_proxy: Proxy
    secret_manager_proxy: Proxy
    cloud_run_proxy: Proxy
    cloud_run: CloudRun

    def get(self, path: str) -> Any:
        return self._timed_request("GET", path)

    def post(self, path: str, body: Json | None = None, **headers: str) -> Any:
        return self._timed_request("POST", path, json=body, headers=headers)

    def train(self, key: str = "k", **changes: Any) -> Any:
        body = {"processed_dataset_id": "dataset_1", "training_config": TRAIN_REQUEST_EXAMPLE["training_config"]} | changes
        return self.post("/train", body, **{"Idempotency-Key": key})

    def submit(self) -> str:
        response = self.train()
        assert response.status_code == 201, response.text
        return response.json()["job_id"]

    def get_job(self, job_id: str) -> Json:
        response = self.get(f"/jobs/{job_id}")
        assert response.status_code == 200, response.text
        return response.json()

    def advance_one_minute(self) -> None:
        """Reconcile as the scheduler does, after the interval at which a launch may be retried."""
        self.clock.advance(61)
        assert self.client.post("/internal/reconcile").status_code == 200

    def wait_until_launched(self) -> None:
        """Reconcile until an execution exists: gRPC reconnects a broken connection only after up to two seconds."""

        def reconcile_and_count() -> int:
            self.advance_one_minute()
            return self.count_executions()

        wait_until(lambda: self.count_executions() or reconcile_and_count(), 10, interval_s=0.1, description="the launch")

    def count_executions(self) -> int:
        return len(self.cloud_run.executions())

    def _timed_request(self, method: str, path: str, **options: Any) -> Any:
        started_at_s = time.monotonic()
        response = self.client.request(method, path, **options)
        assert time.monotonic() - started_at_s < MAX_RESPONSE_S
        return response


@pytest.fixture(scope="session")
def firestore_host() -> Iterator[str]:
    with run_firestore_emulator() as host:
        yield host


@pytest.fixture(scope="session")
def storage_url() -> Iterator[str]:
    with run_cloud_storage(buckets=BUCKETS) as url:
        yield url


@pytest.fixture
def cloud(
    firestore_host: str, storage_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[CloudDeployment]:
    """A deployment for one test. Parametrize indirectly to change settings."""
    project = f"p-{uuid4().hex[:12]}"  # the emulator separates projects
    with ExitStack() as stack:
        cloud_run = stack.enter_context(
            CloudRun(tmp_path / "run", {"llm": [sys.executable, "-c", ATTEMPT_SCRIPT]}, environment={}, grace_s=1)
        )
        cloud_run.create_job(f"projects/{project}/locations/{REGION}/jobs/tunesmith-{PROFILE}", "llm")
        secret_manager = stack.enter_context(SecretManager())
        proxies = [
            stack.enter_context(Proxy(*_split_host(host)))
            for host in (firestore_host, storage_url.removeprefix("http://"), secret_manager.host, cloud_run.host)
        ]
        firestore, storage, secret_manager_proxy, cloud_run_proxy = proxies
        monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", firestore.address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{storage.address}")
        monkeypatch.setenv("CLOUD_RUN_EMULATOR_HOST", cloud_run_proxy.address)
        monkeypatch.setenv("SECRET_MANAGER_EMULATOR_HOST", secret_manager_proxy.address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # otherwise each submission would call the real Hub
        monkeypatch.setenv("PROJECT_ID", project)
        monkeypatch.setenv("REGION", REGION)
        monkeypatch.setenv("TUNESMITH_CLOUD_RUN_PROFILES", PROFILE)
        monkeypatch.setenv("TUNESMITH_CLOUD_RUN_MAX_CONCURRENT_JOBS", "10")
        monkeypatch.setenv("TUNESMITH_CLOUD_RUN_ENVIRONMENTS", str(tmp_path / "environments"))
        manifest = tmp_path / "environments/llm" / MANIFEST_FILE
        manifest.parent.mkdir(parents=True)
        manifest.write_text(make_manifest().model_dump_json())
        clock = FakeClock()
        client = stack.enter_context(
            TestClient(create_app(_make_settings(tmp_path, **getattr(request, "param", {})), clock), raise_server_exceptions=False)
        )
        client.headers |= local_headers(tmp_path / "home")
        client.app.state.services.store.create_dataset(make_dataset())  # type: ignore[attr-defined]
        yield CloudDeployment(client, clock, project, firestore, storage, secret_manager_proxy, cloud_run_proxy, cloud_run)
        for proxy in proxies:
            proxy.restore()


def _make_settings(folder: Path, **changes: str) -> Settings:
    settings = Settings(  # type: ignore[call-arg]  # the rest comes from the environment
        home=folder / "home",
        job_store="firestore",
        launchers=("cloud-run",),
        secret_store="secret-manager",
        configs_url="gs://configs",
        datasets_url="gs://datasets",
        models_url="gs://models",
        public_url="http://127.0.0.1:1",
        reconcile_interval_s=0,
        signing_key="k" * 32,  # type: ignore[arg-type]
    )
    return settings.model_copy(update=changes)


def _split_host(host: str) -> tuple[str, int]:
    address, _, port = host.rpartition(":")
    return address, int(port)
