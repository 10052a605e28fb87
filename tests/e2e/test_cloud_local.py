"""The main job on the Google stack: real client libraries, a proxy that checks identities, and the tiny model."""

import hashlib
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from infra.cloud_local import BUCKETS, PROJECT, CloudLocal, run_cloud_local
from infra.loopback.http_faults import Fault, FaultKind, HttpFaultProxy, run_http_fault_proxy
from tests import waiting
from tests.e2e.conftest import BASE, ROWS, SOURCE, TRAINER_PYTHON, TUNESMITH, Json

HF_TOKEN = "hf_canary_cloud_91c2"
CONFIG: Json = {
    "base_model_id": BASE,
    "hyperparameters": {"max_steps": 8, "batch_size": 2, "learning_rate": 0.01, "logging_steps": 2},
    "export_config": {"format": "merged", "include_gguf": True, "gguf_quantization": "q8_0"},
    "eval_config": {"compute_eval_metrics": True},
}
# For tests that do not depend on what is trained and exported.
ADAPTER_CONFIG: Json = {"base_model_id": BASE, "hyperparameters": {"max_steps": 2, "batch_size": 2}}
# Each fault of a store once: busy, connection reset, request truncated or corrupted, success without a response.
STORAGE_FAULTS: list[tuple[FaultKind, int]] = [
    *(("reject", 503), ("reject", 429), ("reset", 0), ("truncate request", 0)),
    *(("corrupt request", 0), ("drop response", 0), ("reject", 500)),
]
FINAL = ("completed", "failed", "cancelled")


@pytest.fixture(scope="module")
def storage_proxy() -> Iterator[HttpFaultProxy]:
    with run_http_fault_proxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory, tiny_gemma: Path, storage_proxy: HttpFaultProxy) -> Iterator[CloudLocal]:
    folder = tmp_path_factory.mktemp("cloud")
    with pytest.MonkeyPatch.context() as patch, run_cloud_local(folder, storage_faults=storage_proxy) as local:
        patch.setenv("STORAGE_EMULATOR_HOST", local.storage_url)
        bucket = get_bucket("models")
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
    response = http.post("/datasets", files={"file": ("rows.jsonl", rows)})
    assert response.status_code == 201, response.text
    return response.json()["processed_dataset_id"]


@pytest.fixture(scope="module")
def job(http: httpx2.Client, dataset_id: str, cloud: CloudLocal) -> Json:
    job_id = submit_job(http, dataset_id, hf_token=HF_TOKEN)
    job = wait_until_final(http, job_id)
    assert job["status"] == "completed", f"{job['failure']}\n{read_attempt_log(cloud)}\n{cloud.service_log.read_text()[-3000:]}"
    return job


def get_bucket(name: str) -> storage.Bucket:
    return storage.Client(project=PROJECT, credentials=AnonymousCredentials()).bucket(BUCKETS[name])


def submit_job(http: httpx2.Client, dataset_id: str, config: Json = CONFIG, *, max_steps: int | None = None, **changes: Any) -> str:
    if max_steps is not None:
        config = config | {"hyperparameters": config["hyperparameters"] | {"max_steps": max_steps}}
    response = http.post("/train", json={"processed_dataset_id": dataset_id, "training_config": config} | changes)
    assert response.status_code == 201, response.text
    return response.json()["job_id"]


def get_job(http: httpx2.Client, job_id: str) -> Json:
    return http.get(f"/jobs/{job_id}").json()


def wait_until(condition: Callable[[], object], timeout_s: float) -> None:
    """Poll rarely enough for the rate limit of a caller."""
    waiting.wait_until(condition, timeout_s, interval_s=0.3)


def wait_until_final(http: httpx2.Client, job_id: str) -> Json:
    wait_until(lambda: get_job(http, job_id)["status"] in FINAL, 180)
    return get_job(http, job_id)


def running_executions(cloud: CloudLocal) -> list[str]:
    return [execution.name for execution in cloud.cloud_run.executions() if "completion_time" not in execution]


def read_attempt_log(cloud: CloudLocal) -> str:
    return cloud.cloud_run.output_path(cloud.cloud_run.executions()[0].name).read_text()[-3000:]


def test_request_without_identity_is_rejected(cloud: CloudLocal) -> None:
    assert httpx2.get(f"{cloud.url}/health").status_code == 403
    other_audience_token = cloud.identity.identity_token("https://other.example")
    assert httpx2.get(f"{cloud.url}/health", headers={"Authorization": f"Bearer {other_audience_token}"}).status_code == 403


def test_attempt_identity_only_opens_attempt_routes(cloud: CloudLocal) -> None:
    headers = {"X-Serverless-Authorization": f"Bearer {cloud.identity.identity_token(cloud.url)}"}
    assert httpx2.get(f"{cloud.url}/jobs", headers=headers).json()["error"]["code"] == "forbidden"
    user = {"Authorization": f"Bearer {cloud.identity_token()}"}  # ignored when the other header is present
    assert httpx2.get(f"{cloud.url}/jobs", headers=headers | user).status_code == 403
    assert httpx2.post(f"{cloud.url}/internal/jobs/j/attempts/1/claim", json={"claimant": "p"}, headers=headers).status_code == 401


def test_job_trains_on_assigned_hardware(job: Json) -> None:
    assert job["metrics"]["eval_loss"] < job["base_metrics"]["eval_loss"]
    assert job["hardware"] == "cpu"
    assert len(job["attempts"]) == 1
    assert job["attempts"][0]["launcher"] == "cloud-run"


def test_files_are_in_their_buckets_and_use_signed_urls(job: Json, http: httpx2.Client) -> None:
    job_id = job["job_id"]
    assert job["gguf_path"].startswith(f"gs://{BUCKETS['models']}/gguf_models/{job_id}/")
    assert get_bucket("configs").blob(f"results/{job_id}/1.json").exists()
    assert not get_bucket("models").blob(f"results/{job_id}/1.json").exists()
    response = http.get(f"/jobs/download/{job_id}").json()
    assert "X-Goog-Signature" in response["download_url"]
    content = httpx2.get(response["download_url"]).content
    assert content[:4] == b"GGUF"
    assert len(content) == response["files"][0]["size_bytes"]


def test_secrets_are_destroyed_and_never_logged(job: Json, cloud: CloudLocal) -> None:
    assert cloud.secret_manager.secret_names() == []
    logs = [*cloud.service_log.parent.rglob("*.log"), *cloud.service_log.parent.rglob("executions/**/*")]
    for path in (path for path in logs if path.is_file()):
        assert HF_TOKEN.encode() not in path.read_bytes(), path
    assert not [execution for execution in cloud.cloud_run.executions() if HF_TOKEN in str(execution)]


def test_job_events_are_complete(job: Json, http: httpx2.Client) -> None:
    events = http.get(f"/jobs/{job['job_id']}/events", params={"limit": 1000}).json()["events"]
    statuses = [row["event"]["status"] for row in events if row["event"]["type"] == "status"]
    assert statuses == ["preparing", "training", "completed"]
    steps = [row["event"]["step"] for row in events if row["event"]["type"] == "metrics"]
    assert steps == sorted(set(steps))
    assert {2, 4, 6, 8} <= set(steps)


def test_missing_logs_response_explains_where_logs_are(job: Json, http: httpx2.Client) -> None:
    response = http.get(f"/jobs/{job['job_id']}/logs")
    assert response.status_code == 404
    assert "gcloud logging read" in response.json()["error"]["hint"]


def test_preempted_attempt_is_followed_by_another_and_cancel_releases_compute(
    http: httpx2.Client, dataset_id: str, cloud: CloudLocal
) -> None:
    job_id = submit_job(http, dataset_id, ADAPTER_CONFIG, max_steps=100_000)
    wait_until(lambda: get_job(http, job_id)["status"] == "training", 120)
    [running] = running_executions(cloud)
    cloud.cloud_run.signal_execution(running, signal.SIGTERM)  # as for maintenance
    wait_until(lambda: len(get_job(http, job_id)["attempts"]) == 2, 60)
    assert get_job(http, job_id)["attempts"][0]["outcome"] == "preempted"
    wait_until(lambda: running_executions(cloud) and get_job(http, job_id)["status"] == "training", 120)
    assert http.post(f"/jobs/{job_id}/cancel").status_code == 202
    wait_until(lambda: get_job(http, job_id)["status"] == "cancelled", 90)
    wait_until(lambda: not running_executions(cloud), 30)


def test_storage_errors_delay_job_without_damage(
    http: httpx2.Client, dataset_id: str, cloud: CloudLocal, storage_proxy: HttpFaultProxy
) -> None:
    storage_proxy.set_faults(*(Fault(kind, "POST", f"/b/{BUCKETS['models']}/o", status=status) for kind, status in STORAGE_FAULTS))
    job = wait_until_final(http, submit_job(http, dataset_id, ADAPTER_CONFIG))
    assert job["status"] == "completed", f"{job['failure']}\n{read_attempt_log(cloud)}"
    uploads = [request for request in storage_proxy.requests if request.method == "POST" and f"/b/{BUCKETS['models']}/o" in request.path]
    assert len(uploads) > len(STORAGE_FAULTS)  # every fault met an upload
    storage_proxy.set_faults()
    for artifact in job["artifacts"]:
        for file in artifact["files"]:
            content = get_bucket("models").blob(artifact["key"] + file["path"]).download_as_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_storage_permission_error_fails_job_and_publishes_nothing(
    http: httpx2.Client, dataset_id: str, storage_proxy: HttpFaultProxy
) -> None:
    message = "tunesmith-job@p.iam.gserviceaccount.com does not have storage.objects.create access to the Google Cloud Storage object."
    body = json.dumps({"error": {"code": 403, "message": message}})
    storage_proxy.set_faults(Fault("reject", "POST", f"/b/{BUCKETS['models']}/o", times=1000, status=403, body=body))
    job_id = submit_job(http, dataset_id, ADAPTER_CONFIG)
    job = wait_until_final(http, job_id)
    storage_proxy.set_faults()
    assert (job["status"], job["failure"]["code"]) == ("failed", "upload_failed")
    assert "roles/storage.objectUser" in job["failure"]["message"]
    assert job["artifacts"] == []
    assert not get_bucket("models").blob(f"results/{job_id}/manifest.json").exists()
    assert http.get(f"/jobs/download/{job_id}").status_code == 409


def test_cli_works_against_cloud_service(job: Json, cloud: CloudLocal, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **cloud.client_environment()}

    def run_cli(*arguments: str) -> str:
        done = subprocess.run([str(TUNESMITH), *arguments], env=environment, capture_output=True, text=True, cwd=SOURCE)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert job["job_id"] in run_cli("jobs", "--json")
    get_bucket("datasets").blob("incoming/rows.jsonl").upload_from_string("\n".join(json.dumps(row) for row in ROWS))
    assert run_cli("datasets", "import", "incoming/rows.jsonl").startswith("dataset_")
    assert set(json.loads(run_cli("capabilities", "--json"))["launchers"]) == {"cloud-run"}
    run_cli("download", job["job_id"], "--artifact", "gguf-q8_0", "--to", str(tmp_path / "downloaded"))
    gguf = next((tmp_path / "downloaded").rglob("*.gguf"))
    command = [TRAINER_PYTHON, "-m", "jobs.llm.chat", "--model", gguf, "--temperature", "0", "--max-tokens", "4", "--prompt", "what is it"]
    assert subprocess.run(command, cwd=SOURCE, capture_output=True, check=True, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})


def test_deleted_job_leaves_no_objects(http: httpx2.Client, job: Json) -> None:
    job_id = job["job_id"]
    assert http.delete(f"/jobs/{job_id}").json()["deleted"]
    remaining = [blob.name for name in BUCKETS for blob in get_bucket(name).list_blobs() if job_id in blob.name]
    assert [name for name in remaining if not name.startswith("deployments/")] == []  # the mark stays until a cleanup
    assert http.get(f"/jobs/{job_id}").status_code == 404
