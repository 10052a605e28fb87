"""The loss computed in chunks equals the loss computed at once, for every kind of model and trained weights."""

from pathlib import Path
from typing import Any

import pytest

from jobs.llm import loss as loss_module
from jobs.llm.data.blocks import pack_rows
from jobs.llm.data.tokenize import IGNORE_INDEX, tokenize_split
from jobs.llm.loss import ChunkedLmHeadLoss, collate, compute_labeled_logits
from jobs.llm.trainable_tokens import patch_trainable_token_embedding
from tests.jobs.conftest import make_row_tokenizer, messages
from tests.jobs.test_trainable_tokens import make_tuned_model

ONE_POSITION = 1  # byte: a chunk has at least one position


@pytest.fixture(scope="module")
def batch(tokenizer: Any) -> dict[str, Any]:
    """Packed rows with padding."""
    packed = collate(list(pack_rows(tokenize_split(iter(messages(7)), "messages", make_row_tokenizer(tokenizer), 128).rows, 96)), 0)
    packed.pop("non_padding_tokens")
    return packed


def load_model(base: Path, dtype: str = "float32") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()


def split_labels(batch: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    return {name: part for name, part in batch.items() if name != "labels"}, batch["labels"]


def compute_full_loss(model: Any, batch: dict[str, Any], divisor: float) -> Any:
    import torch

    logits, labels = compute_labeled_logits(model, *split_labels(batch))
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / divisor


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_loss_and_gradients(model: Any, batch: dict[str, Any], divisor: float = 7.0) -> ChunkedLmHeadLoss:
    """Compare the loss and all gradients with the full loss in two passes; the first pass also probes the model."""
    import torch

    expected = compute_full_loss(model, batch, divisor)
    expected_gradients = gradients(model, expected)
    head = ChunkedLmHeadLoss(model)
    for _ in range(2):
        loss = head.compute_loss(model, *split_labels(batch), divisor)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        actual_gradients = gradients(model, loss)
        assert actual_gradients.keys() == expected_gradients.keys()
        for name, gradient in actual_gradients.items():
            largest = float(expected_gradients[name].abs().max())
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5 * largest, msg=name)
    return head


def count_positions(model: Any) -> list[int]:
    """Records the number of positions in each call of the head."""
    counts: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, states, __: counts.append(states[0].shape[:-1].numel()))
    return counts


@pytest.mark.parametrize("chunk_bytes", [ONE_POSITION, 3 * 4 * 1024, 1 << 20], ids=["one", "some", "all"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "softcapped"])
def test_all_weights_get_same_gradients(
    base: Path, batch: dict[str, Any], chunk_bytes: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_module.LOGITS_CHUNK_BYTES, "cpu", chunk_bytes)
    model = load_model(base)
    model.config.final_logit_softcapping = softcap
    assert_same_loss_and_gradients(model, batch)


def test_adapter_and_token_embeddings_get_same_gradients(base: Path, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.LOGITS_CHUNK_BYTES, "cpu", ONE_POSITION)
    model = make_tuned_model(base)
    patch_trainable_token_embedding(model)
    assert_same_loss_and_gradients(model, batch)
    assert any("trainable_tokens_delta" in name for name, part in model.named_parameters() if part.grad is not None)


def test_head_only_sees_labeled_positions_in_chunks(base: Path, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.LOGITS_CHUNK_BYTES, "cpu", 4 * 4 * 1024)
    model = load_model(base)
    head = ChunkedLmHeadLoss(model)
    head.compute_loss(model, *split_labels(batch))
    counts = count_positions(model)
    head.compute_loss(model, *split_labels(batch))
    labeled = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    assert max(counts) <= 4
    assert sum(counts) == labeled + 1  # and the probe
    assert labeled < batch["labels"].numel() / 2


def test_loss_is_the_same_without_gradients(base: Path, batch: dict[str, Any]) -> None:
    import torch

    model = load_model(base)
    head = ChunkedLmHeadLoss(model)
    with torch.no_grad():
        loss = head.compute_loss(model, *split_labels(batch), 3.0)
        assert loss.item() == pytest.approx(compute_full_loss(model, batch, 3.0).item(), rel=1e-6)
    assert not loss.requires_grad


def test_default_divisor_is_number_of_labels(base: Path, batch: dict[str, Any]) -> None:
    model = load_model(base)
    labeled = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    assert ChunkedLmHeadLoss(model).compute_loss(model, *split_labels(batch)).item() == pytest.approx(
        compute_full_loss(model, batch, labeled).item(), rel=1e-6
    )


def make_model_with_logit_scale() -> Any:
    import torch
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=1100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return CohereForCausalLM(config).eval()


def test_logit_scale_of_model_is_kept(batch: dict[str, Any]) -> None:
    assert_same_loss_and_gradients(make_model_with_logit_scale(), batch)


def test_logit_scale_is_detected_from_batch_without_labels(batch: dict[str, Any]) -> None:
    model = make_model_with_logit_scale()
    inputs, labels = split_labels(batch)
    head = ChunkedLmHeadLoss(model)
    assert head.compute_loss(model, inputs, labels.new_full(labels.shape, IGNORE_INDEX), 7.0).item() == 0
    assert head.compute_loss(model, inputs, labels, 7.0).item() == pytest.approx(compute_full_loss(model, batch, 7.0).item(), rel=1e-5)


def test_model_output_is_unchanged_outside_the_loss(base: Path, batch: dict[str, Any]) -> None:
    import torch

    model, untouched = load_model(base), load_model(base)
    head = ChunkedLmHeadLoss(model)
    head.compute_loss(model, *split_labels(batch))
    inputs, _ = split_labels(batch)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, untouched(**inputs).logits, rtol=0, atol=0)


def test_failed_forward_leaves_no_state_behind(base: Path, batch: dict[str, Any]) -> None:
    import torch

    model = load_model(base)
    head = ChunkedLmHeadLoss(model)
    inputs, labels = split_labels(batch)
    with pytest.raises(IndexError):
        head.compute_loss(model, inputs | {"input_ids": inputs["input_ids"] + 10_000}, labels)
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == labels.shape
    assert head.compute_loss(model, inputs, labels, 7.0).item() == pytest.approx(compute_full_loss(model, batch, 7.0).item(), rel=1e-6)


def test_bf16_gradients_are_close_to_full_loss(base: Path, batch: dict[str, Any]) -> None:
    model = load_model(base, "bfloat16")
    expected = compute_full_loss(model, batch, 7.0)
    expected_gradients = gradients(model, expected)
    actual_gradients = gradients(model, ChunkedLmHeadLoss(model).compute_loss(model, *split_labels(batch), 7.0))
    for name, gradient in actual_gradients.items():
        difference = (gradient - expected_gradients[name]).float().norm()
        assert float(difference) <= 0.02 * float(expected_gradients[name].float().norm()), name


def test_compiled_model_keeps_layers_in_one_graph(base: Path, batch: dict[str, Any]) -> None:
    import torch

    sizes: list[int] = []

    def count_nodes(graph: Any, _: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    model = load_model(base)
    expected = compute_full_loss(model, batch, 7.0)
    compiled: Any = torch.compile(model, backend=count_nodes)
    torch._dynamo.reset()
    assert ChunkedLmHeadLoss(model).compute_loss(compiled, *split_labels(batch), 7.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert max(sizes) > 0.95 * sum(sizes)  # the rest is the head and the soft cap of the probe
