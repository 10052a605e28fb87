"""POST /train: what is accepted, and the field that each error names."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.adapters.launchers.local.launcher import LocalLauncher
from tests.factories import make_capabilities, make_manifest
from tests.unit.api_harness import ROWS, get_error, get_services, make_request_body, make_request_body_with_config, upload


def test_documented_example_request_is_accepted(client: TestClient, dataset_id: str) -> None:
    body = make_request_body_with_config(dataset_id, "export_config", include_gguf=False, gguf_quantization=None)
    response = client.post("/train", json=body)
    assert response.status_code == 201
    job_id = response.json()["job_id"]
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
    documented = {"job_name", "status", "modality", "wandb_url", "adapter_path", "base_model_id", "gguf_path", "metrics", "error"}
    assert documented <= set(job)
    assert "hf_..." not in json.dumps(job)


def test_same_key_returns_same_job_and_other_body_conflicts(client: TestClient, dataset_id: str) -> None:
    key = {"Idempotency-Key": "k"}
    first = client.post("/train", json=make_request_body(dataset_id), headers=key).json()
    assert client.post("/train", json=make_request_body(dataset_id), headers=key).json() == first
    changed = client.post("/train", json=make_request_body(dataset_id, job_name="other"), headers=key)
    assert get_error(changed, 409)["code"] == "idempotency_conflict"
    get_error(client.post("/train", json=make_request_body(dataset_id), headers={"Idempotency-Key": "x" * 300}), 422)


def test_evaluation_without_held_out_rows_is_rejected(client: TestClient) -> None:
    dataset_id = upload(client, ROWS, eval_fraction="0").json()["processed_dataset_id"]
    assert get_error(client.post("/train", json=make_request_body(dataset_id)), 400)["param"] == "training_config.eval_config.eval_strategy"


# --- invalid requests ------------------------------------------------------------------------------------------------

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
    ("hyperparameters", {"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs"),
    ("hyperparameters", {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "two"}}, "lr_scheduler_kwargs"),
    ("hyperparameters", {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 1.5}}, "lr_scheduler_kwargs"),
    ("hyperparameters", {"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs"),
    ("hyperparameters", {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.5}}, "lr_scheduler_kwargs"),
    ("hyperparameters", {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "lr_scheduler_kwargs"),
    ("hyperparameters", {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 0}}, "lr_scheduler_kwargs"),
    ("hyperparameters", {"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs"),
    ("hyperparameters", {"optim": "adam"}, "optim"),
    ("hyperparameters", {"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1"),
    ("hyperparameters", {"optim": "lion_8bit", "adam_epsilon": 1e-6}, "adam_epsilon"),
    ("hyperparameters", {"adam_beta2": 1}, "adam_beta2"),
    ("hyperparameters", {"adam_epsilon": 0}, "adam_epsilon"),
    ("hyperparameters", {"neftune_noise_alpha": 0}, "neftune_noise_alpha"),
    ("hyperparameters", {"lora_init": "loftq"}, "lora_init"),
    (None, {"trainer_type": "dpo", "hyperparameters": {"lora_init": "eva"}}, "lora_init"),
    (None, {"modality": "vision", "hyperparameters": {"lora_init": "eva"}}, "lora_init"),
    ("hyperparameters", {"lora_init": "orthogonal", "lora_rank": 3}, "lora_init"),
    ("hyperparameters", {"lora_init": "pissa", "use_dora": True}, "lora_init"),
    ("hyperparameters", {"lora_init": "olora", "weight_decay": 0.1}, "weight_decay"),
    (None, {"method": "QLoRA", "hyperparameters": {"lora_init": "pissa"}}, "lora_init"),
    (None, {"method": "Full", "hyperparameters": {"lora_init": "default"}}, "lora_init"),
    (None, {"provider": "unsloth", "hyperparameters": {"lora_init": "pissa"}}, "lora_init"),
    (None, {"trainer_type": "dpo", "hyperparameters": {"neftune_noise_alpha": 5}}, "neftune_noise_alpha"),
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
    (
        None,
        GRPO_CONFIG | {"hyperparameters": {"batch_size": 3, "gradient_accumulation_steps": 1, "num_generations": 2}},
        "num_generations",
    ),
    (None, GRPO_CONFIG | {"hyperparameters": {"num_iterations": 0}}, "num_iterations"),
    (None, GRPO_CONFIG | {"hyperparameters": {"num_iterations": 2, "max_steps": 5}}, "max_steps"),
    (None, GRPO_CONFIG | {"hyperparameters": {"num_iterations": 2, "save_strategy": "steps", "save_steps": 5}}, "save_steps"),
    (
        None,
        GRPO_CONFIG | {"hyperparameters": {"num_iterations": 2}, "eval_config": {"eval_strategy": "steps", "eval_steps": 5}},
        "eval_steps",
    ),
    (None, GRPO_CONFIG | {"hyperparameters": {"epsilon": 0.3}}, "epsilon"),
    (None, GRPO_CONFIG | {"hyperparameters": {"num_iterations": 2, "epsilon_high": 0.1}}, "epsilon_high"),
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
    (None, {"prompt_format": "jinja"}, "prompt_format"),
    (None, {"prompt_format": "raw", "modality": "vision"}, "prompt_format"),
    (None, {"prompt_format": "raw", "chat_template": "{{ messages }}"}, "chat_template"),
    (None, {"chat_template": ""}, "chat_template"),
    (None, {"chat_template": "x" * 262_145}, "chat_template"),
    (None, {"chat_template": "{{ messages }}", "modality": "vision"}, "chat_template"),
    (None, {"train_on_inputs": True, "last_turn_only": True}, "last_turn_only"),
    (None, {"trainer_type": "dpo", "train_on_inputs": True}, "train_on_inputs"),
]


@pytest.mark.parametrize(
    ("group", "changes", "param"), INVALID_CONFIG_CASES, ids=lambda value: json.dumps(value)[:80] if isinstance(value, dict) else None
)
def test_invalid_config_value_is_rejected_with_field(
    readonly_client: TestClient, readonly_dataset_id: str, group: str | None, changes: dict[str, Any], param: str
) -> None:
    error = get_error(readonly_client.post("/train", json=make_request_body_with_config(readonly_dataset_id, group, **changes)), 422)
    assert error["param"].startswith("training_config.")
    assert param in error["param"]
    assert "canary" not in str(error)
    assert readonly_client.get("/jobs").json()["jobs"] == []


@pytest.mark.parametrize("template", ["{% for message in messages %}", "{{" + "(" * 10_000, "{% \u202e\x1b[2J %}"])
def test_chat_template_that_cannot_be_parsed_is_rejected(readonly_client: TestClient, readonly_dataset_id: str, template: str) -> None:
    body = make_request_body_with_config(readonly_dataset_id, chat_template=template)
    error = get_error(readonly_client.post("/train", json=body), 400)
    assert error["param"] == "training_config.chat_template"
    assert error["message"].isprintable()
    assert readonly_client.get("/jobs").json()["jobs"] == []


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
    readonly_client: TestClient, readonly_dataset_id: str, changes: dict[str, Any], param: str
) -> None:
    assert get_error(readonly_client.post("/train", json=make_request_body(readonly_dataset_id, **changes)), 422)["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}', b'"' + b"x" * 1000 + b'"', b"[" * 10_000, b'{"a":1}' * 2]
)
def test_malformed_body_is_rejected(readonly_client: TestClient, body: bytes) -> None:
    response = readonly_client.post("/train", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_non_finite_number_is_rejected(readonly_client: TestClient, readonly_dataset_id: str, number: str) -> None:
    body = json.dumps(make_request_body(readonly_dataset_id)).replace('"learning_rate": 0.0001', f'"learning_rate": {number}')
    response = readonly_client.post("/train", content=body, headers={"Content-Type": "application/json"})
    assert "learning_rate" in get_error(response, 422)["param"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer_type": "dpo"}, "environment 'llm' has: sft"),
        ({"trainer_type": "ppo"}, "it supports: sft, dpo, orpo, kto, grpo, reward"),
        ({"provider": "unsloth"}, "it supports: huggingface"),
        ({"method": "QLoRA"}, "it supports: LoRA, Full"),
        ({"modality": "vision"}, "it supports: text"),
    ],
)
def test_unsupported_option_error_names_supported_ones(
    readonly_client: TestClient, readonly_dataset_id: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"provider": ("huggingface",), "method": ("LoRA", "Full"), "modality": ("text",)}
    narrow = make_manifest(make_capabilities(trainer_types=("sft",), options=options))
    monkeypatch.setattr(LocalLauncher, "list_environments", lambda _: {"llm": narrow})
    error = get_error(readonly_client.post("/train", json=make_request_body_with_config(readonly_dataset_id, **changes)), 400)
    assert (error["code"], message in error["message"]) == ("unsupported", True)


def test_job_keeps_the_trace_of_its_request(client: TestClient, dataset_id: str) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    job_id = client.post("/train", json=make_request_body(dataset_id), headers=headers).json()["job_id"]
    job = get_services(client).store.find_job(job_id)
    assert job is not None
    assert job.traceparent is not None
    assert job.traceparent.split("-")[1] == trace_id
    assert job.traceparent.split("-")[3] == "01"
