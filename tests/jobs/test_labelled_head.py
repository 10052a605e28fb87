"""The loss that is made some positions at a time is the one that is made at once, whatever the model and whatever is trained in it."""

from pathlib import Path
from typing import Any

import pytest

from jobs.data.render import NO_LABEL, render
from jobs.trainers import likelihood
from jobs.trainers.likelihood import LabelledHead, collate, labelled_logits
from jobs.trainers.sft import blocks_of
from jobs.turn_tokens import train_few_rows_only
from tests.jobs.conftest import messages
from tests.jobs.test_turn_tokens import a_tuned_model

ONE_POSITION = 1  # byte: a part has one position at least


@pytest.fixture(scope="module")
def batch(tokenizer: Any) -> dict[str, Any]:
    """Blocks of packed rows, and padding."""
    found = collate(blocks_of(render(iter(messages(7)), "messages", tokenizer, 128).rows, 96), 0)
    found.pop("real_tokens")
    return found


def whole_model(base: Path, dtype: str = "float32") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()


def split(batch: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    return {name: part for name, part in batch.items() if name != "labels"}, batch["labels"]


def at_once(model: Any, batch: dict[str, Any], divisor: float) -> Any:
    import torch

    logits, wanted = labelled_logits(model, *split(batch))
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / divisor


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def assert_same_lesson(model: Any, batch: dict[str, Any], divisor: float = 7.0) -> LabelledHead:
    """Loss and every gradient, twice: the first batch is looked at more closely."""
    import torch

    expected = at_once(model, batch, divisor)
    slopes = gradients(model, expected)
    head = LabelledHead(model)
    for _ in range(2):
        loss = head.loss(model, *split(batch), divisor)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        found = gradients(model, loss)
        assert found.keys() == slopes.keys()
        for name, slope in found.items():
            largest = float(slopes[name].abs().max())
            torch.testing.assert_close(slope, slopes[name], rtol=1e-4, atol=1e-5 * largest, msg=name)
    return head


def count_positions(model: Any) -> list[int]:
    """How many positions go into the head, call by call."""
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, states, __: seen.append(states[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("part_bytes", [ONE_POSITION, 3 * 4 * 1024, 1 << 20], ids=["one", "some", "all"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "softcapped"])
def test_all_weights_learn_the_same(
    base: Path, batch: dict[str, Any], part_bytes: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(likelihood.PART_BYTES, "cpu", part_bytes)
    model = whole_model(base)
    model.config.final_logit_softcapping = softcap
    assert_same_lesson(model, batch)


def test_an_adapter_and_trained_turn_tokens_learn_the_same(base: Path, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(likelihood.PART_BYTES, "cpu", ONE_POSITION)
    model = a_tuned_model(base)
    train_few_rows_only(model)
    assert_same_lesson(model, batch)
    assert any("trainable_tokens_delta" in name for name, part in model.named_parameters() if part.grad is not None)


def test_the_head_sees_labelled_positions_only_and_never_all_at_once(
    base: Path, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(likelihood.PART_BYTES, "cpu", 4 * 4 * 1024)
    model = whole_model(base)
    head = LabelledHead(model)
    head.loss(model, *split(batch))
    seen = count_positions(model)
    head.loss(model, *split(batch))
    labelled = int((batch["labels"][:, 1:] != NO_LABEL).sum())
    assert max(seen) <= 4
    assert sum(seen) == labelled + 1  # one more is the model's own
    assert labelled < batch["labels"].numel() / 2


def test_without_gradients_the_loss_is_the_same(base: Path, batch: dict[str, Any]) -> None:
    import torch

    model = whole_model(base)
    head = LabelledHead(model)
    with torch.no_grad():
        loss = head.loss(model, *split(batch), 3.0)
        assert loss.item() == pytest.approx(at_once(model, batch, 3.0).item(), rel=1e-6)
    assert not loss.requires_grad


def test_the_divisor_is_the_number_of_labels_when_none_is_given(base: Path, batch: dict[str, Any]) -> None:
    model = whole_model(base)
    labelled = int((batch["labels"][:, 1:] != NO_LABEL).sum())
    assert LabelledHead(model).loss(model, *split(batch)).item() == pytest.approx(at_once(model, batch, labelled).item(), rel=1e-6)


def a_model_that_scales_its_logits() -> Any:
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


def test_a_model_that_scales_its_logits_keeps_its_own(batch: dict[str, Any]) -> None:
    assert_same_lesson(a_model_that_scales_its_logits(), batch)


def test_a_model_that_scales_its_logits_is_found_out_by_a_batch_that_teaches_nothing(batch: dict[str, Any]) -> None:
    model = a_model_that_scales_its_logits()
    inputs, labels = split(batch)
    head = LabelledHead(model)
    assert head.loss(model, inputs, labels.new_full(labels.shape, NO_LABEL), 7.0).item() == 0
    assert head.loss(model, inputs, labels, 7.0).item() == pytest.approx(at_once(model, batch, 7.0).item(), rel=1e-5)


def test_the_model_answers_as_ever_outside_the_loss(base: Path, batch: dict[str, Any]) -> None:
    import torch

    model, untouched = whole_model(base), whole_model(base)
    head = LabelledHead(model)
    head.loss(model, *split(batch))
    inputs, _ = split(batch)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, untouched(**inputs).logits, rtol=0, atol=0)


def test_a_forward_that_failed_leaves_nothing_behind(base: Path, batch: dict[str, Any]) -> None:
    import torch

    model = whole_model(base)
    head = LabelledHead(model)
    inputs, labels = split(batch)
    with pytest.raises(IndexError):
        head.loss(model, inputs | {"input_ids": inputs["input_ids"] + 10_000}, labels)
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == labels.shape
    assert head.loss(model, inputs, labels, 7.0).item() == pytest.approx(at_once(model, batch, 7.0).item(), rel=1e-6)


def test_weights_in_bf16_are_rounded_no_more_than_at_once(base: Path, batch: dict[str, Any]) -> None:
    model = whole_model(base, "bfloat16")
    expected = at_once(model, batch, 7.0)
    slopes = gradients(model, expected)
    found = gradients(model, LabelledHead(model).loss(model, *split(batch), 7.0))
    for name, slope in found.items():
        assert float((slope - slopes[name]).float().norm()) <= 0.02 * float(slopes[name].float().norm()), name


def test_a_compiled_model_keeps_its_layers_in_one_graph(base: Path, batch: dict[str, Any]) -> None:
    import torch

    sizes: list[int] = []

    def as_it_is(graph: Any, _: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    model = whole_model(base)
    expected = at_once(model, batch, 7.0)
    compiled: Any = torch.compile(model, backend=as_it_is)
    torch._dynamo.reset()
    assert LabelledHead(model).loss(compiled, *split(batch), 7.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert max(sizes) > 0.95 * sum(sizes)  # what is left over is the head and the soft cap of one position
