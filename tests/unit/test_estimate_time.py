"""Estimates of steps, tokens, time and price are ranges that grow with the work, and never negative."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.estimate.devices import GPUS, KNOWN_GPUS, UNKNOWN_GPU, Device, find_gpu, make_cpu
from schema.estimate.llm_export import ExportPlan, estimate_export_memory, estimate_gguf_bytes, explain_impossible_export, plan_artifacts
from schema.estimate.llm_memory import LongestRows, TrainingShape
from schema.estimate.llm_models import KNOWN_MODELS, find_known_shape
from schema.estimate.llm_plan import PassPlan, TrainingNeeds, find_fitting_plan
from schema.estimate.llm_shapes import ModelShape
from schema.estimate.llm_steps import choose_grpo_accumulation, plan_grpo_steps, plan_steps
from schema.estimate.llm_time import Work, estimate_evaluation, estimate_generation, estimate_training
from schema.estimate.prices import PRICES, Price, bill_usd, estimate_usd
from schema.estimate.ranges import NOTHING, Range, sum_ranges
from schema.estimate.row_lengths import RowLengths, guess_lengths, merge_lengths, read_histogram

GEMMA: ModelShape = find_known_shape("google/gemma-3-1b-it")  # type: ignore[assignment]
LLAMA: ModelShape = find_known_shape("meta-llama/Llama-3.1-8B")  # type: ignore[assignment]
CPU = make_cpu("a processor", 2, 16 << 30, has_bf16=True)
DEVICES = (*KNOWN_GPUS, UNKNOWN_GPU, CPU)

devices = st.sampled_from(DEVICES)
models = st.sampled_from([shape for name in KNOWN_MODELS if (shape := find_known_shape(name))])
lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=80)


def make_lengths(tokens: list[int], top: int = 64) -> RowLengths:
    """Lengths as a tokenizer's histogram tells them."""
    histogram: dict[int, int] = {}
    for length in tokens:
        bound = next(size for n in range(20) for size in (1 << n, 3 << max(0, n - 1)) if size >= length)
        histogram[bound] = histogram.get(bound, 0) + 1
    return read_histogram(sorted(histogram.items()), sum(tokens), sorted(tokens, reverse=True)[:top], exact=True)


# --- rows ---


@given(lengths)
def test_rows_and_tokens_of_a_histogram_are_those_that_were_counted(tokens: list[int]) -> None:
    rows = make_lengths(tokens)
    assert (rows.rows, rows.longest) == (len(tokens), max(tokens))
    assert rows.tokens == pytest.approx(sum(tokens), rel=0.02, abs=len(tokens))


@given(lengths, st.integers(1, 6000))
def test_truncation_counts_the_longer_rows(tokens: list[int], max_length: int) -> None:
    rows = make_lengths(tokens, top=len(tokens))
    assert rows.count_longer(max_length) == sum(length > max_length for length in tokens)
    assert rows.truncate(max_length).tokens <= min(rows.tokens, max_length * len(tokens)) + 1e-6


def test_rows_that_are_cut_are_not_exact() -> None:
    rows = make_lengths([10, 100, 1000])
    assert rows.truncate(1000).exact
    assert not rows.truncate(999).exact


@given(lengths, st.integers(1, 16))
def test_padding_adds_tokens_and_at_most_makes_all_rows_the_longest(tokens: list[int], batch: int) -> None:
    rows = make_lengths(tokens)
    padded = rows.pad(batch)
    assert rows.tokens <= padded <= rows.rows * max(size for size, _ in rows.buckets) + 1e-6
    assert padded <= rows.pad(batch + 1) + 1e-6


@given(lengths, st.integers(64, 8192))
def test_packed_blocks_hold_all_tokens_and_are_not_more_than_the_rows(tokens: list[int], max_length: int) -> None:
    rows = make_lengths(tokens)
    blocks = rows.pack(max_length)
    assert rows.truncate(max_length).tokens / max_length <= blocks <= rows.rows


def test_packing_is_close_to_what_the_trainer_packs() -> None:
    rng = random.Random(1)
    tokens = [min(1000, max(5, round(rng.lognormvariate(4.5, 0.7)))) for _ in range(2000)]
    estimated, free = make_lengths(tokens).pack(1024), []
    for length in sorted(tokens, reverse=True):  # best fit, longest first
        fitting = [n for n, left in enumerate(free) if left >= length]
        if fitting:
            best = min(fitting, key=lambda n: free[n])
            free[best] -= length
        else:
            free.append(1024 - length)
    assert estimated == pytest.approx(len(free), rel=0.05)


@given(st.integers(1, 100_000), st.floats(0, 1e9))
def test_guessed_lengths_have_all_rows_and_their_tokens(rows: int, characters: float) -> None:
    guessed = guess_lengths(rows, characters)
    assert guessed.rows == rows
    assert not guessed.exact
    assert guessed.tokens > 0


@given(lengths, st.integers(0, 5000))
def test_resized_rows_have_that_number(tokens: list[int], rows: int) -> None:
    assert make_lengths(tokens).resize(rows).rows == rows


def test_merged_rows_know_their_longest_only_where_each_part_does() -> None:
    long, short = make_lengths([500] * 10, top=2), make_lengths([100] * 3)
    merged = merge_lengths([long, short])
    assert (merged.rows, merged.longest) == (13, 500)
    assert merged.top == (500, 500)  # whether a row of 100 tokens comes next is not known


# --- steps ---


@given(st.integers(1, 2000), st.integers(1, 8), st.integers(1, 8), st.integers(1, 5))
def test_steps_are_those_of_the_trainer(rows: int, batch: int, accumulation: int, epochs: int) -> None:
    steps = plan_steps(
        make_lengths([50] * rows),
        batch_size=batch,
        accumulation_steps=accumulation,
        epochs=epochs,
        max_steps=-1,
        packing=None,
        trainer_type="sft",
    )
    assert steps.total_steps == epochs * -(-rows // (batch * accumulation))
    assert steps.total_tokens == pytest.approx(50 * rows * epochs, rel=0.01)
    assert steps.exact


def test_max_steps_counts_the_rows_of_its_steps_only() -> None:
    lengths = make_lengths([50] * 10)
    steps = plan_steps(lengths, batch_size=2, accumulation_steps=2, epochs=3, max_steps=4, packing=None, trainer_type="sft")
    assert (steps.steps_per_epoch, steps.total_steps) == (3, 4)
    assert steps.total_examples == 14  # an epoch of 4, 4 and 2 rows, and 4 of the next


def test_pairs_are_two_sequences() -> None:
    lengths = make_lengths([50] * 10)
    single, pair = (
        plan_steps(lengths, batch_size=1, accumulation_steps=1, epochs=1, max_steps=-1, packing=None, trainer_type=name)
        for name in ("sft", "dpo")
    )
    assert pair.total_tokens == 2 * single.total_tokens


def test_grpo_leaves_out_prompts_that_fill_no_step() -> None:
    steps = plan_grpo_steps(
        make_lengths([20] * 10),
        batch_size=8,
        accumulation_steps=4,
        epochs=1,
        max_steps=-1,
        num_generations=8,
        num_iterations=2,
        completion_tokens=100,
        on_gpu=True,
    )
    assert steps.total_steps == 10 // 4 * 2
    assert steps.tokens_per_example == pytest.approx(120, rel=0.1)


@given(st.integers(1, 32), st.integers(2, 32), st.integers(1, 20))
def test_grpo_steps_have_whole_groups(batch: int, generations: int, prompts: int) -> None:
    assert batch * choose_grpo_accumulation(batch, generations, prompts) % generations == 0


# --- time ---


def is_range(value: Range) -> bool:
    return 0 <= value.low <= value.high


works = st.builds(
    Work,
    trainer_type=st.sampled_from(["sft", "dpo", "kto", "orpo", "reward", "grpo"]),
    method=st.sampled_from(["LoRA", "QLoRA", "Full"]),
    tokens=st.floats(0, 1e10),
    passes=st.floats(0, 1e6),
    gradient_checkpointing=st.booleans(),
    steps=st.integers(0, 100_000),
    generated_batches=st.floats(0, 1000),
    generated_tokens=st.integers(0, 1000),
    generation_batch=st.integers(1, 64),
)


@given(models, devices, works)
def test_training_time_is_a_range_that_grows_with_the_work(model: ModelShape, device: Device, work: Work) -> None:
    seconds = estimate_training(model, device, work)
    assert is_range(seconds)
    for larger in (
        replace(work, tokens=work.tokens * 2),
        replace(work, passes=work.passes + 1),
        replace(work, gradient_checkpointing=True),
        replace(work, steps=work.steps + 1),
    ):
        more = estimate_training(model, device, larger)
        assert more.low >= seconds.low
        assert more.high >= seconds.high


@given(models, devices, st.floats(0, 1e7), st.integers(1, 1000), st.integers(0, 64), st.integers(1, 512), st.integers(1, 16))
def test_evaluation_time_is_a_range(
    model: ModelShape, device: Device, tokens: float, rows: int, prompts: int, new_tokens: int, batch: int
) -> None:
    seconds = estimate_evaluation(model, device, tokens=tokens, rows=rows, prompts=prompts, new_tokens=new_tokens, batch=batch)
    assert is_range(seconds)
    assert is_range(estimate_generation(model, device, batch, new_tokens))


def test_faster_hardware_takes_less_time() -> None:
    work = Work("sft", "LoRA", 1e8, 1e4, steps=1000)
    times = {device.name: estimate_training(GEMMA, device, work).high for device in DEVICES}
    assert times["NVIDIA H100, 80 GB"] < times["NVIDIA L4, 24 GB"] < times["NVIDIA T4, 16 GB"] < times["a processor"]


def test_full_training_takes_longer_than_an_adapter() -> None:
    times = {method: estimate_training(GEMMA, CPU, Work("sft", method, 1e6, 100, steps=10)) for method in ("LoRA", "Full")}
    assert times["Full"].low > times["LoRA"].low


def test_gpu_is_known_by_its_name_and_keeps_the_memory_that_it_has() -> None:
    assert find_gpu("NVIDIA H200", 141 << 30).flop_per_s == dict(GPUS)["H200"].flop_per_s
    assert find_gpu("NVIDIA L40S", None).memory_bytes == 48 << 30
    assert find_gpu("NVIDIA L4", None).memory_bytes == 24 << 30
    unknown = find_gpu("AMD Instinct", 10)
    assert (unknown.memory_bytes, unknown.flop_per_s) == (10, UNKNOWN_GPU.flop_per_s)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=5))
def test_sum_of_ranges_is_a_range(parts: list[tuple[float, float]]) -> None:
    assert is_range(sum_ranges(Range(min(part), max(part)) for part in parts))


# --- memory and exports ---


def make_needs(batch: int, tokens: int, model: ModelShape = GEMMA, trainer_type: str = "sft", accumulation: int = 1) -> TrainingNeeds:
    rows = LongestRows((tokens,) * batch * accumulation, (tokens,) * batch * accumulation)
    training = TrainingShape(trainer_type, "LoRA", batch, tokens, accumulation)
    return TrainingNeeds(model, replace(training, batch=rows.largest_batch(batch)), rows)


@given(st.integers(1, 32), st.integers(8, 4096), st.floats(1e8, 1e12))
def test_plan_keeps_the_rows_of_a_step_and_fits_if_it_says_so(batch: int, tokens: int, available: float) -> None:
    needs = make_needs(batch, tokens)
    fit, plan = find_fitting_plan(needs, available, chooses_batch=False)
    assert plan.batch_size * plan.gradient_accumulation_steps == batch
    assert (needs.estimate(plan).peak < available) == (fit != "does_not_fit")


def test_memory_that_shrinks_takes_checkpointing_then_smaller_batches_then_does_not_fit() -> None:
    needs = make_needs(16, 2048)
    fits = [find_fitting_plan(needs, size * 1e9, chooses_batch=False)[0] for size in (200, 30, 7, 1)]
    assert fits == ["fits", "fits_with_gradient_checkpointing", "fits_with_smaller_batch", "does_not_fit"]


@given(st.integers(1, 16), st.integers(8, 2048))
def test_memory_grows_with_rows_and_length(batch: int, tokens: int) -> None:
    def peak(rows: int, length: int) -> float:
        return make_needs(rows, length).estimate(PassPlan(rows, 1, gradient_checkpointing=False)).peak

    assert peak(batch, tokens) <= peak(batch + 1, tokens)
    assert peak(batch, tokens) <= peak(batch, tokens + 1)


EXPORTS = ExportPlan(("adapter", "merged", "gguf", "lora_gguf"), ("q8_0", "q4_k_m", "none"), 2, 1_000_000)


def test_every_export_has_its_size() -> None:
    sizes = {each.name: each.size_bytes for each in plan_artifacts(LLAMA, EXPORTS)}
    assert list(sizes) == ["adapter", "merged", "gguf-q8_0", "gguf-q4_k_m", "gguf-none", "lora-gguf"]
    assert sizes["lora-gguf"] < sizes["adapter"] < sizes["gguf-q4_k_m"] < sizes["gguf-q8_0"] < sizes["gguf-none"]
    assert sizes["gguf-q8_0"] == pytest.approx(8.54e9, rel=0.03)  # as published on the Hub
    assert sizes["gguf-q4_k_m"] == pytest.approx(4.92e9, rel=0.12)


def test_quantized_embeddings_of_a_small_model_keep_eight_bits() -> None:
    gemma: ModelShape = find_known_shape("gemma-3-270m")  # type: ignore[assignment]
    assert estimate_gguf_bytes(gemma, "q4_k_m", 2) > gemma.parameters * 6.5 / 8


def test_onnx_takes_main_memory_and_has_a_limit() -> None:
    plan = ExportPlan(("onnx",), (), 2, 0)
    on_gpu, on_cpu = (estimate_export_memory(GEMMA, plan, on_gpu=on_gpu) for on_gpu in (True, False))
    assert on_gpu.host == pytest.approx(20 * GEMMA.parameters)
    assert (on_cpu.device, on_cpu.host) == (on_gpu.host, 0)
    assert explain_impossible_export(GEMMA, plan) is None
    assert "1.5 billion parameters" in (explain_impossible_export(LLAMA, plan) or "")


def test_adapter_alone_needs_no_memory_for_the_whole_model() -> None:
    plan = ExportPlan(("adapter",), (), 2, 1000)
    assert estimate_export_memory(GEMMA, plan, on_gpu=True).device == 0


# --- prices ---


def test_billed_time_is_rounded_up_and_at_least_the_minimum() -> None:
    price = Price(3600.0, "a list", "2026-11-30", billing_step_s=10.0, min_billed_s=60.0)
    assert [bill_usd(price, seconds) for seconds in (0, 1, 61, 70)] == [0, 60, 70, 70]


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.sampled_from(list(PRICES.values())))
def test_price_is_a_range_of_the_times(first: float, second: float, price: Price) -> None:
    assert is_range(estimate_usd(price, Range(min(first, second), max(first, second))))
    assert estimate_usd(price, NOTHING) == NOTHING
