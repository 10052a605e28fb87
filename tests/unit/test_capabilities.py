"""Validation against dataset, base model and hardware before anything is launched, and its error messages."""

from dataclasses import replace
from typing import Any

import pytest

from schema.capabilities import EnvironmentManifest, FamilyCapabilities
from schema.dataset import Dataset
from schema.training import TRAINER_TYPES, TRAINING_CONFIG, TrainingConfig
from service.api.capabilities import capabilities_response
from service.core.errors import InvalidRequest, Unavailable, Unsupported
from service.core.launchers import LauncherPool
from service.core.validation.llm import check_dataset_compatible, find_known_model
from service.core.validation.placement import check_environment
from tests.factories import make_dataset, make_grpo_config, make_manifest, make_profile
from tests.fakes import FakeLauncher

GEMMA = "google/gemma-3-270m"
GATE = {"metric": "perplexity", "at_most": 0.9, "relative_to_base": True}


def make_config(**changes: Any) -> TrainingConfig:
    return TRAINING_CONFIG.validate_python({"base_model_id": GEMMA} | changes)


def make_train_only_dataset(**changes: Any) -> Dataset:
    return make_dataset(splits={"train": make_dataset().splits["train"]}, **changes)


def get_validation_error(config: TrainingConfig, dataset: Dataset) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as excinfo:
        check_dataset_compatible(config, dataset)
    return excinfo.value


# --- the dataset -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer_type", TRAINER_TYPES)
@pytest.mark.parametrize("dataset_type", ["messages", "prompt_completion", "text", "preference", "unpaired_preference", "prompt"])
def test_trainer_accepts_only_its_dataset_types(trainer_type: str, dataset_type: Any) -> None:
    config = make_grpo_config({"type": "format", "name": "form"}) if trainer_type == "grpo" else make_config(trainer_type=trainer_type)
    dataset = make_dataset(dataset_type=dataset_type)
    if dataset_type in TRAINER_TYPES[trainer_type].dataset_types:
        check_dataset_compatible(config, dataset)
        return
    error = get_validation_error(config, dataset)
    assert error.param == "processed_dataset_id"
    assert dataset_type in error.hint  # the hint names a trainer that fits
    assert all(name in error.message for name in (trainer_type, dataset_type, config.dataset_types[0]))


@pytest.mark.parametrize(
    ("changes", "images", "message"),
    [
        ({"modality": "text"}, 3, "has 3 images"),
        ({"modality": "vision", "base_model_id": "google/gemma-3-4b-it"}, 0, "has none"),
        ({"modality": "vision"}, 3, "text model"),
        ({"modality": "vision", "base_model_id": "unsloth/gemma-3-1b-it-qat"}, 3, "text model"),
    ],
)
def test_images_with_text_only_model_are_rejected(changes: dict[str, Any], images: int, message: str) -> None:
    error = get_validation_error(make_config(**changes), make_dataset(images=images))
    assert error.param == "training_config.modality"
    assert message in error.message
    assert error.hint


@pytest.mark.parametrize("base", ["google/gemma-3-4b-it", "somebody/something-new"])
def test_images_with_possible_vision_model_are_accepted(base: str) -> None:
    check_dataset_compatible(make_config(modality="vision", base_model_id=base), make_dataset(images=1))


@pytest.mark.parametrize(
    ("dataset", "columns"),
    [
        (make_dataset(dataset_type="prompt", columns=("solution", "level")), "solution, level"),
        (make_dataset(dataset_type="prompt"), "none beside the prompt"),
        (make_dataset(dataset_type="prompt_completion"), "completion"),
    ],
)
def test_grader_with_missing_column_is_rejected(dataset: Dataset, columns: str) -> None:
    form, right = {"type": "format", "name": "form"}, {"type": "numeric_accuracy", "name": "right"}
    error = get_validation_error(make_grpo_config(form, right), dataset)
    assert error.param == "training_config.reward_config.1.reference_field"
    assert "grader 'right' reads the column 'answer'" in error.message
    assert error.message.endswith(f"have: {columns}")


def test_score_model_prompt_uses_existing_columns() -> None:
    judge = {"type": "score_model", "name": "judge", "base_url": "https://j.example", "model": "m"}
    dataset = make_dataset(dataset_type="prompt", columns=("solution",))
    check_dataset_compatible(make_grpo_config(judge | {"prompt": "{{prompt}} {{completion}} {{solution}} {{ level }}"}), dataset)
    error = get_validation_error(make_grpo_config(judge | {"prompt": "{{prompt}} {{level}}"}), dataset)
    assert error.param == "training_config.reward_config.0.prompt"
    assert "'level'" in error.message


def test_graders_with_existing_columns_are_accepted() -> None:
    grader = {"type": "numeric_accuracy", "name": "right", "reference_field": "solution"}
    json_grader = {"type": "json_schema", "name": "shape", "json_schema": {}}
    check_dataset_compatible(make_grpo_config(grader, json_grader), make_dataset(dataset_type="prompt", columns=("solution",)))
    check_dataset_compatible(make_grpo_config(grader | {"reference_field": "completion"}), make_dataset(dataset_type="prompt_completion"))


# --- the base model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("google/gemma-3-270m", 640),
        ("google/gemma-3-270m-it", 640),
        ("unsloth/Gemma-3-1B-it", 1152),
        ("google/gemma-3-4b-pt", 2560),
        ("gemma-3-12b-it", 3840),
        ("google/gemma-3-27b-it", 5376),
        ("google/gemma-3-270market", None),
        ("google/gemma-3-1bis", None),
        ("google/gemma-2-2b", None),
    ],
)
def test_known_base_model_is_recognized_by_name(name: str, width: int | None) -> None:
    base = find_known_model(name)
    assert (base.hidden_size if base else None) == width


def test_lora_rank_above_known_width_is_rejected() -> None:
    error = get_validation_error(make_config(hyperparameters={"lora_rank": 641}), make_dataset())
    assert (error.param, "at most 640" in error.hint) == ("training_config.hyperparameters.lora_rank", True)
    check_dataset_compatible(make_config(hyperparameters={"lora_rank": 640}), make_dataset())
    check_dataset_compatible(make_config(base_model_id="somebody/small", hyperparameters={"lora_rank": 1024}), make_dataset())


# --- the evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eval_config", "field"),
    [
        ({"eval_strategy": "steps"}, "eval_strategy"),
        ({"eval_strategy": "epoch", "early_stopping_patience": 2}, "eval_strategy"),
        ({"eval_strategy": "epoch", "load_best_model_at_end": True}, "eval_strategy"),
        ({"compute_eval_metrics": True}, "compute_eval_metrics"),
        ({"promotion_gate": [GATE]}, "promotion_gate"),
    ],
)
def test_evaluation_requires_held_out_rows(eval_config: dict[str, Any], field: str) -> None:
    error = get_validation_error(make_config(eval_config=eval_config), make_train_only_dataset())
    assert error.param == f"training_config.eval_config.{field}"
    assert "eval_fraction" in error.hint
    check_dataset_compatible(make_config(eval_config=eval_config), make_dataset())


@pytest.mark.parametrize(
    ("metric", "eval_config", "needs"),
    [
        ("accuracy", {}, "compute_eval_metrics"),
        ("rouge_l", {}, "compute_eval_metrics"),
        ("lm_eval/arc_easy/acc", {}, "arc_easy"),
        ("lm_eval/arc_easy/acc", {"lm_eval_tasks": ["arc"]}, "arc_easy"),
    ],
)
def test_gate_on_unmeasured_metric_is_rejected(metric: str, eval_config: dict[str, Any], needs: str) -> None:
    config = make_config(eval_config=eval_config | {"promotion_gate": [GATE, {"metric": metric, "at_least": 0.5}]})
    error = get_validation_error(config, make_dataset())
    assert error.param == "training_config.eval_config.promotion_gate.1.metric"
    assert needs in error.hint


@pytest.mark.parametrize(
    ("metric", "eval_config"),
    [
        ("eval_loss", {}),
        ("rewards/accuracies", {}),
        ("exact_match", {"compute_eval_metrics": True}),
        ("lm_eval/arc_easy/acc", {"lm_eval_tasks": ["arc_easy"]}),
    ],
)
def test_gate_on_measurable_metric_is_accepted(metric: str, eval_config: dict[str, Any]) -> None:
    check_dataset_compatible(
        make_config(eval_config=eval_config | {"promotion_gate": [{"metric": metric, "at_least": 0.5}]}), make_dataset()
    )


def test_gate_on_lm_eval_tasks_needs_no_held_out_rows() -> None:
    eval_config = {"lm_eval_tasks": ["arc_easy"], "promotion_gate": [{"metric": "lm_eval/arc_easy/acc", "at_least": 0.5}]}
    check_dataset_compatible(make_config(eval_config=eval_config), make_train_only_dataset())


# --- the hardware ----------------------------------------------------------------------------------------------------

COMPLETE = FamilyCapabilities(
    trainer_types=tuple(TRAINER_TYPES),
    options={"provider": ("huggingface", "unsloth"), "method": ("LoRA", "QLoRA", "Full"), "modality": ("text", "vision")},
    features={"gguf": True, "onnx": True, "lm_eval": True, "flash_attention_2": True},
    needs_gpu=("unsloth", "flash_attention_2"),
)
MINIMAL = COMPLETE.model_copy(
    update={
        "options": {"provider": ("huggingface",), "method": ("LoRA", "Full"), "modality": ("text", "vision")},
        "features": {},
        "notes": {
            "method": "QLoRA needs bitsandbytes",
            "format": "the ONNX exporter is missing",
            "include_gguf": "llama.cpp is missing",
            "include_lora_gguf": "llama.cpp is missing",
            "lm_eval_tasks": "install lm_eval",
        },
    }
)
GPU = make_profile("gpu", device="cuda", device_name="NVIDIA L4", compute_capability=8.9)


@pytest.mark.parametrize(
    ("changes", "param", "note"),
    [
        ({"method": "QLoRA"}, "method", "bitsandbytes"),
        ({"provider": "unsloth"}, "provider", "needs a GPU"),
        ({"export_config": {"format": ["merged", "onnx"]}}, "export_config.format", "ONNX"),
        ({"export_config": {"include_gguf": True}}, "export_config.include_gguf", "llama.cpp"),
        ({"export_config": {"include_lora_gguf": True}}, "export_config.include_lora_gguf", "llama.cpp"),
        ({"eval_config": {"lm_eval_tasks": ["arc_easy"]}}, "eval_config.lm_eval_tasks", "lm_eval"),
        ({"hyperparameters": {"use_fa2": True}}, "hyperparameters.use_fa2", "Ampere"),
    ],
)
def test_missing_trainer_capability_is_rejected_with_reason(changes: dict[str, Any], param: str, note: str) -> None:
    with pytest.raises(Unsupported) as excinfo:
        check_environment(make_config(**changes), make_manifest(MINIMAL), make_profile())
    assert excinfo.value.param == f"training_config.{param}"
    assert note in excinfo.value.hint
    check_environment(make_config(**changes), make_manifest(COMPLETE), GPU)


@pytest.mark.parametrize("changes", [{"provider": "unsloth"}, {"hyperparameters": {"use_fa2": True}}])
def test_installed_package_that_needs_a_gpu_is_refused_without_one(changes: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        check_environment(make_config(**changes), make_manifest(COMPLETE), make_profile())
    old_gpu = replace(GPU, compute_capability=7.5)
    if "hyperparameters" in changes:
        with pytest.raises(Unsupported):
            check_environment(make_config(**changes), make_manifest(COMPLETE), old_gpu)


def test_training_that_cannot_fit_into_the_memory_is_refused_with_what_would_fit() -> None:
    l4 = replace(GPU, gpus=1, gpu_memory_bytes=24 << 30)
    large = {"base_model_id": "google/gemma-3-27b-it"}
    with pytest.raises(
        Unsupported, match=r"method LoRA needs at least \d+ GB, and a GPU of gpu has 26 GB; method QLoRA would fit"
    ) as excinfo:
        check_environment(make_config(**large), make_manifest(COMPLETE), l4)
    assert excinfo.value.param == "training_config.method"
    check_environment(make_config(**large, method="QLoRA"), make_manifest(COMPLETE), l4)
    check_environment(make_config(**large), make_manifest(COMPLETE), replace(l4, gpus=4))  # sharded
    check_environment(make_config(base_model_id="someone/unknown-900b"), make_manifest(COMPLETE), l4)
    check_environment(make_config(**large), make_manifest(COMPLETE), replace(l4, gpu_memory_bytes=None))


def test_trainer_type_without_its_environment_is_rejected() -> None:
    with pytest.raises(Unsupported, match="trainer_type 'sft' is not available"):
        check_environment(make_config(), make_manifest(COMPLETE.model_copy(update={"trainer_types": ("kto",)})), GPU)


def test_capabilities_response_lists_launchers_and_options() -> None:
    on_gpu = FakeLauncher("cloud-run", ("l4", "moon"))
    on_gpu.manifests = {"llm": make_manifest(COMPLETE)}
    away = FakeLauncher("away")
    away.list_environments = raise_unavailable  # type: ignore[method-assign]
    response: Any = capabilities_response(LauncherPool([away, on_gpu, FakeLauncher()]))
    assert response["trainer_types"]["kto"]["dataset_types"] == ["unpaired_preference", "preference"]
    assert response["trainer_types"]["kto"]["hardware"] == ["cloud-run/l4", "cloud-run/moon", "fake/fake"]
    assert response["trainer_types"]["sft"]["modalities"] == ["text", "vision"]
    assert response["launchers"]["cloud-run"]["profiles"]["l4"]["price"]["usd_per_hour"] > 1
    assert response["launchers"]["cloud-run"]["profiles"]["moon"]["price"] is None
    assert (response["launchers"]["away"]["problem"], response["launchers"]["fake"]["problem"]) == ("it does not answer", None)
    assert response["default_hardware"] == "cloud-run/l4"
    assert {"score_model", "python", "json_schema"} <= set(response["graders"])
    assert response["trackers"] == ["wandb", "mlflow", "tensorboard", "trackio"]
    assert response["export"]["destinations"] == ["gcs", "hfhub"]
    assert response["methods"] == ["LoRA", "QLoRA", "Full"]
    assert response["export"]["formats"] == ["adapter", "merged", "onnx"]
    assert capabilities_response(LauncherPool([FakeLauncher()]))["export"]["formats"] == ["adapter", "merged"]  # type: ignore[index]


def raise_unavailable() -> dict[str, EnvironmentManifest]:
    raise Unavailable("it does not answer")
