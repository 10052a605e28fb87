"""The main job on the Google stack: real client libraries, a front door that asks for identities, the tiny model."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from infra.cloud_local import BUCKETS, PROJECT, CloudLocal, cloud_local
from infra.loopback.http_faults import Fault, HttpFaults, Wrong, http_faults
from tests.e2e.conftest import BASE, ROWS, SOURCE, TRAINER_PYTHON, TUNESMITH, Json, until

HF_TOKEN = "hf_canary_cloud_91c2"
CONFIG = {
    "base_model_id": BASE,
    "hyperparameters": {"max_steps": 8, "batch_size": 2, "learning_rate": 0.01, "logging_steps": 2},
    "export_config": {"format": "merged", "include_gguf": True, "gguf_quantization": "q8_0"},
    "eval_config": {"compute_eval_metrics": True},
}
# What a store does on a bad day, each once: it is busy, breaks off, mangles what it gets, and does as it is told without saying so.
STUMBLES: list[tuple[Wrong, int]] = [
    *(("refuse", 503), ("refuse", 429), ("reset", 0), ("cut request", 0)),
    *(("damage request", 0), ("lose answer", 0), ("refuse", 500)),
]
FINAL = ("completed", "failed", "cancelled")


@pytest.fixture(scope="module")
def storage_front() -> Iterator[HttpFaults]:
    with http_faults() as front:
        yield front


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory, tiny_gemma: Path, storage_front: HttpFaults) -> Iterator[CloudLocal]:
    folder = tmp_path_factory.mktemp("cloud")
    with pytest.MonkeyPatch.context() as patch, cloud_local(folder, before_storage=storage_front) as local:
        patch.setenv("STORAGE_EMULATOR_HOST", local.storage_url)
        bucket = a_bucket("models")
        for file in tiny_gemma.iterdir():
            bucket.blob(f"pretrained_weights/huggingface/{BASE}/{file.name}").upload_from_filename(str(file))
        yield local


@pytest.fixture(scope="module")
def http(cloud: CloudLocal) -> Iterator[httpx2.Client]:
    headers = {"Authorization": f"Bearer {cloud.identity_token()}"}
    with httpx2.Client(base_url=cloud.url, headers=headers, timeout=30) as http:
        yield http


@pytest.fixture(scope="module")
def dataset_id(http: httpx2.Client) -> str:
    rows = "\n".join(json.dumps(row) for row in ROWS)
    answer = http.post("/datasets", files={"file": ("rows.jsonl", rows)})
    assert answer.status_code == 201, answer.text
    return answer.json()["processed_dataset_id"]


@pytest.fixture(scope="module")
def job(http: httpx2.Client, dataset_id: str, cloud: CloudLocal) -> Json:
    job_id = submitted(http, dataset_id, hf_token=HF_TOKEN)
    job = finished(http, job_id)
    assert job["status"] == "completed", f"{job['failure']}\n{log_of(cloud)}\n{cloud.service_log.read_text()[-3000:]}"
    return job


def a_bucket(name: str) -> storage.Bucket:
    return storage.Client(project=PROJECT, credentials=AnonymousCredentials()).bucket(BUCKETS[name])


def submitted(http: httpx2.Client, dataset_id: str, *, hyperparameters: Json | None = None, **changes: Any) -> str:
    config = CONFIG | {"hyperparameters": CONFIG["hyperparameters"] | (hyperparameters or {})}  # type: ignore[operator]
    answer = http.post("/train", json={"processed_dataset_id": dataset_id, "training_config": config} | changes)
    assert answer.status_code == 201, answer.text
    return answer.json()["job_id"]


def finished(http: httpx2.Client, job_id: str) -> Json:
    until(lambda: http.get(f"/jobs/{job_id}").json()["status"] in FINAL, 180)
    return http.get(f"/jobs/{job_id}").json()


def log_of(cloud: CloudLocal) -> str:
    return cloud.cloud_run.output_of(cloud.cloud_run.executions()[0].name).read_text()[-3000:]


def test_nobody_comes_in_without_an_identity(cloud: CloudLocal) -> None:
    assert httpx2.get(f"{cloud.url}/health").status_code == 403
    for_somebody_else = cloud.identity.identity_token("https://other.example")
    assert httpx2.get(f"{cloud.url}/health", headers={"Authorization": f"Bearer {for_somebody_else}"}).status_code == 403


def test_the_identity_of_attempts_opens_no_other_door(cloud: CloudLocal) -> None:
    headers = {"X-Serverless-Authorization": f"Bearer {cloud.identity.identity_token(cloud.url)}"}
    assert httpx2.get(f"{cloud.url}/jobs", headers=headers).json()["error"]["code"] == "forbidden"
    somebody = {"Authorization": f"Bearer {cloud.identity_token()}"}  # which the door does not look at when there is the other
    assert httpx2.get(f"{cloud.url}/jobs", headers=headers | somebody).status_code == 403
    assert httpx2.post(f"{cloud.url}/internal/jobs/j/attempts/1/claim", json={"claimant": "p"}, headers=headers).status_code == 401


def test_the_job_learned_on_the_hardware_it_was_given(job: Json) -> None:
    assert job["metrics"]["eval_loss"] < job["base_metrics"]["eval_loss"]
    assert job["hardware"] == "cpu"
    assert len(job["attempts"]) == 1
    assert job["attempts"][0]["launcher"] == "cloud-run"


def test_files_lie_in_their_own_buckets_and_come_through_signed_links(job: Json, http: httpx2.Client) -> None:
    job_id = job["job_id"]
    assert job["gguf_path"].startswith(f"gs://{BUCKETS['models']}/gguf_models/{job_id}/")
    assert a_bucket("configs").blob(f"results/{job_id}/1.json").exists()
    assert not a_bucket("models").blob(f"results/{job_id}/1.json").exists()
    answer = http.get(f"/jobs/download/{job_id}").json()
    assert "X-Goog-Signature" in answer["download_url"]
    content = httpx2.get(answer["download_url"]).content
    assert content[:4] == b"GGUF"
    assert len(content) == answer["files"][0]["size_bytes"]


def test_secrets_are_destroyed_and_were_nowhere_else(job: Json, cloud: CloudLocal) -> None:
    assert cloud.secret_manager.secrets() == []
    seen = [*cloud.service_log.parent.rglob("*.log"), *cloud.service_log.parent.rglob("executions/**/*")]
    for path in (path for path in seen if path.is_file()):
        assert HF_TOKEN.encode() not in path.read_bytes(), path
    assert not [e for e in cloud.cloud_run.executions() if HF_TOKEN in str(e)]


def test_the_history_is_whole(job: Json, http: httpx2.Client) -> None:
    events = http.get(f"/jobs/{job['job_id']}/events", params={"limit": 1000}).json()["events"]
    statuses = [row["event"]["status"] for row in events if row["event"]["type"] == "status"]
    assert statuses == ["preparing", "training", "completed"]
    steps = [row["event"]["step"] for row in events if row["event"]["type"] == "metrics"]
    assert steps == sorted(set(steps))
    assert {2, 4, 6, 8} <= set(steps)


def test_the_output_is_elsewhere_and_the_answer_says_where(job: Json, http: httpx2.Client) -> None:
    answer = http.get(f"/jobs/{job['job_id']}/logs")
    assert answer.status_code == 404
    assert "gcloud logging read" in answer.json()["error"]["hint"]


def test_a_cancelled_job_gives_its_compute_back(http: httpx2.Client, dataset_id: str, cloud: CloudLocal) -> None:
    job_id = submitted(http, dataset_id, hyperparameters={"max_steps": 100_000})
    until(lambda: http.get(f"/jobs/{job_id}").json()["status"] == "training", 120)
    assert http.post(f"/jobs/{job_id}/cancel").status_code == 202
    until(lambda: http.get(f"/jobs/{job_id}").json()["status"] == "cancelled", 60)
    until(lambda: not any("completion_time" not in execution for execution in cloud.cloud_run.executions()), 30)


def test_an_attempt_whose_machine_is_taken_away_is_followed_by_the_next(http: httpx2.Client, dataset_id: str, cloud: CloudLocal) -> None:
    job_id = submitted(http, dataset_id, hyperparameters={"max_steps": 100_000})
    until(lambda: http.get(f"/jobs/{job_id}").json()["status"] == "training", 120)
    running = next(e for e in cloud.cloud_run.executions() if "completion_time" not in e)
    cloud.cloud_run.end_by_signal(running.name, 15)  # SIGTERM, as for maintenance
    until(lambda: len(http.get(f"/jobs/{job_id}").json()["attempts"]) == 2, 60)
    assert http.get(f"/jobs/{job_id}").json()["attempts"][0]["outcome"] == "preempted"
    http.post(f"/jobs/{job_id}/cancel")
    until(lambda: http.get(f"/jobs/{job_id}").json()["status"] == "cancelled", 90)


def test_a_bucket_that_stumbles_delays_a_job_and_damages_nothing(
    http: httpx2.Client, dataset_id: str, cloud: CloudLocal, storage_front: HttpFaults
) -> None:
    storage_front.plan(*(Fault(wrong, "POST", f"/b/{BUCKETS['models']}/o", status=status) for wrong, status in STUMBLES))
    job = finished(http, submitted(http, dataset_id))
    assert job["status"] == "completed", f"{job['failure']}\n{log_of(cloud)}"
    storage_front.plan()
    for artifact in job["artifacts"]:
        for file in artifact["files"]:
            content = a_bucket("models").blob(artifact["key"] + file["path"]).download_as_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_a_bucket_that_refuses_fails_the_job_and_no_part_of_it_is_visible(
    http: httpx2.Client, dataset_id: str, storage_front: HttpFaults
) -> None:
    said = "tunesmith-job@p.iam.gserviceaccount.com does not have storage.objects.create access to the Google Cloud Storage object."
    body = json.dumps({"error": {"code": 403, "message": said}})
    storage_front.plan(Fault("refuse", "POST", f"/b/{BUCKETS['models']}/o", times=1000, status=403, body=body))
    job_id = submitted(http, dataset_id)
    job = finished(http, job_id)
    storage_front.plan()
    assert (job["status"], job["failure"]["code"]) == ("failed", "upload_failed")
    assert "roles/storage.objectUser" in job["failure"]["message"]
    assert job["artifacts"] == []
    assert not a_bucket("models").blob(f"results/{job_id}/manifest.json").exists()
    assert http.get(f"/jobs/download/{job_id}").status_code == 409


def test_the_command_line_is_a_user_like_any_other(job: Json, cloud: CloudLocal, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **cloud.client_environment()}

    def tunesmith(*arguments: str) -> str:
        done = subprocess.run([str(TUNESMITH), *arguments], env=environment, capture_output=True, text=True, cwd=SOURCE)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert job["job_id"] in tunesmith("jobs", "--json")
    a_bucket("datasets").blob("incoming/rows.jsonl").upload_from_string("\n".join(json.dumps(row) for row in ROWS))
    assert tunesmith("datasets", "import", "incoming/rows.jsonl").startswith("dataset_")
    assert json.loads(tunesmith("capabilities", "--json"))["launcher"] == "cloud-run"
    tunesmith("download", job["job_id"], "--artifact", "gguf-q8_0", "--to", str(tmp_path / "got"))
    gguf = next((tmp_path / "got").glob("*.gguf"))
    command = [TRAINER_PYTHON, "-m", "jobs.chat", "--gguf", gguf, "--temperature", "0", "--max-tokens", "4", "--prompt", "what is it"]
    assert subprocess.run(command, cwd=SOURCE, capture_output=True, check=True, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})


def test_deleting_leaves_nothing_in_any_bucket(http: httpx2.Client, job: Json) -> None:
    job_id = job["job_id"]
    assert http.delete(f"/jobs/{job_id}").json()["deleted"]
    left = [blob.name for name in BUCKETS for blob in a_bucket(name).list_blobs() if job_id in blob.name]
    assert left == []
    assert http.get(f"/jobs/{job_id}").status_code == 404
