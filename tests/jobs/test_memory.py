"""How a training uses the device's memory: measured peaks against their estimates, and the rows of a forward pass."""

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.llm.loss import LOGITS_CHUNK_BYTES
from jobs.llm.memory_planner import get_training_shape, read_base_shape
from jobs.llm.trainers.sft import SftTask, concatenates_rows
from jobs.llm.training_context import TrainingContext, prepare_training
from schema.estimate.llm_memory import CHUNK_BYTES
from schema.estimate.llm_plan import choose_rows_per_pass
from schema.training.llm_hyperparameters import SftHyperparameters
from tests.jobs.conftest import EventRecorder, FinishedTraining, make_context, make_spec


@pytest.mark.parametrize(
    ("base", "trainer_type", "hyperparameters"),
    [
        ("gemma3_text", "sft", {"batch_size": 4}),
        ("llama", "sft", {"batch_size": 4, "lora_dropout": 0.1}),
        ("qwen3", "sft", {"batch_size": 8, "gradient_checkpointing": True}),
        ("phi3", "dpo", {"batch_size": 1}),
    ],
)
def test_estimate_is_within_15_percent_of_the_measured_peak(
    base: str, trainer_type: str, hyperparameters: dict[str, Any], tmp_path: Path
) -> None:
    from bench.memory import TOLERANCE, Case, run_case

    outcome = run_case(Case(base, trainer_type, hyperparameters=hyperparameters, row_words=200), tmp_path)
    assert abs(outcome.error) <= TOLERANCE == 0.15, outcome


def test_live_tensors_count_views_once_and_forget_what_is_dropped() -> None:
    import torch

    from bench.live_tensors import LiveTensors

    with LiveTensors() as live:
        first = torch.zeros(1000)
        view = first[:10]
        second = first + 1
        assert live.live_bytes == 8000
        del first
        assert live.live_bytes == 8000  # the view keeps it
        del view, second
        assert live.live_bytes == 0
    assert live.peak_bytes == 8000


def test_coefficients_can_be_measured_again() -> None:
    from bench.activation_memory import measure_coefficients
    from schema.estimate.llm_activations import MEASURED

    measured, recorded = measure_coefficients("llama", "adapter_bf16"), MEASURED["llama", "adapter_bf16"]
    assert astuple(measured) == pytest.approx(astuple(recorded), abs=0.1)


def test_estimated_chunks_are_those_of_the_loss() -> None:
    assert {"cpu": CHUNK_BYTES[False], "cuda": CHUNK_BYTES[True]} == LOGITS_CHUNK_BYTES


# --- rows of a forward pass ---


@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=64).map(lambda tokens: sorted(tokens, reverse=True)),
    st.integers(1, 64),
    st.integers(1, 8),
    st.integers(0, 40_000),
)
def test_any_rows_fit_the_budget_and_the_step_keeps_its_rows(tokens: list[int], effective: int, max_world_size: int, budget: int) -> None:
    rows = choose_rows_per_pass(tokens, effective, max_world_size, budget)
    passes, remainder = divmod(effective, rows)
    assert remainder == 0
    assert rows == 1 or sum(tokens[:rows]) <= budget
    # As many processes as can share the step's rows evenly can share its forward passes evenly.
    world_size = max(count for count in range(1, max_world_size + 1) if effective % count == 0)
    assert passes % world_size == 0
    larger = [size for size in range(rows + 1, effective + 1) if effective % size == 0 and effective // size % world_size == 0]
    assert all(sum(tokens[:size]) > budget for size in larger)


@pytest.mark.parametrize(
    ("effective", "max_world_size", "budget", "rows"), [(8, 1, 8192, 8), (8, 1, 3000, 2), (8, 8, 8192, 1), (8, 3, 8192, 4), (8, 1, 10, 1)]
)
def test_rows_per_pass_follow_budget_and_processes(effective: int, max_world_size: int, budget: int, rows: int) -> None:
    assert choose_rows_per_pass([1000] * 8, effective, max_world_size, budget) == rows


@pytest.mark.parametrize(
    ("sent", "on_gpu", "packing_is_safe", "concatenated"),
    [
        ({}, True, True, True),
        ({}, False, True, False),
        ({}, True, False, False),
        ({"batch_size": 2}, True, True, False),
        ({"packing": False}, True, True, False),
        ({"batch_size": 2, "micro_batches": "auto"}, True, True, True),
        ({"micro_batches": "fixed"}, True, True, False),
        ({"packing": True, "use_fa2": True}, True, True, True),
        ({"packing": True}, True, True, False),
    ],
)
def test_rows_are_concatenated_by_default_on_a_gpu_only(
    sent: dict[str, Any], on_gpu: bool, packing_is_safe: bool, concatenated: bool
) -> None:
    hyperparameters = SftHyperparameters.model_validate(sent)
    assert concatenates_rows(hyperparameters, on_gpu=on_gpu, packing_is_safe=packing_is_safe) == concatenated
    stored = SftHyperparameters.model_validate_json(hyperparameters.model_dump_json())
    assert concatenates_rows(stored, on_gpu=on_gpu, packing_is_safe=packing_is_safe) == concatenated


def prepare(store: Path, workdir: Path, record: EventRecorder | None = None, **hyperparameters: Any) -> TrainingContext:
    """Prepare a training whose rows of a forward pass are chosen by the job."""
    spec = make_spec(store, held_out=[], hyperparameters={"micro_batches": "auto", "gradient_accumulation_steps": 4} | hyperparameters)
    return prepare_training(spec.training_config, make_context(spec, workdir, record))


def make_task(training: TrainingContext, *, concatenates: bool) -> SftTask:
    from jobs.llm.data.blocks import make_single_blocks
    from jobs.llm.data.cache import load_or_tokenize_split
    from jobs.llm.data.mixing import load_mixed
    from jobs.llm.data.splits import check_splits

    splits = load_mixed(training, lambda source: load_or_tokenize_split(source, source.dataset.dataset_type))
    rows, held_out = check_splits(training, splits)
    return SftTask(training, rows, held_out, make_single_blocks(rows), [], concatenates)


def test_concatenated_rows_get_the_largest_passes_that_fit(store: Path, tmp_path: Path) -> None:
    from jobs.llm.memory_planner import plan_memory

    record = EventRecorder()
    training = prepare(store, tmp_path, record)
    needs, plan = plan_memory(make_task(training, concatenates=True), training, 1)
    assert (plan.batch_config.batch_size, plan.batch_config.gradient_accumulation_steps) == (8, 1)
    assert needs.rows.concatenated
    assert record.decisions["batch_size"] == "8"
    assert record.decisions["gradient_checkpointing"] == "false"
    padded = plan_memory(make_task(training, concatenates=False), training, 1)[1]
    assert (padded.batch_config.batch_size, padded.batch_config.gradient_accumulation_steps) == (2, 4)


def test_little_memory_gives_gradient_checkpointing_and_then_single_rows(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.llm import memory_planner

    training = prepare(store, tmp_path)
    task = make_task(training, concatenates=True)
    monkeypatch.setattr(memory_planner, "measure_free_bytes", lambda _: 6e6)
    plan = memory_planner.plan_memory(task, training, 1)[1]
    assert (plan.batch_config.effective_batch_size, plan.gradient_checkpointing) == (8, True)
    monkeypatch.setattr(memory_planner, "measure_free_bytes", lambda _: 1e6)
    plan = memory_planner.plan_memory(task, training, 1)[1]
    assert (plan.batch_config.batch_size, plan.gradient_checkpointing) == (1, True)


def train_rows(store: Path, workdir: Path, *, concatenates: bool, **hyperparameters: Any) -> FinishedTraining:
    from jobs.llm.training_loop import run_training

    record = EventRecorder()
    training = prepare(store, workdir, record, learning_rate=1e-3, **hyperparameters)
    model = run_training(make_task(training, concatenates=concatenates), training)
    return FinishedTraining(model, record, workdir, training.context)


def test_concatenated_rows_train_as_padded_ones(store: Path, tmp_path: Path) -> None:
    concatenated = train_rows(store, tmp_path / "concatenated", concatenates=True)
    padded = train_rows(store, tmp_path / "padded", concatenates=False)
    assert (concatenated.record.decisions["batch_size"], "batch_size" in padded.record.decisions) == ("8", False)
    losses = [[point.values["loss"] or 0.0 for point in trained.record.points] for trained in (concatenated, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # sums in bf16 have another order
    assert concatenated.model.train_tokens == padded.model.train_tokens


def test_training_shape_follows_the_device(store: Path, tmp_path: Path) -> None:
    training = prepare(store, tmp_path)
    shape = get_training_shape(training)
    assert (shape.on_gpu, shape.lora_rank, shape.gradient_accumulation_steps) == (False, 4, 4)
    assert read_base_shape(training.base_folder).model_type == "gemma3_text"
