"""The requests that commands send, and what they print."""

import json
from pathlib import Path

import httpx2
from typer.testing import CliRunner, Result

from cli.errors import ApiError, CliError
from cli.main import app
from tests.unit.cli.api_json import make_job_json
from tests.unit.cli.fake_service import JOB_CREATED, JOB_ID, FakeReply, FakeService


def run_command(*words: str, replies: list[FakeReply], environment: dict[str, str] | None = None) -> tuple[Result, list[httpx2.Request]]:
    """Run a command against a service that returns these replies."""
    service = FakeService(*replies)
    variables = {"HF_TOKEN": None, "WANDB_API_KEY": None} | (environment or {})
    done = CliRunner().invoke(app, [*words], env=variables, obj=lambda: service.client)
    return done, service.requests


def test_clone_sends_changes_and_required_secrets() -> None:
    error = {"code": "invalid_request", "message": "needed again", "hint": "", "param": "hf_token"}
    needs_token = httpx2.Response(400, json={"error": error})
    words = [
        "clone",
        JOB_ID,
        "--set",
        "hyperparameters.learning_rate=1e-4",
        "--set",
        "wandb_config=null",
        "--secret",
        "a_api_key=k=1",
    ]
    done, requests = run_command(*words, replies=[needs_token, JOB_CREATED], environment={"HF_TOKEN": "hf_x"})
    assert (done.exit_code, done.output.strip()) == (0, "training_1")
    first, second = (json.loads(request.content) for request in requests)
    assert first == {
        "training_config": {"hyperparameters": {"learning_rate": 1e-4}, "wandb_config": None},
        "secrets": {"a_api_key": "k=1"},
    }
    assert second == first | {"hf_token": "hf_x"}
    assert {request.url.path for request in requests} == {f"/jobs/{JOB_ID}/clone"}


def test_missing_secret_error_names_option() -> None:
    error = {"code": "invalid_request", "message": "needed again", "hint": "h", "param": "secrets.judge_api_key"}
    done, requests = run_command("clone", JOB_ID, replies=[httpx2.Response(400, json={"error": error})])
    assert isinstance(done.exception, ApiError)
    assert done.exception.hint == "--secret judge_api_key=…; h"
    assert len(requests) == 1


def test_export_without_step_uses_published_model() -> None:
    words = ["export", JOB_ID, "--format", "merged", "--gguf", "q8_0", "--lora-gguf", "--to-hub", "ada/tuned"]
    done, [request] = run_command(*words, replies=[JOB_CREATED])
    assert done.exit_code == 0, done.output
    assert request.url.path == f"/jobs/{JOB_ID}/export"
    assert json.loads(request.content)["export_config"] == {
        "format": ["merged"],
        "include_gguf": True,
        "gguf_quantization": ["q8_0"],
        "include_lora_gguf": True,
        "destination": "hfhub",
        "hf_repo_id": "ada/tuned",
    }
    _, [request] = run_command("export", JOB_ID, "40", replies=[JOB_CREATED])
    assert request.url.path == f"/jobs/{JOB_ID}/checkpoints/40/export"


def test_delete_affects_hub_only_with_option() -> None:
    deleted = httpx2.Response(200, json={"deleted": True, "message": "deleted", "job_id": "j", "deleted_resources": []})
    _, [request] = run_command("delete", JOB_ID, "--yes", replies=[deleted], environment={"HF_TOKEN": "hf_x"})
    assert ("X-HF-Token" in request.headers, request.url.query) == (False, b"")
    _, [request] = run_command("delete", JOB_ID, "--hub", "--yes", replies=[deleted], environment={"HF_TOKEN": "hf_x"})
    assert (request.headers["X-HF-Token"], request.url.query) == ("hf_x", b"delete_hub=true")
    done, requests = run_command("delete", JOB_ID, "--hub", replies=[deleted])
    assert isinstance(done.exception, CliError)
    assert requests == []


def test_caps_are_sent_as_numbers() -> None:
    caps = ["--max-cost-usd", "2.5", "--max-gpu-seconds", "3600"]
    done, [trained] = run_command("train", "--dataset", "d", "--base", "g/m", *caps, replies=[JOB_CREATED])
    assert done.exit_code == 0, done.output
    _, [cloned] = run_command("clone", JOB_ID, *caps, replies=[JOB_CREATED])
    _, [exported] = run_command("export", JOB_ID, *caps, replies=[JOB_CREATED])
    resumed = httpx2.Response(202, json=make_job_json(status="queued"))
    _, [resume] = run_command("resume", JOB_ID, *caps, replies=[resumed])
    _, [retry] = run_command("retry", JOB_ID, *caps, replies=[resumed])
    for request in (trained, cloned, exported, resume, retry):
        body = json.loads(request.content)
        assert (body["max_cost_usd"], body["max_gpu_seconds"]) == (2.5, 3600)


def test_dataset_option_replaces_a_mix_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "request.yaml"
    file.write_text("datasets: [{processed_dataset_id: a, weight: 1}, {processed_dataset_id: b, weight: 1}]\ntraining_config: {}\n")
    done, [request] = run_command("train", str(file), "--dataset", "c", "--base", f"job:{JOB_ID}", replies=[JOB_CREATED])
    assert done.exit_code == 0, done.output
    assert json.loads(request.content) == {"processed_dataset_id": "c", "training_config": {"base_model_id": f"job:{JOB_ID}"}}
