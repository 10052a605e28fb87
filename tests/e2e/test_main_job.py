"""The main job from `POST /train` to a GGUF that answers: everything is real except the size of the model."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from schema.job import Artifact
from tests.e2e.conftest import BASE, ROWS, SOURCE, TRAINER_PYTHON, Json, Service, wait_until

GGUF = {"export_config": {"format": "merged", "include_gguf": True, "gguf_quantization": ["f16", "q8_0"]}}
CANARIES = {"hf_token": "hf_canary_7c1d", "api_key": "wandb_canary_55e0a1b2c3d4e5f60718293a4b5c6d7e8f90"}


@pytest.fixture(scope="module")
def job(service: Service) -> Json:
    """A job with every feature switched on."""
    dataset_id = service.upload()
    config = {
        **GGUF,
        "eval_config": {"eval_strategy": "steps", "eval_steps": 6, "compute_eval_metrics": True},
        "wandb_config": {"api_key": CANARIES["api_key"], "mode": "offline"},
    }
    hyperparameters = {"max_steps": 12, "learning_rate": 0.01, "logging_steps": 2}
    job_id = service.train(dataset_id, hyperparameters, config=config, hf_token=CANARIES["hf_token"], job_name="everything")
    job = service.wait_until_final(job_id)
    assert job["status"] == "completed", f"{job['failure']}\n{service.log(job_id)}"
    return job


def test_training_improves_metrics(job: Json) -> None:
    assert job["metrics"]["eval_loss"] < job["base_metrics"]["eval_loss"]
    assert job["metrics"]["perplexity"] == pytest.approx(2.718281828 ** job["metrics"]["eval_loss"], rel=1e-6)
    assert 0 <= job["metrics"]["accuracy"] <= 1
    assert job["metrics"]["eval_runtime"] > 0
    assert (job["progress"]["step"], job["progress"]["total_steps"]) == (12, 12)


def test_artifacts_are_stored_with_correct_digests(job: Json, service: Service) -> None:
    job_id = job["job_id"]
    root = (service.home / "objects").as_uri()
    assert job["adapter_path"] == f"{root}/merged_models/{job_id}/attempt-1/"
    assert job["gguf_path"].startswith(f"{root}/gguf_models/{job_id}/attempt-1/")
    assert {artifact["name"] for artifact in job["artifacts"]} == {"merged", "gguf-f16", "gguf-q8_0"}
    for artifact in map(Artifact.model_validate, job["artifacts"]):
        for file in artifact.files:
            path = service.home / "objects" / artifact.file_key(file)
            assert path.stat().st_size == file.size_bytes
            assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


def test_every_gguf_matches_the_model(job: Json) -> None:
    fidelity = {artifact["name"]: artifact["fidelity"] for artifact in job["artifacts"] if artifact["name"] in ("gguf-f16", "gguf-q8_0")}
    assert fidelity["gguf-f16"]["argmax_agreement"] >= 0.99
    for measurements in fidelity.values():
        assert measurements["compared_tokens"] > 0
        assert measurements["sample_text"]
        assert measurements["mean_kl_to_merged"] < measurements["mean_kl_to_base"]


def test_the_gguf_answers_after_download(job: Json, service: Service, tmp_path: Path) -> None:
    files = service.run_cli("download", job["job_id"], "--artifact", "gguf-f16", "--to", str(tmp_path)).split()
    [path] = [file for file in files if file.endswith(".gguf")]
    command = [
        str(TRAINER_PYTHON),
        "-m",
        "jobs.llm.chat",
        "--model",
        path,
        "--temperature",
        "0",
        "--max-tokens",
        "8",
        "--prompt",
        "what does function 3 do",
    ]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=SOURCE, check=True, env=service.environment).stdout
    assert answer.strip()


def test_events_are_complete_and_ordered(job: Json, service: Service) -> None:
    rows = service.http.get(f"/jobs/{job['job_id']}/events", params={"limit": 1000}).json()["events"]
    events = [row["event"] for row in rows]
    assert [event["status"] for event in events if event["type"] == "status"] == ["preparing", "training", "completed"]
    assert [event["when"] for event in events if event["type"] == "evaluation"][:1] == ["before"]
    points = [event for event in events if event["type"] == "metrics" and "loss" in event["values"]]
    assert [point["step"] for point in points] == [2, 4, 6, 8, 10, 12]
    assert all(point["values"]["rss_bytes"] > 0 and point["values"]["tokens_per_second"] > 0 for point in points)
    assert {"device", "dtype"} <= {event["setting"] for event in events if event["type"] == "decision"}
    phases = [event["phase"] for event in events if event["type"] == "phase"]
    for phase in ("downloading", "tokenizing", "training", "evaluating", "merging", "converting", "verifying", "uploading"):
        assert phase in phases


def test_secrets_are_removed_and_never_written(job: Json, service: Service) -> None:
    assert list((service.home / "secrets").glob("*.secret")) == []
    for path in service.home.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for canary in CANARIES.values():
                assert canary.encode() not in content, path
    assert "canary" not in json.dumps(job)


def test_watch_of_finished_job_returns(job: Json, service: Service) -> None:
    assert "completed" in service.run_cli("watch", job["job_id"])


def test_unknown_base_model_is_refused_before_a_job_is_taken(service: Service) -> None:
    body = {"processed_dataset_id": service.upload(), "training_config": {"base_model_id": "nobody/nothing"}}
    error = service.http.post("/train", json=body).json()["error"]
    assert error["param"] == "training_config.base_model_id"
    assert BASE in error["message"]


def test_base_of_a_folder_is_imported_listed_and_removed(service: Service, tiny_gemma: Path) -> None:
    service.run_cli("models", "import", str(tiny_gemma), "--name", "me/mine")
    assert service.http.get("/models/mine").json()["source"] == "folder"
    assert {"me/mine", BASE} <= set(service.run_cli("models", "list").split())
    service.run_cli("models", "remove", "mine", "--yes")
    assert service.http.get("/models/me/mine").status_code == 404


def test_base_model_without_weights_fails_the_job_with_hint(service: Service) -> None:
    base = service.home / "objects/pretrained_weights/huggingface/nobody/nothing"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    job = service.wait_until_final(service.train(service.upload(), config={"base_model_id": "nobody/nothing"}))
    assert job["status"] == "failed"
    assert "nobody/nothing" in job["error"]
    assert job["failure"]["hint"]


def test_cancelled_job_releases_its_slot_to_the_next(service: Service) -> None:
    dataset_id = service.upload()
    first, second = service.train(dataset_id, {"max_steps": 100_000}), service.train(dataset_id, config={"method": "Full"})
    wait_until(lambda: service.job(first)["status"] == "training")
    assert service.job(second)["status"] == "queued"
    [process] = service.attempts()
    service.run_cli("cancel", first)
    assert service.wait_until_final(first)["status"] == "cancelled"
    wait_until(lambda: not process.is_running())
    assert service.run_cli("delete", first)
    job = service.wait_until_final(second)
    assert job["status"] == "completed", service.log(second)
    assert [artifact["name"] for artifact in job["artifacts"]] == ["merged"]  # a full fine-tune has no adapter


def test_cli_workflow(service: Service, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    config = tmp_path / "train.yaml"
    config.write_text(f"base_model_id: {BASE}\nhyperparameters: {{max_steps: 2, batch_size: 2}}\n")
    dataset_id = service.run_cli("datasets", "upload", str(rows)).strip()
    assert dataset_id in service.run_cli("datasets", "list")
    assert "function" in service.run_cli("datasets", "show", dataset_id)
    job_id = service.run_cli("train", str(config), "--dataset", dataset_id, "--set", "hyperparameters.learning_rate=1e-3").strip()
    assert "completed" in service.run_cli("watch", job_id)
    assert service.job(job_id)["training_config"]["hyperparameters"]["learning_rate"] == 1e-3
    assert job_id in service.run_cli("jobs", "--status", "completed", "--json")
    assert "attempt" in service.run_cli("logs", job_id)
    files = service.run_cli("download", job_id, "--to", str(tmp_path / "out")).split()
    assert {Path(file).name for file in files} >= {"adapter_model.safetensors", "adapter_config.json"}
    lines = service.run_cli("chat", job_id, "--max-tokens", "4", "--prompt", "what is it", "--json").splitlines()
    assert json.loads(lines[-1])["done"]  # the adapter talks, with its base
    assert "LoRA" in service.run_cli("capabilities")
    assert "no job" in service.run_cli("watch", "nobody", expect_failure=True)
    assert "it supports: sft" in service.run_cli(
        "train", str(config), "--dataset", dataset_id, "--set", "trainer_type=ppo", expect_failure=True
    )
