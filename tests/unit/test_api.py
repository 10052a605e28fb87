"""The HTTP API: the seed's addresses and shapes, and an answer to everything that can be wrong with a request."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
from starlette.testclient import TestClient

from schema.checkpoint import MANIFEST, Checkpoint, checkpoint_key, checkpoints_prefix
from schema.job import Artifact, ArtifactFile, EvalMetrics, Status
from schema.requests import TRAIN_REQUEST_EXAMPLE
from service.adapters.launchers.local import LocalLauncher
from service.core import lifecycle
from service.core.errors import Unavailable
from service.main import create_app
from service.settings import Settings
from tests.factories import START, make_capabilities

ROWS = "\n".join(
    json.dumps({"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]})
    for n in range(20)
)


@contextmanager
def run_test_service(home: Path) -> Iterator[TestClient]:
    limits = {"max_upload_bytes": 100_000, "max_incoming_bytes": 200_000, "max_row_bytes": 10_000}
    settings = Settings(home=home, HF_HUB_OFFLINE=True, **limits)  # type: ignore[call-arg]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalLauncher, "get_capabilities", lambda _, profile=None: make_capabilities())
        patch.setattr(LocalLauncher, "count_free_slots", lambda _, active: 0)  # jobs stay in the queue
        patch.setattr(LocalLauncher, "check", lambda *_: "running")  # attempts here are made up
        with TestClient(create_app(settings), raise_server_exceptions=False) as client:
            yield client


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with run_test_service(tmp_path / "home") as client:
        yield client


@pytest.fixture
def dataset_id(client: TestClient) -> str:
    return upload(client, ROWS).json()["processed_dataset_id"]


@pytest.fixture(scope="module")
def readonly_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service for requests that change nothing."""
    with run_test_service(tmp_path_factory.mktemp("empty")) as client:
        yield client


@pytest.fixture(scope="module")
def readonly_client_and_dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, str]]:
    """A service with a dataset, for requests that change nothing."""
    with run_test_service(tmp_path_factory.mktemp("steady")) as client:
        yield client, upload(client, ROWS).json()["processed_dataset_id"]


def upload(client: TestClient, content: str | bytes, **fields: str) -> Any:
    return client.post("/datasets", files={"file": ("rows.jsonl", content)}, data=fields)


def make_request_body(dataset_id: str, **changes: Any) -> dict[str, Any]:
    return {**TRAIN_REQUEST_EXAMPLE, "processed_dataset_id": dataset_id, **changes}


def make_request_body_with_config(dataset_id: str, group: str | None = None, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(TRAIN_REQUEST_EXAMPLE["training_config"]))
    (config[group] if group else config).update(changes)
    return make_request_body(dataset_id, training_config=config)


def complete_job(client: TestClient, job_id: str) -> None:
    """Put a finished job into the store, with files behind it."""
    parts = client.app.state.services  # type: ignore[attr-defined]
    parts.buckets.models.write(f"gguf_models/{job_id}/m-q8_0.gguf", b"0123456789")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        parts.buckets.models.write(f"trained_adapters/{job_id}/{name}", name.encode())
    file = ArtifactFile(path="", size_bytes=10, sha256="0")
    gguf = Artifact(name="gguf-q8_0", kind="gguf", uri="file:///g", key=f"gguf_models/{job_id}/m-q8_0.gguf", size_bytes=10, files=[file])
    files = [ArtifactFile(path=name, size_bytes=len(name), sha256="0") for name in ("adapter_config.json", "adapter_model.safetensors")]
    adapter = Artifact(name="adapter", kind="adapter", uri="file:///a/", key=f"trained_adapters/{job_id}/", size_bytes=44, files=files)
    job = lifecycle.begin_attempt(parts.store.find_job(job_id), "local", START)
    measured = EvalMetrics(eval_loss=0.5, perplexity=1.6, accuracy=0.9, eval_runtime=1.0)
    done = {"status": Status.COMPLETED, "artifacts": (adapter, gguf), "metrics": measured, "base_metrics": measured}
    parts.store.replace_job(job.model_copy(update=done))


def get_error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "hint", "param"}
    assert "Traceback" not in answer.text
    return error


# --- controls --------------------------------------------------------------------------------------------------------


def submit_job(client: TestClient, dataset_id: str) -> str:
    return client.post("/train", json=make_request_body(dataset_id)).json()["job_id"]


def test_pause_resume_cancel_retry_are_idempotent(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    parts = client.app.state.services  # type: ignore[attr-defined]
    parts.store.replace_job(parts.store.find_job(job_id).model_copy(update={"secret_names": ()}))  # the seed's body has a token
    for verb, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled"), ("retry", "queued")):
        for _ in range(2):
            answer = client.post(f"/jobs/{job_id}/{verb}")
            assert (answer.status_code, answer.json()["status"]) == (202, status), answer.text


def test_retry_without_required_token_is_rejected(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    client.post(f"/jobs/{job_id}/cancel")
    refused = get_error(client.post(f"/jobs/{job_id}/retry"), 400)
    assert (refused["param"], "needed again" in refused["message"]) == ("hf_token", True)
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
def test_resume_with_immutable_field_is_rejected(client: TestClient, dataset_id: str, body: Any, status: int, param: str | None) -> None:
    job_id = submit_job(client, dataset_id)
    client.post(f"/jobs/{job_id}/pause")
    assert get_error(client.post(f"/jobs/{job_id}/resume", json=body), status)["param"] == param
    assert client.get(f"/jobs/{job_id}").json()["status"] == "paused"


def test_invalid_transition_is_a_conflict(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    assert "only a failed or cancelled job" in get_error(client.post(f"/jobs/{job_id}/retry"), 409)["message"]
    client.post(f"/jobs/{job_id}/cancel")
    assert "nothing to pause" in get_error(client.post(f"/jobs/{job_id}/pause"), 409)["message"]
    refused = get_error(client.post(f"/jobs/{job_id}/resume"), 409)
    assert "retry" in refused["hint"]
    for verb in ("pause", "resume", "cancel", "retry"):
        get_error(client.post(f"/jobs/no-such-job/{verb}"), 404)


def test_checkpoints_are_listed_and_exported(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    assert client.get(f"/jobs/{job_id}/checkpoints").json() == {"checkpoints": []}
    assert "it has: none" in get_error(client.post(f"/jobs/{job_id}/checkpoints/5/export"), 404)["message"]
    parts = client.app.state.services  # type: ignore[attr-defined]
    for step, loss in ((5, 1.5), (10, 2.5)):
        made = Checkpoint.model_validate(
            {"job_id": job_id, "attempt": 1, "step": step, "total_steps": 100, "epoch": 0.5, "batch_size": 2, "eval_loss": loss}
            | {"gradient_accumulation_steps": 1, "training_config": parts.store.find_job(job_id).training_config, "created_at": START}
            | {"files": [{"path": "optimizer.pt", "size_bytes": 7, "sha256": "0"}]}
        )
        key = checkpoint_key(checkpoints_prefix(job_id, None), 1, step) + MANIFEST
        parts.buckets.models.write(key, made.with_checksum())
    rows = client.get(f"/jobs/{job_id}/checkpoints").json()["checkpoints"]
    assert [(row["step"], row["is_best"], row["size_bytes"]) for row in rows] == [(10, False, 7), (5, True, 7)]
    key = {"Idempotency-Key": "export-1"}
    answers = [client.post(f"/jobs/{job_id}/checkpoints/5/export", headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()
    made = client.get(f"/jobs/{answers[0].json()['job_id']}").json()
    assert (made["export_of"]["job_id"], made["export_of"]["step"]) == (job_id, 5)
    body = {"export_config": {"include_gguf": False, "gguf_quantization": "q8_0"}}
    get_error(client.post(f"/jobs/{job_id}/checkpoints/5/export", json=body), 422)


def test_orphans_are_listed_and_removed_on_request(client: TestClient, dataset_id: str) -> None:
    parts = client.app.state.services  # type: ignore[attr-defined]
    parts.buckets.models.write("trained_adapters/gone/attempt-1/a", b"xyz")
    (row,) = client.get("/internal/orphans").json()["orphans"]
    assert (row["job_id"], row["objects"], row["size_bytes"]) == ("gone", 1, 3)
    client.post("/internal/cleanup")
    assert len(client.get("/internal/orphans").json()["orphans"]) == 1
    client.post("/internal/cleanup", json={"orphans": True})
    assert client.get("/internal/orphans").json() == {"orphans": [], "complete": True}


def test_clone_is_a_new_job_with_changes(client: TestClient, dataset_id: str) -> None:
    job_id = submit_job(client, dataset_id)
    body = {"hf_token": None, "job_name": "again", "training_config": {"hyperparameters": {"epochs": 9}, "export_config": None}}
    key = {"Idempotency-Key": "clone-1"}
    answers = [client.post(f"/jobs/{job_id}/clone", json=body, headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201], answers[0].text
    assert answers[0].json() == answers[1].json()
    made = client.get(f"/jobs/{answers[0].json()['job_id']}").json()
    assert (made["cloned_from"], made["job_name"], made["training_config"]["hyperparameters"]["epochs"]) == (job_id, "again", 9)
    assert made["training_config"]["hyperparameters"]["learning_rate"] == 1e-4
    assert made["training_config"]["export_config"]["include_gguf"] is False
    assert (
        get_error(client.post(f"/jobs/{job_id}/clone", json=body | {"job_name": "b"}, headers=key), 409)["code"] == "idempotency_conflict"
    )


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
def test_invalid_clone_is_rejected_with_field(client: TestClient, dataset_id: str, body: Any, status: int, param: str | None) -> None:
    config: dict[str, Any] = make_request_body_with_config(dataset_id)
    config["training_config"]["hyperparameters"]["lora_dropout"] = 0.1
    job_id = client.post("/train", json=config).json()["job_id"]
    assert get_error(client.post(f"/jobs/{job_id}/clone", json=body), status)["param"] == param
    assert len(client.get("/jobs").json()["jobs"]) == 1


def test_failed_gate_is_shown_with_publish_hint(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    shown = client.get(f"/jobs/{job_id}").json()
    assert (shown["gate_passed"], shown["gate"], shown["published_step"], shown["tracker_urls"]) == (None, None, None, {})
    check = {"metric": "perplexity", "value": 12.5, "at_most": 9.0, "base": 10.0, "passed": False, "reason": "12.5 is above 9"}
    result = {"job_id": job_id, "attempt": 1, "outcome": "completed", "started_at": START.isoformat(), "finished_at": START.isoformat()}
    result |= {"gate": {"passed": False, "checks": [check]}, "tracker_urls": {"mlflow": "https://m"}}
    auth = attempt_headers(client, job_id)
    assert client.post(f"/internal/jobs/{job_id}/attempts/1/result", json=result, headers=auth).status_code == 204
    shown = client.get(f"/jobs/{job_id}").json()
    assert (shown["status"], shown["gate_passed"], shown["artifacts"], shown["tracker_urls"]) == (
        "completed",
        False,
        [],
        {"mlflow": "https://m"},
    )
    assert check.items() <= shown["gate"]["checks"][0].items()
    refused = get_error(client.get(f"/jobs/download/{job_id}"), 409)
    assert "perplexity: 12.5 is above 9" in refused["message"]
    assert f"POST /jobs/{job_id}/export" in refused["hint"]
    assert "clone" in get_error(client.post(f"/jobs/{job_id}/export"), 404)["hint"]


def test_capabilities_list_all_request_options(client: TestClient) -> None:
    told = client.get("/capabilities").json()
    assert set(told["trainer_types"]) == {"sft", "dpo", "orpo", "kto", "grpo", "reward"}
    assert told["profiles"]["local"]["methods"] == told["methods"]
    assert {"graders", "trackers", "modalities", "export", "lm_eval"} <= set(told)


# --- the seed's contract ---------------------------------------------------------------------------------------------


def test_documented_example_request_is_accepted(client: TestClient, dataset_id: str) -> None:
    body = make_request_body_with_config(dataset_id, "export_config", include_gguf=False, gguf_quantization=None)
    answer = client.post("/train", json=body)
    assert answer.status_code == 201
    job_id = answer.json()["job_id"]
    assert job_id.startswith(f"training_{dataset_id.removeprefix('dataset_')}_gemma-3-270m_")
    listed = client.get("/jobs").json()["jobs"][0]
    assert {name: listed[name] for name in ("job_id", "job_name", "base_model_id", "status", "modality")} == {
        "job_id": job_id,
        "job_name": "my-job-name",
        "base_model_id": "google/gemma-3-270m",
        "status": "queued",
        "modality": "text",
    }
    job = client.get(f"/jobs/{job_id}").json()
    seed_fields = {"job_name", "status", "modality", "wandb_url", "adapter_path", "base_model_id", "gguf_path", "metrics", "error"}
    assert seed_fields <= set(job)
    assert "hf_..." not in json.dumps(job)


def test_completed_job_has_documented_fields(client: TestClient, dataset_id: str) -> None:
    job_id = client.post("/train", json=make_request_body(dataset_id)).json()["job_id"]
    complete_job(client, job_id)
    job = client.get(f"/jobs/{job_id}").json()
    assert job["adapter_path"] == "file:///a/"
    assert job["gguf_path"] == "file:///g"
    assert {"accuracy": 0.9, "perplexity": 1.6, "eval_loss": 0.5, "eval_runtime": 1.0}.items() <= job["metrics"].items()
    assert job["error"] is None


def test_download_link_supports_range_requests(client: TestClient, dataset_id: str) -> None:
    job_id = client.post("/train", json=make_request_body(dataset_id)).json()["job_id"]
    assert get_error(client.get(f"/jobs/download/{job_id}"), 409)["code"] == "conflict"
    complete_job(client, job_id)
    answer = client.get(f"/jobs/download/{job_id}").json()
    assert answer["artifact"] == "gguf-q8_0"
    assert client.get(answer["download_url"]).content == b"0123456789"
    part = client.get(answer["download_url"], headers={"Range": "bytes=3-5"})
    assert (part.status_code, part.content) == (206, b"345")
    assert 'filename="m-q8_0.gguf"' in part.headers["content-disposition"]
    adapter = client.get(f"/jobs/download/{job_id}?artifact=adapter").json()
    assert [file["path"] for file in adapter["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    assert client.get(adapter["download_url"]).content == b"adapter_model.safetensors"
    assert "it has: adapter, gguf-q8_0" in get_error(client.get(f"/jobs/download/{job_id}?artifact=x"), 404)["message"]


@pytest.mark.parametrize("change", ["x", "", "."])
def test_tampered_link_is_rejected(client: TestClient, dataset_id: str, change: str) -> None:
    job_id = client.post("/train", json=make_request_body(dataset_id)).json()["job_id"]
    complete_job(client, job_id)
    url = client.get(f"/jobs/download/{job_id}").json()["download_url"]
    get_error(client.get(url[:-8] + change), 401)


def test_delete_removes_and_lists_files_and_record(client: TestClient, dataset_id: str) -> None:
    job_id = client.post("/train", json=make_request_body(dataset_id)).json()["job_id"]
    complete_job(client, job_id)
    answer = client.delete(f"/jobs/{job_id}").json()
    assert answer["deleted"] is True
    assert answer["message"] == "Job and all associated files deleted successfully."
    assert sorted(uri.partition("/objects/")[2] for uri in answer["deleted_resources"]) == [
        f"gguf_models/{job_id}/",
        f"trained_adapters/{job_id}/",
    ]
    get_error(client.get(f"/jobs/{job_id}"), 404)
    get_error(client.delete(f"/jobs/{job_id}"), 404)


def test_a_queued_job_can_be_deleted(client: TestClient, dataset_id: str) -> None:
    job_id = client.post("/train", json=make_request_body(dataset_id)).json()["job_id"]
    assert client.delete(f"/jobs/{job_id}").json()["deleted"] is True


def test_health_lists_dependencies(client: TestClient) -> None:
    health = client.get("/health").json()
    assert (health["live"], health["ready"]) == (True, True)


def test_unavailable_store_makes_service_unready(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise Unavailable("the disk is gone")

    monkeypatch.setattr(client.app.state.services.store, "ping", broken)  # type: ignore[attr-defined]
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["live"], answer.json()["ready"]) == (503, True, False)
    assert answer.json()["checks"]["job_store"] == "the disk is gone"


# --- wrong requests --------------------------------------------------------------------------------------------------

GRPO_CONFIG = {"trainer_type": "grpo", "reward_config": [{"type": "format", "name": "tags"}]}
INVALID_CONFIG_CASES: list[tuple[str | None, dict[str, Any], str]] = [
    ("hyperparameters", {"learning_rate": -1}, "learning_rate"),
    ("hyperparameters", {"learning_rate": 0}, "learning_rate"),
    ("hyperparameters", {"learning_rate": "fast"}, "learning_rate"),
    ("hyperparameters", {"batch_size": 0}, "batch_size"),
    ("hyperparameters", {"batch_size": "4"}, "batch_size"),
    ("hyperparameters", {"batch_size": 1.5}, "batch_size"),
    ("hyperparameters", {"batch_size": True}, "batch_size"),
    ("hyperparameters", {"epochs": -3}, "epochs"),
    ("hyperparameters", {"max_steps": 0}, "max_steps"),
    ("hyperparameters", {"max_steps": -2}, "max_steps"),
    ("hyperparameters", {"packing": "yes"}, "packing"),
    ("hyperparameters", {"lora_dropout": 1}, "lora_dropout"),
    ("hyperparameters", {"lr_scheduler_type": "zigzag"}, "lr_scheduler_type"),
    ("hyperparameters", {"save_strategy": "sometimes"}, "save_strategy"),
    ("hyperparameters", {"save_steps": 5}, "save_steps"),
    ("hyperparameters", {"learning_rates": 1}, "learning_rates"),
    ("hyperparameters", {"seed": 2**40}, "seed"),
    ("export_config", {"format": "zip"}, "format"),
    ("export_config", {"format": []}, "format"),
    ("export_config", {"format": ["merged", "merged"]}, "format"),
    (None, {"trainer_type": "grpo"}, "reward_config"),
    (None, {"trainer_type": "grpo", "reward_config": []}, "reward_config"),
    (None, {"trainer_type": "grpo", "reward_config": [{"name": "a"}]}, "reward_config.0"),
    (None, {"trainer_type": "grpo", "reward_config": [{"type": "vibes", "name": "a"}]}, "reward_config.0"),
    (None, {"reward_config": [{"type": "format", "name": "a"}]}, "reward_config"),
    (None, {"trainer_type": "dpo", "modality": "vision"}, "modality"),
    (None, {"trainer_type": "dpo", "provider": "unsloth", "hyperparameters": {}}, "provider"),
    (None, {"trainer_type": "dpo", "hyperparameters": {"label_smoothing": 0.1}}, "label_smoothing"),
    (None, GRPO_CONFIG | {"hyperparameters": {"max_completion_length": 512, "max_seq_length": 512}}, "max_completion_length"),
    (None, GRPO_CONFIG | {"hyperparameters": {"batch_size": 3, "num_generations": 2}}, "num_generations"),
    (None, {"hyperparameters": {"use_dora": True}, "export_config": {"include_lora_gguf": True}}, "include_lora_gguf"),
    (None, {"modality": "vision", "hyperparameters": {"packing": True}}, "packing"),
    (None, {"modality": "vision", "export_config": {"format": "onnx"}}, "format"),
    (None, {"trainer_type": "reward", "export_config": {"include_gguf": True}}, "include_gguf"),
    ("hyperparameters", {"beta": 0.1}, "beta"),
    ("hyperparameters", {"train_vision_tower": True}, "train_vision_tower"),
    ("export_config", {"destination": "hfhub"}, "hf_repo_id"),
    ("export_config", {"hf_repo_id": "a/b"}, "hf_repo_id"),
    ("export_config", {"include_gguf": False}, "gguf_quantization"),
    ("export_config", {"gguf_quantization": "q9"}, "gguf_quantization"),
    ("export_config", {"gguf_quantization": []}, "gguf_quantization"),
    ("export_config", {"gguf_quantization": ["f16", "f16"]}, "gguf_quantization"),
    ("eval_config", {"eval_strategy": "often"}, "eval_strategy"),
    ("eval_config", {"eval_steps": 0}, "eval_steps"),
    ("eval_config", {"compute_eval_metrics": False, "batch_eval_metrics": True}, "batch_eval_metrics"),
    (None, {"base_model_id": "../../etc/passwd"}, "base_model_id"),
    (None, {"base_model_id": ""}, "base_model_id"),
    (None, {"method": "Magic"}, "method"),
    (None, {"method": "Full"}, "lora_"),
    (None, {"wandb_config": {"project": "p"}}, "api_key"),
    (None, {"mlflow_config": {"tracking_uri": "https://me:canary@mlflow.example"}}, "tracking_uri"),
    (None, {"wandb_config": {"api_key": "k", "project": "a/b"}}, "project"),
]


@pytest.mark.parametrize(
    ("group", "changes", "param"), INVALID_CONFIG_CASES, ids=lambda value: json.dumps(value) if isinstance(value, dict) else None
)
def test_invalid_config_value_is_rejected_with_field(
    readonly_client_and_dataset: tuple[TestClient, str], group: str | None, changes: dict[str, Any], param: str
) -> None:
    client, dataset_id = readonly_client_and_dataset
    error = get_error(client.post("/train", json=make_request_body_with_config(dataset_id, group, **changes)), 422)
    assert error["param"].startswith("training_config.")
    assert param in error["param"]
    assert "canary" not in str(error)
    assert client.get("/jobs").json()["jobs"] == []


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"processed_dataset_id": None}, "processed_dataset_id"),
        ({"processed_dataset_id": "a/../b"}, "processed_dataset_id"),
        ({"job_name": ""}, "job_name"),
        ({"job_name": "a\x1b[2Jb"}, "job_name"),
        ({"job_name": "x" * 129}, "job_name"),
        ({"project_id": "a b"}, "project_id"),
        ({"training_config": None}, "training_config"),
        ({"training_config": []}, "training_config"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_invalid_request_field_is_rejected_with_name(
    readonly_client_and_dataset: tuple[TestClient, str], changes: dict[str, Any], param: str
) -> None:
    client, dataset_id = readonly_client_and_dataset
    assert get_error(client.post("/train", json=make_request_body(dataset_id, **changes)), 422)["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}', b'"' + b"x" * 1000 + b'"', b"[" * 10_000, b'{"a":1}' * 2]
)
def test_malformed_body_is_rejected(readonly_client: TestClient, body: bytes) -> None:
    answer = readonly_client.post("/train", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_non_finite_number_is_rejected(readonly_client_and_dataset: tuple[TestClient, str], number: str) -> None:
    client, dataset_id = readonly_client_and_dataset
    body = json.dumps(make_request_body(dataset_id)).replace('"learning_rate": 0.0001', f'"learning_rate": {number}')
    answer = client.post("/train", content=body, headers={"Content-Type": "application/json"})
    assert "learning_rate" in get_error(answer, 422)["param"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer_type": "dpo"}, "it can do: sft"),
        ({"trainer_type": "ppo"}, "it can do: sft, dpo, orpo, kto, grpo, reward"),
        ({"provider": "unsloth"}, "it can do: huggingface"),
        ({"method": "QLoRA"}, "it can do: LoRA, Full"),
        ({"modality": "vision"}, "it can do: text"),
    ],
)
def test_unsupported_option_error_names_supported_ones(
    readonly_client_and_dataset: tuple[TestClient, str], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, dataset_id = readonly_client_and_dataset
    narrow = make_capabilities(trainer_types=("sft",), modalities=("text",))
    monkeypatch.setattr(LocalLauncher, "get_capabilities", lambda _, profile=None: narrow)
    error = get_error(client.post("/train", json=make_request_body_with_config(dataset_id, **changes)), 400)
    assert (error["code"], message in error["message"]) == ("unsupported", True)


def test_same_key_returns_same_job_and_other_body_conflicts(client: TestClient, dataset_id: str) -> None:
    key = {"Idempotency-Key": "k"}
    first = client.post("/train", json=make_request_body(dataset_id), headers=key).json()
    assert client.post("/train", json=make_request_body(dataset_id), headers=key).json() == first
    changed = client.post("/train", json=make_request_body(dataset_id, job_name="other"), headers=key)
    assert get_error(changed, 409)["code"] == "idempotency_conflict"
    get_error(client.post("/train", json=make_request_body(dataset_id), headers={"Idempotency-Key": "x" * 300}), 422)


@pytest.mark.parametrize("query", ["limit=0", "limit=1000", "limit=x", "status=odd", "cursor=odd", "project_id=a%20b"])
def test_invalid_query_is_rejected(readonly_client: TestClient, query: str) -> None:
    assert readonly_client.get(f"/jobs?{query}").status_code in (400, 422)


@pytest.mark.parametrize(
    "path", ["/jobs/none", "/jobs/download/none", "/jobs/none/events", "/jobs/none/logs", "/datasets/none", "/nowhere"]
)
def test_missing_resource_is_404(readonly_client: TestClient, path: str) -> None:
    get_error(readonly_client.get(path), 404)


def test_a_wrong_method_is_405(readonly_client: TestClient) -> None:
    get_error(readonly_client.put("/train"), 405)


# --- datasets --------------------------------------------------------------------------------------------------------


def test_upload_returns_counts_splits_and_preview(client: TestClient) -> None:
    answer = upload(client, ROWS, name="my rows", eval_fraction="0.2")
    assert answer.status_code == 201
    dataset = answer.json()
    assert (dataset["name"], dataset["dataset_type"], dataset["rows"], dataset["splits"]) == (
        "my rows",
        "messages",
        20,
        {"train": 16, "eval": 4},
    )
    detail = client.get(f"/datasets/{dataset['processed_dataset_id']}").json()
    assert len(detail["preview"]["eval"]) == 4
    assert client.get("/datasets").json()["datasets"][0] == dataset
    assert client.delete(f"/datasets/{dataset['processed_dataset_id']}").json()["deleted"] is True
    get_error(client.get(f"/datasets/{dataset['processed_dataset_id']}"), 404)


INVALID_ROW_CASES: list[tuple[str | bytes, str]] = [
    ("", "no rows"),
    ("\n\n", "no rows"),
    (b"\xff\xfe{}", "line 1"),
    ('{"text": "a"}\n{"text": ', "line 2"),
    ('{"text": "a"}\n\n[1]', "line 3"),
    ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', "line 2"),
    ('{"text": ""}', "line 1"),
    ('{"text": NaN}', "line 1"),
    ('{"text": "a", "text": "b"}', "line 1"),
    ('{"messages": []}', "line 1"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "line 1"),
    ('{"text": "' + "x" * 20_000 + '"}', "line 1"),
    ("[" * 9_000, "line 1"),
]


@pytest.mark.parametrize(("content", "where"), INVALID_ROW_CASES, ids=range(len(INVALID_ROW_CASES)))
def test_invalid_row_is_rejected_with_line_and_nothing_is_stored(readonly_client: TestClient, content: str | bytes, where: str) -> None:
    assert where in get_error(upload(readonly_client, content), 400)["message"]
    assert readonly_client.get("/datasets").json()["datasets"] == []
    assert list(readonly_client.app.state.services.buckets.models.iter_objects("")) == []  # type: ignore[attr-defined]


def test_oversized_upload_is_rejected(readonly_client: TestClient) -> None:
    assert get_error(upload(readonly_client, "x" * 200_000), 413)["code"] == "too_large"
    assert get_error(readonly_client.post("/train", content=b"x" * 2_000_000), 413)["code"] == "too_large"


def test_oversized_chunked_upload_is_rejected_while_streaming(readonly_client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 65536

    answer = readonly_client.post("/train", content=chunks(), headers={"Content-Type": "application/json"})
    assert get_error(answer, 413)["code"] == "too_large"


def test_upload_without_file_is_rejected(readonly_client: TestClient) -> None:
    assert get_error(readonly_client.post("/datasets", data={"name": "x"}), 400)["param"] == "file"


@pytest.mark.parametrize("fraction", ["-0.1", "0.9", "nan", "x"])
def test_invalid_eval_fraction_is_rejected(readonly_client: TestClient, fraction: str) -> None:
    assert get_error(upload(readonly_client, ROWS, eval_fraction=fraction), 422)["param"] == "eval_fraction"


def test_a_dataset_in_use_cannot_be_deleted(client: TestClient, dataset_id: str) -> None:
    job_id = client.post("/train", json=make_request_body(dataset_id)).json()["job_id"]
    assert job_id in get_error(client.delete(f"/datasets/{dataset_id}"), 409)["message"]
    client.post(f"/jobs/{job_id}/cancel")
    assert client.delete(f"/datasets/{dataset_id}").status_code == 200


def test_evaluation_without_held_out_rows_is_rejected(client: TestClient) -> None:
    dataset_id = upload(client, ROWS, eval_fraction="0").json()["processed_dataset_id"]
    assert get_error(client.post("/train", json=make_request_body(dataset_id)), 400)["param"] == "training_config.eval_config.eval_strategy"


# --- attempts, events, logs ------------------------------------------------------------------------------------------


def attempt_headers(client: TestClient, job_id: str, attempt: int = 1) -> dict[str, str]:
    token = client.app.state.services.tokens.sign_attempt_token(job_id, attempt)  # type: ignore[attr-defined]
    return {"Authorization": f"Bearer {token}"}


def start_attempt(client: TestClient, dataset_id: str) -> str:
    job_id = client.post("/train", json=make_request_body(dataset_id)).json()["job_id"]
    store = client.app.state.services.store  # type: ignore[attr-defined]
    job = store.replace_job(lifecycle.begin_attempt(store.find_job(job_id), "local", START))
    store.replace_job(lifecycle.mark_launched(job, 1, "0@0", START))
    return job_id


def test_an_attempt_claims_reports_and_finishes(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    base, auth = f"/internal/jobs/{job_id}/attempts/1", attempt_headers(client, job_id)
    claim = client.post(f"{base}/claim", json={"claimant": "a"}, headers=auth)
    assert claim.json() == {"secrets": {"hf_token": "hf_..."}, "directive": "continue"}
    assert get_error(client.post(f"{base}/claim", json={"claimant": "b"}, headers=auth), 409)["code"] == "fenced"
    point = {"at": START.isoformat(), "event": {"type": "metrics", "step": 0, "values": {"loss": 2.5}}}
    phase = {"at": START.isoformat(), "event": {"type": "phase", "phase": "training"}}
    answer = client.post(f"{base}/events", json={"first_seq": 0, "events": [phase, point], "phase": "training"}, headers=auth)
    assert answer.json() == {"directive": "continue", "next_seq": 2}
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["phase"]) == ("training", "training")
    events = client.get(f"/jobs/{job_id}/events").json()
    assert [event["event"]["type"] for event in events["events"]] == ["phase", "metrics", "status"]
    result = {"job_id": job_id, "attempt": 1, "outcome": "completed", "started_at": START.isoformat(), "finished_at": START.isoformat()}
    assert client.post(f"{base}/result", json=result, headers=auth).status_code == 204
    assert client.get(f"/jobs/{job_id}").json()["status"] == "completed"
    assert get_error(client.post(f"{base}/events", json={"first_seq": 2}, headers=auth), 409)["code"] == "fenced"


def test_an_attempt_needs_its_own_token(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    for headers in (
        {},
        {"Authorization": "Bearer x"},
        {"Authorization": "Basic x"},
        attempt_headers(client, job_id, 2),
        attempt_headers(client, "other"),
    ):
        for call in ("claim", "events", "result"):
            answer = client.post(f"/internal/jobs/{job_id}/attempts/1/{call}", json={"claimant": "a"}, headers=headers)
            assert answer.status_code in (401, 422), call
            assert answer.status_code == 401 or call == "result"


def test_event_stream_resumes_after_last_event_id(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    client.post(f"/jobs/{job_id}/cancel")
    [first] = client.get(f"/jobs/{job_id}/events").json()["events"]
    base, auth = f"/internal/jobs/{job_id}/attempts/1", attempt_headers(client, job_id)
    result = {"job_id": job_id, "attempt": 1, "outcome": "cancelled", "started_at": START.isoformat(), "finished_at": START.isoformat()}
    client.post(f"{base}/result", json=result, headers=auth)
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(first["id"])}
    text = client.get(f"/jobs/{job_id}/events", headers=headers).text
    told = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [event["event"]["status"] for event in told if event] == ["cancelled"]
    assert text.rstrip().endswith("data: {}")
    get_error(client.get(f"/jobs/{job_id}/events", headers={**headers, "Last-Event-ID": "x"}), 400)


def test_logs_are_paged(client: TestClient, dataset_id: str) -> None:
    job_id = start_attempt(client, dataset_id)
    log = client.app.state.services.settings.home_folder / f"attempts/{job_id}.1.log"  # type: ignore[attr-defined]
    log.parent.mkdir(exist_ok=True)
    log.write_text("one\ntwo é\n")
    page = client.get(f"/jobs/{job_id}/logs?limit=5").json()
    assert page == {"attempt": 1, "text": "one\nt", "next_offset": 5}
    assert client.get(f"/jobs/{job_id}/logs?offset=5").json()["text"] == "wo é\n"
    get_error(client.get(f"/jobs/{job_id}/logs?attempt=2"), 404)


def test_openapi_documents_the_contract_with_an_example(client: TestClient) -> None:
    api = client.get("/openapi.json").json()
    assert {"/train", "/jobs", "/jobs/{job_id}", "/jobs/download/{job_id}", "/health", "/datasets", "/capabilities"} <= set(api["paths"])
    assert not [path for path in api["paths"] if path.startswith("/internal")]
    request = api["components"]["schemas"]["TrainRequest"]
    assert request["examples"][0]["training_config"]["hyperparameters"] == TRAIN_REQUEST_EXAMPLE["training_config"]["hyperparameters"]
    schemas = api["components"]["schemas"]
    config = request["properties"]["training_config"]
    assert set(config["discriminator"]["mapping"]) == {"sft", "dpo", "orpo", "kto", "grpo", "reward"}
    assert schemas["SftConfig"]["properties"]["trainer_type"]["default"] == "sft"
    assert "reward_config" in schemas["GrpoConfig"]["required"]
    knobs = schemas["SftHyperparameters"]["properties"]
    assert knobs["lora_rank"]["minimum"] == 1
    assert knobs["learning_rate"]["anyOf"][0]["maximum"] == 1
    assert schemas["DpoHyperparameters"]["properties"]["beta"]["default"] == 0.1


# --- the identity of attempts ----------------------------------------------------------------------------------------


def test_attempt_identity_can_only_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalLauncher, "get_capabilities", lambda _, profile=None: make_capabilities())
    app = create_app(Settings(home=tmp_path, attempt_identity="job@p"))  # type: ignore[call-arg]
    token = {email: jwt.encode({"email": email}, "k" * 32, algorithm="HS256") for email in ("job@p", "me@p")}
    shown = {who: {"X-Serverless-Authorization": f"Bearer {token[who]}"} for who in token}
    with TestClient(app) as client:
        refusal = client.get("/jobs", headers=shown["job@p"])
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (403, "forbidden")
        assert client.get("/jobs", headers=shown["job@p"] | {"Authorization": f"Bearer {token['me@p']}"}).status_code == 403
        assert client.post("/internal/reconcile", headers={"Authorization": f"Bearer {token['job@p']}"}).status_code == 403
        assert client.post("/internal/jobs/j/attempts/1/claim", json={"claimant": "p"}, headers=shown["job@p"]).status_code == 401
        for headers in ({}, shown["me@p"], {"Authorization": "Bearer no.token"}, {"Authorization": "Basic eA=="}):
            assert client.get("/jobs", headers=headers).status_code == 200


# --- files that lie in the store already -----------------------------------------------------------------------------


def test_a_file_in_the_store_becomes_a_dataset(client: TestClient) -> None:
    objects = client.app.state.services.buckets.datasets  # type: ignore[attr-defined]
    objects.write("incoming/more/rows.jsonl", ROWS.encode())
    answer = client.post("/datasets", data={"incoming": "incoming/more/rows.jsonl", "eval_fraction": "0.2"})
    assert answer.status_code == 201, answer.text
    assert (answer.json()["name"], answer.json()["rows"]) == ("rows.jsonl", 20)
    assert objects.stat("incoming/more/rows.jsonl")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"incoming": "incoming/nothing.jsonl"}, 404, "incoming"),
        ({"incoming": "results/job/1.json"}, 400, "incoming"),
        ({"incoming": "incoming/../results/job/1.json"}, 400, "incoming"),
        ({"incoming": "incoming/large.jsonl"}, 413, "incoming"),
        ({"incoming": "incoming/bad.jsonl"}, 400, "file"),
        ({}, 400, "file"),
    ],
)
def test_invalid_store_file_is_rejected_with_field(readonly_client: TestClient, fields: dict[str, str], status: int, param: str) -> None:
    objects = readonly_client.app.state.services.buckets.datasets  # type: ignore[attr-defined]
    objects.write("incoming/large.jsonl", b"x" * 200_001)
    objects.write("incoming/bad.jsonl", b"no json\n")
    answer = readonly_client.post("/datasets", data=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert readonly_client.get("/datasets").json()["datasets"] == []


def test_file_and_store_key_together_are_rejected(client: TestClient) -> None:
    answer = upload(client, ROWS, incoming="incoming/rows.jsonl")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
