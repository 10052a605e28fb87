"""Estimates of memory, time, disk and price: unchanged numbers, and one source for each."""

import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from schema.estimate.disk import estimate_checkpoint_bytes, estimate_save_s
from schema.estimate.llm import (
    COMPILE_S,
    ONNX_MAX_PARAMETERS,
    estimate_comparison_bytes,
    estimate_compile_saving_s,
    estimate_training_s,
    float32_weights_bytes,
    limit_generation_batch,
)
from schema.estimate.llm_memory import TrainingShape, usable_memory_bytes
from schema.estimate.llm_shapes import read_model_shape
from schema.estimate.prices import PRICES, find_price

SOURCE = Path(__file__).parents[2]

MODELS = {
    "gemma-270m": ({"hidden_size": 640, "num_hidden_layers": 18, "vocab_size": 262_144}, 536_223_056),
    "gemma-1b": ({"hidden_size": 1152, "num_hidden_layers": 26, "vocab_size": 262_144}, 1_999_811_208),
    "gemma-4b": ({"text_config": {"hidden_size": 2560, "num_hidden_layers": 34, "vocab_size": 262_208}}, 8_600_158_944),
    "llama-8b": ({"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128_256}, 16_060_522_496),
    "without sizes": ({}, 1_000_000_001),
}

# Computed by the code that this function replaced (jobs/llm/hardware.py).
# model, trainer type, method, batch_size, max_seq_length, gradient accumulation, s of 100 steps
BEFORE = [
    ("gemma-270m", "sft", "LoRA", 2, 512, 4, 10.98184818688),
    ("gemma-1b", "sft", "Full", 8, 4096, 4, 1965.89440991232),
    ("gemma-1b", "orpo", "QLoRA", 1, 1024, 8, 81.91226707968),
    ("gemma-4b", "reward", "LoRA", 8, 4096, 4, 5636.20016553984),
    ("llama-8b", "grpo", "LoRA", 8, 4096, 1, 2631.35600574464),
    ("without sizes", "sft", "LoRA", 2, 512, 4, 20.48000002048),
]


@pytest.mark.parametrize(("model", "trainer_type", "method", "batch", "length", "accumulation", "duration_s"), BEFORE)
def test_training_time_is_unchanged(
    model: str, trainer_type: str, method: str, batch: int, length: int, accumulation: int, duration_s: float
) -> None:
    training = TrainingShape(trainer_type, method, batch, length, accumulation)
    assert estimate_training_s(read_model_shape(*MODELS[model]), training, 100) == duration_s


def test_other_rules_are_unchanged() -> None:
    assert usable_memory_bytes(24e9) == 24e9 * 0.8
    assert (estimate_compile_saving_s(2000.0), COMPILE_S) == (300.0, 300.0)
    assert estimate_checkpoint_bytes(1_000_000) == 3_000_000
    assert estimate_save_s(500_000_000) == 10.0
    assert ONNX_MAX_PARAMETERS == 1_500_000_000
    assert float32_weights_bytes(100, stored_in_float32=True) == 100
    assert float32_weights_bytes(100, stored_in_float32=False) == 200
    assert estimate_comparison_bytes(200) == 300.0


@pytest.mark.parametrize(("train_batch", "longest", "expected"), [(1, 20, 64), (1, 4000, 8), (1, 1000, 15), (64, 20, 64), (16, 4000, 16)])
def test_generation_batch_is_limited_by_prompts_and_tokens(train_batch: int, longest: int, expected: int) -> None:
    assert limit_generation_batch(train_batch, longest, 64) == expected


def test_estimates_need_only_the_standard_library() -> None:
    modules = ", ".join(f"schema.estimate.{path.stem}" for path in (SOURCE / "schema/estimate").glob("*.py") if path.stem != "__init__")
    code = f"import sys; before = set(sys.modules); import {modules}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "schema" in loaded
    assert loaded <= {"schema", *sys.stdlib_module_names}


def test_docs_state_the_prices_of_the_table() -> None:
    section = (SOURCE / "docs/costs.md").read_text().partition("## An hour of training")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| ([^|]+) \|$", section, re.MULTILINE)
    stated = {profile: float(known[1]) for profile, total in rows if (known := re.fullmatch(r"\*\*\$([\d.]+)\*\*", total))}
    assert {profile for profile, _ in rows} == {"l4", "cpu", "rtx-pro-6000"}
    assert stated == {profile: round(price.usd_per_hour, 2) for (launcher, profile), price in PRICES.items() if launcher == "cloud-run"}
    assert stated == {"l4": 1.42, "cpu": 0.75}


def test_unknown_price_is_not_guessed() -> None:
    assert find_price("cloud-run", "rtx-pro-6000") is None
    assert find_price("local", "cpu") is None
    assert find_price("cloud-run", "l4") == PRICES["cloud-run", "l4"]


def test_every_price_has_a_source_and_a_date() -> None:
    for price in PRICES.values():
        assert price.source
        assert date.fromisoformat(price.as_of).isoformat() == price.as_of
