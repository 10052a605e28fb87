"""Validation against dataset, base model and hardware before anything is launched, and its error messages."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schema.capabilities import EnvironmentManifest, FamilyCapabilities
from schema.dataset import Dataset
from schema.training import TRAINER_TYPES, TRAINING_CONFIG, TrainingConfig
from service.api.capabilities import capabilities_response
from service.core.errors import InvalidRequest, Unavailable, Unsupported
from service.core.launchers import LauncherPool
from service.core.validation.chat_template import check_chat_template
from service.core.validation.known_models import KNOWN_MODELS, find_known_model, is_stateful_name
from service.core.validation.llm import check_dataset_compatible
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


# --- how rows become text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer_type", "dataset_type", "prompt_form"),
    [
        ("sft", "messages", None),
        ("sft", "messages", "messages"),
        ("sft", "prompt_completion", "messages"),
        ("dpo", "preference", "messages"),
    ],
)
def test_raw_format_of_messages_is_rejected(trainer_type: str, dataset_type: Any, prompt_form: Any) -> None:
    dataset = make_dataset(dataset_type=dataset_type, prompt_form=prompt_form)
    error = get_validation_error(make_config(trainer_type=trainer_type, prompt_format="raw"), dataset)
    assert error.param == "training_config.prompt_format"
    assert "are lists of messages" in error.message
    check_dataset_compatible(make_config(trainer_type=trainer_type, prompt_format="chat"), dataset)


@pytest.mark.parametrize(
    ("dataset_type", "prompt_form"), [("text", "strings"), ("prompt_completion", "strings"), ("prompt_completion", None)]
)
def test_raw_format_of_strings_is_accepted(dataset_type: Any, prompt_form: Any) -> None:
    check_dataset_compatible(make_config(prompt_format="raw"), make_dataset(dataset_type=dataset_type, prompt_form=prompt_form))


@pytest.mark.parametrize("field", ["train_on_inputs", "last_turn_only"])
def test_choice_of_learned_messages_needs_messages_without_weights(field: str) -> None:
    config = make_config(**{field: True})
    check_dataset_compatible(config, make_dataset())
    for dataset, reason in ((make_dataset(dataset_type="text"), "are texts"), (make_dataset(has_weights=True), "overrule the weights")):
        error = get_validation_error(config, dataset)
        assert (error.param, reason in error.message) == (f"training_config.{field}", True)
        assert field in error.hint
        check_dataset_compatible(make_config(), dataset)


def test_rows_with_tools_are_not_for_vision() -> None:
    config = make_config(modality="vision", base_model_id="google/gemma-3-4b-it")
    assert get_validation_error(config, make_dataset(has_tools=True)).param == "training_config.modality"
    check_dataset_compatible(make_config(), make_dataset(has_tools=True))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt_format": "raw", "chat_template": "x"}, "chat_template"),
        ({"prompt_format": "raw", "modality": "vision"}, "prompt_format"),
        ({"chat_template": "x", "modality": "vision"}, "chat_template"),
        ({"train_on_inputs": True, "last_turn_only": True}, "last_turn_only"),
        ({"prompt_format": "raw", "train_on_inputs": True}, "train_on_inputs"),
        ({"prompt_format": "raw", "last_turn_only": True}, "last_turn_only"),
    ],
)
def test_fields_that_contradict_each_other_are_rejected(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as excinfo:
        make_config(**changes)
    (error,) = excinfo.value.errors()
    assert (error["type"], error["ctx"]["field"]) == ("fields_conflict", field)  # type: ignore[typeddict-item]  # the error has a context


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
        "{%- for m in messages %}{% if loop.first %}{% continue %}{% else %}{% break %}{% endif %}{% endfor %}",
        "{{ 2 ** 99999999 }}{{ 'a' * 999999999 }}",
    ],
)
def test_chat_template_is_parsed_and_never_run(template: str) -> None:
    check_dataset_compatible(make_config(chat_template=template), make_dataset())


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m }}", "line 1: Unexpected end of template"),
        ("ok\n{{ m.content", "line 2: "),
        ("{% unknown %}", "line 1: Encountered unknown tag 'unknown'."),
        ("{% generation %}x", "line 1: "),
        ("{{" + "(" * 100_000, "nested too deeply"),
        ("{% if a %}" * 20_000, "nested too deeply"),
        ("{{ " + "1" * 10_000 + " }}", "a number that is too long"),
    ],
    ids=range(7),
)
def test_chat_template_with_bad_syntax_is_rejected(template: str, reason: str) -> None:
    error = get_validation_error(make_config(chat_template=template), make_dataset())
    assert error.param == "training_config.chat_template"
    assert reason in error.message
    assert len(error.message) < 300


@settings(max_examples=150, deadline=None, database=None)
@given(
    st.lists(st.sampled_from([*"{}%#()[]|.,:='1ax-+~", "{{", "}}", "{%", "%}", " for ", " in ", " if ", "endif", "raw", " set ", "macro"]))
)
def test_any_chat_template_is_accepted_or_rejected_cleanly(pieces: list[str]) -> None:
    try:
        check_chat_template("".join(pieces))
    except InvalidRequest as error:
        assert error.message.isprintable()


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
        ("google/gemma-2-2b-it", 2304),
        ("google/gemma-2b", 2048),
        ("google/gemma-3n-E4B-it", 2048),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", 4096),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", 2048),
        ("Qwen/Qwen3-4B-Instruct-2507", 2560),
        ("Qwen/Qwen2.5-Coder-7B", 3584),
        ("microsoft/phi-4", 5120),
        ("microsoft/Phi-4-mini-instruct", 3072),
        ("microsoft/Phi-4-multimodal-instruct", None),
        ("Qwen/Qwen3-40B", None),
    ],
)
def test_known_base_model_is_recognized_by_name(name: str, width: int | None) -> None:
    base = find_known_model(name)
    assert (base.hidden_size if base else None) == width


def test_known_names_are_lower_case_and_none_hides_another() -> None:
    assert [base.name for base in KNOWN_MODELS if base != find_known_model(f"somebody/{base.name.upper()}-x")] == []


@pytest.mark.parametrize(
    ("name", "message"), [("microsoft/phi-4", "is a text model"), ("Qwen/Qwen2.5-VL-7B-Instruct", "images that this trainer does not know")]
)
def test_images_with_other_known_model_are_rejected(name: str, message: str) -> None:
    error = get_validation_error(make_config(modality="vision", base_model_id=name), make_dataset(images=1))
    assert (error.param, message in error.message) == ("training_config.modality", True)
    assert "google/gemma-3-4b-it" in error.hint


@pytest.mark.parametrize(
    "name",
    [
        "LiquidAI/LFM2-1.2B",
        "LiquidAI/LFM2.5-1.2B-Instruct",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "Qwen/Qwen3.5-27B",
        "state-spaces/mamba-2.8b-hf",
        "tiiuae/falcon-mamba-7b",
        "tiiuae/Falcon-H1-1.5B-Deep-Instruct",
        "ibm-granite/granite-4.0-h-tiny",
        "ai21labs/AI21-Jamba-Mini-1.7",
        "Zyphra/Zamba2-2.7B",
        "RWKV/rwkv-4-169m-pile",
        "ibm-fms/Bamba-9B",
        "nvidia/Nemotron-H-8B-Base-8K",
        "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    ],
)
def test_packing_of_rows_that_would_share_a_state_is_rejected(name: str) -> None:
    error = get_validation_error(make_config(base_model_id=name, hyperparameters={"packing": True}), make_dataset())
    assert (error.param, error.hint) == ("training_config.hyperparameters.packing", "set packing to false")
    check_dataset_compatible(make_config(base_model_id=name), make_dataset())


@pytest.mark.parametrize(
    "name", ["google/gemma-3-1b-it", "ibm-granite/granite-4.0-micro", "nvidia/Llama-3.1-Nemotron-Nano-8B-v1", "a/alfm2b"]
)
def test_packing_of_other_models_is_accepted(name: str) -> None:
    assert not is_stateful_name(name)
    check_dataset_compatible(make_config(base_model_id=name, hyperparameters={"packing": True}), make_dataset())


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
        ({"hyperparameters": {"optim": "paged_adamw_8bit"}}, "hyperparameters.optim", "adamw_torch"),
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
    check_environment(make_config(**large), make_manifest(COMPLETE), replace(l4, gpus=8))  # sharded
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
