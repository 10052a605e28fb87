"""Preferences, graders, the promotion gate and the Hub: over real HTTP, in real attempts, with a Hub on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.loopback.hub import LoopbackHub, Token
from tests.e2e.conftest import BASE, Json, Service, new_service

PAIRS = [{"prompt": f"what does function {n} do", "chosen": f" it returns list {n % 7}", "rejected": " no"} for n in range(40)]
PROMPT_ROWS = [{"prompt": f"what is the value of number {n}", "answer": f"number {n}"} for n in range(24)]
TOKEN = "hf_e2e_canary"


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.tokens[TOKEN] = Token("ada")
        running.tokens["hf_reader"] = Token("ada", "read")
        yield running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_gemma: Path, hub: LoopbackHub) -> Iterator[Service]:
    service = new_service(tmp_path_factory.mktemp("tuning"), tiny_gemma)
    service.environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    del service.environment["HF_HUB_OFFLINE"]
    service.start()
    yield service
    service.stop()
    service.http.close()


@pytest.fixture(scope="module")
def pushed_job(service: Service, hub: LoopbackHub) -> Json:
    """A DPO job that pushes its artifacts."""
    export = {"format": ["adapter", "merged"], "destination": "hfhub", "hf_repo_id": "ada/tuned", "include_gguf": True}
    config = {"trainer_type": "dpo", "export_config": export, "tensorboard_config": {}}
    hyperparameters = {"lora_rank": 4, "max_seq_length": 64, "learning_rate": 1e-3}
    job = service.wait_until_final(service.train(service.upload(PAIRS), hyperparameters, config=config, hf_token=TOKEN))
    assert job["status"] == "completed", service.log(job["job_id"])
    return job


def test_dpo_job_is_pushed_in_one_private_commit(pushed_job: Json, hub: LoopbackHub) -> None:
    assert pushed_job["metrics"]["values"]["rewards/margins"] > 0
    repo = hub.repos["ada/tuned"]
    assert repo.private
    assert {"README.md", "run.json", "config.json", "adapter/adapter_config.json"} <= repo.files.keys()
    assert any(path.endswith("q8_0.gguf") for path in repo.files)
    assert {artifact["hub"]["repo_id"] for artifact in pushed_job["artifacts"]} == {"ada/tuned"}
    assert len({artifact["hub"]["revision"] for artifact in pushed_job["artifacts"]}) == 1
    card = bytes(repo.files["README.md"].content).decode()
    assert f"base_model: {BASE}" in card
    assert TOKEN not in card + bytes(repo.files["run.json"].content).decode()


def test_tensorboard_files_are_stored(pushed_job: Json, service: Service) -> None:
    written = list((service.home / "objects/trackers" / pushed_job["job_id"]).rglob("*tfevents*"))
    assert written
    assert all(path.stat().st_size > 100 for path in written)


def test_read_only_token_is_rejected_before_job_is_created(service: Service) -> None:
    export = {"destination": "hfhub", "hf_repo_id": "ada/tuned"}
    body = {"processed_dataset_id": service.upload(), "hf_token": "hf_reader"}
    response = service.http.post("/train", json=body | {"training_config": {"base_model_id": BASE, "export_config": export}})
    assert response.status_code in (400, 403)
    assert "hf_token" in response.json()["error"]["param"]
    assert "read-only" in response.json()["error"]["message"]


def test_clone_copies_job_with_changes(pushed_job: Json, service: Service) -> None:
    change = {"training_config": {"hyperparameters": {"beta": 0.5, "max_steps": 1}, "export_config": None, "tensorboard_config": None}}
    response = service.http.post(f"/jobs/{pushed_job['job_id']}/clone", json=change | {"hf_token": None})
    assert response.status_code == 201, response.text
    clone = service.wait_until_final(response.json()["job_id"])
    assert clone["status"] == "completed", service.log(clone["job_id"])
    assert clone["cloned_from"] == pushed_job["job_id"]
    assert (clone["training_config"]["trainer_type"], clone["training_config"]["hyperparameters"]["beta"]) == ("dpo", 0.5)


def test_model_failing_gate_is_published_only_by_explicit_export(service: Service) -> None:
    source = "def grade(completion, row):\n    return 1.0 if row['answer'] in completion else len(completion) / 1000\n"
    graders = [
        {"type": "python", "name": "mine", "source": source},
        {"type": "string_check", "name": "says_it", "operation": "ilike", "reference_field": "answer", "weight": 0.5},
    ]
    gate = [{"metric": "reward", "at_least": 100}]
    config = {
        "trainer_type": "grpo",
        "reward_config": graders,
        "eval_config": {"promotion_gate": gate, "sample_prompts": 1, "max_new_tokens": 8},
    }
    hyperparameters = {
        "batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_seq_length": 64,
        "max_steps": 2,
        "lora_rank": 4,
    }
    job_id = service.train(service.upload(PROMPT_ROWS), hyperparameters, config=config)
    job = service.wait_until_final(job_id)
    assert job["status"] == "completed", service.log(job_id)
    assert job["gate_passed"] is False
    assert job["artifacts"] == []
    download_response = service.http.get(f"/jobs/download/{job_id}")
    assert download_response.status_code in (404, 409)
    assert "reward" in download_response.json()["error"]["message"]
    export_response = service.http.post(f"/jobs/{job_id}/export", json={})
    assert export_response.status_code == 201, export_response.text
    exported = service.wait_until_final(export_response.json()["job_id"])
    assert exported["status"] == "completed", service.log(exported["job_id"])
    assert "adapter" in [artifact["name"] for artifact in exported["artifacts"]]
