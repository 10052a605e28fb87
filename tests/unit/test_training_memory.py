"""Estimates of the memory of training: what they depend on, token budgets, and trainings that cannot fit."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.estimate.llm_activations import MEASURED, WAYS_TO_TRAIN
from schema.estimate.llm_memory import (
    DEFAULT_MIXTURE_MODEL_TYPE,
    DEFAULT_MODEL_TYPE,
    BatchShape,
    TrainingShape,
    estimate_training_bytes,
    explain_misfit,
    find_activation_bytes,
    find_longest_rows,
    find_token_budget,
)
from schema.estimate.llm_models import KNOWN_MODELS, find_known_shape
from schema.estimate.llm_shapes import ModelShape, read_model_shape

GEMMA_1B: ModelShape = find_known_shape("google/gemma-3-1b-it")  # type: ignore[assignment]
LORA = TrainingShape("sft", "LoRA", 2, 1024)


def needed_bytes(training: TrainingShape = LORA, model: ModelShape = GEMMA_1B, **options: Any) -> float:
    return estimate_training_bytes(model, training, **options)


def test_every_architecture_was_measured_in_every_way() -> None:
    model_types = {model_type for model_type, _ in MEASURED}
    assert {DEFAULT_MODEL_TYPE, DEFAULT_MIXTURE_MODEL_TYPE} <= model_types
    assert MEASURED.keys() == {(model_type, way) for model_type in model_types for way in WAYS_TO_TRAIN}


def test_unknown_architecture_gets_the_documented_default() -> None:
    for experts, default in ((0, DEFAULT_MODEL_TYPE), (4, DEFAULT_MIXTURE_MODEL_TYPE)):
        model = replace(GEMMA_1B, model_type="new", experts_per_token=experts)
        assert find_activation_bytes(model, "adapter_bf16") == MEASURED[default, "adapter_bf16"]


def test_default_coefficients_are_not_below_those_of_dense_architectures_without_own_layers() -> None:
    sizes = {
        model_type: needed_bytes(model=replace(GEMMA_1B, model_type=model_type))
        for model_type in ("llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma")
    }
    assert max(sizes.values()) <= needed_bytes(model=replace(GEMMA_1B, model_type="new"))


@pytest.mark.parametrize(
    ("larger", "smaller"),
    [
        (replace(LORA, batch_size=4), LORA),
        (replace(LORA, max_seq_length=2048), LORA),
        (replace(LORA, has_dropout=True), LORA),
        (replace(LORA, lora_rank=64), LORA),
        (replace(LORA, method="Full"), LORA),
        (LORA, replace(LORA, method="QLoRA")),
        (LORA, replace(LORA, batch=BatchShape(2, 100, 200))),
        (replace(LORA, trainer_type="dpo"), LORA),
        (replace(LORA, trainer_type="orpo"), replace(LORA, trainer_type="dpo")),
        (replace(LORA, method="Full"), replace(LORA, method="Full", optimizer="adamw_8bit")),
        (replace(LORA, method="Full", trainer_type="dpo"), replace(LORA, method="Full", trainer_type="reward")),
        (replace(LORA, train_vision_tower=True), LORA),
        (replace(LORA, computes_bf16=False), LORA),
        (replace(LORA, method="Full", gradient_accumulation_steps=2), replace(LORA, method="Full")),
    ],
)
def test_memory_grows_with_what_takes_memory(larger: TrainingShape, smaller: TrainingShape) -> None:
    assert needed_bytes(larger) > needed_bytes(smaller)


def test_gradient_checkpointing_saves_most_of_the_activations() -> None:
    long = replace(LORA, batch_size=8, max_seq_length=2048)
    assert needed_bytes(long, gradient_checkpointing=True) < needed_bytes(long) / 4


@pytest.mark.parametrize(("method", "state_bytes"), [("Full", 4 + 2 + 8 + 4), ("LoRA", 2)])
def test_shards_divide_weights_gradients_and_optimizer_state(method: str, state_bytes: int) -> None:
    model = read_model_shape({"hidden_size": 3840, "num_hidden_layers": 48, "vocab_size": 262_208}, 24_000_000_000)
    training = TrainingShape("sft", method, 1, 64, gradient_accumulation_steps=4, lora_rank=1)
    sizes = [needed_bytes(training, model, gradient_checkpointing=True, num_shards=count) for count in (1, 2, 4, 8)]
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[1] - sizes[3] == pytest.approx(state_bytes * 12e9 * (1 / 2 - 1 / 8), rel=0.01)


def test_stored_precision_gives_the_number_of_weights() -> None:
    assert read_model_shape({"dtype": "float32"}, 4_000_000).parameters == 1e6
    assert read_model_shape({"torch_dtype": "bfloat16"}, 2_000_000).parameters == 1e6
    assert read_model_shape({}, 2_000_000).parameters == 1e6


def test_config_with_unusual_values_gets_defaults() -> None:
    strange = {"hidden_size": None, "num_hidden_layers": "12", "vocab_size": -1, "text_config": [], "num_experts_per_tok": None}
    assert read_model_shape(strange, 10) == read_model_shape({}, 10)


def test_mixture_of_experts_counts_the_experts_of_a_token() -> None:
    config = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128}
    assert read_model_shape(config, 0).active_intermediate_size == 8 * 768
    assert read_model_shape(config | {"n_shared_experts": 1}, 0).active_intermediate_size == 9 * 768


# --- rows ---


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 5000)), max_size=60), st.integers(1, 20))
def test_longest_rows_are_found(rows: list[tuple[int, int]], count: int) -> None:
    longest = find_longest_rows(iter(rows), count)
    assert list(longest.tokens) == sorted((tokens for tokens, _ in rows), reverse=True)[:count]
    assert list(longest.labels) == sorted((labels for _, labels in rows), reverse=True)[:count]


def test_largest_batch_is_padded_or_concatenated() -> None:
    rows = find_longest_rows([(10, 4), (30, 2), (20, 9)], 3)
    assert rows.largest_batch(2) == BatchShape(2, 30, 13)
    assert replace(rows, concatenated=True).largest_batch(2) == BatchShape(1, 50, 13)
    assert replace(rows, sequences_per_row=2).largest_batch(2) == BatchShape(4, 30, 13)
    assert rows.largest_batch(8) == BatchShape(3, 30, 15)


@given(st.floats(1e9, 2e11), st.booleans(), st.sampled_from(["Full", "LoRA", "QLoRA"]))
def test_token_budget_is_the_largest_that_fits(available: float, checkpointing: bool, method: str) -> None:
    training = replace(LORA, method=method)
    budget = find_token_budget(GEMMA_1B, training, available, gradient_checkpointing=checkpointing)
    sizes = [
        needed_bytes(replace(training, batch=BatchShape(1, tokens, tokens)), gradient_checkpointing=checkpointing)
        for tokens in (budget, budget + 1)
    ]
    assert budget == 0 or sizes[0] <= available
    assert sizes[1] > available


# --- what cannot fit ---


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_models_have_about_as_many_weights_as_their_sizes_make(name: str) -> None:
    model = find_known_shape(f"someone/{name}-instruct")
    assert model is not None
    attention = 2 * model.hidden_size * (model.query_size + model.key_value_size)
    layer = attention + 3 * model.hidden_size * model.active_intermediate_size
    assert model.layers * layer + model.embedding_parameters == pytest.approx(model.parameters, rel=0.12)  # 4B has a vision tower too


def test_models_are_found_by_the_beginning_of_their_names() -> None:
    assert find_known_shape("meta-llama/Meta-Llama-3.1-8B-Instruct") == find_known_shape("copy/llama-3.1-8b")
    assert find_known_shape("google/gemma-3-1") is None
    assert find_known_shape("google/gemma-3-12b-it") != find_known_shape("google/gemma-3-1b")
    assert find_known_shape("Qwen/Qwen3-4B-Base") is not None
    assert find_known_shape("Qwen/Qwen3-42B") is None


def test_training_that_cannot_fit_is_explained() -> None:
    gemma_27b = find_known_shape("google/gemma-3-27b-it")
    assert gemma_27b is not None
    full = replace(LORA, method="Full")
    problem = explain_misfit(gemma_27b, full, 24e9, device="a GPU of l4", methods=("LoRA", "QLoRA", "Full"))
    assert problem == "method Full needs at least 493 GB, and a GPU of l4 has 24 GB; method QLoRA would fit"
    assert explain_misfit(gemma_27b, replace(LORA, method="QLoRA"), 24e9, device="x", methods=()) is None
    assert explain_misfit(gemma_27b, full, 80e9, device="x", methods=(), num_shards=8) is None
    nothing = explain_misfit(gemma_27b, full, 8e9, device="a GPU of t4", methods=("LoRA", "QLoRA"))
    assert nothing is not None
    assert nothing.endswith("use a smaller base model or a larger device")
