"""A real service process, real HTTP, real attempts in the trainer's environment, and a tiny Gemma as the base."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests import waiting
from tests.local_token import local_headers

SOURCE = Path(__file__).resolve().parents[2]
TRAINER_PYTHON = SOURCE / ".venvs/llm/bin/python"
TUNESMITH = Path(sys.executable).with_name("tunesmith")
BASE = "tests/tiny-gemma"
Json = dict[str, Any]

ROWS = [
    {"messages": [{"role": "user", "content": f"what does function {n} do"}, {"role": "assistant", "content": f"it returns list {n % 7}"}]}
    for n in range(60)
]


class Service:
    """One `tunesmith serve` in its own home; it can be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            # As on a user's machine: no setting, and only what is installed can be imported.
            **{name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_") and name != "PYTHONPATH"},
            "TUNESMITH_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.port = 0
        self.process: subprocess.Popen[str] | None = None
        self.http = httpx2.Client(timeout=60)

    def start(self) -> None:
        """Start, on the previous port if there was one, and wait until the service is healthy."""
        with (self.home / "service.log").open("a") as log:
            command = [str(TUNESMITH), "serve", "--port", str(self.port)]
            self.process = subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True, cwd=SOURCE)
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        assert url, (self.home / "service.log").read_text()
        self.port = int(url.rpartition(":")[2])
        self.http.base_url = httpx2.URL(url)
        wait_until(self.is_ready)
        self.http.headers |= local_headers(self.home)

    def is_ready(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self, signal_number: signal.Signals = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(signal_number)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def upload(self, rows: list[Json] = ROWS, **fields: str) -> str:
        content = "\n".join(json.dumps(row) for row in rows)
        response = self.http.post("/datasets", files={"file": ("rows.jsonl", content)}, data=fields)
        assert response.status_code == 201, response.text
        return response.json()["processed_dataset_id"]

    def train(self, dataset_id: str, hyperparameters: Json | None = None, **changes: Any) -> str:
        request = {
            "processed_dataset_id": dataset_id,
            "training_config": {"base_model_id": BASE, "hyperparameters": {"max_steps": 4, "batch_size": 2, **(hyperparameters or {})}},
        }
        request["training_config"] |= changes.pop("config", {})
        response = self.http.post("/train", json=request | changes)
        assert response.status_code == 201, response.text
        return response.json()["job_id"]

    def job(self, job_id: str) -> Json:
        return self.http.get(f"/jobs/{job_id}").json()

    def wait_until_final(self, job_id: str, timeout_s: float = 120) -> Json:
        """Wait until the job is final; return it."""
        wait_until(lambda: self.job(job_id)["status"] in ("completed", "failed", "cancelled"), timeout_s)
        return self.job(job_id)

    def log(self, job_id: str) -> str:
        return self.http.get(f"/jobs/{job_id}/logs", params={"limit": 1 << 20}).json()["text"]

    def attempts(self) -> list[psutil.Process]:
        """The attempt processes of this home."""
        attempts = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            if "jobs.run" in (process.info["cmdline"] or []) and str(self.home) in str(process.info["environ"]):
                attempts.append(process)
        return attempts

    def run_cli(self, *arguments: str, expect_failure: bool = False) -> str:
        """Run the command line; return its stdout, or its stderr if it is expected to fail."""
        done = subprocess.run([str(TUNESMITH), *arguments], env=self.environment, capture_output=True, text=True, cwd=SOURCE)
        assert (done.returncode != 0) == expect_failure, done.stdout + done.stderr
        return done.stderr if expect_failure else done.stdout


def wait_until(condition: Callable[[], object], timeout_s: float = 120) -> None:
    """Poll less often than other tests: most conditions are an HTTP request. Starting an attempt takes 20 s on busy cores."""
    waiting.wait_until(condition, timeout_s, interval_s=0.05)


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, built once in the trainer's environment."""
    folder = tmp_path_factory.mktemp("tiny") / "gemma"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [str(TRAINER_PYTHON), "-m", "tests.tiny_gemma", str(folder)], check=True, cwd=SOURCE, env=environment, capture_output=True
    )
    return folder


def new_service(home: Path, tiny_gemma: Path) -> Service:
    base = home / "objects/pretrained_weights/huggingface" / BASE
    base.mkdir(parents=True)
    for file in tiny_gemma.iterdir():
        (base / file.name).hardlink_to(file)
    return Service(home)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_gemma: Path) -> Iterator[Service]:
    """A service shared by tests that do not stop it."""
    service = new_service(tmp_path_factory.mktemp("home"), tiny_gemma)
    service.start()
    yield service
    service.stop()
    service.http.close()


@pytest.fixture
def own_service(tmp_path: Path, tiny_gemma: Path) -> Iterator[Service]:
    """A service for one test that kills or stops it."""
    service = new_service(tmp_path / "home", tiny_gemma)
    service.start()
    yield service
    if service.process and service.process.poll() is None:
        service.stop()
    for process in service.attempts():
        process.kill()
    service.http.close()
