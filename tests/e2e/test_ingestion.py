"""A dataset that a job makes, on a laptop's service with its real launcher, attempt and child process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Json, Service, wait_until

# An attempt of this home that holds the only slot for trainings, as the launcher recognizes one.
FAKE_TRAINING = "import time\nprint('ready', flush=True)\ntime.sleep(600)\n"


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path / "home")
    service.home.mkdir()
    service.start()
    yield service
    if service.process and service.process.poll() is None:
        service.stop()
    for process in service.attempts():
        process.kill()
    service.http.close()


@pytest.fixture
def training(laptop: Service, tmp_path: Path) -> Iterator[None]:
    source = tmp_path / "fake"
    (source / "jobs").mkdir(parents=True)
    (source / "jobs/__init__.py").touch()
    (source / "jobs/run.py").write_text(FAKE_TRAINING)
    environment = {"PATH": os.environ["PATH"], "JOB_WORKDIR": str(laptop.home / "attempts/training-1.1")}
    command = [sys.executable, "-m", "jobs.run", "--name", "training-1.1"]
    process = subprocess.Popen(command, cwd=source, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield
    process.kill()
    process.wait()
    process.stdout.close()


def upload(service: Service, rows: int) -> Json:
    """Send rows for a job to read."""
    content = "".join(f'{{"prompt": "what is {n}", "completion": "it is {n}"}}\n' for n in range(rows))
    response = service.http.post("/datasets", files={"file": ("rows.jsonl", content)}, data={"wait": "false"})
    assert response.status_code == 202, response.text
    return response.json()


def find_dataset(service: Service, dataset: Json) -> Json:
    return service.http.get(f"/datasets/{dataset['processed_dataset_id']}").json()


def wait_until_reading(service: Service, dataset: Json) -> None:
    wait_until(lambda: service.job(dataset["job_id"])["phase"] == "reading")


@pytest.mark.usefixtures("training")
def test_dataset_is_made_while_a_training_holds_the_only_slot(laptop: Service) -> None:
    dataset = upload(laptop, 50_000)
    assert dataset["status"] == "processing"
    wait_until(lambda: find_dataset(laptop, dataset)["status"] != "processing")
    ready = find_dataset(laptop, dataset)
    assert (ready["status"], ready["rows"], ready["source"]) == ("ready", 50_000, "rows.jsonl"), laptop.log(dataset["job_id"])
    [listed] = laptop.http.get("/jobs", params={"trainer_type": "ingest"}).json()["jobs"]
    assert (listed["job_name"], listed["status"]) == ("dataset rows.jsonl", "completed")
    assert list((laptop.home / "objects/incoming").rglob("*.jsonl")) == []


def test_ingestion_outlives_a_killed_service_and_starts_again_after_a_pause(laptop: Service) -> None:
    dataset = upload(laptop, 300_000)
    job_id = dataset["job_id"]
    wait_until_reading(laptop, dataset)
    refused = laptop.http.delete(f"/datasets/{dataset['processed_dataset_id']}")
    assert (refused.status_code, job_id in refused.json()["error"]["message"]) == (409, True)
    laptop.http.post(f"/jobs/{job_id}/pause")
    wait_until(lambda: laptop.job(job_id)["status"] == "paused")
    laptop.http.post(f"/jobs/{job_id}/resume")
    wait_until_reading(laptop, dataset)
    laptop.stop(signal.SIGKILL)
    laptop.start()
    job = laptop.wait_until_final(job_id)
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["paused", "completed"], laptop.log(job_id)
    assert find_dataset(laptop, dataset)["rows"] == 300_000


def test_canceled_ingestion_is_a_failed_dataset_that_can_be_deleted(laptop: Service) -> None:
    dataset = upload(laptop, 300_000)
    wait_until_reading(laptop, dataset)
    laptop.http.post(f"/jobs/{dataset['job_id']}/cancel")
    assert laptop.wait_until_final(dataset["job_id"])["status"] == "cancelled"
    failed = find_dataset(laptop, dataset)
    assert (failed["status"], "was cancelled" in failed["failure"]["message"]) == ("failed", True)
    training = {"processed_dataset_id": dataset["processed_dataset_id"], "training_config": {"base_model_id": "a/b"}}
    assert laptop.http.post("/train", json=training).status_code == 400
    assert laptop.http.delete(f"/datasets/{dataset['processed_dataset_id']}").status_code == 200
