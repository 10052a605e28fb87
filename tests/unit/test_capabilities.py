"""What is refused before any compute is spent, and in which words."""

from typing import Any

import pytest

from schema.dataset import Dataset
from schema.training import TRAINER_TYPES, TRAINING_CONFIG, TrainingConfig
from service.adapters.launchers.cloud_run import PROFILES
from service.adapters.launchers.local import hardware_of
from service.core.bases import known_base
from service.core.capabilities import check_fits, check_supported, describe
from service.core.errors import InvalidRequest, Unsupported
from tests.factories import a_dataset, a_grpo_config, some_hardware

GEMMA = "google/gemma-3-270m"
GATE = {"metric": "perplexity", "at_most": 0.9, "relative_to_base": True}


def a_config(**changes: Any) -> TrainingConfig:
    return TRAINING_CONFIG.validate_python({"base_model_id": GEMMA} | changes)


def without_eval(**changes: Any) -> Dataset:
    return a_dataset(splits={"train": a_dataset().splits["train"]}, **changes)


def refusal(config: TrainingConfig, dataset: Dataset) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        check_fits(config, dataset)
    return refused.value


# --- the dataset -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer_type", TRAINER_TYPES)
@pytest.mark.parametrize("dataset_type", ["messages", "prompt_completion", "text", "preference", "unpaired_preference", "prompt"])
def test_a_trainer_takes_the_rows_it_learns_from_and_refuses_others(trainer_type: str, dataset_type: Any) -> None:
    config = a_grpo_config({"type": "format", "name": "form"}) if trainer_type == "grpo" else a_config(trainer_type=trainer_type)
    dataset = a_dataset(dataset_type=dataset_type)
    if dataset_type in TRAINER_TYPES[trainer_type].dataset_types:
        check_fits(config, dataset)
        return
    refused = refusal(config, dataset)
    assert refused.param == "processed_dataset_id"
    assert dataset_type in refused.hint  # which trainer would do
    assert all(known in refused.message for known in (trainer_type, dataset_type, config.dataset_types[0]))


@pytest.mark.parametrize(
    ("changes", "images", "words"),
    [
        ({"modality": "text"}, 3, "has 3 images"),
        ({"modality": "vision", "base_model_id": "google/gemma-3-4b-it"}, 0, "has none"),
        ({"modality": "vision"}, 3, "text model"),
        ({"modality": "vision", "base_model_id": "unsloth/gemma-3-1b-it-qat"}, 3, "text model"),
    ],
)
def test_images_and_models_that_cannot_see_them_do_not_meet(changes: dict[str, Any], images: int, words: str) -> None:
    refused = refusal(a_config(**changes), a_dataset(images=images))
    assert refused.param == "training_config.modality"
    assert words in refused.message
    assert refused.hint


@pytest.mark.parametrize("base", ["google/gemma-3-4b-it", "somebody/something-new"])
def test_images_meet_a_model_that_sees_or_may_see(base: str) -> None:
    check_fits(a_config(modality="vision", base_model_id=base), a_dataset(images=1))


@pytest.mark.parametrize(
    ("dataset", "known"),
    [
        (a_dataset(dataset_type="prompt", columns=("solution", "level")), "solution, level"),
        (a_dataset(dataset_type="prompt"), "none beside the prompt"),
        (a_dataset(dataset_type="prompt_completion"), "completion"),
    ],
)
def test_a_grader_reads_a_column_that_there_is(dataset: Dataset, known: str) -> None:
    form, right = {"type": "format", "name": "form"}, {"type": "numeric_accuracy", "name": "right"}
    refused = refusal(a_grpo_config(form, right), dataset)
    assert refused.param == "training_config.reward_config.1.reference_field"
    assert "grader 'right' reads the column 'answer'" in refused.message
    assert refused.message.endswith(f"have: {known}")


def test_a_judge_is_told_of_columns_that_there_are() -> None:
    judge = {"type": "score_model", "name": "judge", "base_url": "https://j.example", "model": "m"}
    dataset = a_dataset(dataset_type="prompt", columns=("solution",))
    check_fits(a_grpo_config(judge | {"prompt": "{{prompt}} {{completion}} {{solution}} {{ level }}"}), dataset)
    refused = refusal(a_grpo_config(judge | {"prompt": "{{prompt}} {{level}}"}), dataset)
    assert refused.param == "training_config.reward_config.0.prompt"
    assert "'level'" in refused.message


def test_graders_that_find_their_columns_are_accepted() -> None:
    right = {"type": "numeric_accuracy", "name": "right", "reference_field": "solution"}
    schema = {"type": "json_schema", "name": "shape", "json_schema": {}}
    check_fits(a_grpo_config(right, schema), a_dataset(dataset_type="prompt", columns=("solution",)))
    check_fits(a_grpo_config(right | {"reference_field": "completion"}), a_dataset(dataset_type="prompt_completion"))


# --- the base --------------------------------------------------------------------------------------------------------


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
def test_a_base_is_known_by_its_name(name: str, width: int | None) -> None:
    base = known_base(name)
    assert (base.width if base else None) == width


def test_a_rank_above_the_width_is_refused_where_the_width_is_known() -> None:
    refused = refusal(a_config(hyperparameters={"lora_rank": 641}), a_dataset())
    assert (refused.param, "at most 640" in refused.hint) == ("training_config.hyperparameters.lora_rank", True)
    check_fits(a_config(hyperparameters={"lora_rank": 640}), a_dataset())
    check_fits(a_config(base_model_id="somebody/small", hyperparameters={"lora_rank": 1024}), a_dataset())


# --- the evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"eval_strategy": "steps"}, "eval_strategy"),
        ({"eval_strategy": "epoch", "early_stopping_patience": 2}, "eval_strategy"),
        ({"eval_strategy": "epoch", "load_best_model_at_end": True}, "eval_strategy"),
        ({"compute_eval_metrics": True}, "compute_eval_metrics"),
        ({"promotion_gate": [GATE]}, "promotion_gate"),
    ],
)
def test_what_is_measured_on_held_out_rows_needs_some(wanted: dict[str, Any], field: str) -> None:
    refused = refusal(a_config(eval_config=wanted), without_eval())
    assert refused.param == f"training_config.eval_config.{field}"
    assert "eval_fraction" in refused.hint
    check_fits(a_config(eval_config=wanted), a_dataset())


@pytest.mark.parametrize(
    ("metric", "wanted", "needs"),
    [
        ("accuracy", {}, "compute_eval_metrics"),
        ("rouge_l", {}, "compute_eval_metrics"),
        ("lm_eval/arc_easy/acc", {}, "arc_easy"),
        ("lm_eval/arc_easy/acc", {"lm_eval_tasks": ["arc"]}, "arc_easy"),
    ],
)
def test_a_gate_on_what_is_not_measured_is_refused(metric: str, wanted: dict[str, Any], needs: str) -> None:
    config = a_config(eval_config=wanted | {"promotion_gate": [GATE, {"metric": metric, "at_least": 0.5}]})
    refused = refusal(config, a_dataset())
    assert refused.param == "training_config.eval_config.promotion_gate.1.metric"
    assert needs in refused.hint


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [
        ("eval_loss", {}),
        ("rewards/accuracies", {}),
        ("exact_match", {"compute_eval_metrics": True}),
        ("lm_eval/arc_easy/acc", {"lm_eval_tasks": ["arc_easy"]}),
    ],
)
def test_a_gate_on_what_is_or_may_be_measured_is_accepted(metric: str, wanted: dict[str, Any]) -> None:
    check_fits(a_config(eval_config=wanted | {"promotion_gate": [{"metric": metric, "at_least": 0.5}]}), a_dataset())


def test_a_gate_on_public_tasks_alone_needs_no_held_out_rows() -> None:
    wanted = {"lm_eval_tasks": ["arc_easy"], "promotion_gate": [{"metric": "lm_eval/arc_easy/acc", "at_least": 0.5}]}
    check_fits(a_config(eval_config=wanted), without_eval())


# --- the hardware ----------------------------------------------------------------------------------------------------


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
def test_what_the_trainers_environment_lacks_is_refused_with_the_reason(changes: dict[str, Any], param: str, note: str) -> None:
    bare = hardware_of({"device": "cpu", "device_name": "a processor", "packages": {"torch": "2"}})
    with pytest.raises(Unsupported) as refused:
        check_supported(a_config(**changes), bare)
    assert refused.value.param == f"training_config.{param}"
    assert note in refused.value.hint
    packages = dict.fromkeys(("bitsandbytes", "unsloth", "onnx", "lm_eval"), "1.0")
    rich = hardware_of({"device": "cuda", "gguf": True, "flash_attention_2": True, "packages": packages})
    check_supported(a_config(**changes), rich)
    assert rich.notes == {}


def test_unsloth_on_a_gpu_without_it_says_so() -> None:
    assert hardware_of({"device": "cuda"}).notes["provider"].startswith("unsloth is not installed")
    assert hardware_of({"device": "cpu", "packages": {"unsloth": "1"}}).providers == ("huggingface",)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_every_profile_in_the_cloud_trains_everything_but_with_unsloth(profile: Any) -> None:
    facts = profile.hardware
    for trainer_type in TRAINER_TYPES:
        config = a_grpo_config() if trainer_type == "grpo" else a_config(trainer_type=trainer_type, method="QLoRA")
        check_supported(config, facts)
    with pytest.raises(Unsupported) as refused:
        check_supported(a_config(provider="unsloth"), facts)
    assert "not in the image" in refused.value.hint


def test_capabilities_tell_what_a_request_may_say() -> None:
    told: Any = describe({"local": some_hardware(methods=("LoRA", "QLoRA", "Full"))}, "local")
    assert told["trainer_types"]["kto"] == {"dataset_types": ["unpaired_preference", "preference"], "modalities": ["text"]}
    assert told["trainer_types"]["sft"]["modalities"] == ["text", "vision"]
    assert {"score_model", "python", "json_schema"} <= set(told["graders"])
    assert told["trackers"] == ["wandb", "mlflow", "tensorboard", "trackio"]
    assert told["export"]["destinations"] == ["gcs", "hfhub"]
    assert told["export"]["formats"] == ["adapter", "merged"]
    assert told["methods"] == ["LoRA", "QLoRA", "Full"]
    assert "onnx" in describe({"local": some_hardware(onnx=True)}, "local")["export"]["formats"]  # type: ignore[index]
