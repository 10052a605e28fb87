"""Jobs over HTTP: reading, controls, checkpoints, clones, downloads and deletion."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from schema.checkpoint import MANIFEST, Checkpoint, checkpoint_key, checkpoints_prefix
from schema.job import Artifact, ArtifactFile, EvalMetrics, Status
from service.core import lifecycle
from tests.factories import START
from tests.unit.api_harness import (
    attempt_headers,
    get_error,
    get_services,
    make_request_body_with_config,
    make_result_body,
    start_attempt,
    submit_job,
)


@pytest.fixture(scope="module")
def paused_job_id(readonly_client: TestClient, readonly_dataset_id: str) -> str:
    """A job for requests that are rejected. Its config sets a hyperparameter that only LoRA accepts."""
    body = make_request_body_with_config(readonly_dataset_id, "hyperparameters", lora_dropout=0.1)
    job_id = readonly_client.post("/train", json=body).json()["job_id"]
    readonly_client.post(f"/jobs/{job_id}/pause")
    return job_id


def complete_job(client: TestClient, job_id: str) -> None:
    """Record the job as completed, and write its artifacts."""
    services = get_services(client)
    services.buckets.models.write(f"gguf_models/{job_id}/m-q8_0.gguf", b"0123456789")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        services.buckets.models.write(f"trained_adapters/{job_id}/{name}", name.encode())
    file = ArtifactFile(path="", size_bytes=10, sha256="0")
    gguf = Artifact(name="gguf-q8_0", kind="gguf", uri="file:///g", key=f"gguf_models/{job_id}/m-q8_0.gguf", size_bytes=10, files=[file])
    files = [ArtifactFile(path=name, size_bytes=len(name), sha256="0") for name in ("adapter_config.json", "adapter_model.safetensors")]
    adapter = Artifact(name="adapter", kind="adapter", uri="file:///a/", key=f"trained_adapters/{job_id}/", size_bytes=44, files=files)
    queued = services.store.find_job(job_id)
    assert queued is not None
    job = lifecycle.begin_attempt(queued, queued.placements[0], START)
    metrics = EvalMetrics(eval_loss=0.5, perplexity=1.6, accuracy=0.9, eval_runtime=1.0)
    changes = {"status": Status.COMPLETED, "artifacts": (adapter, gguf), "metrics": metrics, "base_metrics": metrics}
    services.store.replace_job(job.model_copy(update=changes))


def test_completed_job_has_documented_fields(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    complete_job(client, job_id)
    job = client.get(f"/jobs/{job_id}").json()
    assert job["adapter_path"] == "file:///a/"
    assert job["gguf_path"] == "file:///g"
    assert {"accuracy": 0.9, "perplexity": 1.6, "eval_loss": 0.5, "eval_runtime": 1.0}.items() <= job["metrics"].items()
    assert job["error"] is None


def test_download_link_supports_range_requests(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    assert get_error(client.get(f"/jobs/download/{job_id}"), 409)["code"] == "conflict"
    complete_job(client, job_id)
    link = client.get(f"/jobs/download/{job_id}").json()
    assert link["artifact"] == "gguf-q8_0"
    assert link["download_url"].startswith("http://127.0.0.1:8080/")  # from the settings; the request's Host is testserver
    assert client.get(link["download_url"]).content == b"0123456789"
    part = client.get(link["download_url"], headers={"Range": "bytes=3-5"})
    assert (part.status_code, part.content) == (206, b"345")
    assert 'filename="m-q8_0.gguf"' in part.headers["content-disposition"]
    adapter = client.get(f"/jobs/download/{job_id}?artifact=adapter").json()
    assert [file["path"] for file in adapter["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    assert client.get(adapter["download_url"]).content == b"adapter_model.safetensors"
    assert "it has: adapter, gguf-q8_0" in get_error(client.get(f"/jobs/download/{job_id}?artifact=x"), 404)["message"]


@pytest.mark.parametrize("change", ["x", "", "."])
def test_tampered_link_is_rejected(client: TestClient, dataset_id: str, change: str) -> None:
    job_id = submit_job(client, dataset_id)
    complete_job(client, job_id)
    url = client.get(f"/jobs/download/{job_id}").json()["download_url"]
    get_error(client.get(url[:-8] + change), 401)


def test_delete_removes_and_lists_files_and_record(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    complete_job(client, job_id)
    deletion = client.delete(f"/jobs/{job_id}").json()
    assert deletion["deleted"] is True
    assert deletion["message"] == "Job and all associated files deleted successfully."
    assert sorted(uri.partition("/objects/")[2] for uri in deletion["deleted_resources"]) == [
        f"gguf_models/{job_id}/",
        f"trained_adapters/{job_id}/",
    ]
    get_error(client.get(f"/jobs/{job_id}"), 404)
    get_error(client.delete(f"/jobs/{job_id}"), 404)


def test_a_queued_job_can_be_deleted(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    assert client.delete(f"/jobs/{job_id}").json()["deleted"] is True


# --- controls --------------------------------------------------------------------------------------------------------


def test_pause_resume_cancel_retry_are_idempotent(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    services = get_services(client)
    job = services.store.find_job(job_id)
    services.store.replace_job(job.model_copy(update={"secret_names": ()}))  # so that a retry needs no token
    for verb, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled"), ("retry", "queued")):
        for _ in range(2):
            response = client.post(f"/jobs/{job_id}/{verb}")
            assert (response.status_code, response.json()["status"]) == (202, status), response.text


def test_retry_without_required_token_is_rejected(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    client.post(f"/jobs/{job_id}/cancel")
    error = get_error(client.post(f"/jobs/{job_id}/retry"), 400)
    assert (error["param"], "needed again" in error["message"]) == ("hf_token", True)
    assert client.post(f"/jobs/{job_id}/retry", json={"hf_token": "hf_new"}).status_code == 202


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"learning_rate": 0.1}, 422, "learning_rate"),
        ({"training_config": {}}, 422, "training_config"),
        ({"epochs": 0}, 422, "epochs"),
        ({"epoch": 9}, 422, "epoch"),
        ({"epochs": 1}, 400, "epochs"),
        ({"max_steps": 9}, 400, "max_steps"),
        ({"wandb_api_key": "k"}, 400, "wandb_api_key"),
        ([], 422, None),
    ],
)
def test_resume_with_immutable_field_is_rejected(
    readonly_client: TestClient, paused_job_id: str, body: Any, status: int, param: str | None
) -> None:
    assert get_error(readonly_client.post(f"/jobs/{paused_job_id}/resume", json=body), status)["param"] == param
    assert readonly_client.get(f"/jobs/{paused_job_id}").json()["status"] == "paused"


def test_invalid_transition_is_a_conflict(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    assert "only a failed or cancelled job" in get_error(client.post(f"/jobs/{job_id}/retry"), 409)["message"]
    client.post(f"/jobs/{job_id}/cancel")
    assert "nothing to pause" in get_error(client.post(f"/jobs/{job_id}/pause"), 409)["message"]
    error = get_error(client.post(f"/jobs/{job_id}/resume"), 409)
    assert "retry" in error["hint"]
    for verb in ("pause", "resume", "cancel", "retry"):
        get_error(client.post(f"/jobs/no-such-job/{verb}"), 404)


# --- checkpoints, clones, the promotion gate -------------------------------------------------------------------------


def test_checkpoints_are_listed_and_exported(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    assert client.get(f"/jobs/{job_id}/checkpoints").json() == {"checkpoints": []}
    assert "it has: none" in get_error(client.post(f"/jobs/{job_id}/checkpoints/5/export"), 404)["message"]
    services = get_services(client)
    for step, loss in ((5, 1.5), (10, 2.5)):
        checkpoint = Checkpoint.model_validate(
            {"job_id": job_id, "attempt": 1, "step": step, "total_steps": 100, "epoch": 0.5, "batch_size": 2, "eval_loss": loss}
            | {"gradient_accumulation_steps": 1, "training_config": services.store.find_job(job_id).training_config, "created_at": START}
            | {"files": [{"path": "optimizer.pt", "size_bytes": 7, "sha256": "0"}]}
        )
        key = checkpoint_key(checkpoints_prefix(job_id, None), 1, step) + MANIFEST
        services.buckets.models.write(key, checkpoint.with_checksum())
    rows = client.get(f"/jobs/{job_id}/checkpoints").json()["checkpoints"]
    assert [(row["step"], row["is_best"], row["size_bytes"]) for row in rows] == [(10, False, 7), (5, True, 7)]
    headers = {"Idempotency-Key": "export-1"}
    responses = [client.post(f"/jobs/{job_id}/checkpoints/5/export", headers=headers) for _ in range(2)]
    assert [response.status_code for response in responses] == [201, 201]
    assert responses[0].json() == responses[1].json()
    export = client.get(f"/jobs/{responses[0].json()['job_id']}").json()
    assert (export["export_of"]["job_id"], export["export_of"]["step"]) == (job_id, 5)
    body = {"export_config": {"include_gguf": False, "gguf_quantization": "q8_0"}}
    get_error(client.post(f"/jobs/{job_id}/checkpoints/5/export", json=body), 422)


def test_clone_is_a_new_job_with_changes(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    body = {"hf_token": None, "job_name": "again", "training_config": {"hyperparameters": {"epochs": 9}, "export_config": None}}
    headers = {"Idempotency-Key": "clone-1"}
    responses = [client.post(f"/jobs/{job_id}/clone", json=body, headers=headers) for _ in range(2)]
    assert [response.status_code for response in responses] == [201, 201], responses[0].text
    assert responses[0].json() == responses[1].json()
    clone = client.get(f"/jobs/{responses[0].json()['job_id']}").json()
    assert (clone["cloned_from"], clone["job_name"], clone["training_config"]["hyperparameters"]["epochs"]) == (job_id, "again", 9)
    assert clone["training_config"]["hyperparameters"]["learning_rate"] == 1e-4
    assert clone["training_config"]["export_config"]["include_gguf"] is False
    changed = client.post(f"/jobs/{job_id}/clone", json=body | {"job_name": "b"}, headers=headers)
    assert get_error(changed, 409)["code"] == "idempotency_conflict"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "hf_token"),
        ({"hf_token": None, "training_config": {"hyperparameters": {"epochs": 0}}}, 422, "training_config.hyperparameters.epochs"),
        ({"hf_token": None, "training_config": {"method": "Full"}}, 422, "training_config.hyperparameters.lora_dropout"),
        (
            {"hf_token": None, "training_config": {"trainer_type": "grpo", "hyperparameters": {"batch_size": 8}}},
            422,
            "training_config.reward_config",
        ),
        ({"hf_token": None, "training_config": {"trainer_type": "ppo"}}, 400, "training_config.trainer_type"),
        ({"hf_token": None, "training_config": {"trainer_type": "dpo"}}, 400, "processed_dataset_id"),
        ({"hf_token": None, "training_config": {"provider": "unsloth"}}, 400, "training_config.provider"),
        ({"hf_token": None, "processed_dataset_id": "dataset_none"}, 404, "processed_dataset_id"),
        ({"hf_token": None, "secrets": {"wandb_api_key": "k"}}, 400, "secrets.wandb_api_key"),
        ({"hf_token": None, "training_config": []}, 422, "training_config"),
        ({"status": "completed"}, 422, "status"),
        ([], 422, None),
    ],
)
def test_invalid_clone_is_rejected_with_field(
    readonly_client: TestClient, paused_job_id: str, body: Any, status: int, param: str | None
) -> None:
    assert get_error(readonly_client.post(f"/jobs/{paused_job_id}/clone", json=body), status)["param"] == param
    assert len(readonly_client.get("/jobs").json()["jobs"]) == 1


def test_failed_gate_is_shown_with_publish_hint(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["gate_passed"], job["gate"], job["published_step"], job["tracker_urls"]) == (None, None, None, {})
    check = {"metric": "perplexity", "value": 12.5, "at_most": 9.0, "base": 10.0, "passed": False, "reason": "12.5 is above 9"}
    result = make_result_body(job_id, gate={"passed": False, "checks": [check]}, tracker_urls={"mlflow": "https://m"})
    headers = attempt_headers(client, job_id)
    assert client.post(f"/internal/jobs/{job_id}/attempts/1/result", json=result, headers=headers).status_code == 204
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["gate_passed"], job["artifacts"], job["tracker_urls"]) == (
        "completed",
        False,
        [],
        {"mlflow": "https://m"},
    )
    assert check.items() <= job["gate"]["checks"][0].items()
    error = get_error(client.get(f"/jobs/download/{job_id}"), 409)
    assert "perplexity: 12.5 is above 9" in error["message"]
    assert f"POST /jobs/{job_id}/export" in error["hint"]
    assert "clone" in get_error(client.post(f"/jobs/{job_id}/export"), 404)["hint"]
