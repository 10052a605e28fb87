"""Packed rows are computed as if each were alone, in every architecture that may pack; the others are refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample
from jobs.llm.loss import ChunkedLmHeadLoss, collate
from jobs.llm.packing import MEASURED_MODEL_TYPES, measure_leak, require_separate_rows
from jobs.runtime.errors import JobFailed
from tests.jobs.conftest import FinishedTraining, load_trainer, make_context, make_spec
from tests.tiny_models import ARCHITECTURES, build_tiny_model

REFUSED = {"qwen3_5": "linear_attention", "lfm2": "conv", "gpt_oss": "does not see where a row begins"}
PACKABLE = sorted(ARCHITECTURES.keys() - REFUSED.keys())
MAX_ROUNDING = 1e-6  # standard deviations of the logits, in float32
Train = Callable[..., FinishedTraining]


@pytest.fixture(scope="module")
def load_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Loads the tiny model of an architecture, in float32."""
    root = tmp_path_factory.mktemp("tiny")

    def load(name: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(build_tiny_model(name, root / name), dtype=torch.float32)

    return load


def make_rows(vocab_size: int) -> list[TokenizedExample]:
    """Three rows of different lengths, with labels on their second halves."""
    rows: list[TokenizedExample] = []
    for seed, length in enumerate((9, 21, 14)):
        ids = [(37 * n + 101 * seed + n * n) % vocab_size for n in range(length)]
        rows.append(TokenizedExample(ids, [IGNORE_INDEX] * (length // 2) + ids[length // 2 :], "", length // 2))
    return rows


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_row_gets_its_own_logits_and_gradients(load_tiny: Callable[[str], Any], name: str) -> None:
    model = load_tiny(name)
    assert model.config.model_type in MEASURED_MODEL_TYPES
    assert measure_leak(model.eval()) < MAX_ROUNDING
    rows = make_rows(model.config.vocab_size)
    labels = sum(label != IGNORE_INDEX for row in rows for label in row.labels)
    loss = ChunkedLmHeadLoss(model)

    def compute_gradients(*batches: dict[str, Any]) -> dict[str, Any]:
        model.zero_grad()
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key not in ("labels", "non_padding_tokens")}
            loss.compute_loss(model, inputs, batch["labels"], divisor=labels).backward()
        return {parameter: weight.grad.clone() for parameter, weight in model.named_parameters() if weight.grad is not None}

    packed = compute_gradients(collate([rows], pad_id=0))
    alone = compute_gradients(*(collate([[row]], pad_id=0) for row in rows))
    assert packed.keys() == alone.keys()
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    for parameter, gradient in alone.items():
        assert float((packed[parameter] - gradient).abs().max()) < 1e-5 * largest, parameter


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_architecture_that_leaks_is_refused_before_training(store: Path, tmp_path: Path, name: str, reason: str) -> None:
    build_tiny_model(name, store / "pretrained_weights/huggingface/tiny" / name)
    spec = make_spec(store, base_model_id=f"tiny/{name}", hyperparameters={"packing": True})
    context = make_context(spec, tmp_path)
    with pytest.raises(JobFailed) as failed:
        load_trainer(spec)(spec.training_config, context)
    failure = failed.value.failure
    assert failure.code == "invalid_config"
    assert f"packing cannot be used with base model tiny/{name}" in failure.message
    assert reason in failure.message
    assert "set packing to false" in failure.hint
    assert "attn_implementation" not in context.state.decisions  # no model was loaded


@pytest.mark.parametrize("name", REFUSED)
def test_refused_architecture_really_leaks(load_tiny: Callable[[str], Any], name: str) -> None:
    model = load_tiny(name).train()
    assert measure_leak(model) > 0.2
    assert model.training
    with pytest.raises(JobFailed, match="does not separate packed rows"):
        require_separate_rows(model, f"tiny/{name}")


def test_unknown_architecture_is_measured() -> None:
    from transformers import BloomConfig, BloomForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32}
    blind = BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, **sizes))  # its mask ignores positions, and its config does not say so
    with pytest.raises(JobFailed, match="bloom does not separate packed rows: a row behind another one gets logits that differ"):
        require_separate_rows(blind, "some/bloom")
    separate = partial(GPTNeoXConfig, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    require_separate_rows(GPTNeoXForCausalLM(separate(**sizes)), "some/neox")


def test_measuring_changes_no_random_numbers() -> None:
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, vocab_size=64, hidden_size=32))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    measure_leak(model)
    assert torch.equal(torch.rand(2), expected)
